"""What a model is evaluated on: one class a kind of task, each naming its rows, its columns and its main metric."""

import dataclasses
from typing import ClassVar

from embedjax.config.data import File, Source
from embedjax.config.errors import ConfigError
from embedjax.config.model import Precision


@dataclasses.dataclass(frozen=True)
class Rows:
    """What all tasks have. Metrics are NAME/METRIC for whole vectors and NAME@64/METRIC for their first 64 numbers."""

    main = ""  # the metric that stands for the task
    metrics: ClassVar[tuple[str, ...]] = ()
    """What the task may find."""
    sides: ClassVar[tuple[str, ...]] = ("anchor",)
    """What its texts are to the model: columns, or "query" and "document" with the prompts of these."""
    source: Source = dataclasses.field(default_factory=File)
    """Where the rows come from."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Our column -> the source's."""
    name: str = dataclasses.field(default="", kw_only=True)
    """Name in the metrics."""
    limit: int = dataclasses.field(default=0, kw_only=True)
    """At most so many rows; 0 for all."""
    prompt: str = dataclasses.field(default="", kw_only=True)
    """Name of the model's prompt, adapter or both that the texts are encoded with; of prompts NAME-query and NAME-document each
    side has its own. Without a name queries and documents (`sides`) have the prompts of these names where the model has such,
    and all other texts the default prompt alone, as in sentence-transformers, whatever training put before them: name `query`
    for both sides to have that. Of two towers each always has the prompt of its side."""
    dims: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)
    """Prefixes of the vectors to score as well (Matryoshka), such as 256, 64; the texts are encoded once."""

    def __post_init__(self):
        if self.limit < 0:
            raise ConfigError(f"the limit of task {self.name!r} is {self.limit}; it must be at least 0")
        if len(set(self.dims)) < len(self.dims) or any(dim < 1 for dim in self.dims):
            raise ConfigError(f"the dims of task {self.name!r} are {self.dims}; each must be at least 1, and there once")

    @property
    def seen(self) -> tuple[bool, ...]:
        """Of each of its sides whether it is pictures: those of a column `image` in place of `text`, in most tasks."""
        return ("image" in self.columns,) * len(self.sides)

    @property
    def main_metric(self) -> str:
        """The key of the metric that stands for the task."""
        return f"{self.name}/{self.main}"

    @property
    def labels(self) -> tuple[str, ...]:
        """What its metrics' keys begin with: NAME, and NAME@DIM of each prefix."""
        return (self.name, *(f"{self.name}@{dim}" for dim in self.dims))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all metrics it may find."""
        return tuple(f"{label}/{metric}" for label in self.labels for metric in self.metrics)


@dataclasses.dataclass(frozen=True)
class Sts(Rows):
    """Semantic textual similarity: Spearman and Pearson correlation of the model's similarity and the human score."""

    main = "spearman"
    metrics = ("spearman", "pearson")
    sides = ("anchor", "positive")
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"a": "sentence1", "b": "sentence2", "score": "score"})
    """The source's columns for a, b and score."""
    name: str = dataclasses.field(default="sts", kw_only=True)


@dataclasses.dataclass(frozen=True)
class Retrieval(Rows):
    """Retrieval of each query's own document among all documents of the source, or of a corpus with judgements."""

    main = "ndcg@10"
    metrics = (
        *("ndcg@10", "mrr@10", "map@100", "recall@1", "recall@10", "recall@100"),
        *("success@1", "success@5", "success@10"),  # of pictures
    )
    sides = ("query", "document")
    source: Source = dataclasses.field(default_factory=File)
    """Query-document pairs; or, with `corpus`, the judgements."""
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"query": "anchor", "document": "positive"})
    """The source's columns for query and document; with `corpus`: query_id, document_id and relevance."""
    queries: Source | None = None
    """Queries, with columns id and text (names in `query_columns`)."""
    corpus: Source | None = None
    """Documents, with columns id and text (names in `corpus_columns`)."""
    query_columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"id": "_id", "text": "text"})
    """Columns of `queries`; of pictures id and image."""
    corpus_columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"id": "_id", "title": "title", "text": "text"})
    """Columns of `corpus`, of pictures id and image; the title, if named, is put before the text. A file or row without "title"
    has none; one of another name must be there."""
    pictures: tuple[str, ...] = ()
    """Of query and document those that are pictures."""
    skip_same_id: bool = False
    """Leave out of each query's ranking the document of the same id: queries that are taken from the corpus (ArguAna, Quora, as
    BEIR and mteb score them) would find themselves first."""
    pool: int = dataclasses.field(default=1, kw_only=True)
    """Late interaction: one vector is kept for so many tokens of a document, by token pooling; 1 keeps all."""
    precision: Precision = dataclasses.field(default="float32", kw_only=True)
    """Late interaction: what the numbers of documents' vectors are kept as. Queries stay float32."""
    first: str = dataclasses.field(default="", kw_only=True)
    """A first stage, whose candidates alone are scored: "bm25"; "tokens", the documents of the tokens nearest to a query's
    tokens (late interaction); or a MODEL of one vector a text. Without one all documents are."""
    candidates: int = dataclasses.field(default=100, kw_only=True)
    """Documents that the first stage finds for a query; of "tokens" tokens that it finds for each token of a query."""
    name: str = dataclasses.field(default="retrieval", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.pool < 1 or self.candidates < 1:
            raise ConfigError(
                f"task {self.name!r} has pool {self.pool} and candidates {self.candidates}; they must be at least 1"
            )
        if self.first == "bm25" and self.pictures:
            raise ConfigError(f"task {self.name!r} has bm25 as its first stage, which finds texts by their words, not pictures")
        if self.skip_same_id and self.corpus is None:
            raise ConfigError(f"task {self.name!r} has skip_same_id, but no corpus; without one there are no ids")
        if odd := [name for name in self.pictures if name not in self.sides]:
            raise ConfigError(f"task {self.name!r}: pictures names {odd[0]!r}; it is for query and document")

    @property
    def seen(self) -> tuple[bool, ...]:
        """Whether queries are pictures, and documents."""
        return tuple(side in self.pictures for side in self.sides)


@dataclasses.dataclass(frozen=True)
class Reranking(Rows):
    """Order of each query's own candidates: MAP, MRR@10, nDCG@10. Rows of equal queries are one query."""

    main = "ndcg@10"
    metrics = ("map", "mrr@10", "ndcg@10")
    sides = ("query", "document")
    columns: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"query": "query", "positive": "positive", "negative": "negative"}
    )
    """The source's columns for query, positive and negative: a text or a list of texts; more are negative_2, positive_2 ..."""
    name: str = dataclasses.field(default="reranking", kw_only=True)


@dataclasses.dataclass(frozen=True)
class PairClassification(Rows):
    """Whether two texts belong together: average precision, and accuracy and F1 at the best threshold of the similarity."""

    main = "ap"
    metrics = ("ap", "accuracy", "accuracy_threshold", "f1", "precision", "recall", "f1_threshold")
    sides = ("anchor", "positive")
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"a": "sentence1", "b": "sentence2", "label": "label"})
    """The source's columns for a, b and label."""
    positive: str = "1"
    """The label of pairs that belong together; every other label says that they do not."""
    name: str = dataclasses.field(default="pairs", kw_only=True)


@dataclasses.dataclass(frozen=True)
class TripletAccuracy(Rows):
    """Share of triplets whose anchor is nearer to the positive than to the negative."""

    main = "accuracy"
    metrics = ("accuracy",)
    sides = ("query", "document")
    columns: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"anchor": "anchor", "positive": "positive", "negative": "negative"}
    )
    """The source's columns for anchor, positive and negative."""
    name: str = dataclasses.field(default="triplets", kw_only=True)


@dataclasses.dataclass(frozen=True)
class Classification(Rows):
    """Accuracy and macro F1 of a logistic regression on the vectors, a mean over draws of few training rows (as mteb's); the
    linear probe of pictures, with per_label 0."""

    main = "accuracy"
    metrics = ("accuracy", "f1")
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"text": "text", "label": "label"})
    """The columns for text, or image, and label, of both sources."""
    train: Source = dataclasses.field(default_factory=File)
    """Rows that the classifier learns from; `source` holds those it is tested on."""
    per_label: int = 8
    """Training rows of each label in a draw; 0 for all rows, once."""
    experiments: int = 10
    """Draws."""
    seed: int = 42
    """Seed of the draws."""
    name: str = dataclasses.field(default="classification", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.per_label < 0 or self.experiments < 1:
            raise ConfigError(
                f"task {self.name!r} has per_label {self.per_label} and experiments {self.experiments}; "
                "they must be at least 0 and 1"
            )
        check_seed(self, self.seed)


@dataclasses.dataclass(frozen=True)
class KnnClassification(Rows):
    """Accuracy and macro F1 of the label that most of the k nearest training rows have."""

    main = "accuracy"
    metrics = ("accuracy", "f1")
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"text": "text", "label": "label"})
    """The columns for text, or image, and label, of both sources."""
    train: Source = dataclasses.field(default_factory=File)
    """Rows whose labels are known; `source` holds those it is tested on."""
    k: int = 5
    """Nearest rows that vote; of labels with equal votes the first in sorted order wins."""
    name: str = dataclasses.field(default="knn", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"task {self.name!r} has k {self.k}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class ZeroShot(Rows):
    """Zero-shot classification (Radford et al. 2021, section 3.1): a picture, or text, has the class whose texts are nearest.
    These are its name in each of the templates; their vectors are scaled to length 1, averaged, and scaled again."""

    main = "top1"
    metrics = ("top1", "mean_per_class", "top5")
    sides = ("query", "document")
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"image": "image", "label": "label"})
    """The source's columns for image, or text, and label."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Texts with {} for the name of the class."""
    classes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Label -> name of the class: the choices; labels of one name are one. Rows may have the name for the label. Without any,
    the names that the data set has for its numbers (tensorflow-datasets, Hugging Face's Parquet), else all labels that occur,
    with spaces for their underscores."""
    name: str = dataclasses.field(default="zero-shot", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not self.templates:
            raise ConfigError(f"task {self.name!r} has no templates; one is a text with {{}} for the name of the class")
        if odd := [template for template in self.templates if "{}" not in template]:
            raise ConfigError(f"task {self.name!r}: the template {odd[0]!r} has no {{}} for the name of the class")
        if len(self.classes) == 1 or not all(label.strip() and name.strip() for label, name in self.classes.items()):
            raise ConfigError(f"task {self.name!r}: classes must be two or more, of labels and names that are not empty")

    @property
    def seen(self) -> tuple[bool, ...]:
        """The texts of the classes are none; what is classified may be pictures."""
        return False, "image" in self.columns


@dataclasses.dataclass(frozen=True)
class HeadAccuracy(Rows):
    """Accuracy and macro F1 of a class head of the model's own, on single texts or pairs of them. `prompt` is that of the set
    that trained the head, and names its adapter."""

    main = "accuracy"
    metrics = ("accuracy", "f1")
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"text": "text", "label": "label"})
    """The source's columns for text, or image, and label; `other` for the second text of a pair. Labels are names or numbers of
    the head's classes, or lists of them."""
    head: str = ""
    """Name of the set that trained the head; empty for the only one."""
    name: str = dataclasses.field(default="head", kw_only=True)

    @property
    def sides(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("query", "document") if "other" in self.columns else ("query",)


@dataclasses.dataclass(frozen=True)
class Clustering(Rows):
    """V-measure of mini-batch k-means with as many clusters as there are labels, a mean over starts."""

    main = "v_measure"
    metrics = ("v_measure",)
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"text": "text", "label": "label"})
    """The source's columns for text, or image, and label."""
    experiments: int = 10
    """Starts of k-means."""
    seed: int = 42
    """Seed of the first start; the others follow it."""
    name: str = dataclasses.field(default="clustering", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.experiments < 1:
            raise ConfigError(f"task {self.name!r} has experiments {self.experiments}; it must be at least 1")
        check_seed(self, self.seed, self.experiments)


@dataclasses.dataclass(frozen=True)
class BitextMining(Rows):
    """Whether each text's nearest neighbour in the other language is its translation: F1, and accuracy in both directions."""

    main = "f1"
    metrics = ("f1", "accuracy", "accuracy_to_target", "accuracy_to_source")
    sides = ("anchor", "positive")
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: {"source": "source", "target": "target"})
    """The source's columns for the two languages."""
    name: str = dataclasses.field(default="bitext", kw_only=True)


def check_seed(task: Rows, seed: int, uses: int = 1) -> None:
    """Raises ConfigError for a seed that numpy has no generator for, or none for one that follows it."""
    if not 0 <= seed <= 2**32 - uses:
        raise ConfigError(f"task {task.name!r} has seed {seed}; it must be from 0 to {2**32 - uses}")


Task = (
    Sts
    | Retrieval
    | Reranking
    | PairClassification
    | TripletAccuracy
    | Classification
    | KnnClassification
    | ZeroShot
    | HeadAccuracy
    | Clustering
    | BitextMining
)
