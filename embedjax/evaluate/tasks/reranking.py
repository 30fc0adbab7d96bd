"""Reranking: the order of each query's own candidates, some of which are right."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh

from embedjax.config import Reranking, Similarity
from embedjax.config.errors import DataError
from embedjax.evaluate import scores
from embedjax.evaluate.rows import text_at, texts_at
from embedjax.evaluate.tasks.reading import opened, rows_of
from embedjax.evaluate.tasks.side import Side, Vectors, own_scores
from embedjax.evaluate.token_vectors import TokenVectors


@dataclasses.dataclass(frozen=True)
class RerankingData:
    """Queries, all candidates, and for each query {row number of one of its candidates: whether it is right}."""

    task: Reranking
    sides: tuple[Side, Side]
    judgements: Sequence[Mapping[int, bool]]

    def scores(
        self, vectors: Sequence[Vectors | TokenVectors], similarity: Similarity, mesh: DeviceMesh | None
    ) -> dict[str, float]:
        """Means over the queries. Of candidates with equal similarity the wrong ones count as the nearer ones."""
        of = own_scores(vectors, similarity)
        gains = np.zeros((len(self.judgements), max(map(len, self.judgements))))
        for query, (row, judged) in enumerate(zip(gains, self.judgements, strict=True)):
            right = np.fromiter(judged.values(), np.float64)
            found = of(query, list(judged))
            row[: len(judged)] = right[np.lexsort((right, -found))]
        ideal = -np.sort(-gains, axis=1)
        values = {
            "map": scores.map_at(gains, ideal, gains.shape[1]),
            "mrr@10": scores.mrr_at(gains, 10),
            "ndcg@10": scores.ndcg_at(gains, ideal, 10),
        }
        return {key: float(value.mean()) for key, value in values.items()}


def read(task: Reranking) -> RerankingData:
    """Queries with right candidates only, or wrong ones only, tell nothing and are left out, as sentence-transformers does."""
    more = [name for name in task.columns if re.fullmatch(r"(positive|negative)(_\d+)?", name)]
    source = opened(task, ("query", "positive", "negative"), optional=more)
    kinds = {name: name.partition("_")[0] == "positive" for name in task.columns if name != "query"}
    queries: dict[str, dict[str, bool]] = {}
    for row in rows_of(task, source):
        judged = queries.setdefault(text_at(source, row, task.columns["query"]), {})
        for name, right in kinds.items():
            for text in texts_at(source, row, task.columns[name]):
                judged[text] = right or judged.get(text, False)
    queries = {query: judged for query, judged in queries.items() if len(set(judged.values())) == 2}
    if not queries:
        raise DataError(f"task {task.name!r}: no query has both a positive and a negative")
    places: dict[str, int] = {}
    judgements = [
        {places.setdefault(text, len(places)): right for text, right in judged.items()} for judged in queries.values()
    ]
    return RerankingData(task, (Side(list(queries), "query"), Side(list(places), "document")), judgements)
