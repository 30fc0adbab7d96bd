"""Where rows come from: files of many formats, prepared data sets, the embedded one."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class File:
    """One file, or several of one kind: TSV, CSV, JSONL, Parquet, ArrayRecord (of JSON rows) or lines of text; .gz accepted."""

    path: str = ""
    """A path, a glob pattern, a folder of Parquet files, or a URL that fsspec or etils knows (gs://...)."""
    format: Literal["auto", "tsv", "csv", "jsonl", "parquet", "arrayrecord", "text"] = "auto"
    """auto goes by the file name's ending."""
    names: tuple[str, ...] = ()
    """Column names of a TSV or CSV file without a header row."""
    root: str = ""
    """Folder that paths of pictures are relative to; empty for that of the file."""
    quotes: bool | None = None
    """Whether fields of a TSV or CSV file may stand in quotes, which then are no part of the text and may hold tabs, commas and
    newlines; None for CSV yes, TSV no. True reads a TSV that a spreadsheet, pandas or Python's csv has written with quotes."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A folder of pictures, at any depth. Columns: `image`, `name` (the file's, without ending), `label` (its folder's)."""

    path: str = ""
    """The folder."""


@dataclasses.dataclass(frozen=True)
class Tar:
    """Tar archives of samples as webdataset lays them out, read in place. Columns: `key`, `image` (of any format), `txt`,
    `cls`, `json.KEY`, and other kinds of files by their endings, as bytes."""

    path: str = ""
    """An archive, a glob pattern, a folder of *.tar, or a pattern such as train-{0000..0127}.tar."""


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


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """The embedded data set of pictures: glyphs of the fonts inside matplotlib, drawing <-> Unicode name. Columns: `image`,
    `name`, `font`. Held-out names put words together that are known from others."""

    split: Literal["train", "test"] = "train"
    """Training names or held-out names."""
    font: str = ""
    """One font, such as "DejaVuSans"; empty for all, each character once a font that has it."""
    limit: int = 0
    """At most so many rows, chosen by the seed; 0 for all."""
    seed: int = 0
    """Seed of the split and of the choice of rows."""


Source = File | Pictures | Tar | Tfds | Functions | Glyphs
