"""Tar archives of samples, as webdataset lays them out: rows by number, nothing unpacked.

A sample is a run of members whose names agree up to the first dot of the last part; what follows is the member's kind:
`000/cat.jpg`, `000/cat.txt`, `000/cat.json`. Pictures of any format are the column `image`, .txt and .cls are text, the keys
of .json become columns `json.KEY`, and other kinds stay bytes. `key` is the name.
"""

import dataclasses
import os
import re
import tarfile
from collections.abc import Iterator

from embedjax.config.errors import DataError
from embedjax.data.files import expand, is_remote, open_binary, reading
from embedjax.data.image import ENDINGS
from embedjax.data.rows import BadRow, json_object, utf8

LARGEST_MEMBER = 1 << 28
"""Bytes of a member beyond which its sample is refused."""

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
    return [Tar(each) for each in paths]


@dataclasses.dataclass(frozen=True)
class Member:
    """Where the bytes of one file of a sample lie in the archive."""

    start: int
    size: int


@dataclasses.dataclass
class Sample:
    """The members of one name, by kind, and what is wrong with them."""

    key: str
    members: dict[str, Member]
    fault: str = ""


class Tar:
    """The samples of one archive, which is read once from end to end for its headers; then any sample is two seeks away."""

    def __init__(self, path: str):
        self.path = path
        if path.endswith((".gz", ".tgz", ".bz2", ".xz")):
            raise DataError(
                f"{path}: a compressed archive cannot be read by number; unpack it to .tar (pictures do not shrink)"
            )
        with reading(path), open_binary(path) as file:
            file.seek(0, os.SEEK_END)
            self.samples = list(_samples(path, file, file.tell()))
        if not self.samples:
            raise DataError(f"{path}: an archive without files")
        self.columns = self._columns()

    def _columns(self) -> tuple[str, ...]:
        found: dict[str, None] = {"key": None}
        for at, sample in enumerate(self.samples[:SAMPLES_LOOKED_AT]):
            for kind in sample.members:
                if kind == "json":
                    try:
                        found |= dict.fromkeys(self[at])
                    except BadRow:
                        continue
                else:
                    found[_column(kind)] = None
        return tuple(found)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, object]:
        sample = self.samples[i]
        if sample.fault:
            raise BadRow(self.path, i + 1, f"sample {sample.key!r}: {sample.fault}")
        row: dict[str, object] = {"key": sample.key}
        try:
            with reading(self.path), open_binary(self.path) as file:
                for kind, member in sample.members.items():
                    file.seek(member.start)
                    data = file.read(member.size)
                    if len(data) < member.size:
                        raise ValueError(f"member .{kind} ends after {len(data)} of {member.size} bytes")
                    row |= _values(kind, data)
        except (DataError, ValueError) as error:
            raise BadRow(self.path, i + 1, f"sample {sample.key!r}: {error}") from None
        return row

    def place(self, i: int) -> int:
        return i + 1


def _samples(path: str, file, size: int) -> Iterator[Sample]:
    """The samples in their order; a damaged header ends the archive with an error that says where."""
    sample: Sample | None = None
    seen: set[str] = set()
    for name, start, length, fault in _members(path, file, size):
        key, kind = _split(name)
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = Sample(key, {}, "its name stands in the archive before" if key in seen else "")
            seen.add(key)
        if kind in sample.members or (kind in ENDINGS and any(other in ENDINGS for other in sample.members)):
            fault = fault or f"has two members .{kind}"
        sample.fault = sample.fault or fault
        sample.members[kind] = Member(start, length)
    if sample is not None:
        yield sample


def _members(path: str, file, size: int) -> Iterator[tuple[str, int, int, str]]:
    """(name, start, bytes, fault) of every member that is no folder."""
    file.seek(0)
    try:
        # Headers alone are read; nothing is ever written anywhere, whatever a member's name says.
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isdir():
                    yield member.name, member.offset_data, member.size, _fault(member, size)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise DataError(f"{path}: not a whole tar archive: {error}") from None


def _fault(member: tarfile.TarInfo, size: int) -> str:
    parts = re.split(r"[\\/]", member.name)
    if not member.isreg() or member.issparse():
        return f"member {member.name!r} is no plain file"
    if member.name.startswith(("/", "\\")) or ".." in parts or "\0" in member.name or re.match(r"[A-Za-z]:", member.name):
        return f"member {member.name!r} has a name that leaves the archive"
    if member.size > LARGEST_MEMBER:
        return f"member {member.name!r} has {member.size} bytes; at most {LARGEST_MEMBER} are read"
    if member.offset_data + member.size > size:
        return f"member {member.name!r} reaches beyond the archive's end"
    return ""


def _split(name: str) -> tuple[str, str]:
    """(name of the sample, kind of the member)."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _column(kind: str) -> str:
    return "image" if kind in ENDINGS else kind or "data"


def _values(kind: str, data: bytes) -> dict[str, object]:
    if kind == "json":
        return {f"json.{key}": value for key, value in json_object(data).items()}
    if kind in ("txt", "text", "cls", "caption"):
        return {kind: utf8(data).strip()}
    return {_column(kind): data}
