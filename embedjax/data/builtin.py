"""The embedded data set: functions of the installed Python packages as rows of docstring summary and source code.

Files are only parsed, never imported or run. Rows are split by package, so held-out functions come from packages never
seen. Which rows there are depends on the packages installed on this machine and the seed, and on nothing else. Batching and
tokenizing are not done here.
"""

import ast
import collections
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embedjax.config.data import Functions
from embedjax.config.errors import DataError

log = logging.getLogger(__name__)

# Directories left out: tests, copies of other packages, and the packages that a standard library folder may contain.
SKIPPED = {
    "test", "tests", "__pycache__", "site-packages", "dist-packages", "node_modules", "_vendor", "vendor", "_vendored",
    "vendored", "_vendored_packages", "third_party", "thirdparty", "_third_party", "extern", "externals", "_external",
}  # fmt: skip
TEST_FILE = re.compile(r"(test_.*|.*_tests?|conftest|tests?)\.py")
DOCSTRING = re.compile(rb':[ \t]*\r?\n[ \t]+[rRuU]?("""|\'\'\')')

FILE_BYTES = 1 << 20  # larger ones are generated
SPARSE_BYTES = 2400  # a file with fewer than one docstring in so many bytes is not worth its parsing
TOTAL_BYTES = 44 << 20  # parsing takes a second for about 5 MB
PACKAGE_DOCSTRINGS = 6000  # enough of one package: its share of the rows is capped
CODE_CHARS = 16_000
SHARE = 5  # no package has more than one in SHARE rows
TEST_SHARE = 0.12
FEWEST = 1000

SECTION = re.compile(
    r"\s*(>>>|:\w+[^:]*:|@\w+|\.\. |[-=~*]{3,}|(Args?|Arguments|Parameters|Returns?|Raises|Yields?|Examples?|Notes?)\s*:)"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")
WORD = re.compile(r"[A-Za-z]{2,}")
# A signature or a parameter's description, or a summary that says nothing of the function itself.
EMPTY_WORDS = re.compile(r"[\w.]+ ?\(|(see|same as|deprecated|overrides?|overridden|inherited|todo)\b", re.IGNORECASE)

Found = tuple[str, int, str, str]  # name, line, summary, code


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
    for file, found in zip(files, _read_all([file.path for file in files]), strict=True):
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


# Which functions


def _read_all(paths: Sequence[str]) -> list[list[Found]]:
    """`_read` of each path, shared among a few processes.

    They are plain child processes and not `multiprocessing`, whose children would import the user's script again.
    """
    count = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    count = max(1, min(count, len(paths) // 100))
    command = [sys.executable, "-c", "from embedjax.data import builtin; builtin._serve()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    children = []
    for part in range(1, count):
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        children.append((part, child))
    found: list[list[Found]] = [[] for _ in paths]
    answers = ThreadPoolExecutor(max(1, count - 1))
    pending = [
        (part, child, answers.submit(child.communicate, json.dumps(paths[part::count]).encode())) for part, child in children
    ]
    found[::count] = _read(paths[::count])
    for part, child, answer in pending:
        output, _ = answer.result()
        found[part::count] = json.loads(output) if child.returncode == 0 else _read(paths[part::count])
    answers.shutdown()
    return found


def _serve() -> None:
    """The child of `_read_all`: paths on its input, what they hold on its output, both JSON."""
    json.dump(_read(json.load(sys.stdin)), sys.stdout)


def _read(paths: Sequence[str]) -> list[list[Found]]:
    found = []
    collecting = gc.isenabled()
    gc.disable()  # trees of a million nodes: the collector would double the time and find nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own invalid escapes
            for path in paths:
                try:
                    text = Path(path).read_bytes().decode("utf-8-sig")
                except (OSError, UnicodeDecodeError):
                    text = ""
                found.append(list(functions_of(text)))
    finally:
        if collecting:
            gc.enable()
    return found


def functions_of(text: str) -> Iterator[Found]:
    """(name, line, summary, code) of the documented functions and methods of a module; none if it does not parse."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.split("\n")  # as ast counts them: form feeds do not end a line
    scopes: list[ast.Module | ast.ClassDef] = [module]
    while scopes:
        scope = scopes.pop()
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                summary = summary_of(docstring) if docstring else None
                code = _code(node, lines) if summary else None
                if summary and code:
                    yield node.name, node.lineno, summary, code


def summary_of(docstring: str) -> str | None:
    """The first sentence of a docstring; None if it is not at least three words of plain English."""
    paragraph: list[str] = []
    for line in docstring[:2000].strip().split("\n"):
        if not line.strip() or SECTION.match(line):
            break
        paragraph.append(line)
    summary = SENTENCE.split(" ".join(" ".join(paragraph).split()))[0]
    words = WORD.findall(summary)
    if len(words) < 3 or len(summary) > 300 or EMPTY_WORDS.match(summary):
        return None
    plain = sum(character.isascii() for character in summary)
    return summary if plain >= 0.95 * len(summary) and sum(map(len, words)) >= 0.5 * len(summary) else None


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str | None:
    """Source of a function from `def` on, without decorators and docstring, dedented; None if too little is left."""
    docstring, rest = node.body[0], node.body[1:]
    if not rest or (len(rest) == 1 and _trivial(rest[0])):
        return None
    first, last = docstring.lineno, docstring.end_lineno or docstring.lineno
    if lines[first - 1][: docstring.col_offset].strip() or rest[0].lineno <= last:
        return None  # the docstring shares its lines with code
    kept = lines[node.lineno - 1 : first - 1] + lines[last : node.end_lineno]
    indent = lines[node.lineno - 1][: node.col_offset]
    # Not textwrap.dedent: a string whose lines start at the margin would keep the whole function indented.
    code = "\n".join(line.removeprefix(indent) for line in kept)
    if sum(1 for line in kept if line.strip()) < 3 or len(code) > CODE_CHARS:
        return None
    return code


def _trivial(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False


# Which rows


def _distinct(rows: Iterable[Function]) -> Iterator[Function]:
    """Rows whose summary and code were not seen before, but for spaces, case and punctuation."""
    seen: set[str] = set()
    for row in rows:
        keys = {" ".join(WORD.findall(row.summary)).lower(), "\0" + "".join(row.code.split())}
        if not keys & seen:
            yield row
        seen |= keys


def _split(rows: Sequence[Function]) -> dict[str, list[Function]]:
    """Held-out packages are taken in the order of their names' hashes, none too large, until their share is reached."""
    counts = collections.Counter(row.package for row in rows)
    wanted = TEST_SHARE * len(rows)
    held_out: set[str] = set()
    taken = 0
    for package in sorted(counts, key=lambda package: hashlib.blake2b(package.encode()).digest()):
        if taken < wanted and counts[package] <= max(1, wanted / SHARE):
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
