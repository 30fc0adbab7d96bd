"""Typed configs: frozen dataclasses that are replaced, never mutated. Imports no jax and no numpy."""

from embedjax.config.data import Data, File, Functions, Set, Source, Tfds
from embedjax.config.losses import InBatch, Loss, MultipleNegatives, Siglip
from embedjax.config.model import Architecture, Bert, Dense, DistilBert, Model, ModernBert, Mpnet, Roberta, Tower, Transformer
from embedjax.config.run import Checkpoint, Config, Distributed, Evaluate, Export, Group, Mesh, Optim, Retrieval, Sts, Task

__all__ = [
    "Architecture",
    "Bert",
    "Checkpoint",
    "Config",
    "Data",
    "Dense",
    "DistilBert",
    "Distributed",
    "Evaluate",
    "Export",
    "File",
    "Functions",
    "Group",
    "InBatch",
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
    "Siglip",
    "Source",
    "Sts",
    "Task",
    "Tfds",
    "Tower",
    "Transformer",
]
