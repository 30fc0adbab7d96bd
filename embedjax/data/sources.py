"""Rows by number: opens a config's source, whatever its format, as one sequence that any thread may index. Makes no batches.

source = open_source(config.File("pairs.jsonl.gz"))
len(source), source[3], source.columns, source.where(3)
"""

import bisect
import glob
import itertools
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from embedjax import config
from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.data.files import FileInfo, expand, file_info, is_remote
from embedjax.data.pictures import Pictures
from embedjax.data.records import JsonRecords, Parquet, RowGroups, open_tfds
from embedjax.data.rows import BadRow, Part
from embedjax.data.shards import Tar, open_shards
from embedjax.data.tables import JsonLines, PlainText, Table

__all__ = ["BadRow", "FileInfo", "Files", "Source", "class_names", "manifest", "open_source", "select", "source_of"]

ENDINGS = {
    "tsv": "tsv", "tab": "tsv", "csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl", "txt": "text", "text": "text",
    "parquet": "parquet", "arrayrecord": "arrayrecord", "array_record": "arrayrecord",
}  # fmt: skip
SHARD = re.compile(r"-\d+-of-\d+$")
ARCHIVE = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz)$")


@runtime_checkable
class Source(Protocol):
    """Rows by number. Row i is always the same row, so i may be its id.

    `source[i]` raises BadRow for a row that cannot be decoded and IndexError outside [0, len); both leave the source usable.
    """

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def files(self) -> Sequence[FileInfo]:
        """What it was read from, in order, each with the rows that this source has of it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: SupportsIndex, /) -> dict[str, object]: ...

    def where(self, i: SupportsIndex, /) -> tuple[str, int]:
        """The file of row i and its 1-based number there: the line it begins on in a text file, else the record."""
        ...


class Files:
    """The rows of one or more files, one after the other, as a Source."""

    def __init__(self, name: str, parts: Sequence[Part], root: str = ""):
        self.name, self.parts = name, tuple(parts)
        self.root = root  # of the paths of pictures in its rows; "" for the folder of each file
        self.ends = list(itertools.accumulate(map(len, self.parts)))
        self.columns = self.parts[0].columns
        self.files = tuple(part.info if isinstance(part, Tar) else file_info(part.path, len(part)) for part in self.parts)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: SupportsIndex, /) -> dict[str, object]:
        part, at = self._find(i)
        return part[at]

    def where(self, i: SupportsIndex, /) -> tuple[str, int]:
        part, at = self._find(i)
        return part.path, part.place(at)

    def _find(self, index: SupportsIndex) -> tuple[Part, int]:
        i = operator.index(index)
        if not 0 <= i < self.ends[-1]:
            raise IndexError(f"{self.name}: row {i} of {len(self)}")
        n = bisect.bisect_right(self.ends, i)
        return self.parts[n], i - (self.ends[n - 1] if n else 0)


def source_of(path: str, names: tuple[str, ...] = ()) -> config.Source:
    """What a path on a command line means: tar archives, a folder of them, a folder of pictures (at any depth, without Parquet
    files), else a file or files. `names` are the columns of a table without header row."""
    folder = "" if is_remote(path) else os.path.expanduser(path)
    if ARCHIVE.search(path) or (os.path.isdir(folder) and glob.glob("*.tar", root_dir=folder)):
        return config.Tar(path)
    if os.path.isdir(folder) and not any(glob.iglob("**/*.parquet", root_dir=folder, recursive=True)):
        return config.Pictures(path)
    return config.File(path, names=names)


def class_names(source: Source, column: str) -> tuple[str, ...]:
    """The names of a column's numbered classes, where the data set says them: tensorflow-datasets and Parquet files of Hugging
    Face datasets do."""
    part = next(iter(getattr(source, "parts", ())), None)
    return getattr(part, "classes", {}).get(column, ())


def open_source(source: config.Source) -> Source:
    """Open what a config names. DataError for what is missing, empty or corrupt; ConfigError for a wrong setting."""
    match source:
        case config.File():
            return Files(source.path, _open_files(source), source.root)
        case config.Pictures():
            return Pictures(source.path)
        case config.Tar():
            return Files(source.path, open_shards(source.path))
        case config.Tfds():
            return Files(f"{source.name}:{source.split}", open_tfds(source))
        case config.Glyphs():
            from embedjax.data.glyphs import open_glyphs

            return open_glyphs(source)
        case config.Functions():
            from embedjax.data.builtin import open_functions

            return open_functions(source)  # pyright: ignore[reportReturnType] (its `files` is a cached property)


def select(source: Source, columns: dict[str, str], what: str) -> None:
    """Check that `columns` (ours -> the source's) exist; DataError names `what`, the nearest name and those found."""
    for ours, theirs in columns.items():
        if theirs not in source.columns:
            hint = nearest(theirs, source.columns)
            found = "" if hint.startswith("known") else f" found: {', '.join(source.columns)}"
            raise DataError(f"{what}: {source.name} has no column {theirs!r} (for {ours!r}); {hint}{found}")


def manifest(source: Source, known: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, object]]:
    """What the source was made of: file, bytes, when it was changed, sha256 and rows of each file. Reads every file once, but
    for those that are as a manifest made before says."""
    hashes = {(row["file"], row["bytes"], row.get("changed")): row["sha256"] for row in known}

    def told(file: FileInfo) -> dict[str, object]:
        stamp = file.path, file.size, file.changed
        sha256 = hashes[stamp] if file.changed and stamp in hashes else file.sha256
        return {"file": file.path, "bytes": file.size, "changed": file.changed, "sha256": sha256, "rows": file.rows}

    with ThreadPoolExecutor() as threads:
        return list(threads.map(told, source.files))


def _open_files(source: config.File) -> list[Part]:
    paths = expand(source.path)
    formats = {_format(path) if source.format == "auto" else source.format for path in paths}
    if len(formats) > 1:
        raise DataError(f"{source.path}: matches files of the formats {', '.join(sorted(formats))}; name one kind")
    kind = formats.pop()
    if source.names and kind not in ("tsv", "csv"):
        raise ConfigError(f"{source.path}: names is for TSV and CSV files; this is {kind}")
    if source.quotes is not None and kind not in ("tsv", "csv"):
        raise ConfigError(f"{source.path}: quotes is for TSV and CSV files; this is {kind}")
    cache = RowGroups()
    openers = {
        "tsv": lambda path: Table(path, delimiter="\t", quotes=source.quotes is True, names=source.names),
        "csv": lambda path: Table(path, delimiter=",", quotes=source.quotes is not False, names=source.names),
        "jsonl": JsonLines,
        "text": PlainText,
        "parquet": lambda path: Parquet(path, cache),
        "arrayrecord": JsonRecords,
    }
    parts: list[Part] = [openers[kind](path) for path in paths]
    for part in parts if kind in ("tsv", "csv", "parquet") else ():
        if set(part.columns) != set(parts[0].columns):
            raise DataError(
                f"{part.path}: columns {', '.join(part.columns)}; {parts[0].path} has {', '.join(parts[0].columns)}"
            )
    return parts


def _format(path: str) -> str:
    """The format that a file name's ending tells, .gz and shard numbers aside."""
    name = SHARD.sub("", re.split(r"[\\/]", path)[-1])
    ending = name.removesuffix(".gz").rpartition(".")[2].lower()
    kind = ENDINGS.get(ending)
    if kind is None:
        raise ConfigError(
            f"{path}: the ending tells no format; set format to one of {', '.join(sorted(set(ENDINGS.values())))}"
        )
    return kind
