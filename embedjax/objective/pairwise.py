"""Losses of labelled pairs: how alike the anchor and its positive are told to be."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from embedjax.config import AnglE, Contrastive, CoSent, CosineRegression, Model, OnlineContrastive, Set
from embedjax.config.errors import ConfigError
from embedjax.config.losses.pairwise import Pairwise
from embedjax.losses import pairwise
from embedjax.models.embedder import Embedder
from embedjax.objective.encoding import texts
from embedjax.objective.kinds import Objective


def pair(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Of several scores a row, which a sum's other losses may need, the first is the positive's. Raises ConfigError for several
    without negatives, and for names of labels that are not two."""
    loss, similarity = task.loss, model.similarity
    assert isinstance(loss, Pairwise)
    compare, target = COMPARE[type(loss)], "scores" if "score" in loss.needs else "labels"
    several = sorted(name for name in task.columns if name.startswith("score_"))
    if several and "negative" not in task.columns:
        raise ConfigError(f"set {task.name!r}: {type(loss).__name__} takes one score a row, not {several[0]!r} too")
    if "label" in loss.needs and len(task.labels) not in (0, 2):
        raise ConfigError(f"set {task.name!r}: {type(loss).__name__} tells two labels apart, 0 and 1, not {len(task.labels)}")

    def value(params, outputs, targets, key):
        if targets.ndim > 1:
            raise ConfigError(f"set {task.name!r}: {type(loss).__name__} needs one label a row, not a list")
        return compare(loss, similarity, outputs["anchor"], outputs["positive"][:, 0], targets), {}

    def targets(constants, columns):
        found = columns[target]
        return found.reshape(found.shape[0], -1)[:, 0] if target == "scores" else found

    return Objective(texts(task, model, embedders), targets, value)


# `(loss, the towers' similarity, x, y, labels or scores) -> value`
COMPARE: dict[type[Pairwise], Callable[..., Any]] = {
    Contrastive: lambda loss, _, x, y, label: pairwise.contrastive(x, y, label, loss.distance, loss.margin),
    OnlineContrastive: lambda loss, _, x, y, label: pairwise.online_contrastive(x, y, label, loss.distance, loss.margin),
    CosineRegression: lambda loss, similarity, x, y, score: pairwise.regression(x, y, score, similarity),
    CoSent: lambda loss, similarity, x, y, score: pairwise.cosent(x, y, score, loss.scale, similarity),
    AnglE: lambda loss, _, x, y, score: pairwise.angle(x, y, score, loss.scale),
}
