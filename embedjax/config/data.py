"""Where rows come from and how they are batched."""

import dataclasses
from typing import Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses import Loss, MultipleNegatives


@dataclasses.dataclass(frozen=True)
class File:
    """One file, or several of one kind: TSV, CSV, JSONL, Parquet, ArrayRecord (of JSON rows) or lines of text; .gz accepted."""

    path: str = ""
    """A path, a glob pattern, a folder of Parquet files, or a URL that fsspec or etils knows (gs://...)."""
    format: Literal["auto", "tsv", "csv", "jsonl", "parquet", "arrayrecord", "text"] = "auto"
    """auto goes by the file name's ending."""
    names: tuple[str, ...] = ()
    """Column names of a TSV or CSV file without a header row."""


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A data set prepared by tensorflow-datasets in ArrayRecord or Parquet, read without TensorFlow."""

    name: str = ""
    """Name of the data set, such as "snli", or the folder of a prepared one."""
    split: str = "train"
    """Split, slices such as train[:10%] included."""
    data_dir: str = ""
    """Where tensorflow-datasets keeps its data; empty for its own default."""


@dataclasses.dataclass(frozen=True)
class Functions:
    """The embedded data set: functions of the installed Python packages, docstring summary -> source without it.

    Columns: `summary`, `code`, `name`, `package`. Split by package: held-out functions come from packages never seen.
    """

    split: Literal["train", "test"] = "train"
    """Training packages or held-out packages."""
    limit: int = 0
    """At most so many rows, chosen by the seed; 0 for all."""
    seed: int = 0
    """Seed of the choice of files and rows."""


Source = File | Tfds | Functions


@dataclasses.dataclass(frozen=True)
class Set:
    """A data set, what its columns mean and the loss it is trained with."""

    source: Source = dataclasses.field(default_factory=File)
    """Where the rows come from."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Our column -> the source's: {"anchor": "question", "positive": "answer", "negative": "wrong"};
    more hard negatives are negative_2, negative_3, ..."""
    loss: Loss = dataclasses.field(default_factory=MultipleNegatives)
    """The loss of this set."""
    name: str = "train"
    """Name of the task, used in metrics and checkpoints."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The training sets and how batches are made of them."""

    batch_size: int = 64
    """Rows of the global batch, over all devices and hosts."""
    buckets: tuple[tuple[int, int], ...] = ()
    """(anchor length, document length) pairs in tokens, one compiled step each; empty for one, the towers' maxima."""
    sets: tuple[Set, ...] = ()
    """The training sets."""
    shuffle: bool = True
    """Whether rows are drawn in a new order each epoch."""
    threads: int = 2
    """Threads that decode and tokenize ahead."""
    prefetch: int = 8
    """Batches kept ready."""
    bad_share: float = 0.01
    """Share of bad rows above which the run stops; below it they are replaced and listed."""

    def __post_init__(self):
        for name in ("batch_size", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        for pair in self.buckets:
            if min(pair) < 1:
                raise ConfigError(f"data.buckets holds {pair}; lengths must be at least 1")
        if not 0 <= self.bad_share <= 1:
            raise ConfigError(f"data.bad_share is {self.bad_share}; it must be in [0, 1]")
        if len({s.name for s in self.sets}) < len(self.sets):
            raise ConfigError(f"data.sets have names {[s.name for s in self.sets]}; each must have its own")
