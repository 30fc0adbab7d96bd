"""The pictures of a source: which column holds them, what each is known by and called, their bytes when they are needed."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable
from typing import Any

from PIL import Image

from embedjax.data.image import ENDINGS, decode, read
from embedjax.data.pictures import Pictures
from embedjax.data.sources import BadRow, Source

LOOKED_AT = 100
"""Rows that are tried for one that can be read, to learn what a column holds."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A picture of a source, read each time it is needed: a task may have more of them than memory holds. Two are equal when
    they have the same path, or the same bytes."""

    source: Source
    row: int
    column: str

    def read(self) -> bytes:
        """The encoded picture. Raises BadRow, a DataError."""
        try:
            return read(self.source[self.row].get(self.column), self._folder)
        except ValueError as error:
            raise self.bad(error) from None

    @functools.cached_property
    def path(self) -> str:
        """Where it is, if it is a file of its own. Raises BadRow for what is neither a path nor bytes."""
        value = self.source[self.row].get(self.column)
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str | bytes | bytearray | memoryview) or not value:
            found = "missing" if value in (None, "", b"") else f"{type(value).__name__}, not a picture"
            raise BadRow(*self.source.where(self.row), f"column {self.column!r} is {found}")
        return os.path.join(self._folder, value) if isinstance(value, str) else ""

    @functools.cached_property
    def key(self) -> str | bytes:
        """What equal ones have in common: the path, or the hash of the bytes."""
        return self.path or hashlib.blake2b(self.read(), digest_size=16).digest()

    @property
    def name(self) -> str:
        """What a person calls it: its path below its folder or in its table, its sample's key in an archive, or its row."""
        if isinstance(self.source, Pictures):
            return _printable(self.source.inside(self.row))
        values = self.source[self.row]
        value = values.get(self.column)
        found = value.get("path") if isinstance(value, dict) else value
        found = found if isinstance(found, str) else values.get("key")
        return _printable(found) if isinstance(found, str) else f"row {self.row + 1}"

    @property
    def place(self) -> str:
        """Where a person finds it: a path, or the file it is in and its name there."""
        file, _ = self.source.where(self.row)
        if isinstance(self.source, Pictures):
            return _printable(file)
        return _printable(self.path) or f"{file}: {self.name}"

    def bad(self, reason: object) -> BadRow:
        """The error that names its file and row."""
        return BadRow(*self.source.where(self.row), f"column {self.column!r}: {reason}")

    @property
    def _folder(self) -> str:
        return getattr(self.source, "root", "") or os.path.dirname(self.source.where(self.row)[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stored) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return self.name


def decoded(picture: Any) -> Image.Image:
    """Pixels of a Stored picture, of bytes, a path, Hugging Face's {"bytes", "path"}, or of one that Pillow has opened.

    Raises ValueError, or BadRow for a Stored one, where it is no whole picture or too large.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    data = read(os.fspath(picture) if isinstance(picture, os.PathLike) else picture)
    try:
        return decode(data)
    except ValueError as error:
        raise picture.bad(error) if isinstance(picture, Stored) else error from None


def holds_pictures(source: Source, column: str) -> bool:
    """Whether a column holds pictures, by its first value: bytes, {"bytes", "path"}, or the name of a picture's file."""
    for row in range(min(LOOKED_AT, len(source))):
        try:
            value = source[row].get(column)
        except BadRow:
            continue
        return isinstance(value, bytes | dict) or (isinstance(value, str) and value.rpartition(".")[2].lower() in ENDINGS)
    return False


def files_key(source: Source, pictures: Iterable[Stored]) -> str:
    """SHA-256 of what tells a source's pictures from others without decoding them: the files it is of, and where the first is a
    file of its own the path, size and time of change of each. Raises BadRow for what is neither a path nor bytes."""
    digest = hashlib.sha256(" ".join(info.sha256 for info in source.files).encode())
    for number, picture in enumerate(pictures):
        path = picture.path
        if not path and not number:
            break  # bytes are in the source's files; to look at each would read them all once more
        try:
            found = os.stat(path)
            told = f"{found.st_size} {found.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError for a name with a zero byte
            told = "missing"  # which reading it tells
        digest.update(f"\n{path}\0{told}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _printable(name: str) -> str:
    """A file's name as text; bytes that are no UTF-8 are shown as such."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
