"""Files of records as rows: Parquet, ArrayRecord, and data sets prepared by tensorflow-datasets, read without TensorFlow."""

import bisect
import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embedjax.config.data import Tfds
from embedjax.config.errors import DataError
from embedjax.data.files import is_remote, local_file, open_binary, reading
from embedjax.data.rows import BadRow, json_object, utf8

CACHE_BYTES = 1 << 29


class RowGroups:
    """Decoded row groups of all files of a source, `limit` bytes of them: the least recently used leave, the last one stays.

    A group that is there is found without a lock, for threads that read rows would queue at it; the lock is held while one
    is decoded, so that no two threads decode the same.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self.limit = limit
        self.groups: dict[tuple[str, int], object] = {}
        self.used: dict[tuple[str, int], int] = {}
        self.clock = itertools.count()
        self.lock = threading.Lock()

    def get(self, key: tuple[str, int], decode: Callable[[], object]) -> object:
        """The group under `key`; `decode()` makes it: a pyarrow table, or a str that says why it cannot be decoded."""
        self.used[key] = next(self.clock)
        group = self.groups.get(key)
        if group is None:
            with self.lock:
                group = self.groups.get(key)
                if group is None:
                    group = self.groups[key] = decode()
                    self._shrink()
        return group

    def _shrink(self) -> None:
        sizes = {key: getattr(group, "nbytes", 0) for key, group in self.groups.items()}
        for key in sorted(self.groups, key=self.used.__getitem__)[:-1]:
            if sum(sizes.values()) <= self.limit:
                break
            del self.groups[key], sizes[key]


class Parquet:
    """Rows of a Parquet file; lists and structs come as Python lists and dicts. Holds no open file."""

    def __init__(self, path: str, cache: RowGroups):
        import pyarrow
        import pyarrow.parquet

        self.path, self.cache = path, cache
        try:
            with reading(path), self._open() as file:
                self.metadata = file.metadata
                self.columns = tuple(file.schema_arrow.names)
        except pyarrow.ArrowException as e:
            raise DataError(f"{path}: not a readable Parquet file: {_line(e)}") from None
        if len(set(self.columns)) < len(self.columns):
            raise DataError(f"{path}: column names appear twice: {', '.join(self.columns)}")
        rows = [self.metadata.row_group(g).num_rows for g in range(self.metadata.num_row_groups)]
        self.starts = [0, *itertools.accumulate(rows)]
        if not len(self):
            raise DataError(f"{path}: no rows")
        self.classes = _hub_classes(self.metadata.metadata or {})

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> dict[str, object]:
        group = bisect.bisect_right(self.starts, i) - 1
        table = self.cache.get((self.path, group), lambda: self._decode(group))
        if isinstance(table, str):
            raise BadRow(self.path, i + 1, table)
        at = i - self.starts[group]
        try:
            return {name: column[at].as_py() for name, column in zip(self.columns, table.columns, strict=True)}  # pyright: ignore
        except (ValueError, OverflowError) as e:  # text that is not UTF-8, times that Python cannot hold
            raise BadRow(self.path, i + 1, _line(e)) from None

    def place(self, i: int) -> int:
        return i + 1

    def _open(self):
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(open_binary(self.path) if is_remote(self.path) else self.path)

    def _decode(self, group: int):
        import pyarrow

        try:
            with self._open() as file:
                return file.read_row_group(group)
        except (pyarrow.ArrowException, OSError) as e:
            return f"row group {group} cannot be decoded: {_line(e)}"


class ArrayRecord:
    """Records of an ArrayRecord file as bytes."""

    def __init__(self, path: str):
        from array_record.python.array_record_module import ArrayRecordReader

        self.path = path
        with local_file(path) as local:
            # The package's settings for random access: no read-ahead, no threads. It opens a missing file without a word.
            self.reader = ArrayRecordReader(local, "readahead_buffer_size:0,max_parallelism:0")
        if not self.reader.ok():
            raise DataError(f"{path}: empty, truncated or not an ArrayRecord file")
        self.rows = self.reader.num_records()
        if not self.rows:
            raise DataError(f"{path}: no rows")

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> bytes:
        try:
            return self.reader.read([i])[0]
        except RuntimeError as e:
            raise BadRow(self.path, i + 1, f"cannot be read: {_line(e)}") from None


class JsonRecords:
    """An ArrayRecord file of JSON objects; the columns are the keys of the first good row."""

    def __init__(self, path: str):
        self.path, self.records = path, ArrayRecord(path)
        self.columns = self._first_keys()

    def _first_keys(self) -> tuple[str, ...]:
        first = None
        for i in range(len(self)):
            try:
                return tuple(self[i])
            except BadRow as e:
                first = first or e
        raise DataError(f"{self.path}: no record is a JSON object; record 1: {first.reason if first else ''}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, object]:
        raw = self.records[i]
        try:
            return json_object(raw)
        except ValueError as e:
            raise BadRow(self.path, i + 1, str(e)) from None

    def place(self, i: int) -> int:
        return i + 1


@dataclasses.dataclass(frozen=True)
class TfdsShard:
    """Rows `skip` to `skip + take` of a file of tensorflow-datasets, decoded by the data set's features, but for pictures."""

    path: str
    columns: tuple[str, ...]
    read: Callable[[int], bytes]
    features: object
    skip: int
    take: int
    pictures: frozenset[str] = frozenset()
    """Columns of pictures."""
    classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Column -> the names of its classes."""

    def __len__(self) -> int:
        return self.take

    def __getitem__(self, i: int) -> dict[str, object]:
        raw = self.read(self.skip + i)
        try:
            found = self._decoded(raw)
            return {name: value if name in self.pictures else _plain(value) for name, value in found.items()}
        except Exception as e:  # features raise whatever their decoders do
            raise BadRow(self.path, self.place(i), f"cannot be decoded: {_line(e)}") from None

    def _decoded(self, raw: bytes) -> dict[str, object]:
        features: Any = self.features
        if not self.pictures:
            return features.deserialize_example_np(raw)
        from tensorflow_datasets.core.decode import SkipDecoding

        return features.deserialize_example_np(raw, decoders={name: SkipDecoding() for name in self.pictures})

    def place(self, i: int) -> int:
        return self.skip + i + 1


def open_tfds(source: Tfds) -> list[TfdsShard]:
    """The files of a split. tfds's own data source is not used: its Parquet form passes over the slice of train[:10%]."""
    name, info = f"tfds {source.name}", _tfds_info(source)
    try:
        instructions = info.splits[source.split].file_instructions
    except (ValueError, KeyError, AssertionError) as e:
        raise DataError(f"{name}: split {source.split!r}: {_line(e)}") from None
    if not instructions:
        raise DataError(f"{name}: split {source.split!r} has no rows")
    kind, cache = info.file_format.value if info.file_format else "unknown", RowGroups()
    openers = {"array_record": lambda path: ArrayRecord(path).__getitem__, "parquet": lambda path: _parquet_bytes(path, cache)}
    if kind not in openers:
        raise DataError(f"{name}: prepared as {kind}; prepare it with file_format array_record or parquet")
    columns = tuple(info.features)  # pyright: ignore[reportArgumentType]
    pictures, classes = _tfds_kinds(info.features)
    shards = []
    for step in instructions:
        path, take = os.fspath(step.filename), step.examples_in_shard - step.skip if step.take < 0 else step.take
        shards.append(TfdsShard(path, columns, openers[kind](path), info.features, step.skip, take, pictures, classes))
    return shards


def _tfds_kinds(features: Any) -> tuple[frozenset[str], dict[str, tuple[str, ...]]]:
    """The columns of pictures, and the names of classes by column."""
    from tensorflow_datasets.core.features import ClassLabel, Image

    pictures = frozenset(name for name, feature in features.items() if isinstance(feature, Image))
    labels = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
    return pictures, {name: tuple(feature.names) for name, feature in labels.items() if feature.names}


def _hub_classes(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Column -> the names of its classes, as Hugging Face's datasets note them in a Parquet file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        labels = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, names)) for name, names in labels.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # a note that is not there, or not of this form, is none


def _parquet_bytes(path: str, cache: RowGroups) -> Callable[[int], bytes]:
    """tfds writes Parquet with one column, of serialised examples."""
    file = Parquet(path, cache)
    return lambda i: file[i][file.columns[0]]  # pyright: ignore[reportReturnType]


def _tfds_info(source: Tfds):
    try:
        import tensorflow_datasets as tfds
        from etils import epath
    except ImportError as e:
        raise DataError(f"tfds {source.name}: {e}") from None
    try:
        if (epath.Path(source.name).expanduser() / "dataset_info.json").exists():
            return tfds.builder_from_directory(epath.Path(source.name).expanduser()).info
        builder = tfds.builder(source.name, data_dir=source.data_dir or None, try_gcs=False)
    except Exception as e:  # tfds raises of many kinds: not found, not this version, not this file
        raise DataError(f"tfds {source.name}: {_line(e)}") from None
    if not builder.is_prepared():
        raise DataError(f"tfds {source.name}: not prepared in {builder.data_path}; prepare it there or set data_dir")
    return builder.info


def _plain(value: object) -> object:
    """Text as str, numpy scalars and vectors as Python's own, arrays of more axes as they are."""
    match value:
        case bytes():
            return utf8(value)
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case np.ndarray() if value.ndim == 1 or value.dtype == object:
            return [_plain(item) for item in value.tolist()]
        case np.generic() | np.ndarray() if value.ndim == 0:
            return _plain(value.item())
        case _:
            return value


def _line(error: Exception) -> str:
    """The first line of a message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
