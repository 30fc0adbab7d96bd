"""Losses of triplets: given, or found among the labelled texts or the pairs of the global batch; and what spreads texts out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from embedjax.config import (
    BatchAll,
    BatchHard,
    BatchHardSoftMargin,
    BatchSemiHard,
    GlobalOrthogonal,
    MegaBatchMargin,
    Mined,
    Model,
    Set,
    Triplet,
)
from embedjax.config.errors import ConfigError
from embedjax.losses import triplet
from embedjax.losses.compose import global_orthogonal
from embedjax.models.embedder import Embedder
from embedjax.objective.encoding import texts
from embedjax.objective.kinds import Objective


def given(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Triplets in the columns, or negatives that are other rows' positives."""
    loss = task.loss
    assert isinstance(loss, Triplet | MegaBatchMargin)

    def value(params, outputs, targets, key):
        anchor, positive = outputs["anchor"], outputs["positive"][:, 0]
        if isinstance(loss, MegaBatchMargin):
            return triplet.mega_batch_margin(anchor, positive, loss.positive_margin, loss.negative_margin), {}
        return triplet.triplet(anchor, positive, outputs["positive"][:, 1:], loss.distance, loss.margin), {}

    return Objective(texts(task, model, embedders), lambda constants, columns: None, value)


def mined(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Triplets among labelled texts. Raises ConfigError for rows of several labels."""
    loss, find = task.loss, FIND[type(task.loss)]
    assert isinstance(loss, Mined)

    def value(params, outputs, targets, key):
        if targets.ndim > 1:
            raise ConfigError(f"set {task.name!r}: {type(loss).__name__} needs one label a row, not a list")
        return find(loss, triplet.distances(outputs["anchor"], loss.distance), targets), {}

    return Objective(texts(task, model, embedders), lambda constants, columns: columns["labels"], value)


# `(loss, distances, labels) -> value`
FIND: dict[type, Callable[..., Any]] = {
    BatchAll: lambda loss, d, label: triplet.batch_all(d, label, loss.margin),
    BatchHard: lambda loss, d, label: triplet.batch_hard(d, label, loss.margin),
    BatchHardSoftMargin: lambda loss, d, label: triplet.batch_hard_soft_margin(d, label),
    BatchSemiHard: lambda loss, d, label: triplet.batch_semi_hard(d, label, loss.margin),
}


def spread(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Global orthogonal regularisation of every column of texts."""
    loss, similarity = task.loss, model.similarity
    assert isinstance(loss, GlobalOrthogonal)

    def value(params, outputs, targets, key):
        columns = [outputs["anchor"][None]]
        columns += [jnp.moveaxis(outputs["positive"], 1, 0)] if "positive" in outputs else []
        terms = [global_orthogonal(column, similarity) for column in columns]
        mean, second = (jnp.concatenate(each) for each in zip(*terms, strict=True))
        gather = jnp.mean if loss.aggregation == "mean" else jnp.sum
        return loss.mean_weight * gather(mean) + loss.second_moment_weight * gather(second), {}

    return Objective(texts(task, model, embedders), lambda constants, columns: None, value)
