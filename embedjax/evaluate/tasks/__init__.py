"""Evaluation tasks -> metrics of a model. Reads its data once, encodes each text or picture once for all prefixes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh as DeviceMesh

from embedjax import config
from embedjax.config import Similarity, Task
from embedjax.config.errors import ConfigError
from embedjax.evaluate.tasks import bitext, classification, clustering, heads, pairs, reranking, retrieval, sts, zeroshot
from embedjax.evaluate.tasks.heads import HeadData
from embedjax.evaluate.tasks.retrieval import DEPTH, RetrievalData
from embedjax.evaluate.tasks.side import Side
from embedjax.load import Model

__all__ = ["DEPTH", "RetrievalData", "TaskData", "encoded", "evaluate", "prepare", "read"]


@runtime_checkable
class TaskData(Protocol):
    """A task whose data was read: texts or pictures, and what is made of their vectors."""

    @property
    def task(self) -> Any: ...

    @property
    def sides(self) -> Sequence[Side]: ...

    def scores(self, vectors: Sequence[Any], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """{METRIC: value} of the vectors of `sides`, whole or a prefix of them."""
        ...


READERS: dict[type, Callable[[Any], TaskData]] = {
    config.Sts: sts.read,
    config.Retrieval: retrieval.read,
    config.Reranking: reranking.read,
    config.PairClassification: pairs.read_pairs,
    config.TripletAccuracy: pairs.read_triplets,
    config.Classification: classification.read_probe,
    config.KnnClassification: classification.read_knn,
    config.ZeroShot: zeroshot.read,
    config.HeadAccuracy: heads.read,
    config.Clustering: clustering.read,
    config.BitextMining: bitext.read,
}


LATE = (config.Retrieval, config.Reranking, config.Sts, config.PairClassification, config.TripletAccuracy)
"""The tasks of late interaction, which compares texts and has no vector of one."""


def evaluate(
    model: Model,
    tasks: Sequence[Task | TaskData],
    *,
    mesh: DeviceMesh | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """{"NAME/METRIC": value} of all tasks, and {"NAME@64/METRIC": value} of the first 64 numbers where a task's `dims` ask for
    them. A training run calls `prepare` once and passes what it gives. `progress(what, done, total)` is called as texts are
    encoded.

    Raises DataError for data that cannot be used, ConfigError for dims beyond the model's, NonFiniteError for a model whose
    vectors are not finite.
    """
    found: dict[str, float] = {}
    for task in tasks:
        data = task if isinstance(task, TaskData) else read(task)
        check_late(data.task, model.config)
        data = data.of(model.heads, model.origin, model.config) if isinstance(data, HeadData) else data
        for side in data.sides:
            side.check(model, data.task.dims)
        whole = encoded(data, model, mesh, progress)
        for label, dim in zip(data.task.labels, (None, *data.task.dims), strict=True):
            vectors: list[Any] = [
                side.prefix(model, part, dim) if dim else part for side, part in zip(data.sides, whole, strict=True)
            ]
            scores = data.scores(vectors, model.config.similarity, mesh)
            found.update({f"{label}/{metric}": value for metric, value in scores.items()})
    return found


def check_late(task: Task, model: config.Model) -> None:
    """Raises ConfigError for a task that wants one vector a text, and a model of late interaction, which has one a token; and
    for a task that is about tokens, and a model of one vector a text."""
    if model.late and not isinstance(task, LATE):
        kinds = ", ".join(kind.__name__ for kind in LATE)
        raise ConfigError(f"task {task.name!r} is {type(task).__name__}; late interaction is scored by {kinds}")
    if not model.late and isinstance(task, config.Retrieval):
        wanted = {"pool": task.pool > 1, "precision": task.precision != "float32", "first": task.first == "tokens"}
        if odd := [f"{name} {getattr(task, name)!r}" for name, is_odd in wanted.items() if is_odd]:
            raise ConfigError(f"task {task.name!r} has {odd[0]}, for late interaction alone; the model has one vector a text")


def encoded(
    data: TaskData, model: Model, mesh: DeviceMesh | None, progress: Callable[[str, int, int], None] | None
) -> list[Any]:
    """The vectors of each side, or by late interaction those of its tokens; the progress is that of all of them."""
    total, before, found = sum(len(side.texts) for side in data.sides), 0, []
    told = lambda before, done: progress(f"encode {data.task.name}", before + done, total) if progress else None
    for side in data.sides:
        found.append(side.vectors(model, mesh, data.task.prompt, functools.partial(told, before)))
        before += len(side.texts)
    return found


def prepare(tasks: Sequence[Task]) -> tuple[TaskData, ...]:
    """All tasks, read. Raises ConfigError for two of one name, DataError."""
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"evaluation tasks share the name {twice[0]!r}; give each its own")
    return tuple(map(read, tasks))


def read(task: Task) -> TaskData:
    """The data of one task. Raises DataError for the first row that cannot be used: an evaluation passes over none."""
    return READERS[type(task)](task)
