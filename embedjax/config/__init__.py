"""Typed configs: frozen dataclasses that are replaced, never mutated. Imports no jax and no numpy."""

from embedjax.config.data import Data, File, Functions, Set, Source, Tfds
from embedjax.config.losses import Loss, MultipleNegatives
from embedjax.config.model import Architecture, Bert, Dense, DistilBert, Model, ModernBert, Mpnet, Roberta, Tower, Transformer
from embedjax.config.run import Checkpoint, Config, Evaluate, Export, Group, Mesh, Optim, Retrieval, Sts, Task

__all__ = [
    "Architecture",
    "Bert",
    "Checkpoint",
    "Config",
    "Data",
    "Dense",
    "DistilBert",
    "Evaluate",
    "Export",
    "File",
    "Functions",
    "Group",
    "Loss",
    "Mesh",
    "Model",
    "ModernBert",
    "Mpnet",
    "MultipleNegatives",
    "Optim",
    "Retrieval",
    "Roberta",
    "Set",
    "Source",
    "Sts",
    "Task",
    "Tfds",
    "Tower",
    "Transformer",
]
