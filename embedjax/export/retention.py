"""What is kept of a model's quality at each dimension and precision, with and without rescoring, by the tasks it is scored on.

"By codes" both sides are codes, as in a store that compares them: queries are quantized as documents are, and compared by the
model's similarity of what the codes stand for, which of bits ranks as Hamming distance does. "Rescored" is what a store does
with `rescore` times as many documents as are asked for, found by their codes: the query in float32 against what their codes
stand for. Documents are codes in both. Of scored pairs (STS) the first text is the query.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh as DeviceMesh

from embedjax import calibration, quantize
from embedjax.config import Precision, Similarity
from embedjax.config.errors import ConfigError
from embedjax.evaluate.encode import side_of
from embedjax.evaluate.kept import Kept
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.stages import by_ranking, rerank
from embedjax.evaluate.tasks import RetrievalData, TaskData, check_late, encoded
from embedjax.evaluate.tasks.side import comparable, own_scores
from embedjax.evaluate.tasks.sts import StsData
from embedjax.load import Model

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "binary")
RESCORE = 4
K = 10
"""Documents that are asked for: the depth of nDCG@10."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The score of a task at one dimension and precision."""

    task: str
    metric: str
    dim: int
    precision: Precision
    bytes: int
    """Of a document's vector."""
    score: float
    """By codes."""
    rescored: float


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How fast the texts of the tasks were encoded, compilation included."""

    rows: int
    seconds: float
    device: str


def retention(
    model: Model,
    tasks: Sequence[TaskData],
    dims: Sequence[int] = (),
    precisions: Sequence[Precision] = PRECISIONS,
    *,
    rescore: int = RESCORE,
    mesh: DeviceMesh | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Row], Encoding]:
    """The main metric of each task of retrieval or STS, of whole vectors and of their first `dims` numbers, at each precision;
    texts are encoded once. int8 and uint8 take the ranges saved with the model. Raises ConfigError for other tasks, for late
    interaction, and where ranges are missing, before anything is encoded."""
    if model.config.late:
        raise ConfigError(f"{model.origin} gives a vector a token: evaluate --precision scores what is kept of those")
    for task in tasks:
        check_late(task.task, model.config)  # raises for what is of late interaction
        forms_of(model, checked(task), dims, precisions)  # and where ranges are missing
    found, rows, seconds = [], 0, 0.0
    for task in map(checked, tasks):
        began = time.perf_counter()
        vectors = encoded(task, model, mesh, progress)
        rows, seconds = rows + sum(map(len, vectors)), seconds + time.perf_counter() - began
        found += measure(model, task, vectors, dims, precisions, rescore=rescore, mesh=mesh)
    device = (mesh.devices.flat[0] if mesh else jax.local_devices()[0]).device_kind
    return found, Encoding(rows, seconds, device)


def measure(
    model: Model,
    task: RetrievalData | StsData,
    vectors: Sequence[np.ndarray],
    dims: Sequence[int] = (),
    precisions: Sequence[Precision] = PRECISIONS,
    *,
    rescore: int = RESCORE,
    mesh: DeviceMesh | None = None,
) -> list[Row]:
    """The rows of one task, of the whole vectors of its sides."""
    forms = forms_of(model, task, dims, precisions)
    return [_row(task, form, vectors, model.config.similarity, rescore, mesh) for form in forms]


def checked(task: TaskData) -> RetrievalData | StsData:
    """The task. Raises ConfigError for one that is neither retrieval nor STS."""
    if not isinstance(task, RetrievalData | StsData):
        raise ConfigError(f"task {task.task.name!r} is {type(task.task).__name__}; retention is of Retrieval and Sts")
    return task


def scorable(model: Model, task: TaskData) -> bool:
    """Whether the task is of retrieval or STS, and of documents whose tower has saved ranges."""
    if not isinstance(task, RetrievalData | StsData):
        return False
    stored = task.sides[1]
    side = side_of(model.config, stored.column, stored.pictures)
    return model.config.tower_of(side) in calibration.read(Path(model.origin))


def forms_of(model: Model, task: RetrievalData | StsData, dims: Sequence[int], precisions: Sequence[Precision]) -> list[Kept]:
    """What a task's documents are kept as: every dimension, at every precision. Raises ConfigError without ranges."""
    stored = task.sides[1]
    side = side_of(model.config, stored.column, stored.pictures)
    whole = Kept.of(model, side).dim
    chosen = sorted({whole, *dims}, reverse=True)
    return [Kept.of(model, side, dim, precision) for dim in chosen for precision in precisions]


def _row(
    task: RetrievalData | StsData,
    kept: Kept,
    vectors: Sequence[np.ndarray],
    similarity: Similarity,
    rescore: int,
    mesh: DeviceMesh | None,
) -> Row:
    queries, documents = vectors
    stored = kept.vectors(kept.codes(documents))
    coded = kept.vectors(kept.codes(queries))
    size = kept.count * np.dtype(quantize.TYPES[kept.precision]).itemsize
    told = (task.task.name, task.task.main, kept.dim, kept.precision, size)
    if isinstance(task, StsData):
        scores = [task.scores((side, stored), similarity, mesh)[task.task.main] for side in (coded, kept.prefix(queries))]
        return Row(*told, *map(float, scores))
    some = task.depth(K * rescore)
    _, ranked = topk(comparable(coded, similarity), comparable(stored, similarity), some, mesh=mesh)
    again = rerank(own_scores((kept.prefix(queries), stored), similarity), by_ranking(ranked), task.depth(K))[1]
    return Row(*told, *(float(task.measure(found)[task.task.main]) for found in (ranked, again)))
