"""Late interaction: texts -> the vectors of their tokens, and exact MaxSim over them on the mesh.

What is scored at a time is padded to texts of about the same length. Knows nothing of tasks and files.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float, Int

from embedjax import config, sharding
from embedjax.config.errors import ConfigError, NonFiniteError
from embedjax.config.model import side_of
from embedjax.evaluate.encode import IN_FLIGHT, Columns, Encoder, ahead, plan
from embedjax.evaluate.pool import check_factor, pooled
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import Model
from embedjax.losses.late import Tokens, maxsim
from embedjax.models.embedder import Embedder

# Tokens of documents on a device, and of queries, that are scored at a time: their products are 32 MB.
DOCUMENT_TOKENS = 8192
QUERY_TOKENS = 1024


class TokenEncoder(Encoder):
    """One tower of late interaction on a mesh, for any number of blocks of texts."""

    late = True

    def _reads(self, model: Model, tower: str) -> None:
        super()._reads(model, tower)
        self.texts = self.texts.of(self.column)
        embedder = model.embedders[tower]
        assert isinstance(embedder, Embedder)
        self.forward = _forward(embedder, self.mesh)

    @property
    def identity(self) -> tuple:
        """What decides the columns of a text."""
        return (*super().identity, self.texts.late, self.texts.side)

    def _batches(self, columns: Columns) -> Iterator[tuple[np.ndarray, Columns]]:
        used = columns["mask"] | columns["score"]
        lengths = used.shape[1] - used[:, ::-1].argmax(1)
        yield from self._cut(columns, lengths)

    def token_vectors(self, columns: Columns, advance: Callable[[int], None] = lambda rows: None) -> list[np.ndarray]:
        """The vectors [L E] of each text of a tokenized block. Raises NonFiniteError."""
        out: list[np.ndarray] = [np.zeros((0, self.width), np.float32)] * len(columns["ids"])
        pending: collections.deque[tuple[np.ndarray, np.ndarray, jax.Array]] = collections.deque()

        def fetch() -> None:
            rows, score, vectors = pending.popleft()
            found = np.asarray(vectors)[: len(rows)]
            if not np.isfinite(found).all():
                raise NonFiniteError("the model gives vectors that are not finite; its weights hold NaN, or overflow")
            for row, counts, each in zip(rows, score, found, strict=False):
                out[row] = each[counts]
            advance(len(rows))

        for rows, batch in self._batches(columns):
            pending.append((rows, batch["score"], self.forward(self.params, self._place(batch))))
            if len(pending) > IN_FLIGHT:
                fetch()
        while pending:
            fetch()
        return out

    def gather(
        self,
        blocks: Iterable[Columns],
        *,
        progress: Callable[[int], None] | None = None,
        pool: int = 1,
        protected: int = 1,
    ) -> TokenVectors:
        """Those of all blocks, pooled; the next block is made (tokenized) while the device works on this one."""
        done, found = 0, []

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            if progress:
                progress(done)

        for columns in ahead(blocks):
            found += [pooled(each, pool, protected) for each in self.token_vectors(columns, advance)]
        return TokenVectors.joined(found, self.width)


def encode_tokens(
    model: Model,
    texts: Sequence[str],
    *,
    column: str = "document",
    prompt: str | None = None,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    tokens_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    pool: int = 1,
    protected: int = 1,
) -> TokenVectors:
    """The vectors of the texts' tokens, of "query" texts or of "document" ones; otherwise as `encode`. With `pool` above 1 the
    vectors of documents are pooled: about one is left of so many, but for the first `protected` of each. Raises ConfigError for
    a model of one vector a text, and for queries that are to be pooled."""
    if isinstance(texts, str):
        raise ConfigError("encode_tokens takes a list of texts, not one string; write [text]")
    check_factor(pool, protected)
    if pool > 1 and side_of(column) == "query":
        raise ConfigError("pool is for documents; each token of a query is compared")
    encoder = TokenEncoder(model, column=column, prompt=prompt, task=task, mesh=mesh, tokens_per_batch=tokens_per_batch)
    blocks = (encoder.tokenize(texts[start : start + encoder.block]) for start in range(0, len(texts), encoder.block))
    report = (lambda done: progress(done, len(texts))) if progress else None
    return encoder.gather(blocks, progress=report, pool=pool, protected=protected)


def maxsim_topk(
    queries: TokenVectors, documents: TokenVectors, k: int, *, mesh: DeviceMesh | None = None
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores (float32, highest first) and numbers of each query's min(k, N) best documents; equal scores in the order of their
    numbers."""
    k = min(k, len(documents))
    scores, places = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int32)
    if not len(queries):
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
    for rows, found in _blocks(queries, documents, mesh):
        scores = np.concatenate([scores, found], 1)
        places = np.concatenate([places, np.broadcast_to(rows.astype(np.int32), found.shape)], 1)
        order = np.lexsort((places, -scores))[:, :k]
        scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
    return scores, places


def maxsim_own(query: Float[np.ndarray, "L E"], documents: TokenVectors, texts: Sequence[int]) -> Float[np.ndarray, " n"]:
    """Scores of one query with some documents, such as those that a first stage found."""
    scores = np.zeros(len(texts), np.float32)
    each = [documents.of(text) for text in texts]
    if full := [n for n, vectors in enumerate(each) if len(vectors)]:
        flat = np.concatenate([each[n] for n in full]) @ query.T
        starts = np.cumsum([0, *(len(each[n]) for n in full[:-1])])
        scores[full] = np.maximum.reduceat(flat, starts, axis=0).sum(1)
    return scores


def _blocks(
    queries: TokenVectors, documents: TokenVectors, mesh: DeviceMesh | None
) -> Iterator[tuple[np.ndarray, Float[np.ndarray, "Q n"]]]:
    """(numbers of some documents, the scores of all queries with them)."""
    mesh = mesh or sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])
    length = max(1, int(queries.lengths.max(initial=0)))
    size = min(len(queries), max(1, QUERY_TOKENS // length))
    count = -(-len(queries) // size)
    asked = queries.padded(np.arange(len(queries)), (count * size, length))
    asked = jax.tree.map(lambda x: _put(x.reshape(count, size, *x.shape[1:]), sharding.replicated(mesh)), asked)
    longest = max(1, int(documents.lengths.max(initial=0)))
    for rows, shape in plan(np.maximum(documents.lengths, 1), longest, DOCUMENT_TOKENS, mesh.size):
        block = jax.tree.map(lambda x: _put(x, sharding.rows(mesh)), documents.padded(rows, shape))
        found = np.asarray(_score(mesh)(asked, block))
        yield rows, found.reshape(-1, shape[0])[: len(queries), : len(rows)]


@functools.lru_cache(maxsize=8)
def _score(mesh: DeviceMesh) -> Callable[[Tokens, Tokens], jax.Array]:
    """(queries [P R Lq E], documents [n Ld E]) -> [P R n], compiled once a shape."""
    each = lambda queries, documents: jax.lax.map(lambda query: maxsim(query, documents), queries)
    return jax.jit(each, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def _forward(embedder: Embedder, mesh: DeviceMesh) -> Callable[[Any, Any], jax.Array]:
    """Compiled once a shape for all calls with equal embedders. Vectors are replicated, so that every host reads them."""
    apply = sharding.in_sight(mesh, lambda params, column: embedder.apply(params, column, want=("vectors",)).vectors)
    return jax.jit(apply, out_shardings=sharding.replicated(mesh))


def _put(array: np.ndarray, where: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, lambda at: array[at])
