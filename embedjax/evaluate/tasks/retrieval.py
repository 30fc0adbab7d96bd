"""Retrieval: each query's documents among all others, by exact search."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.config import Retrieval, Similarity
from embedjax.config.errors import ConfigError
from embedjax.data.sources import BadRow, Source, open_source, select
from embedjax.evaluate import scores
from embedjax.evaluate.late import maxsim_topk
from embedjax.evaluate.pictures import Stored
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.rows import key_at, number_at, string_at, text_at
from embedjax.evaluate.stages import by_tokens, rerank
from embedjax.evaluate.tasks.first import First, first_of
from embedjax.evaluate.tasks.reading import opened, picture_at, require, rows_of
from embedjax.evaluate.tasks.side import Side, Vectors, comparable, own_scores
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import Model

# Ranks that the metrics look at.
DEPTH = 100

# The column of titles that a file need not have: BEIR's files have it, others often not.
TITLE = ("title", "title")


@dataclasses.dataclass(frozen=True)
class RetrievalData:
    """Queries, documents and, for each query, {row number of a document: relevance}."""

    task: Retrieval
    queries: Side
    documents: Side
    judgements: Sequence[Mapping[int, float]]
    own: Int[np.ndarray, " Q"] | None = None
    """The row number of each query's own document (-1 for none), if that is not to be found."""
    first: First | None = None
    """The first stage, where the task names one that is not the model's own."""

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.queries, self.documents

    def some(self, queries: Int[np.ndarray, " q"]) -> "RetrievalData":
        """The same documents, and only the queries of these numbers."""
        texts = Side([self.queries.texts[query] for query in queries], self.queries.column, self.queries.pictures)
        own = None if self.own is None else self.own[queries]
        first = self.first and self.first.some(queries)
        judged = [self.judgements[query] for query in queries]
        return dataclasses.replace(self, queries=texts, judgements=judged, own=own, first=first)

    def depth(self, k: int = DEPTH) -> int:
        """How many documents have to be found for k to be left by `others`."""
        return k if self.own is None else k + 1

    def others(self, ranked: Int[np.ndarray, "Q n"], k: int = DEPTH) -> Int[np.ndarray, "Q k"]:
        """The first k of a ranking, each query's own document left out if the task says so; -1 where there is none."""
        if self.own is not None:
            ranked = np.where(ranked == self.own[:, None], -1, ranked)
            ranked = np.take_along_axis(ranked, np.argsort(ranked < 0, axis=1, kind="stable"), axis=1)
        return ranked[:, :k]

    def rank(self, model: Model, mesh: DeviceMesh | None = None, k: int = DEPTH) -> Int[np.ndarray, "Q k"]:
        """Row numbers of each query's min(k, N) nearest documents, nearest first; -1 where there is none."""
        vectors = [side.vectors(model, mesh, self.task.prompt) for side in self.sides]
        return self.others(self._nearest(vectors, model.config.similarity, mesh, self.depth(k)), k)

    def measure(self, ranked: Int[np.ndarray, "Q n"]) -> dict[str, float]:
        """The metrics of any ranking of these documents, `depth()` of them, such as BM25's; means over the queries."""
        gains, ideal = scores.gains_of(self.others(ranked), self.judgements), scores.ideal_gains(self.judgements)
        found = {
            "ndcg@10": scores.ndcg_at(gains, ideal, 10),
            "mrr@10": scores.mrr_at(gains, 10),
            "map@100": scores.map_at(gains, ideal, 100),
            "recall@1": scores.recall_at(gains, ideal, 1),
            "recall@10": scores.recall_at(gains, ideal, 10),
            "recall@100": scores.recall_at(gains, ideal, 100),
        }
        if self.task.pictures:
            found |= {f"success@{k}": scores.success_at(gains, k) for k in (1, 5, 10)}
        return {key: float(value.mean()) for key, value in found.items()}

    def scores(
        self, vectors: Sequence[Vectors | TokenVectors], similarity: Similarity, mesh: DeviceMesh | None
    ) -> dict[str, float]:
        """The metrics of the model's ranking."""
        return self.measure(self._nearest(vectors, similarity, mesh, self.depth()))

    def _nearest(
        self, vectors: Sequence[Vectors | TokenVectors], similarity: Similarity, mesh: DeviceMesh | None, k: int
    ) -> Int[np.ndarray, "Q k"]:
        """`nearest`, of documents as the task keeps them, and in the stages that it asks for."""
        queries, documents = vectors
        if isinstance(documents, TokenVectors):
            documents = documents.pooled(self.task.pool)
            documents = documents if self.task.precision == "float32" else documents.quantized(self.task.precision)
        if not self.task.first:
            return nearest((queries, documents), similarity, mesh, k)
        if self.first is not None:
            count = self.depth(self.task.candidates)
            candidates = self.first.candidates(self.queries, self.documents, count, mesh)
        else:
            assert isinstance(queries, TokenVectors) and isinstance(documents, TokenVectors)
            candidates = by_tokens(queries, documents, self.task.candidates, mesh=mesh)
        return rerank(own_scores((queries, documents), similarity), candidates, k)[1]


def nearest(
    vectors: Sequence[Vectors | TokenVectors], similarity: Similarity, mesh: DeviceMesh | None, k: int
) -> Int[np.ndarray, "Q k"]:
    """(queries, documents) -> row numbers of each query's min(k, N) nearest documents, nearest first."""
    if tokens := [part for part in vectors if isinstance(part, TokenVectors)]:
        asked, found = tokens
        return maxsim_topk(asked, found, k, mesh=mesh)[1]
    queries, documents = (comparable(part, similarity) for part in vectors if not isinstance(part, TokenVectors))
    return topk(queries, documents, k, mesh=mesh)[1]


def read(task: Retrieval) -> RetrievalData:
    return _read_pairs(task) if task.corpus is None else _read_judged(task)


def _read_pairs(task: Retrieval) -> RetrievalData:
    """Equal documents are one document; all documents of equal queries are relevant to the one query."""
    source = opened(task, ("query", "document"))
    queries: dict[str | Stored, int] = {}
    documents: dict[str | Stored, int] = {}
    judgements: list[dict[int, float]] = []
    at = lambda name, row: (picture_at if name in task.pictures else text_at)(source, row, task.columns[name])
    for row in rows_of(task, source):
        query, document = (at(name, row) for name in ("query", "document"))
        place = queries.setdefault(query, len(queries))
        if place == len(judgements):
            judgements.append({})
        judgements[place][documents.setdefault(document, len(documents))] = 1.0
    return _retrieval(task, queries, documents, judgements)


def _read_judged(task: Retrieval) -> RetrievalData:
    """Judged queries against a whole corpus, as BEIR lays it out; both may be pictures. Documents, unlike queries, may be empty
    texts."""
    if task.corpus is None or task.queries is None:
        raise ConfigError(f"task {task.name!r} has a corpus but no queries; with a corpus, set `queries` too")
    corpus = _items_by_id(task, open_source(task.corpus), task.corpus_columns, "document")
    asking = open_source(task.queries)
    asked = _items_by_id(task, asking, task.query_columns, "query")
    source, columns = opened(task, ("query_id", "document_id"), optional=("relevance",)), task.columns
    places = {key: place for place, key in enumerate(corpus)}
    judgements: dict[str, dict[int, float]] = {}
    for row in rows_of(task, source):
        query, document = (key_at(source, row, columns[name]) for name in ("query_id", "document_id"))
        for key, known, what in ((query, asked, "query"), (document, corpus, "document")):
            if key not in known:
                raise BadRow(*source.where(row), f"{what} {key!r} is not in the {what} file")
        if isinstance(text := asked[query], str) and not text.strip():
            raise BadRow(*asking.where(list(asked).index(query)), f"the text of query {query!r} is empty")
        relevance = number_at(source, row, columns["relevance"]) if "relevance" in columns else 1.0
        judgements.setdefault(query, {})[places[document]] = relevance
    found = _retrieval(task, [asked[query] for query in judgements], corpus.values(), list(judgements.values()))
    if not task.skip_same_id:
        return found
    return dataclasses.replace(found, own=np.array([places.get(query, -1) for query in judgements], np.int32))


def _retrieval(
    task: Retrieval,
    queries: Iterable[str | Stored],
    documents: Iterable[str | Stored],
    judgements: Sequence[Mapping[int, float]],
) -> RetrievalData:
    side = lambda items, name: Side(list(items), name, name in task.pictures)
    return RetrievalData(task, side(queries, "query"), side(documents, "document"), judgements, first=first_of(task))


def _items_by_id(task: Retrieval, source: Source, columns: Mapping[str, str], side: str) -> dict[str, str | Stored]:
    seen = side in task.pictures
    require(task, columns, ("id", "image") if seen else ("id", "text"), () if seen else ("title",))
    select(source, {ours: theirs for ours, theirs in columns.items() if (ours, theirs) != TITLE}, f"task {task.name!r}")
    found: dict[str, str | Stored] = {}
    for row in range(len(source)):
        key = key_at(source, row, columns["id"])
        if key in found:
            raise BadRow(*source.where(row), f"the id {key!r} appears twice")
        if seen:
            found[key] = picture_at(source, row, columns["image"])
        else:
            title = _title_at(source, row, columns.get("title"))
            found[key] = f"{title} {string_at(source, row, columns['text'])}".strip()
    return found


def _title_at(source: Source, row: int, column: str | None) -> str:
    if column is None or ("title", column) == TITLE and source[row].get(column) is None:
        return ""
    return string_at(source, row, column)
