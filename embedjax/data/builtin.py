"""The embedded data set: functions of the installed Python packages as rows of docstring summary and source code.

Files are only parsed, never imported or run. Rows are split by package, so held-out functions come from packages never
seen. Which rows there are depends on the packages installed on this machine and the seed, and on nothing else. Batching and
tokenizing are not done here.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from embedjax.config.data import Functions
from embedjax.config.errors import DataError
from embedjax.data import functions

log = logging.getLogger(__name__)

# Directories left out: tests, copies of other packages, and the packages that a standard library folder may contain.
SKIPPED = {
    "test", "tests", "__pycache__", "site-packages", "dist-packages", "node_modules", "_vendor", "vendor", "_vendored",
    "vendored", "_vendored_packages", "third_party", "thirdparty", "_third_party", "extern", "externals", "_external",
}  # fmt: skip
TEST_FILE = re.compile(r"(test_.*|.*_tests?|conftest|tests?)\.py")
DOCSTRING = re.compile(rb':[ \t]*\r?\n[ \t]+[rRuU]?("""|\'\'\')')

FILE_BYTES = 1 << 20  # larger ones are generated
SPARSE_BYTES = 2300  # a file with fewer than one docstring in so many bytes is not worth its parsing
TOTAL_BYTES = 42 << 20  # parsing takes a second for about 5 MB
PACKAGE_DOCSTRINGS = 6000  # enough of one package: its share of the rows is capped
SHARE = 5  # no package has more than one in SHARE rows
TEST_SHARE = 0.12
FEWEST = 1000


@dataclasses.dataclass(frozen=True)
class Function:
    """One function: its documentation and its code, and where they came from."""

    summary: str
    code: str
    name: str
    package: str
    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class PackageInfo:
    """What was taken of one package; `path` names it with its distributions' versions, `size` counts bytes of its rows."""

    path: str
    files: int
    size: int
    rows: int
    sha256: str
    changed: str = ""
    """Nothing: the hash is that of the rows, which have been read."""


@dataclasses.dataclass(frozen=True)
class _File:
    package: str
    path: str
    place: str  # relative to its root, with /: the same wherever the packages are installed


def open_functions(source: Functions) -> "FunctionRows":
    """The rows of one split. The packages are read once a process and seed; DataError if they have too few functions."""
    split = _installed(source.seed)
    rows = _capped(split[source.split], source.limit)
    return FunctionRows(name=f"functions/{source.split}", rows=tuple(rows), roots=installed_roots())


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionRows:
    """A source: `len`, `[i]`, `columns`, `files`, `where`."""

    name: str
    rows: tuple[Function, ...] = dataclasses.field(repr=False)
    roots: tuple[str, ...]
    columns = ("summary", "code", "name", "package")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        row = self.rows[index]
        return {"summary": row.summary, "code": row.code, "name": row.name, "package": row.package}

    def where(self, index: int) -> tuple[str, int]:
        """The file a row came from, and the line its function starts on."""
        return self.rows[index].file, self.rows[index].line

    @functools.cached_property
    def files(self) -> tuple[PackageInfo, ...]:
        """One entry a package, by name."""
        by_package: dict[str, list[Function]] = collections.defaultdict(list)
        for row in self.rows:
            by_package[row.package].append(row)
        versions = _versions(self.roots)
        return tuple(_package_info(versions.get(name, name), rows) for name, rows in sorted(by_package.items()))


def _package_info(path: str, rows: Sequence[Function]) -> PackageInfo:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.summary}\0{row.code}\0".encode())
    size = sum(len(row.summary.encode()) + len(row.code.encode()) for row in rows)
    return PackageInfo(path=path, files=len({row.file for row in rows}), size=size, rows=len(rows), sha256=digest.hexdigest())


def installed_roots() -> tuple[str, ...]:
    """The running interpreter's site-packages folders and its standard library."""
    paths = sysconfig.get_paths()
    return tuple(dict.fromkeys(os.path.realpath(paths[name]) for name in ("purelib", "platlib", "stdlib")))


@functools.cache
def _installed(seed: int) -> dict[str, list[Function]]:
    start = time.perf_counter()
    split = extract(installed_roots(), seed)
    counts = {name: len(rows) for name, rows in split.items()}
    packages = {name: len({row.package for row in rows}) for name, rows in split.items()}
    if sum(counts.values()) < FEWEST:
        raise DataError(
            f"the packages in {', '.join(installed_roots())} have {sum(counts.values())} documented functions; "
            f"the embedded data set needs at least {FEWEST}: are their .py files installed?"
        )
    log.info(
        "embedded functions: %d for training from %d packages, %d held out from %d, read in %.1f s",
        counts["train"], packages["train"], counts["test"], packages["test"], time.perf_counter() - start,
    )  # fmt: skip
    return split


def extract(roots: Sequence[str | Path], seed: int) -> dict[str, list[Function]]:
    """The functions of the packages under `roots` as {"train": rows, "test": rows}, in an order drawn by the seed."""
    files = _chosen(_files(roots), seed)
    rows: list[tuple[bytes, Function]] = []
    for file, found in zip(files, functions.read_all([file.path for file in files]), strict=True):
        for name, line, summary, code in found:
            function = Function(summary, code, name, file.package, file.path, line)
            rows.append((_draw(seed, file.place, name, line), function))
    rows.sort(key=lambda row: row[0])
    return _split(list(_distinct(row for _, row in rows)))


def _draw(seed: int, *key: object) -> bytes:
    return hashlib.blake2b(repr((seed, *key)).encode("utf-8", "replace"), digest_size=8).digest()


# Which files


def _files(roots: Sequence[str | Path]) -> Iterator[_File]:
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name.lower() not in SKIPPED and not name.startswith(".")]
            inside = folder[len(str(root)) :].replace(os.sep, "/").strip("/")
            for name in names:
                if name.endswith(".py") and not TEST_FILE.fullmatch(name):
                    place = f"{inside}/{name}".lstrip("/")
                    yield _File(_package(place.split("/", 1)[0]), os.path.join(folder, name), place)


def _package(top: str) -> str:
    """A package's name from its folder or file in site-packages; _pytest is part of pytest."""
    return top.removesuffix(".py").strip("_")


def _chosen(files: Iterable[_File], seed: int) -> list[_File]:
    """Files in an order drawn by the seed, until there is enough of each package and of all."""
    chosen = []
    seen: dict[str, int] = collections.Counter()
    total = 0
    for file in sorted(files, key=lambda file: (_draw(seed, file.place), file.path)):
        if seen[file.package] >= PACKAGE_DOCSTRINGS:
            continue
        try:
            raw = Path(file.path).read_bytes()
        except OSError:
            continue
        docstrings = len(DOCSTRING.findall(raw))
        if len(raw) > FILE_BYTES or len(raw) > SPARSE_BYTES * docstrings:
            continue
        seen[file.package] += docstrings
        total += len(raw)
        chosen.append(file)
        if total >= TOTAL_BYTES:
            break
    return chosen


# Which rows


def _distinct(rows: Iterable[Function]) -> Iterator[Function]:
    """Rows whose summary and code were not seen before, but for spaces, case and punctuation."""
    seen: set[str] = set()
    for row in rows:
        keys = {" ".join(functions.WORD.findall(row.summary)).lower(), "\0" + "".join(row.code.split())}
        if not keys & seen:
            yield row
        seen |= keys


def _split(rows: Sequence[Function]) -> dict[str, list[Function]]:
    """Held-out packages are taken in the order of their names' hashes, none too large, until their share is reached."""
    counts = collections.Counter(row.package for row in rows)
    wanted = TEST_SHARE * len(rows)
    held_out: set[str] = set()
    taken = 0
    by_hash = sorted(counts, key=lambda package: hashlib.blake2b(package.encode()).digest())
    for largest in (wanted / SHARE, wanted):  # the second only where packages are few
        for package in by_hash:
            if taken < wanted and counts[package] <= largest and package not in held_out:
                held_out.add(package)
                taken += counts[package]
    split: dict[str, list[Function]] = {"train": [], "test": []}
    for row in rows:
        split["test" if row.package in held_out else "train"].append(row)
    return split


def _capped(rows: Sequence[Function], limit: int) -> list[Function]:
    """The first `limit` rows (0: all) such that no package has more than one in SHARE of them."""
    counts = collections.Counter(row.package for row in rows).values()
    cap = max(counts, default=0)
    if limit:
        cap = min(cap, max(1, limit // SHARE))
    while cap > 1 and cap > (fair := sum(min(count, cap) for count in counts) // SHARE):
        cap = fair
    seen: dict[str, int] = collections.Counter()
    kept = []
    for row in rows:
        seen[row.package] += 1
        if seen[row.package] <= cap:
            kept.append(row)
    return kept[:limit] if limit else kept


def _versions(roots: Sequence[str]) -> dict[str, str]:
    """Package -> the distributions it was installed by with their versions; the standard library's are Python's."""
    versions: dict[str, list[str]] = collections.defaultdict(list)
    for distribution in importlib.metadata.distributions(path=list(roots)):
        record = distribution.read_text("RECORD") or ""
        tops = {_package(line.split("/", 1)[0].split(",", 1)[0]) for line in record.splitlines()}
        for top in tops:
            versions[top].append(f"{distribution.name} {distribution.version}")
    named = {top: f"{top} ({', '.join(sorted(found))})" for top, found in versions.items()}
    stdlib = os.path.realpath(sysconfig.get_paths()["stdlib"])
    if stdlib in roots:
        for name in os.listdir(stdlib):
            top = _package(name)
            named.setdefault(top, f"{top} (Python {platform.python_version()})")
    return named
