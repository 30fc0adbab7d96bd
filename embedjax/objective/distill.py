"""Distillation: the teacher's vectors or scores from the set's columns, or by a frozen tower in the same step."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from embedjax.config import ContrastiveDistillation, KlDistillation, MarginMse, Model, Set, Taught, VectorDistillation
from embedjax.config.errors import ConfigError
from embedjax.losses import distill
from embedjax.losses.compose import vectors_prefix
from embedjax.models.embedder import Embedder
from embedjax.objective.encoding import frozen_towers, texts
from embedjax.objective.kinds import Objective
from embedjax.objective.wrapped import normalized_prefixes


def vectors(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """The student's vectors against a teacher's of the same texts, or a stored one against anchor and positive: hard negatives,
    which a sum's other losses may need, mean something else. Raises ConfigError when the widths differ."""
    loss = task.loss
    assert isinstance(loss, VectorDistillation)
    columns = ("anchor", *(("positive",) if {"positive", "negative"} & set(task.names) else ()))
    width = embedders[model.tower_of("anchor")].width
    if len({embedders[model.tower_of(column)].width for column in columns}) > 1:
        raise ConfigError(f"set {task.name!r}: the teacher's vectors cannot fit towers of two widths")
    if loss.teacher:
        targets = _teacher(task, loss, columns, model, embedders)
    else:
        targets = lambda constants, columns: {"anchor": columns["vectors"], "positive": columns["vectors"][:, None]}
    normalized = normalized_prefixes(task, model, embedders)

    def value(params, outputs, targets, key):
        if (found := targets["anchor"].shape[-1]) != width:
            raise ConfigError(
                f"set {task.name!r}: the teacher's vectors have {found} numbers, the student's {width}; "
                f"end the student's `dense` with Dense(features={found})"
            )
        student = {name: x if loss.teacher or name == "anchor" else x[:, :1] for name, x in outputs.items()}
        taught = {name: targets[name] for name in student}
        if (length := outputs["anchor"].shape[-1]) < width:
            taught = vectors_prefix(taught, length, normalized)
        return distill.vectors(_texts(student), _texts(taught), loss.distance), {}

    return Objective(texts(task, model, embedders), targets, value)


def scores(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Raises ConfigError when the number of score columns does not fit that of the texts."""
    loss = task.loss
    assert isinstance(loss, MarginMse | KlDistillation)
    similarity = loss.similarity or model.similarity
    targets = _taught_scores(task, loss, model, embedders) if loss.teacher else stored_scores(task)

    def value(params, outputs, targets, key):
        return judged(loss, distill.scores(outputs["anchor"], outputs["positive"], similarity), targets), {}

    return Objective(texts(task, model, embedders), targets, value)


def judged(loss: MarginMse | KlDistillation, student: Float[Array, "B C"], teacher: Float[Array, "B S"]) -> Float[Array, ""]:
    """The loss of a student's scores of each row's own documents."""
    if isinstance(loss, MarginMse):
        return distill.margin_mse(student, teacher)
    student = distill.spread(student) if loss.min_max else student
    return distill.kl(student, teacher, loss.temperature, loss.teacher_temperature)


def stored_scores(task: Set) -> Callable:
    """`(constants, columns) -> [B S]`: the teacher's scores in the set's columns. Raises ConfigError for a number of them that
    does not fit that of the texts."""
    if task.mine:
        raise ConfigError(
            f"set {task.name!r} has stored scores and `mine`: they are not of the negatives that are mined; name a `teacher`, "
            "a frozen tower, which scores these"
        )
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
    teach = _teacher(task, loss, ("anchor", "positive"), model, embedders)
    similarity = model.towers[loss.teacher].similarity or "cosine"

    def targets(constants, columns):
        outputs = teach(constants, columns)
        return distill.scores(outputs["anchor"], outputs["positive"], similarity)

    return targets


def contrastive(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """The student's scores of the whole batch against those of the teacher's towers. Raises ConfigError without a teacher."""
    loss = task.loss
    assert isinstance(loss, ContrastiveDistillation)
    if not loss.teacher:
        raise ConfigError(f"set {task.name!r}: ContrastiveDistillation needs a `teacher`, a frozen tower")
    teach = _teacher(task, loss, ("anchor", "positive"), model, embedders)
    kinds = model.similarity, model.towers[loss.teacher].similarity or "cosine"

    def value(params, outputs, targets, key):
        scale = jnp.exp(params["loss"]["scale"]) if loss.learn_scale else loss.scale
        teacher = targets["anchor"], targets["positive"]
        found = distill.contrastive(outputs["anchor"], outputs["positive"], teacher, scale, loss.teacher_scale, kinds)
        return found, {"scale": scale} if loss.learn_scale else {}

    return Objective(texts(task, model, embedders), teach, value)


def _teacher(task: Set, loss: Taught, columns: tuple[str, ...], model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    """`(constants, columns) -> outputs`: the teacher's vectors, of two towers where the loss names two. Raises ConfigError for
    two whose vectors cannot be compared with each other."""
    towers = {"anchor": loss.teacher, "positive": loss.document_teacher or loss.teacher}
    towers = {column: towers[column] for column in columns}
    teach = frozen_towers("teacher", towers, task, model, embedders)
    told = {name: (embedders[name].width, model.towers[name].similarity or "cosine") for name in towers.values()}
    if len(set(told.values())) > 1:
        raise ConfigError(
            f"set {task.name!r}: the teacher's towers are to be compared with each other, but have vectors of {told}"
        )
    return teach


def _texts(outputs: Mapping):
    """[B 1+C E]: the anchor and the documents of each row."""
    return jnp.concatenate([outputs["anchor"][:, None], *([outputs["positive"]] if "positive" in outputs else [])], 1)
