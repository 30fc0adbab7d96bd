"""Where the samples of tar archives lie: found in one pass over their headers, and kept in the user's cache for the next start.

An index is good while the archive's size and date of change are what they were. Missing ones are made by all cores; hosts that
share a cache share the work.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import random
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from jaxtyping import Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from embedjax.config.errors import DataError
from embedjax.data.files import cache_folder, file_state, open_binary, reading
from embedjax.data.image import ENDINGS

LARGEST_MEMBER = 1 << 28
"""Bytes of a member beyond which its sample is refused."""

LARGEST_SIZE = (1 << 31) - 1

FORM = "1"
"""Changes when an index or what is found wrong with a sample does."""

LEAST_KEPT = 1000
"""Samples of an archive whose index is kept; smaller ones are read again as fast."""

LEAST_SHARED = 16
"""Archives without an index that are worth starting other processes for."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The members of one name, kind -> (first byte, bytes), and what is wrong with them."""

    key: str
    members: dict[str, tuple[int, int]]
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """N samples with M members in all, in the order of the archive: some 70 bytes a sample of three."""

    archive_size: int
    keys: UInt8[np.ndarray, " K"]
    """The names in UTF-8, one after the other."""
    key_ends: Int[np.ndarray, " N"]
    member_ends: Int[np.ndarray, " N"]
    starts: Int[np.ndarray, " M"]
    sizes: Int[np.ndarray, " M"]
    kinds: Int[np.ndarray, " M"]
    """Places in `kind_names`."""
    kind_names: tuple[str, ...]
    faults: dict[int, str]
    """Sample -> what is wrong with it."""

    def __len__(self) -> int:
        return len(self.key_ends)

    def __getitem__(self, i: int) -> Sample:
        span = lambda ends: slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        key = self.keys[span(self.key_ends)].tobytes().decode("utf-8", "surrogateescape")
        at = span(self.member_ends)
        places = zip(self.starts[at].tolist(), self.sizes[at].tolist(), strict=True)
        kinds = (self.kind_names[kind] for kind in self.kinds[at])
        return Sample(key, dict(zip(kinds, places, strict=True)), self.faults.get(i, ""))

    def digest(self) -> str:
        """SHA-256 of the names, places and sizes of all members."""
        digest = hashlib.sha256(json.dumps([self.archive_size, self.kind_names, len(self)]).encode())
        for array in self._arrays().values():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _arrays(self) -> dict[str, np.ndarray]:
        names = "keys", "key_ends", "member_ends", "starts", "sizes", "kinds"
        return {name: getattr(self, name) for name in names}

    def save(self, file: pathlib.Path) -> None:
        """Whole or not at all. Raises OSError."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        rest = {"size": self.archive_size, "kinds": self.kind_names, "faults": list(self.faults.items())}
        save_file(self._arrays(), partial, {"rest": json.dumps(rest)})
        os.replace(partial, file)

    @staticmethod
    def load(file: pathlib.Path) -> "TarIndex | None":
        """None where there is no index, or a damaged one."""
        try:
            with safe_open(file, framework="numpy") as tensors:
                rest = json.loads(tensors.metadata()["rest"])
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
            faults = {int(at): fault for at, fault in rest["faults"]}
            return TarIndex(archive_size=rest["size"], kind_names=tuple(rest["kinds"]), faults=faults, **arrays)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None


def tar_indexes(paths: Sequence[str]) -> list[TarIndex]:
    """The index of each archive. Raises DataError for one that is compressed, damaged or without files."""
    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        files = dict(zip(paths, threads.map(_file, paths), strict=True))
        found = dict(zip(paths, threads.map(TarIndex.load, files.values()), strict=True))
    missing = {path: file for path, file in files.items() if found[path] is None}
    began = told = time.monotonic()
    for done, (path, index) in enumerate(_made(missing), 1):
        found[path] = index
        if time.monotonic() - told > 5:
            told = time.monotonic()
            left = (len(missing) - done) * (told - began) / done
            _log.info("headers of %d of %d archives read, %.0f s to go", done, len(missing), left)
    return [index for path in paths if (index := found[path]) is not None]


def _file(path: str) -> pathlib.Path:
    """Where the index of an archive is kept."""
    if path.endswith((".gz", ".tgz", ".bz2", ".xz")):
        raise DataError(f"{path}: a compressed archive cannot be read by number; unpack it to .tar (pictures do not shrink)")
    decided = json.dumps([FORM, LARGEST_MEMBER, *file_state(path)])
    return cache_folder("shards") / f"{hashlib.sha256(decided.encode()).hexdigest()}.safetensors"


def _made(missing: dict[str, pathlib.Path]) -> Iterator[tuple[str, TarIndex]]:
    """The indexes that are not kept, in any order: hosts that share a cache begin at different ones."""
    left = dict(random.Random().sample(list(missing.items()), len(missing)))
    workers = min(os.cpu_count() or 1, len(left) // (LEAST_SHARED // 2))
    if workers > 1:
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        try:
            futures = {pool.submit(_index, path, file): path for path, file in left.items()}
            for future in concurrent.futures.as_completed(futures):
                index = future.result()
                del left[futures[future]]
                yield futures[future], index
        except BrokenProcessPool:  # such as under a script that does not guard its main part
            _log.warning("no processes can be started; one core reads the headers of %d archives", len(left))
        finally:
            pool.shutdown(cancel_futures=True)
    for path, file in left.items():
        yield path, _index(path, file)


def _index(path: str, file: pathlib.Path) -> TarIndex:
    if (index := TarIndex.load(file)) is not None:  # another host was here
        return index
    index = read_headers(path)
    if len(index) >= LEAST_KEPT:
        try:
            index.save(file)
        except OSError as error:
            _log.warning("%s: cannot keep the index of %s: %s", file.parent, path, error.strerror or error)
    return index


def read_headers(path: str) -> TarIndex:
    """One pass over an archive. Raises DataError for a damaged header, and for an archive without files."""
    keys, key_ends, member_ends, members, faults = bytearray(), [], [], [], {}
    kinds: dict[str, int] = {}
    with reading(path), open_binary(path) as file:
        size = file.seek(0, os.SEEK_END)
        for at, sample in enumerate(_samples(path, file, size)):
            keys += sample.key.encode("utf-8", "surrogateescape")
            members += [(*place, kinds.setdefault(kind, len(kinds))) for kind, place in sample.members.items()]
            key_ends.append(len(keys))
            member_ends.append(len(members))
            if sample.fault:
                faults[at] = sample.fault
    if not key_ends:
        raise DataError(f"{path}: an archive without files")
    starts, sizes, numbers = np.array(members, np.int64).T
    sizes = sizes.clip(max=LARGEST_SIZE).astype(np.int32)  # what is larger is not read
    ends = np.array(key_ends, np.int64), np.array(member_ends, np.int64)
    names = np.frombuffer(bytes(keys), np.uint8)
    where = np.ascontiguousarray(starts), sizes, numbers.astype(np.min_scalar_type(len(kinds)))
    return TarIndex(size, names, *ends, *where, tuple(kinds), faults)


def _samples(path: str, file, size: int) -> Iterator[Sample]:
    """The samples in their order; a damaged header ends the archive with an error that says where."""
    key, members, fault = None, {}, ""
    seen: set[str] = set()
    for name, place, wrong in _members(path, file, size):
        its, kind = _split(name)
        if its != key:
            if key is not None:
                yield Sample(key, members, fault)
            key, members, fault = its, {}, "its name stands in the archive before" if its in seen else ""
            seen.add(its)
        if kind in members or (kind in ENDINGS and any(other in ENDINGS for other in members)):
            wrong = wrong or f"has two members .{kind}"
        fault = fault or wrong
        members[kind] = place
    if key is not None:
        yield Sample(key, members, fault)


def _members(path: str, file, size: int) -> Iterator[tuple[str, tuple[int, int], str]]:
    """(name, (first byte, bytes), fault) of every member that is no folder."""
    file.seek(0)
    try:
        # Headers alone are read; nothing is ever written anywhere, whatever a member's name says.
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isdir():
                    yield member.name, (member.offset_data, member.size), _fault(member, size)
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
