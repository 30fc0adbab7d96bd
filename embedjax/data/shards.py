"""Tar archives of samples, as webdataset lays them out: rows by number, nothing unpacked.

A sample is a run of members whose names agree up to the first dot of the last part; what follows is the member's kind:
`000/cat.jpg`, `000/cat.txt`, `000/cat.json`. Pictures of any format are the column `image`, .txt and .cls are text, the keys
of .json become columns `json.KEY`, and other kinds stay bytes. `key` is the name.
"""

import dataclasses
import functools
import os
import re

from embedjax.config.errors import DataError
from embedjax.data.files import FileInfo, expand, is_remote, open_binary, reading
from embedjax.data.image import ENDINGS
from embedjax.data.rows import BadRow, json_object, utf8
from embedjax.data.tar_index import TarIndex, tar_indexes

SAMPLES_LOOKED_AT = 100
"""Samples whose kinds of members make the columns."""

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_shards(path: str) -> list["Tar"]:
    """The archives of a path, a glob pattern, a folder of *.tar, or webdataset's `{000..127}`, in order."""
    if found := RANGE.search(path):
        first, last = found.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        paths = [path[: found.start()] + number + path[found.end() :] for number in numbers]
        if not paths:
            raise DataError(f"{path}: {{{first}..{last}}} is an empty range")
    else:
        folder = not is_remote(path) and os.path.isdir(path)
        paths = expand(os.path.join(path, "*.tar") if folder else path)
    return [Tar(*each) for each in zip(paths, tar_indexes(paths), strict=True)]


@dataclasses.dataclass(frozen=True)
class Archive(FileInfo):
    """An archive among the files of a source, which would take long to read whole."""

    index: TarIndex

    @property
    def changed(self) -> str:
        """Nothing: the hash is made from the index, at once."""
        return ""

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the members' names, places and sizes."""
        return self.index.digest()


class Tar:
    """The samples of one archive: any of them is two seeks away."""

    def __init__(self, path: str, index: TarIndex):
        self.path, self.index = path, index
        self._found: tuple[str, ...] = ()

    @property
    def info(self) -> Archive:
        return Archive(self.path, self.index.archive_size, len(self.index), self.index)

    @property
    def columns(self) -> tuple[str, ...]:
        """By the kinds of members of the first samples. Found when asked for: there may be thousands of archives."""
        self._found = self._found or self._columns()
        return self._found

    def _columns(self) -> tuple[str, ...]:
        found: dict[str, None] = {"key": None}
        for at in range(min(len(self.index), SAMPLES_LOOKED_AT)):
            for kind in self.index[at].members:
                if kind == "json":
                    try:
                        found |= dict.fromkeys(self[at])
                    except BadRow:
                        continue
                else:
                    found[_column(kind)] = None
        return tuple(found)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, object]:
        sample = self.index[i]
        if sample.fault:
            raise BadRow(self.path, i + 1, f"sample {sample.key!r}: {sample.fault}")
        row: dict[str, object] = {"key": sample.key}
        try:
            with reading(self.path), open_binary(self.path) as file:
                for kind, (start, size) in sample.members.items():
                    file.seek(start)
                    data = file.read(size)
                    if len(data) < size:
                        raise ValueError(f"member .{kind} ends after {len(data)} of {size} bytes")
                    row |= _values(kind, data)
        except (DataError, ValueError) as error:
            raise BadRow(self.path, i + 1, f"sample {sample.key!r}: {error}") from None
        return row

    def place(self, i: int) -> int:
        return i + 1


def _column(kind: str) -> str:
    return "image" if kind in ENDINGS else kind or "data"


def _values(kind: str, data: bytes) -> dict[str, object]:
    if kind == "json":
        return {f"json.{key}": value for key, value in json_object(data).items()}
    if kind in ("txt", "text", "cls", "caption"):
        return {kind: utf8(data).strip()}
    return {_column(kind): data}
