"""Search in two stages: few documents as candidates of each query, and the exact scores of these alone."""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float, Int

from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.token_vectors import TokenVectors

Candidates = Sequence[Int[np.ndarray, " n"]]
"""Numbers of some documents for each query, in their order."""


def by_tokens(queries: TokenVectors, documents: TokenVectors, k: int, *, mesh: DeviceMesh | None = None) -> list[np.ndarray]:
    """The documents that have one of the k tokens nearest to any token of a query, by exact search over all tokens."""
    flat = queries.rows(slice(None))
    _, nearest = topk(flat, _Rows(documents), k, mesh=mesh)
    owners = np.searchsorted(documents.starts, nearest, side="right") - 1
    return [np.unique(owners[start:stop]) for start, stop in zip(queries.starts[:-1], queries.starts[1:], strict=True)]


def by_ranking(ranked: Int[np.ndarray, "Q n"]) -> list[np.ndarray]:
    """The documents of a ranking, which has -1 where there is none."""
    return [np.unique(row[row >= 0]) for row in ranked]


def rerank(
    score: Callable[[int, Sequence[int]], Float[np.ndarray, " n"]], candidates: Candidates, k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores (highest first) and numbers of each query's k best candidates by `score(query, documents)`; equal scores in the
    order of their numbers, -inf and -1 where there are no more."""
    scores = np.full((len(candidates), k), -np.inf, np.float32)
    places = np.full((len(candidates), k), -1, np.int32)
    for query, some in enumerate(candidates):
        found = score(query, some.tolist())
        order = np.lexsort((some, -found))[:k]
        scores[query, : len(order)], places[query, : len(order)] = found[order], some[order]
    return scores, places


class _Rows:
    """All vectors of some texts, one block of them as float32 at a time."""

    def __init__(self, tokens: TokenVectors):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens.vectors)

    def __getitem__(self, at: slice) -> np.ndarray:
        return self.tokens.rows(at)
