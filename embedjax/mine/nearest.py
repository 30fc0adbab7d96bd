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


def stream(
    model: Model,
    texts: Corpus,
    column: str,
    *,
    mesh: DeviceMesh | None = None,
    start: int = 0,
    progress: Progress | None = None,
) -> Iterator[Float[np.ndarray, "n E"]]:
    """Blocks of the texts' vectors, from text `start` on, made so that their product is the model's similarity."""
    encoder, total = Encoder(model, column=column, mesh=mesh), len(texts)
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
    for at in range(start, len(queries), ANCHORS):
        block = range(at, min(at + ANCHORS, len(queries)))
        scores, numbers = topk(queries[block.start : block.stop], documents, how.range_max + known.longest, mesh=mesh)
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


def lowest(pairs: Pairs, queries: Float[np.ndarray, "U E"], documents: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "U"]:
    """The lowest score that each anchor gives one of its positives."""
    found = np.full(len(queries), np.inf, np.float32)
    for rows in np.array_split(pairs.rows, max(1, len(pairs.rows) // ANCHORS)):
        np.minimum.at(found, pairs.anchor[rows], score(queries[pairs.anchor[rows]], documents[pairs.positive[rows]]))
    return np.where(np.isinf(found), 0, found)  # anchors of rows that cannot be used have none


def score(a: Float[np.ndarray, "n E"], b: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n"]:
    """The product of each row with the one of the same number."""
    return np.einsum("ne,ne->n", a, b)
