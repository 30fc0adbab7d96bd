"""A model, a corpus and pairs -> the hard negatives of each anchor: exact search, split over the devices."""

from collections.abc import Callable, Iterator

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float

from embedjax.config import Negatives
from embedjax.data.corpus import Corpus, Lists, Pairs
from embedjax.evaluate.encode import Encoder
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.tasks.side import comparable
from embedjax.load import Model
from embedjax.mine.choose import Chosen, choose

Progress = Callable[[int, int], None]

ANCHORS = 4096
"""Anchors searched for at once; the corpus goes to the devices once for so many."""

NEAREST = 1 << 21
"""Documents found at once, for all anchors: those of an anchor with many positives are searched for with few others."""

QUERIES = 256
"""Anchors are searched for in tiles of so many: the last is filled up, or each size would be compiled."""


def stream(
    model: Model,
    texts: Corpus,
    column: str,
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    start: int = 0,
    progress: Progress | None = None,
) -> Iterator[Float[np.ndarray, "n E"]]:
    """Blocks of the texts' vectors, from text `start` on, made so that their product is the model's similarity."""
    encoder, total = Encoder(model, column=column, task=task, mesh=mesh), len(texts)
    starts = range(start, total, min(encoder.block, 2 * encoder.tokens))
    blocks = (encoder.tokenize(texts.take(range(at, min(at + starts.step, total)))) for at in starts)
    told = (lambda done: progress(start + done, total)) if progress else None
    for vectors in encoder.stream(blocks, progress=told):
        yield comparable(vectors, model.config.similarity)


def negatives(
    how: Negatives,
    pairs: Pairs,
    known: Lists,
    queries: Float[np.ndarray, "U E"],
    documents: Float[np.ndarray, "N E"],
    *,
    mesh: DeviceMesh | None = None,
    seed: int = 0,
    start: int = 0,
) -> Iterator[tuple[range, Chosen]]:
    """(numbers of anchors, their negatives), block by block from anchor `start` on."""
    positive = lowest(pairs, queries, documents)
    for block, k in blocks(known, how.range_max, start):
        part = np.asarray(queries[block.start : block.stop])
        filled = np.pad(part, ((0, -len(part) % QUERIES), (0, 0)))
        found = topk(filled, documents, k, mesh=mesh, query_block=QUERIES)
        scores, numbers = (array[: len(block)] for array in found)
        yield (
            block,
            choose(
                how,
                numbers,
                scores,
                known=known.padded(block),
                positive=positive[block.start : block.stop],
                anchors=np.array(block),
                seed=seed,
            ),
        )


def blocks(known: Lists, range_max: int, start: int = 0) -> Iterator[tuple[range, int]]:
    """(numbers of anchors, how many documents near each are looked at) of all anchors from `start` on: at most ANCHORS, and
    NEAREST documents. What is known of an anchor may be the nearest there is, so the longest list of a block is added to the
    ranks asked for; as a power of two, since each number is compiled once."""
    sizes = known.sizes
    while start < len(sizes):
        longest = np.maximum.accumulate(sizes[start : start + ANCHORS])
        wanted = range_max + (1 << np.ceil(np.log2(np.maximum(longest, 1))).astype(int))
        count = max(1, int(np.count_nonzero(np.arange(1, len(wanted) + 1) * wanted <= NEAREST)))
        yield range(start, start + count), int(wanted[count - 1])
        start += count


def lowest(pairs: Pairs, queries: Float[np.ndarray, "U E"], documents: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "U"]:
    """The lowest score that each anchor gives one of its positives."""
    found = np.full(len(queries), np.inf, np.float32)
    for rows in np.array_split(pairs.rows, max(1, len(pairs.rows) // ANCHORS)):
        np.minimum.at(found, pairs.anchor[rows], score(queries[pairs.anchor[rows]], documents[pairs.positive[rows]]))
    return np.where(np.isinf(found), 0, found)  # anchors of rows that cannot be used have none


def score(a: Float[np.ndarray, "n E"], b: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n"]:
    """The product of each row with the one of the same number."""
    return np.einsum("ne,ne->n", a, b)
