"""Evaluation tasks -> metrics of a model: semantic similarity and retrieval. Reads its data once, trains nothing."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float, Int

from embedjax.config import Retrieval, Sts, Task
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.sources import Source, open_source, select
from embedjax.data.text import Texts
from embedjax.evaluate import scores
from embedjax.evaluate.encode import Columns, Encoder
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.rows import key_at, number_at, string_at, text_at
from embedjax.load import MAIN_METRIC, Model

# Ranks that the retrieval metrics look at.
DEPTH = 100


class Side:
    """The texts of one column, and their tokens as the last tokenizer gave them, so that a run tokenizes them once."""

    def __init__(self, texts: list[str], column: str, prompt: str | None = None):
        self.texts, self.column, self.prompt = texts, column, prompt
        self.tokens: tuple[tuple, list[Columns]] | None = None

    def vectors(self, model: Model, mesh: DeviceMesh | None) -> Float[np.ndarray, "N E"]:
        """Encoded by the column's tower, with the named prompt if the model has it, else its default."""
        known = model.texts[model.config.tower_of(self.column)].prompts
        encoder = Encoder(model, column=self.column, prompt=self.prompt if self.prompt in known else None, mesh=mesh)
        key = (encoder.prompt, *_identity(encoder.texts))
        if self.tokens is None or self.tokens[0] != key:
            starts = range(0, len(self.texts), encoder.block)
            self.tokens = key, [encoder.tokenize(self.texts[at : at + encoder.block]) for at in starts]
        return np.concatenate([encoder.embed(block) for block in self.tokens[1]])


@dataclasses.dataclass(frozen=True)
class StsData:
    """N pairs of texts and the similarity people gave each."""

    name: str
    a: Side
    b: Side
    scores: Float[np.ndarray, " N"]

    def evaluate(self, model: Model, mesh: DeviceMesh | None = None) -> dict[str, float]:
        """Correlations of the cosines with the scores; 0 for a model whose cosines are all equal."""
        a, b = (side.vectors(model, mesh).astype(np.float64) for side in (self.a, self.b))
        length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = (a * b).sum(1) / np.maximum(length, 1e-12)
        found = {"spearman": scores.spearman(cosines, self.scores), "pearson": scores.pearson(cosines, self.scores)}
        return {f"{self.name}/{key}": 0.0 if np.isnan(value) else value for key, value in found.items()}


@dataclasses.dataclass(frozen=True)
class RetrievalData:
    """Queries, documents and, for each query, {row number of a document: relevance}."""

    name: str
    queries: Side
    documents: Side
    judgements: Sequence[Mapping[int, float]]

    def rank(self, model: Model, mesh: DeviceMesh | None = None, k: int = DEPTH) -> Int[np.ndarray, "Q k"]:
        """Row numbers of each query's min(k, N) nearest documents by cosine, nearest first."""
        queries, documents = (side.vectors(model, mesh) for side in (self.queries, self.documents))
        return topk(_unit(queries), _unit(documents), k, mesh=mesh)[1]

    def measure(self, ranked: Int[np.ndarray, "Q k"]) -> dict[str, float]:
        """The metrics of any ranking of these documents, such as `rank`'s or BM25's; means over the queries."""
        gains, ideal = scores.gains_of(ranked, self.judgements), scores.ideal_gains(self.judgements)
        found = {
            "ndcg@10": scores.ndcg_at(gains, ideal, 10),
            "mrr@10": scores.mrr_at(gains, 10),
            "map@100": scores.map_at(gains, ideal, 100),
            "recall@1": scores.recall_at(gains, ideal, 1),
            "recall@10": scores.recall_at(gains, ideal, 10),
            "recall@100": scores.recall_at(gains, ideal, 100),
        }
        return {f"{self.name}/{key}": float(value.mean()) for key, value in found.items()}

    def evaluate(self, model: Model, mesh: DeviceMesh | None = None) -> dict[str, float]:
        """The metrics of the model's ranking."""
        return self.measure(self.rank(model, mesh))


TaskData = StsData | RetrievalData


def evaluate(model: Model, tasks: Sequence[Task | TaskData], *, mesh: DeviceMesh | None = None) -> dict[str, float]:
    """{"NAME/METRIC": value} of all tasks. A training run calls `prepare` once and passes what it gives.

    Raises DataError for data that cannot be used, NonFiniteError for a model whose vectors are not finite.
    """
    found: dict[str, float] = {}
    for task in tasks:
        data = task if isinstance(task, StsData | RetrievalData) else read(task)
        found.update(data.evaluate(model, mesh))
    return found


def main_metric(task: Task) -> str:
    """The key of the metric that stands for a task."""
    return f"{task.name}/{MAIN_METRIC[type(task)]}"


def prepare(tasks: Sequence[Task]) -> tuple[TaskData, ...]:
    """All tasks, read. Raises ConfigError for two of one name, DataError."""
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"evaluation tasks share the name {twice[0]!r}; give each its own")
    return tuple(read(task) for task in tasks)


def read(task: Task) -> TaskData:
    """The data of one task. Raises DataError for the first row that cannot be used: an evaluation passes over none."""
    match task:
        case Sts():
            return _read_sts(task)
        case Retrieval(corpus=None):
            return _read_pairs(task)
        case Retrieval():
            return _read_judged(task)


def _read_sts(task: Sts) -> StsData:
    source, columns = _open(task, ("a", "b", "score"))
    rows = range(min(len(source), task.limit or len(source)))
    a, b = ([text_at(source, row, columns[name]) for row in rows] for name in ("a", "b"))
    values = np.array([number_at(source, row, columns["score"]) for row in rows])
    if len(np.unique(values)) < 2:
        raise DataError(f"task {task.name!r}: all {len(values)} scores are {values[0]:g}; a correlation needs different ones")
    return StsData(task.name, Side(a, "anchor"), Side(b, "positive"), values)


def _read_pairs(task: Retrieval) -> RetrievalData:
    """Equal documents are one document; all documents of equal queries are relevant to the one query."""
    source, columns = _open(task, ("query", "document"))
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    judgements: list[dict[int, float]] = []
    for row in range(min(len(source), task.limit or len(source))):
        query, document = (text_at(source, row, columns[name]) for name in ("query", "document"))
        place = queries.setdefault(query, len(queries))
        if place == len(judgements):
            judgements.append({})
        judgements[place][documents.setdefault(document, len(documents))] = 1.0
    return _retrieval(task, queries, documents, judgements)


def _read_judged(task: Retrieval) -> RetrievalData:
    """Judged queries against a whole corpus, as BEIR lays it out. Documents, unlike queries, may be empty texts."""
    if task.corpus is None or task.queries is None:
        raise ConfigError(f"task {task.name!r} has a corpus but no queries; with a corpus, set `queries` too")
    corpus = _texts_by_id(task, open_source(task.corpus), task.corpus_columns)
    texts = _texts_by_id(task, open_source(task.queries), task.query_columns)
    source, columns = _open(task, ("query_id", "document_id"))
    places = {key: place for place, key in enumerate(corpus)}
    judgements: dict[str, dict[int, float]] = {}
    for row in range(min(len(source), task.limit or len(source))):
        query, document = (key_at(source, row, columns[name]) for name in ("query_id", "document_id"))
        for key, known, what in ((query, texts, "query"), (document, corpus, "document")):
            if key not in known:
                raise DataError(f"{':'.join(map(str, source.where(row)))}: {what} {key!r} is not in the {what} file")
        if not texts[query].strip():
            raise DataError(f"task {task.name!r}: the text of query {query!r} is empty")
        relevance = number_at(source, row, columns["relevance"]) if "relevance" in columns else 1.0
        judgements.setdefault(query, {})[places[document]] = relevance
    return _retrieval(task, [texts[query] for query in judgements], corpus.values(), list(judgements.values()))


def _retrieval(
    task: Retrieval, queries: Iterable[str], documents: Iterable[str], judgements: Sequence[Mapping[int, float]]
) -> RetrievalData:
    sides = Side(list(queries), "anchor", "query"), Side(list(documents), "positive", "document")
    return RetrievalData(task.name, *sides, judgements)


def _texts_by_id(task: Retrieval, source: Source, columns: Mapping[str, str]) -> dict[str, str]:
    _require(task, columns, ("id", "text"))
    select(source, dict(columns), f"task {task.name!r}")
    found: dict[str, str] = {}
    for row in range(len(source)):
        key = key_at(source, row, columns["id"])
        if key in found:
            raise DataError(f"{':'.join(map(str, source.where(row)))}: the id {key!r} appears twice")
        title = string_at(source, row, columns["title"]) if "title" in columns else ""
        found[key] = f"{title} {string_at(source, row, columns['text'])}".strip()
    return found


def _open(task: Task, needed: Sequence[str]) -> tuple[Source, Mapping[str, str]]:
    _require(task, task.columns, needed)
    source = open_source(task.source)
    select(source, task.columns, f"task {task.name!r}")
    return source, task.columns


def _require(task: Task, columns: Mapping[str, str], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in columns]:
        raise ConfigError(f"task {task.name!r} names no column for {missing[0]}; its columns are {dict(columns)}")


def _unit(vectors: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N E"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _identity(texts: Texts) -> tuple:
    """What decides tokens, cheap enough to compare each time."""
    said = (texts.max_length, tuple(sorted(texts.prompts.items())), texts.default_prompt, texts.include_prompt)
    return (*said, hash(texts.tokenizer.to_str()))
