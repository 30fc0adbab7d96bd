"""Exact search over vectors that are stored as codes: half floats, bytes in ranges, bits of signs, or as they are.

What counts is the product of a float32 query with the vector that the codes stand for (`quantize.dequantize`). Codes are first
compared as they lie, which is fast: bytes with a query of 8 significant bits, bits with the query's bits by population count.
The best so found are then scored with the float32 query, and a bound on the error tells of which queries others could be as
good: these are searched for again with nothing rounded. Knows nothing of texts, models and files.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from embedjax import quantize, sharding
from embedjax.config import Precision
from embedjax.config.errors import ConfigError
from embedjax.evaluate import retrieval

# How many more than those asked for, at least, are scored again with nothing rounded; and how many times as many by `rescored`.
MORE, AGAIN = 32, 4
# Codes of a tile on a device. The best of a tile take as long for many as for few rows: long lists want large tiles. Scores of
# 256 queries with one take 256 MB.
ROWS = 1 << 18
# Queries that are searched for again are filled up to a multiple of this, or each number of them would be compiled.
FILLED = 32
# Numbers of dequantized vectors that are scored at a time, and vectors that are quantized at a time.
NUMBERS = 1 << 24
QUANTIZED_ROWS = 65536
FLOATS = ("float32", "float16", "bfloat16")

Found = tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]
"""Scores, highest first, and row numbers."""


class Some(Protocol):
    """Vectors [N D] of which any rows may be taken: an array, a memory-mapped file, codes."""

    def __len__(self) -> int: ...

    def __getitem__(self, at, /) -> Float[np.ndarray, "n D"]: ...


@dataclasses.dataclass(frozen=True)
class Coded:
    """N vectors of `width` numbers as codes, which may be a memory-mapped file. Rows of it are float32 vectors again, made as
    they are asked for."""

    codes: quantize.Codes
    precision: Precision
    width: int
    ranges: quantize.Ranges | None = None

    def __post_init__(self):
        count = quantize.count_of(self.precision, self.width)
        if self.codes.ndim != 2 or self.codes.shape[1] != count:
            found = f"{list(self.codes.shape)} of {self.codes.dtype}"
            raise ConfigError(f"codes of {self.precision} of {self.width} numbers are [N {count}]; these are {found}")
        self[:0]  # raises ConfigError for codes of another type, and for ranges that do not fit

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, at: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
        return quantize.dequantize(np.asarray(self.codes[at]), self.precision, self.width, self.ranges)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes


class Placed(NamedTuple):
    """Codes whose tiles lie on the devices of a mesh, for any number of searches (`place`)."""

    coded: Coded
    mesh: DeviceMesh
    tiles: list[tuple[int, Array]]
    longest: float
    """Length of the longest vector, where codes are floats."""


def coded(vectors: Some, precision: Precision, ranges: quantize.Ranges | None = None) -> Coded:
    """The codes of vectors, some of them at a time; without ranges, those of the vectors themselves are taken. Raises as
    `quantize` does."""
    if quantize.in_ranges(precision) and ranges is None:
        ranges = ranges_over(vectors)
    parts = [quantize.quantize(part, precision, ranges) for part in _blocks(vectors)]
    return Coded(np.concatenate(parts), precision, vectors[:0].shape[1], ranges)


def ranges_over(vectors: Some) -> quantize.Ranges:
    """`quantize.ranges_of` vectors that are read some at a time."""
    ends = np.concatenate([quantize.ranges_of(part) for part in _blocks(vectors)])
    return np.stack([ends.min(0), ends.max(0)])


def _blocks(vectors: Some) -> Iterator[Float[np.ndarray, "n D"]]:
    """At least one, which may be empty."""
    for at in range(0, max(1, len(vectors)), QUANTIZED_ROWS):
        yield np.asarray(vectors[at : at + QUANTIZED_ROWS], np.float32)


def place(documents: Coded, *, mesh: DeviceMesh | None = None, block: int | None = None) -> Placed:
    """Puts the codes on the devices once, as they are searched: bytes or bits as they are, floats as bfloat16."""
    mesh = mesh or retrieval.one_device()
    blocks = _blocks(documents) if documents.precision in FLOATS else ()
    longest = max((float(np.linalg.norm(part, axis=1).max(initial=0)) for part in blocks), default=0.0)
    return Placed(documents, mesh, list(_tiles(documents, mesh, block)), longest)


def search(
    queries: Float[np.ndarray, "Q D"],
    documents: Coded | Placed,
    k: int,
    *,
    mesh: DeviceMesh | None = None,
    block: int | None = None,
    query_block: int = 256,
) -> Found:
    """Scores (float32, highest first) and row numbers of each query's min(k, N) best documents.

    A score is the product of the float32 query with the vector that the codes stand for; of binary and ubinary that of the two
    vectors of signs, 1 - 2 h / D where h is the Hamming distance of the bits. Equal scores come in the order of their row
    numbers; the products are summed up in another order than by `topk`, so that scores which are equal but for rounding may
    change places. Codes are read `block` rows a device at a time, and at the end those of a few rows again. Raises ConfigError
    for queries of another width.
    """
    stand_for = documents.coded if isinstance(documents, Placed) else documents
    options = {"mesh": mesh, "block": block, "query_block": query_block}
    if not _rounds(documents):
        return shortlist(queries, documents, k, **options)
    rough, rows = shortlist(queries, documents, k + max(MORE, k), **options)
    scores, best = rescore(queries, stand_for, rows, k)
    if rows.shape[1] < len(stand_for):
        # None that was left out is better than the last of the shortlist by more than the error.
        doubtful = np.flatnonzero(rough[:, -1] + _rounded(queries, documents).error >= scores[:, -1])
        if len(doubtful):
            asked = np.pad(queries[doubtful], ((0, -len(doubtful) % FILLED), (0, 0)))
            again = retrieval.topk(asked, stand_for, k, **options)
            scores[doubtful], best[doubtful] = (found[: len(doubtful)] for found in again)
    return scores, best


def shortlist(
    queries: Float[np.ndarray, "Q D"],
    documents: Coded | Placed,
    k: int,
    *,
    mesh: DeviceMesh | None = None,
    block: int | None = None,
    query_block: int = 256,
) -> Found:
    """`search` by what is compared first alone: Hamming distances of bits; of bytes, and of floats that are placed, products of
    numbers rounded to 8 significant bits. At the end of a long list these miss some that are as good as those they find."""
    placed = documents if isinstance(documents, Placed) else None
    stand_for = documents.coded if isinstance(documents, Placed) else documents
    if queries.ndim != 2 or queries.shape[1] != stand_for.width:
        raise ConfigError(f"queries are {list(queries.shape)}; the documents' vectors have {stand_for.width} numbers")
    mesh = placed.mesh if placed else mesh or retrieval.one_device()
    options = {"mesh": mesh, "query_block": query_block}
    if not placed and stand_for.precision in FLOATS:  # read once, nothing is won by rounding them first
        return retrieval.topk(queries, stand_for, k, block=block, **options)
    tiles = placed.tiles if placed else _tiles(stand_for, mesh, block)
    scan = functools.partial(retrieval.scan, tiles=tiles, k=k, total=len(stand_for), axis=1, **options)
    if quantize.in_bits(stand_for.precision):
        minus_distances, rows = scan(words(quantize.quantize(queries, "ubinary")), score=minus_hamming)
        return 1 + minus_distances * np.float32(2 / stand_for.width), rows
    rounded = _rounded(queries, documents)
    products, rows = scan(rounded.weights, score=rough_product)
    return products + rounded.offsets[:, None].astype(np.float32), rows


def rescore(queries: Float[np.ndarray, "Q D"], documents: Some, rows: Int[np.ndarray, "Q S"], k: int) -> Found:
    """The k best of a shortlist by the product of query and document in float32, highest first; equal scores in the order of
    their row numbers. Row -1 stands for none and gets -inf. Documents are read for a few queries at a time."""
    k = min(k, rows.shape[1])
    scores, best = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int32)
    step = max(1, NUMBERS // max(1, rows.shape[1] * queries.shape[1]))
    for at in range(0, len(rows), step):
        some = np.sort(rows[at : at + step], axis=1)
        vectors = np.asarray(documents[np.maximum(some, 0).reshape(-1)], np.float32).reshape(*some.shape, queries.shape[1])
        # einsum without a matrix product: one order of summing for all rows, so that equal documents get equal scores.
        found = np.einsum("qsd,qd->qs", vectors, np.asarray(queries[at : at + step], np.float32))
        found[some < 0] = -np.inf
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        scores[at : at + step] = np.take_along_axis(found, order, 1)
        best[at : at + step] = np.take_along_axis(some, order, 1)
    return scores, best


def rescored(
    queries: Float[np.ndarray, "Q D"],
    documents: Coded | Placed,
    k: int,
    *,
    vectors: Some | None = None,
    multiplier: int = AGAIN,
    mesh: DeviceMesh | None = None,
) -> Found:
    """`search` for `multiplier` times k, and the k best of these by the float32 query: with `vectors`, such as a memory-mapped
    file of float32, or else with what the codes stand for, of bits the vectors of signs."""
    if multiplier < 1:
        raise ConfigError(f"{multiplier} times as many are to be scored again; it must be at least 1")
    _, rows = search(queries, documents, multiplier * k, mesh=mesh)
    stand_for = documents.coded if isinstance(documents, Placed) else documents
    return rescore(queries, stand_for if vectors is None else vectors, rows, min(k, len(stand_for)))


def minus_hamming(queries: Int[Array, "Q W"], documents: Int[Array, "W n"]) -> Float[Array, "Q n"]:
    """Bits that differ, less than 0: integers, in float32 since `lax.top_k` of integers takes a hundred times as long on a CPU.
    Words lie one after the other, so that a word of many documents is compared at a time."""
    differing = sum(lax.population_count(queries[:, w, None] ^ documents[w][None]) for w in range(documents.shape[0]))
    return -jnp.asarray(differing).astype(jnp.float32)


def rough_product(queries: Float[Array, "Q D"], documents: Array) -> Float[Array, "Q n"]:
    """Products with tiles [D n] of bytes or bfloat16, queries rounded to bfloat16: each product is exact in the float32 sum."""
    return jnp.matmul(queries.astype(jnp.bfloat16), documents.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _rounds(documents: Coded | Placed) -> bool:
    """Whether what is compared first are rounded products."""
    if isinstance(documents, Placed):
        return not quantize.in_bits(documents.coded.precision)
    return quantize.in_ranges(documents.precision)


class _Rounded(NamedTuple):
    """Queries for `rough_product`, what its scores lack to be those of the vectors, and how far off they may then be."""

    weights: Float[np.ndarray, "Q D"]
    offsets: Float[np.ndarray, " Q"]
    error: Float[np.ndarray, " Q"]


def _rounded(queries: Float[np.ndarray, "Q D"], documents: Coded | Placed) -> _Rounded:
    """Of bytes c - 128 ... 127 with weights w = query x step the error is the sum of |w - round(w)| x 128; of floats it follows
    by Cauchy-Schwarz, where rounding to bfloat16 takes at most 2^-9 of a number. Summing D products in float32 takes less than
    D 2^-22 of their sizes."""
    ranges = documents.coded.ranges if isinstance(documents, Placed) else documents.ranges
    slack = queries.shape[1] * 2.0**-22
    if ranges is None:
        assert isinstance(documents, Placed)
        off = queries - queries.astype(jnp.bfloat16).astype(np.float32)
        most = np.linalg.norm(off, axis=1) + (1.01 * 2.0**-9 + slack) * np.linalg.norm(queries, axis=1)
        return _Rounded(queries, np.zeros(len(queries)), documents.longest * most)
    step = (ranges[1] - ranges[0]) / np.float32(255)
    scale = np.where(step == 0, np.float32(1), step)
    middles = ranges[0] + (128 + np.where(step == 0, 0, 0.5)) * scale.astype(np.float64)
    weights = queries * scale
    off = weights - weights.astype(jnp.bfloat16).astype(np.float32)
    sizes = np.abs(queries).astype(np.float64) @ np.abs(ranges).max(0)
    error = 128 * (np.abs(off).sum(1) + slack * np.abs(weights).sum(1)) + slack * sizes
    return _Rounded(weights, queries.astype(np.float64) @ middles, error)


def _tiles(documents: Coded, mesh: DeviceMesh, block: int | None) -> Iterator[tuple[int, Array]]:
    """(first row's number, tile [D n] or [W n]), split over the mesh along its rows."""
    size = retrieval.rows_at_once(len(documents), mesh, block or ROWS)
    rows, turn = sharding.rows(mesh), turned(mesh, documents.precision in FLOATS)
    for at in range(0, len(documents), size):
        part = retrieval.padded(documents.codes, at, size)
        if documents.precision == "bfloat16":
            part = part.view(jnp.bfloat16)
        if documents.precision in ("binary", "uint8"):
            part = (part.view(np.uint8) ^ np.uint8(0x80)).view(np.int8 if documents.precision == "uint8" else np.uint8)
        yield at, turn(retrieval.put(words(part) if quantize.in_bits(documents.precision) else part, rows))


def words(bits: np.ndarray) -> np.ndarray:
    """Bytes [N B] as words [N W] of 32 bits, filled up with zeros."""
    return np.ascontiguousarray(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4)))).view(np.uint32)


@functools.lru_cache(maxsize=8)
def turned(mesh: DeviceMesh, floats: bool) -> Callable[[Array], Array]:
    """[n D] -> [D n], each device's rows where they are. On a CPU this is the order in which products of bfloat16 are fast."""
    turn = lambda tile: (tile.astype(jnp.bfloat16) if floats else tile).T
    return jax.jit(turn, out_shardings=NamedSharding(mesh, P(None, sharding.BATCH_AXES)))
