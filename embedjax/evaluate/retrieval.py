"""Exact nearest neighbours: the k highest dot products of each query with a corpus split over the mesh.

Tiles of queries and of corpus bound the memory; nothing here knows of texts or models.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from embedjax import config, sharding

# Rows of a group whose maximum is looked at first; a power of two.
GROUP = 64


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
    block: int = 65536,
    query_block: int = 256,
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores (float32, highest first) and corpus row numbers of each query's min(k, N) best rows.

    Equal scores come in the order of their row numbers. `block` corpus rows a device and `query_block` queries are scored at
    a time: memory is their product, and the corpus may be a memory-mapped file, or make its rows as they are asked for. Inputs
    must be finite.
    """
    k = min(k, len(corpus))
    scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
    if not k or not len(queries):
        return scores, indices
    mesh = mesh or sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])
    each = min(block, -(-len(corpus) // mesh.size))
    each = -(-each // GROUP) * GROUP
    size, tile = min(query_block, len(queries)), each * mesh.size
    step, whole = _step(mesh, k, len(corpus)), sharding.replicated(mesh)
    starts = range(0, len(queries), size)
    empty = (np.full((size, k), -np.inf, np.float32), np.full((size, k), -1, np.int32))
    best = [jax.tree.map(lambda x: _put(x, whole), empty) for _ in starts]
    for at in range(0, len(corpus), tile):
        documents = _put(_rows(corpus, at, tile), sharding.rows(mesh))
        for i, start in enumerate(starts):
            best[i] = step(best[i], _put(_rows(queries, start, size), whole), documents, np.int32(at))
        jax.block_until_ready(best)  # else tiles of a large corpus queue up in memory
    for start, (values, ids) in zip(starts, best, strict=True):
        rows = min(size, len(queries) - start)
        scores[start : start + rows], indices[start : start + rows] = np.asarray(values)[:rows], np.asarray(ids)[:rows]
    return scores, indices


def two_level(scores: Float[Array, "Q N"], k: int) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """`lax.top_k` by way of the groups with the k highest maxima, in which all of the k best must be. N divides by GROUP."""
    groups = scores.shape[1] // GROUP
    if k >= groups:
        return lax.top_k(scores, k)
    grouped = scores.reshape(scores.shape[0], groups, GROUP)
    _, chosen = lax.top_k(grouped.max(-1), k)
    chosen = jnp.sort(chosen, axis=1)  # in the order of rows, since equal scores must stay in it
    inside = jnp.take_along_axis(grouped, chosen[..., None], axis=1).reshape(scores.shape[0], k * GROUP)
    values, at = lax.top_k(inside, k)
    return values, jnp.take_along_axis(chosen, at // GROUP, axis=1) * GROUP + at % GROUP


@functools.lru_cache(maxsize=32)
def _step(mesh: DeviceMesh, k: int, total: int) -> Callable:
    """best so far, queries, a tile of the corpus and its first row number -> best so far."""

    def local(queries, documents, at):
        rows = documents.shape[0]
        first = at + lax.axis_index(sharding.BATCH_AXES).astype(jnp.int32) * rows
        scores = jnp.matmul(queries, documents.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0 below 0
        here = jnp.arange(rows, dtype=jnp.int32) + first < total
        values, ids = two_level(jnp.where(here[None], scores, -jnp.inf), min(k, rows))
        return values, ids + first

    across = P(None, sharding.BATCH_AXES)
    search = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(sharding.BATCH_AXES), P()), out_specs=(across, across))

    def step(best, queries, documents, at):
        values, ids = search(queries, documents, at)
        # Earlier tiles and devices stand first, so that equal scores stay in the order of row numbers.
        values, ids = jnp.concatenate([best[0], values], 1), jnp.concatenate([best[1], ids], 1)
        values, order = lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, order, axis=1)

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def _rows(array: np.ndarray | Rows, start: int, count: int) -> np.ndarray:
    """`count` rows from `start`, with zeros after the end."""
    part = np.asarray(array[start : start + count], np.float32)
    return part if len(part) == count else np.concatenate([part, np.zeros((count - len(part), part.shape[1]), np.float32)])


def _put(array: np.ndarray, where: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, lambda at: array[at])
