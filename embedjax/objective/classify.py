"""Losses of labelled rows: a class head over one text or a pair, and supervised contrastive.

A set's head is under its name in `params["loss"]`: {"kernel": [F C], "bias": [C]}.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from embedjax.config import ClassHead, ClassifyPair, Dense, Model, Set, SupCon
from embedjax.config.errors import ConfigError
from embedjax.losses import classify
from embedjax.models.classifier import scores
from embedjax.models.embedder import Embedder
from embedjax.models.heads import init_projections
from embedjax.objective.encoding import texts
from embedjax.objective.kinds import Objective

LOSSES = {"softmax": classify.cross_entropy, "sigmoid": classify.multi_label}


def class_head(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Cross-entropy of a linear head. Raises ConfigError for classes or weights that do not fit the set's labels."""
    loss, count = task.loss, classes(task)
    assert isinstance(loss, ClassHead)
    compare = functools.partial(LOSSES[loss.criterion], weights=loss.class_weights, smoothing=loss.label_smoothing)

    def value(params, outputs, labels, key):
        if labels.shape[1:] != ((count,) if loss.criterion == "sigmoid" else ()):
            kind = "a list of labels" if loss.criterion == "sigmoid" else "one label"
            raise ConfigError(f"set {task.name!r}: criterion {loss.criterion!r} needs {kind} a row")
        vectors = [outputs["anchor"]] + ([outputs["positive"][:, 0]] if isinstance(loss, ClassifyPair) else [])
        head = params["loss"][task.name]
        return compare(scores(head["kernel"], head["bias"], *vectors), labels)

    return Objective(texts(task, model, embedders), _labels, value)


def init_class_head(task: Set, model: Model, embedders: Mapping[str, Embedder], key: jax.Array) -> dict[str, Any]:
    """A linear layer as torch makes one: uniform in +-1 / sqrt(inputs)."""
    width = embedders[model.tower_of("anchor")].width
    return init_projections(key, (3 if isinstance(task.loss, ClassifyPair) else 1) * width, [Dense(classes(task))])["0"]


def classes(task: Set) -> int:
    """How many classes a set's head tells apart. Raises ConfigError when loss and labels disagree or neither says."""
    loss = task.loss
    assert isinstance(loss, ClassHead)
    count = loss.classes or len(task.labels)
    if count < (2 if loss.criterion == "softmax" else 1):
        raise ConfigError(f"set {task.name!r}: name its classes in `labels`, or their number in the loss's `classes`")
    for what, found in (("labels", task.labels), ("class_weights", loss.class_weights)):
        if found and len(found) != count:
            raise ConfigError(f"set {task.name!r} has {len(found)} {what} for {count} classes")
    return count


def sup_con(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Supervised contrastive over the anchors, and the positives if there are. Hard negatives, which a sum's other losses may
    need, have no label and count nowhere."""
    loss = task.loss
    assert isinstance(loss, SupCon)

    def value(params, outputs, labels, key):
        if labels.ndim > 1:
            raise ConfigError(f"set {task.name!r}: SupCon needs one label a row, not a list")
        views = [outputs["anchor"][:, None]] + ([outputs["positive"][:, :1]] if "positive" in task.columns else [])
        return classify.sup_con(jnp.concatenate(views, 1), labels, loss.scale)

    return Objective(texts(task, model, embedders), _labels, value)


def _labels(constants, columns):
    return columns["labels"]
