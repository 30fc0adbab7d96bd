"""The command line of `embedjax evaluate` -> (model, task). Reads no data and imports no jax."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import tyro

from embedjax import config
from embedjax.config import File, Task
from embedjax.config.errors import ConfigError, nearest

KINDS: dict[str, type[Task]] = {kind().name: kind for kind in get_args(Task)}
PAIRED = {"query": "query", "document": "document"}
JUDGED = {"query_id": "query-id", "document_id": "corpus-id", "relevance": "score"}


def parse(arguments: Sequence[str]) -> tuple[str, Task]:
    """The model's name and the task. Raises ConfigError for an option that the task does not have."""

    def command(
        model: tyro.conf.Positional[str],
        task: str,
        data: str,
        columns: str = "",
        names: str = "",
        dims: str = "",
        limit: int = 0,
        prompt: str = "",
        train: str = "",
        per_label: int = config.Classification.per_label,
        k: int = config.KnnClassification.k,
        positive: str = config.PairClassification.positive,
        head: str = config.HeadAccuracy.head,
        queries: str = "",
        corpus: str = "",
        query_columns: str = "",
        corpus_columns: str = "",
        skip_same_id: bool = config.Retrieval.skip_same_id,
    ) -> tuple:
        """Scores a model.

        Args:
            model: Run folder, exported folder, Hugging Face or sentence-transformers folder, or hub id.
            task: sts (correlation with scored pairs), retrieval (each query's documents among all), reranking (among its own
                candidates), pairs (do two texts belong together), triplets, classification (logistic regression), knn,
                head (the model's own class head), clustering (k-means) or bitext (translations).
            data: File of rows: of scored or labelled pairs, of query-document pairs or (with --corpus) judgements, of
                triplets, or of labelled texts.
            columns: Ours=theirs, comma-separated, where they differ. Ours: a,b,score (sts); query,document (retrieval; with
                --corpus query_id,document_id,relevance); query,positive,negative (reranking); a,b,label (pairs);
                anchor,positive,negative (triplets); text,label (classification, knn, clustering, and head, which has other for
                the second text of pairs); source,target (bitext).
            names: Comma-separated column names of CSV or TSV files without a header row.
            dims: Prefixes of the vectors to score as well, such as 256,64.
            limit: At most so many rows; 0 for all.
            prompt: Name of the model's prompt or adapter to encode with; without it those of queries and documents are used for
                them, where the model has such.
            train: classification, knn: file of labelled texts to learn from, with the same columns.
            per_label: classification: training rows of each label in each of ten draws; 0 for all rows, once.
            k: knn: nearest texts that vote.
            positive: pairs: the label of pairs that belong together.
            head: head: name of the set that trained it, where the model has several.
            queries: retrieval, with --corpus: file of queries (columns _id, text).
            corpus: retrieval: file of documents (columns _id, text and, if there is one, title).
            query_columns: retrieval: columns of --queries where they differ, such as id=qid.
            corpus_columns: retrieval: columns of --corpus where they differ, such as id=docid,title=headline,text=body.
            skip_same_id: retrieval: no query finds the document of its own id (ArguAna, Quora, as BEIR and mteb have them).
        """
        given = {name: File(path) for name, path in (("queries", queries), ("corpus", corpus)) if path}
        given |= {"train": File(train, names=_listed(names))} if train else {}
        chosen = (
            (config.Classification, "per_label", per_label),
            (config.KnnClassification, "k", k),
            (config.PairClassification, "positive", positive),
            (config.HeadAccuracy, "head", head),
            (config.Retrieval, "skip_same_id", skip_same_id),
        )
        given |= {name: value for kind, name, value in chosen if value != getattr(kind, name)}
        for name, text in (("query_columns", query_columns), ("corpus_columns", corpus_columns)):
            given |= {name: _pairs(text, name)} if text else {}
        source = File(data, names=_listed(names))
        fields = dict(source=source, columns=_pairs(columns), limit=limit, prompt=prompt, dims=_numbers(dims))
        return model, task, fields | given

    model, kind, fields = tyro.cli(command, args=arguments, prog="embedjax evaluate")
    return model, _task(kind, fields)


def _task(name: str, fields: dict[str, Any]) -> Task:
    if name not in KINDS:
        raise ConfigError(f"unknown task {name!r}; {nearest(name, KINDS)}")
    kind = KINDS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    for key in fields:
        if key not in known:
            fits = [other for other, kind in KINDS.items() if key in {field.name for field in dataclasses.fields(kind)}]
            raise ConfigError(f"--{key.replace('_', '-')} is for the task {' or '.join(fits)}, not for {name}")
    if "train" in known and "train" not in fields:
        raise ConfigError(f"the task {name} learns from labelled texts: name their file with --train")
    if kind is config.Retrieval:
        if ("queries" in fields) != ("corpus" in fields):
            raise ConfigError("--queries and --corpus go together")
        for key in ("query_columns", "corpus_columns"):
            if key in fields and "corpus" not in fields:
                raise ConfigError(f"--{key.replace('_', '-')} is for a file of --queries and one of --corpus")
            fields[key] = getattr(kind(), key) | fields.get(key, {})
        fields["columns"] = fields["columns"] or (JUDGED if "corpus" in fields else PAIRED)
    else:
        fields["columns"] = kind().columns | fields["columns"]
    return kind(**fields)


def _pairs(text: str, option: str = "columns") -> dict[str, str]:
    """`ours=theirs,...` as a dict. Raises ConfigError."""
    pairs = {}
    for part in _listed(text):
        ours, sign, theirs = part.partition("=")
        if not (ours and sign and theirs):
            raise ConfigError(f"--{option.replace('_', '-')} holds {part!r}; it must be OURS=THEIRS, such as query=question")
        pairs[ours] = theirs
    return pairs


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _numbers(text: str) -> tuple[int, ...]:
    if odd := [part for part in _listed(text) if not part.isdecimal()]:
        raise ConfigError(f"--dims holds {odd[0]!r}; it must be numbers, such as 256,64")
    return tuple(map(int, _listed(text)))
