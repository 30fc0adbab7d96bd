"""config -> the Objective of each data set: what is encoded, what is compared with, and the loss."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from embedjax.config import (
    AnglE,
    BatchAll,
    BatchHard,
    BatchHardSoftMargin,
    BatchSemiHard,
    Classify,
    ClassifyPair,
    Contrastive,
    ContrastiveDistillation,
    CoSent,
    CosineRegression,
    DenoisingAutoEncoder,
    GlobalOrthogonal,
    KlDistillation,
    Loss,
    MarginMse,
    MaskedLanguage,
    MegaBatchMargin,
    Model,
    MultipleNegatives,
    OnlineContrastive,
    Pooled,
    Set,
    Siglip,
    Sum,
    SupCon,
    Triplet,
    VectorDistillation,
)
from embedjax.config.errors import ConfigError
from embedjax.models.embedder import Embedder
from embedjax.objective import distill, late, triplet
from embedjax.objective.classify import class_head, init_class_head, sup_con
from embedjax.objective.encoding import require
from embedjax.objective.inbatch import first_values, in_batch
from embedjax.objective.kinds import Builder, Objective, bound, combine
from embedjax.objective.pairwise import pair
from embedjax.objective.tokens import denoising, denoising_head, masked_language, masked_language_head, resolve
from embedjax.objective.towers import held, plain
from embedjax.objective.wrapped import members, summed, wrapped

__all__ = ["HEADS", "OBJECTIVES", "Objective", "bound", "combine", "first_values", "loss_params", "make", "resolve"]

OBJECTIVES: dict[type[Loss], Builder] = {
    MultipleNegatives: in_batch,
    Siglip: in_batch,
    Contrastive: pair,
    OnlineContrastive: pair,
    CosineRegression: pair,
    CoSent: pair,
    AnglE: pair,
    Triplet: triplet.given,
    MegaBatchMargin: triplet.given,
    BatchAll: triplet.mined,
    BatchHard: triplet.mined,
    BatchHardSoftMargin: triplet.mined,
    BatchSemiHard: triplet.mined,
    VectorDistillation: distill.vectors,
    MarginMse: distill.scores,
    KlDistillation: distill.scores,
    ContrastiveDistillation: distill.contrastive,
    GlobalOrthogonal: triplet.spread,
    Classify: class_head,
    ClassifyPair: class_head,
    SupCon: sup_con,
    MaskedLanguage: masked_language,
    DenoisingAutoEncoder: denoising,
}

LATE: dict[type[Loss], Builder] = {
    MultipleNegatives: late.in_batch,
    Siglip: late.in_batch,
    MarginMse: late.scores,
    KlDistillation: late.scores,
}
"""Those of late interaction, whose texts have a vector a token."""

# `(task, model, embedders, key) -> parameters` of the losses that have a head of their own.
HEADS: dict[type[Loss], Callable[[Set, Model, Mapping[str, Embedder], jax.Array], dict[str, Any]]] = {
    Classify: init_class_head,
    ClassifyPair: init_class_head,
    MaskedLanguage: masked_language_head,
    DenoisingAutoEncoder: denoising_head,
}


def make(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """The objective of one data set, by the type of its loss. Raises ConfigError for columns, prefixes, layers, a guide or a
    teacher that do not fit."""
    if isinstance(task.loss, Pooled):
        require(task, task.loss.needs, task.loss.takes)
    return plain(_made(task, model, held(embedders, model), mesh), task, model)


def _made(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    if isinstance(task.loss, Sum):
        parts = [_made(each, model, embedders, mesh) for each in members(task)]
        return wrapped(summed(task, model, embedders, parts), task, model, embedders)
    builders = LATE if model.late else OBJECTIVES
    if type(task.loss) not in builders:
        known = ", ".join(kind.__name__ for kind in LATE)
        raise ConfigError(f"set {task.name!r}: {type(task.loss).__name__} is no loss of late interaction; known: {known}")
    return wrapped(builders[type(task.loss)](task, model, embedders, mesh), task, model, embedders)


def loss_params(task: Set, model: Model, embedders: Mapping[str, Embedder], key: jax.Array) -> dict[str, Any]:
    """Initial values of what the loss itself trains: a learned scale and bias under these names, shared by all sets, and a
    head under the name of the set."""
    first = first_values([task], model)
    found: dict[str, Any] = {name: jnp.float32(value) for name, value in first.items()}
    if "scale" in first:
        found["scale"] = jnp.log(found["scale"])
    for each in members(task) if isinstance(task.loss, Sum) else [task]:
        if type(each.loss) in HEADS:
            found[task.name] = HEADS[type(each.loss)](each, model, embedders, key)
    return found
