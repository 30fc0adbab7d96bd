"""A folder of pictures as rows: each file's path, its name, and the name of the folder it lies in."""

import dataclasses
import functools
import hashlib
import operator
import os
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

from embedjax.config.errors import DataError
from embedjax.data.files import FileInfo, reading
from embedjax.data.image import ENDINGS


@dataclasses.dataclass(frozen=True)
class Listing(FileInfo):
    """What a folder held: its hash is that of all names and sizes, for reading every picture would take hours."""

    names: tuple[str, ...] = ()

    @property
    def changed(self) -> str:
        """Nothing: a folder does not tell that what lies in it has changed."""
        return ""

    @functools.cached_property
    def sha256(self) -> str:
        with reading(self.path):
            lines = (f"{name}\0{os.path.getsize(os.path.join(self.path, name))}\n" for name in self.names)
            return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


class Pictures:
    """Columns `image` (the whole path), `name` (without ending) and `label` (its folder's name), in the order of the paths."""

    columns = ("image", "name", "label")

    def __init__(self, path: str):
        path = os.path.expanduser(path)
        self.name = path
        with reading(path):
            if not os.path.isdir(path):
                raise DataError(f"{path}: no such folder")
            self.found = tuple(sorted(_pictures(path)))
        if not self.found:
            raise DataError(f"{path}: a folder without pictures ({', '.join(ENDINGS)})")

    @property
    def files(self) -> Sequence[FileInfo]:
        with reading(self.name):
            size = sum(os.path.getsize(os.path.join(self.name, name)) for name in self.found)
        return (Listing(self.name, size, len(self.found), self.found),)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: SupportsIndex, /) -> dict[str, object]:
        folder, name = os.path.split(self.inside(index))
        return {
            "image": os.path.abspath(os.path.join(self.name, folder, name)),
            "name": os.path.splitext(name)[0],
            "label": os.path.basename(folder or os.path.abspath(self.name)),
        }

    def where(self, index: SupportsIndex, /) -> tuple[str, int]:
        return os.path.join(self.name, self.inside(index)), 1

    def inside(self, index: SupportsIndex, /) -> str:
        """The path of picture i below the folder."""
        i = operator.index(index)
        if not 0 <= i < len(self.found):
            raise IndexError(f"{self.name}: picture {i} of {len(self.found)}")
        return self.found[i]


def _pictures(root: str) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]  # thumbnails, waste
        for name in names:
            if name.rpartition(".")[2].lower() in ENDINGS and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)
