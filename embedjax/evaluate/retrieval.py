"""Exact nearest neighbours: the k highest dot products of each query with a corpus split over the mesh.

Tiles of queries and of corpus bound the memory; nothing here knows of texts or models. `scan` is the same for other scores,
of tiles that lie as these want them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from embedjax import config, sharding

# Rows of a group whose maximum is looked at first, a power of 8; numbers that are few enough to be looked at one by one.
GROUP = 64
ENOUGH = 4096
# Rows of a tile on a device. On a CPU float32 products with 16,384 rows take 0.8 of the time of those with 65,536, since their
# scores stay in its cache; more than FEW best of each tile take longer than that saves.
ROWS, FEW = {"cpu": 16384}, 32
MOST_ROWS = 65536

Scores = Callable[[Array, Array], Array]
"""(queries [Q ...], a tile of n rows) -> float32 [Q n]."""


class Rows(Protocol):
    """Vectors [N D] that are made, or read, a block at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> Float[np.ndarray, "n D"]: ...


def topk(
    queries: Float[np.ndarray, "Q D"],
    corpus: Float[np.ndarray, "N D"] | Rows,
    k: int,
    *,
    mesh: DeviceMesh | None = None,
    block: int | None = None,
    query_block: int = 256,
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores (float32, highest first) and corpus row numbers of each query's min(k, N) best rows.

    Equal scores come in the order of their row numbers. `block` corpus rows a device and `query_block` queries are scored at
    a time: memory is their product, and the corpus may be a memory-mapped file, or make its rows as they are asked for. Inputs
    must be finite.
    """
    mesh = mesh or one_device()
    usual = ROWS.get(mesh.devices.flat[0].platform, MOST_ROWS) if k <= FEW else MOST_ROWS
    size = rows_at_once(len(corpus), mesh, block or usual)
    read = lambda at: padded(corpus, at, size).astype(np.float32, copy=False)
    tiles = ((at, put(read(at), sharding.rows(mesh))) for at in range(0, len(corpus), size))
    return scan(np.asarray(queries, np.float32), tiles, product, k, len(corpus), mesh=mesh, query_block=query_block)


def scan(
    queries: np.ndarray,
    tiles: Iterable[tuple[int, Array]],
    score: Scores,
    k: int,
    total: int,
    *,
    mesh: DeviceMesh,
    axis: int = 0,
    query_block: int = 256,
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """What `topk` gives, by any scores: of a corpus of `total` rows as (first row's number, tile), the tiles of one size and
    split over the mesh along their `axis` of rows. `score` is a function of its own right, since it is compiled once for all
    calls."""
    k = min(k, total)
    scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
    if not k or not len(queries):
        return scores, indices
    size, step, whole = min(query_block, len(queries)), _step(mesh, score, axis, k), sharding.replicated(mesh)
    starts = range(0, len(queries), size)
    empty = (np.full((size, k), -np.inf, np.float32), np.full((size, k), -1, np.int32))
    best = [jax.tree.map(lambda x: put(x, whole), empty) for _ in starts]
    asked = [put(padded(queries, start, size), whole) for start in starts]
    for at, documents in tiles:
        jax.block_until_ready(best)  # else tiles of a large corpus queue up in memory
        best = [step(found, part, documents, np.int32(at), np.int32(total)) for found, part in zip(best, asked, strict=True)]
    for start, (values, ids) in zip(starts, best, strict=True):
        rows = min(size, len(queries) - start)
        scores[start : start + rows], indices[start : start + rows] = np.asarray(values)[:rows], np.asarray(ids)[:rows]
    return scores, indices


def product(queries: Float[Array, "Q D"], documents: Float[Array, "n D"]) -> Float[Array, "Q n"]:
    """Dot products in float32 on every device."""
    return jnp.matmul(queries, documents.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def by_groups(scores: Float[Array, "Q N"], k: int, group: int = GROUP) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """`lax.top_k` by way of the groups with the k highest maxima, in which all of the k best must be; if these are many, by
    smaller groups of them again, since `lax.top_k` takes long to look at a number. N divides by `group`."""
    groups = scores.shape[1] // group
    if k >= groups:
        return lax.top_k(scores, k)
    grouped = scores.reshape(scores.shape[0], groups, group)
    _, chosen = lax.top_k(grouped.max(-1), k)
    chosen = jnp.sort(chosen, axis=1)  # in the order of rows, since equal scores must stay in it
    inside = jnp.take_along_axis(grouped, chosen[..., None], axis=1).reshape(scores.shape[0], k * group)
    values, at = by_groups(inside, k, group // 8) if k * group > ENOUGH else lax.top_k(inside, k)
    return values, jnp.take_along_axis(chosen, at // group, axis=1) * group + at % group


@functools.lru_cache(maxsize=32)
def _step(mesh: DeviceMesh, score: Scores, axis: int, k: int) -> Callable:
    """best so far, queries, a tile of the corpus, its first row's number, rows of the corpus -> best so far."""

    def local(queries, documents, at, total):
        rows = documents.shape[axis]
        first = at + lax.axis_index(sharding.BATCH_AXES).astype(jnp.int32) * rows
        scores = score(queries, documents)
        scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0 below 0
        here = jnp.arange(rows, dtype=jnp.int32) + first < total
        values, ids = by_groups(jnp.where(here[None], scores, -jnp.inf), min(k, rows))
        return values, ids + first

    across = P(None, sharding.BATCH_AXES)
    tile = P(*[None] * axis, sharding.BATCH_AXES)
    search = jax.shard_map(local, mesh=mesh, in_specs=(P(), tile, P(), P()), out_specs=(across, across))

    def step(best, queries, documents, at, total):
        values, ids = search(queries, documents, at, total)
        # Earlier tiles and devices stand first, so that equal scores stay in the order of row numbers.
        values, ids = jnp.concatenate([best[0], values], 1), jnp.concatenate([best[1], ids], 1)
        values, order = lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, order, axis=1)

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def one_device() -> DeviceMesh:
    """The mesh of a search that is given none."""
    return sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])


def rows_at_once(total: int, mesh: DeviceMesh, block: int) -> int:
    """Rows of a tile over all devices, each with the same number of whole groups."""
    each = min(block, max(1, -(-total // mesh.size)))
    return -(-each // GROUP) * GROUP * mesh.size


def padded(array: np.ndarray | Rows, start: int, count: int) -> np.ndarray:
    """`count` rows from `start`, with zeros after the end."""
    part = np.asarray(array[start : start + count])
    return part if len(part) == count else np.concatenate([part, np.zeros((count - len(part), *part.shape[1:]), part.dtype)])


def put(array: np.ndarray, where: jax.sharding.NamedSharding) -> Array:
    return jax.make_array_from_callback(array.shape, where, lambda at: array[at])
