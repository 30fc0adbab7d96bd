"""The command line of `embedjax evaluate` -> (model, task). Reads names of classes and templates, no data; imports no jax."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import tyro

from embedjax import config
from embedjax.config import Pictures, Source, Tar, Task, overrides
from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.data.sources import open_source, source_of
from embedjax.evaluate.rows import key_at, text_at

KINDS: dict[str, type[Task]] = {kind().name: kind for kind in get_args(Task)}
PAIRED = {"query": "query", "document": "document"}
JUDGED = {"query_id": "query-id", "document_id": "corpus-id", "relevance": "score"}
SEEN = {Pictures: {"id": "name", "image": "image"}, Tar: {"id": "key", "image": "image"}}
"""The columns of queries or documents that are pictures, in a folder and in archives; else _id and image."""
LABELLED = {Pictures: {"image": "image", "label": "label"}, Tar: {"image": "image", "label": "cls"}}
"""What is classified in a folder of pictures, whose folders are the labels, and in webdataset's archives."""
OWN: dict[type[Task], tuple[str, ...]] = {
    config.Classification: ("per_label",),
    config.KnnClassification: ("k",),
    config.PairClassification: ("positive",),
    config.HeadAccuracy: ("head",),
    config.Retrieval: ("skip_same_id", "pool", "precision", "first", "candidates"),
}
"""Options that are fields of one task, with its defaults."""


class Asked(NamedTuple):
    """What the command line asks for."""

    model: str
    task: Task
    retention: bool
    """Whether at every dimension and precision."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Scores a model."""

    model: tyro.conf.Positional[str]
    """Run folder, exported folder, Hugging Face or sentence-transformers folder, or hub id."""
    task: str
    """sts (correlation with scored pairs), retrieval (each query's documents among all), reranking (among its own candidates),
    pairs (do two texts belong together), triplets, classification (logistic regression; with --per-label 0 the linear probe),
    knn, zero-shot (by the names of the classes), head (the model's own class head), clustering (k-means) or bitext
    (translations)."""
    data: str
    """File of rows: of scored or labelled pairs, of query-document pairs or (with --corpus) judgements, of triplets, or of
    labelled texts or pictures; or a folder of pictures, labelled by the folders they lie in, or webdataset's tar archives,
    labelled by cls."""
    columns: str = ""
    """Ours=theirs, comma-separated, where they differ. Ours: a,b,score (sts); query,document (retrieval; with --corpus
    query_id,document_id,relevance); query,positive,negative (reranking); a,b,label (pairs); anchor,positive,negative
    (triplets); text,label or, of pictures, image,label (classification, knn, zero-shot, clustering, and head, which has other
    for the second text of pairs); source,target (bitext)."""
    names: str = ""
    """Comma-separated column names of CSV or TSV files without a header row."""
    dims: str = ""
    """Prefixes of the vectors to score as well, such as 256,64."""
    limit: int = 0
    """At most so many rows; 0 for all."""
    prompt: str = ""
    """Name of the model's prompt or adapter to encode with; without it those of queries and documents are used for them, where
    the model has such."""
    train: str = ""
    """classification, knn: labelled texts or pictures to learn from, with the same columns."""
    per_label: int = config.Classification.per_label
    """classification: training rows of each label in each of ten draws; 0 for all rows, once."""
    k: int = config.KnnClassification.k
    """knn: nearest texts or pictures that vote."""
    positive: str = config.PairClassification.positive
    """pairs: the label of pairs that belong together."""
    head: str = config.HeadAccuracy.head
    """head: name of the set that trained it, where the model has several."""
    queries: str = ""
    """retrieval, with --corpus: file of queries (columns _id, text; of pictures _id, image)."""
    corpus: str = ""
    """retrieval: file of documents (columns _id, text and, if there is one, title; of pictures _id, image)."""
    query_columns: str = ""
    """retrieval: columns of --queries where they differ, such as id=qid."""
    corpus_columns: str = ""
    """retrieval: columns of --corpus where they differ, such as id=docid,title=headline,text=body."""
    pictures: str = ""
    """retrieval: which are pictures: query, document or query,document."""
    templates: tuple[str, ...] = ()
    """zero-shot: texts with {} for the name of the class, such as "a photo of a {}.", or files of one a line."""
    classes: str = ""
    """zero-shot: names of the classes, comma-separated, or a file: of lines, or a table of label and name. Labels are the names
    or, of lines and commas, their numbers from 0. Without it all labels that occur."""
    skip_same_id: bool = config.Retrieval.skip_same_id
    """retrieval: no query finds the document of its own id (ArguAna, Quora, as BEIR and mteb have them)."""
    pool: int = config.Retrieval.pool
    """retrieval, late interaction: keep one vector for so many tokens of a document."""
    precision: config.Precision = config.Retrieval.precision
    """retrieval, late interaction: what the numbers of documents' vectors are kept as."""
    first: str = config.Retrieval.first
    """retrieval: score the candidates of a first stage alone: bm25, a MODEL of one vector a text or, by late interaction,
    tokens (the documents of the tokens nearest to a query's)."""
    candidates: int = config.Retrieval.candidates
    """retrieval: how many --first finds for a query, of tokens for each of its tokens."""
    retention: bool = False
    """retrieval and sts, one vector a text: score whole vectors and those of --dims in float32, float16, int8 and binary, with
    and without rescoring; the table, a plot and a section of the card are left in an exported folder, which has ranges for int8
    (export FOLDER --calibrate FILE --dims 256,64)."""

    def fields(self) -> dict[str, Any]:
        """Those of the task that were given. Raises ConfigError, DataError for what cannot be read."""
        given: dict[str, Any] = {"source": source_of(self.data, _listed(self.names)), "columns": _pairs(self.columns)}
        given |= {"limit": self.limit, "prompt": self.prompt, "dims": numbers(self.dims)}
        given |= {name: source_of(path) for name, path in (("queries", self.queries), ("corpus", self.corpus)) if path}
        given |= {"train": source_of(self.train, _listed(self.names))} if self.train else {}
        given |= {"pictures": _listed(self.pictures)} if self.pictures else {}
        given |= {"templates": _templates(self.templates)} if self.templates else {}
        given |= {"classes": _classes(self.classes)} if self.classes else {}
        for kind, names in OWN.items():
            given |= {name: value for name in names if (value := getattr(self, name)) != getattr(kind, name)}
        for name, text in (("query_columns", self.query_columns), ("corpus_columns", self.corpus_columns)):
            given |= {name: _pairs(text, name)} if text else {}
        return given


def parse(arguments: Sequence[str]) -> Asked:
    """The command line, read. Raises ConfigError for an option that the task does not have."""
    made = overrides.parse(Arguments, arguments, prog="embedjax evaluate")
    return Asked(made.model, _task(made.task, made.fields()), made.retention)


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
            seen = {"query_columns": "query", "corpus_columns": "document"}[key] in fields.get("pictures", ())
            source = fields.get({"query_columns": "queries", "corpus_columns": "corpus"}[key])
            usual = SEEN.get(type(source), {"id": "_id", "image": "image"}) if seen and source else getattr(kind(), key)
            fields[key] = usual | fields.get(key, {})
        fields["columns"] = fields["columns"] or (JUDGED if "corpus" in fields else PAIRED)
    else:
        fields["columns"] = _columns(kind, fields["source"], fields["columns"])
    return kind(**fields)


def _columns(kind: type[Task], source: Source, given: dict[str, str]) -> dict[str, str]:
    """The columns given, and for the others what the source or the task has by default: pictures for texts where these are
    given."""
    usual = kind().columns
    if {"text", "image"} & usual.keys():
        usual = LABELLED.get(type(source), usual)
        for one, other in (("image", "text"), ("text", "image")):
            if one in given and other not in given:
                usual = {ours: theirs for ours, theirs in usual.items() if ours != other}
    return usual | given


def _templates(given: Sequence[str]) -> tuple[str, ...]:
    """The templates, and the lines of those words that name a file instead."""
    found: list[str] = []
    for word in given:
        if "{}" not in word and Path(word).is_file():
            found += [line for line in _lines(Path(word)) if line.strip()]
        else:
            found.append(word)
    return tuple(found)


def _classes(given: str) -> dict[str, str]:
    """Label -> name of `name,name`, whose labels are their numbers, or of a file: of lines, or a table of label and name."""
    if not Path(given).is_file():
        if "," not in given:
            raise ConfigError(f"--classes is {given!r}: no such file, nor names with commas between them")
        return _numbered([name.strip() for name in given.split(",")])
    if Path(given).suffix in (".txt", ".text", ""):
        return _numbered([line.strip() for line in _lines(Path(given)) if line.strip()])
    table = open_source(source_of(given))
    if missing := [name for name in ("label", "name") if name not in table.columns]:
        raise DataError(f"{given}: names of classes are in the columns label and name; {missing[0]!r} is not there")
    return {key_at(table, row, "label"): text_at(table, row, "name").strip() for row in range(len(table))}


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(names)}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


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


def numbers(text: str) -> tuple[int, ...]:
    """`256,64` as numbers. Raises ConfigError."""
    if odd := [part for part in _listed(text) if not part.isdecimal()]:
        raise ConfigError(f"--dims holds {odd[0]!r}; it must be numbers, such as 256,64")
    return tuple(map(int, _listed(text)))
