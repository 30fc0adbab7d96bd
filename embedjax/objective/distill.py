"""Distillation: the teacher's vectors or scores from the set's columns, or by a frozen tower in the same step."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.sharding import Mesh

from embedjax.config import KlDistillation, MarginMse, Model, Set, Taught, VectorDistillation
from embedjax.config.errors import ConfigError
from embedjax.losses import distill
from embedjax.models.embedder import Embedder
from embedjax.objective.encoding import frozen_tower, texts
from embedjax.objective.kinds import Objective


def vectors(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Raises ConfigError when the teacher's vectors have another width than the student's."""
    loss = task.loss
    assert isinstance(loss, VectorDistillation)
    columns = ("anchor", *(("positive",) if {"positive", "negative"} & set(task.names) else ()))
    width = embedders[model.tower_of("anchor")].width
    if len({embedders[model.tower_of(column)].width for column in columns}) > 1:
        raise ConfigError(f"set {task.name!r}: the teacher's vectors cannot fit towers of two widths")
    if loss.teacher:
        teach = frozen_tower("teacher", loss.teacher, columns, model, embedders)
        targets = lambda constants, columns: _texts(teach(constants, columns))
    else:
        targets = lambda constants, columns: columns["vectors"][:, None]

    def value(params, outputs, targets, key):
        if targets.shape[-1] != width:
            raise ConfigError(
                f"set {task.name!r}: the teacher's vectors have {targets.shape[-1]} numbers, the student's {width}; "
                f"end the student's `dense` with Dense(features={targets.shape[-1]})"
            )
        student = _texts(outputs)
        return distill.vectors(student, targets[..., : student.shape[-1]], loss.distance), {}

    return Objective(texts(task, model, embedders), targets, value)


def scores(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Raises ConfigError when the number of score columns does not fit that of the texts."""
    loss, similarity = task.loss, model.similarity
    assert isinstance(loss, MarginMse | KlDistillation)
    targets = _taught_scores(task, loss, model, embedders) if loss.teacher else _stored_scores(task)

    def value(params, outputs, targets, key):
        student = distill.scores(outputs["anchor"], outputs["positive"], similarity)
        if isinstance(loss, MarginMse):
            return distill.margin_mse(student, targets), {}
        return distill.kl(student, targets, loss.temperature, loss.teacher_temperature), {}

    return Objective(texts(task, model, embedders), targets, value)


def _stored_scores(task: Set) -> Callable:
    count = lambda start: sum(name.split("_")[0] == start for name in task.names)
    negatives, found = count("negative"), count("score")
    wanted = (negatives + 1, negatives) if isinstance(task.loss, MarginMse) else (negatives + 1,)
    if found not in wanted:
        raise ConfigError(
            f"set {task.name!r}: {type(task.loss).__name__} needs {' or '.join(map(str, wanted))} score columns for "
            f"{negatives} negatives; it has {found}"
        )
    return lambda constants, columns: columns["scores"].reshape(columns["scores"].shape[0], -1)


def _taught_scores(task: Set, loss: Taught, model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    teach = frozen_tower("teacher", loss.teacher, ("anchor", "positive"), model, embedders)
    similarity = model.towers[loss.teacher].similarity or "cosine"

    def targets(constants, columns):
        outputs = teach(constants, columns)
        return distill.scores(outputs["anchor"], outputs["positive"], similarity)

    return targets


def _texts(outputs: Mapping):
    """[B 1+C E]: the anchor and the documents of each row."""
    return jnp.concatenate([outputs["anchor"][:, None], *([outputs["positive"]] if "positive" in outputs else [])], 1)
