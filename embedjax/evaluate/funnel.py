"""Search in stages by prefixes of Matryoshka embeddings (Kusupati et al. 2022, "Matryoshka Representation Learning", section
4.3): few numbers of all documents for a shortlist, more of these alone, and so on.

    64 numbers, binary          -> 400     all documents
    256 numbers, int8           -> 100     the best 400
    all numbers, float32        -> k       the best 100

Numpy arrays and codes alone; knows nothing of texts, models and files.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float, Int

from embedjax import quantize
from embedjax.config import Precision
from embedjax.config.errors import ConfigError
from embedjax.evaluate import codes
from embedjax.evaluate.codes import Coded, Found, Placed, Some

Vectors = Float[np.ndarray, "N E"]
Prefix = Callable[[Vectors, int], Vectors]
"""(vectors, how many numbers) -> their prefixes as they are compared: `unit_prefix`, or `cut` where lengths count."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is compared, the first `dim` numbers as `precision` keeps them, and how many of the best go on to the next stage.
    The last stage's are the results: it has no shortlist (0)."""

    dim: int
    precision: Precision = "float32"
    shortlist: int = 0

    def __str__(self) -> str:
        return f"{self.dim}:{self.precision}" + (f":{self.shortlist}" if self.shortlist else "")


class Prefixes:
    """The first `dim` numbers of vectors that may lie in a file, made as they are asked for."""

    def __init__(self, vectors: Some, dim: int, prefix: Prefix):
        self.vectors, self.dim, self.prefix = vectors, dim, prefix

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, at: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
        return self.prefix(np.asarray(self.vectors[at]), self.dim)


def cut(vectors: Vectors, dim: int) -> Vectors:
    """The first `dim` numbers, for products of vectors whose lengths count."""
    return vectors[:, :dim]


def unit_prefix(vectors: Vectors, dim: int) -> Vectors:
    """The first `dim` numbers at length 1, for cosines. A row of zeros stays one."""
    part = vectors[:, :dim]
    return part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)


def check(stages: Sequence[Stage], width: int, k: int) -> None:
    """Raises ConfigError for stages that do not follow from each other, over vectors of `width` numbers and for k results."""
    told = ", ".join(map(str, stages))
    if not stages:
        raise ConfigError("a funnel has at least one stage")
    if k < 1:
        raise ConfigError(f"{k} results were asked for; it must be at least 1")
    for stage in stages:
        if stage.precision not in quantize.PRECISIONS:
            raise ConfigError(
                f"stage {stage}: there is no precision {stage.precision!r}; known: {', '.join(quantize.PRECISIONS)}"
            )
        if not 1 <= stage.dim <= width:
            raise ConfigError(f"stage {stage} takes {stage.dim} numbers; the vectors have {width}")
    if stages[-1].shortlist:
        raise ConfigError(f"funnel {told}: the last stage's shortlist are the results; give it none")
    for before, after in zip(stages, stages[1:], strict=False):
        if (after.dim, _bits(after)) <= (before.dim, _bits(before)):
            raise ConfigError(f"funnel {told}: stage {after} must know more than {before}: more numbers, or finer ones")
        if before.shortlist < max(k, after.shortlist):
            fewest = f"{after.shortlist} of the next" if after.shortlist > k else f"{k} results"
            raise ConfigError(f"funnel {told}: the shortlist of stage {before} must hold at least the {fewest}")


def prepare(
    vectors: Some,
    stages: Sequence[Stage],
    *,
    prefix: Prefix = unit_prefix,
    ranges: Sequence[quantize.Ranges | None] | None = None,
) -> list[Coded]:
    """The codes that each stage compares: prefix, length 1, then quantize.

    `vectors` are whole ones as they are compared, of length 1 for cosines: as float32 they stay what they are, such as a
    memory-mapped file; other codes are made in memory. `ranges` of a stage are those of its own prefixes unless they are given.
    """
    width = vectors[:0].shape[1]
    made = []
    for stage, given in zip(stages, ranges or [None] * len(stages), strict=True):
        whole = stage.precision == "float32" and stage.dim == width
        if whole and isinstance(vectors, np.ndarray) and vectors.dtype == np.float32:
            made.append(Coded(vectors, "float32", width))
        else:
            made.append(codes.coded(Prefixes(vectors, stage.dim, prefix), stage.precision, given))
    return made


def funnel(
    queries: Float[np.ndarray, "Q E"],
    documents: Sequence[Coded | Placed],
    stages: Sequence[Stage],
    k: int,
    *,
    prefix: Prefix = unit_prefix,
    mesh: DeviceMesh | None = None,
) -> Found:
    """Scores (float32, highest first) and row numbers of each query's min(k, N) best documents by the last stage.

    The first stage goes through all documents (`codes.shortlist`, of bits by Hamming distance); the others score the shortlist
    before them by the float32 query and the vectors that their codes stand for. A stage alone is a search (`codes.search`), of
    bits with the best scored so (`codes.rescored`). Raises ConfigError for stages that do not go together (`check`) or are not
    those of the documents.
    """
    check(stages, queries.shape[1], k)
    each = [part.coded if isinstance(part, Placed) else part for part in documents]
    if [(part.width, part.precision) for part in each] != [(stage.dim, stage.precision) for stage in stages]:
        raise ConfigError(f"the documents' codes are not those of the stages {', '.join(map(str, stages))}")
    asked = prefix(queries, stages[0].dim)
    if len(stages) == 1 and quantize.in_bits(stages[0].precision):
        return codes.rescored(asked, documents[0], k, mesh=mesh)
    if len(stages) == 1:
        return codes.search(asked, documents[0], k, mesh=mesh)
    scores, rows = codes.shortlist(asked, documents[0], stages[0].shortlist, mesh=mesh)
    for stage, part in zip(stages[1:], each[1:], strict=True):
        scores, rows = codes.rescore(prefix(queries, stage.dim), part, rows, stage.shortlist or k)
    return scores, rows


def _bits(stage: Stage) -> int:
    """What a number takes."""
    return 1 if quantize.in_bits(stage.precision) else 8 * np.dtype(quantize.TYPES[stage.precision]).itemsize
