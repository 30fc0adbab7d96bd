"""What is searched: the texts of a file, the functions of a folder's code, or pictures, and for each where it stands."""

import ast
import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float

from embedjax.config import File
from embedjax.config.errors import DataError
from embedjax.data.sources import open_source, source_of
from embedjax.evaluate.bm25 import Words
from embedjax.evaluate.encode import PictureEncoder, encode, encoder_of
from embedjax.evaluate.pictures import Stored, files_key
from embedjax.evaluate.rows import column_of, string_at
from embedjax.load import Model

Progress = Callable[[int, int], None]
"""Is called with (done, all)."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts and, for each, where it stands: file:line; and what BM25 takes for their words."""

    texts: list[str]
    places: list[str]
    words: Words = "plain"

    pictures = False

    def shown(self, row: int) -> tuple[str, str]:
        """A text and its place."""
        return self.texts[row], self.places[row]

    def key(self) -> str:
        """SHA-256 of all texts."""
        digest = hashlib.sha256(f"{len(self.texts)}\n".encode())
        for text in self.texts:
            raw = text.encode()
            digest.update(f"{len(raw)} ".encode() + raw)
        return digest.hexdigest()

    def vectors(
        self, model: Model, side: str, *, task: str | None, mesh: DeviceMesh | None, progress: Progress | None
    ) -> Float[np.ndarray, "N E"]:
        """One a text."""
        return encode(model, self.texts, column=side, task=task, mesh=mesh, progress=progress)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures, which are read as they are encoded."""

    stored: Sequence[Stored]

    pictures = True

    def shown(self, row: int) -> tuple[str, str]:
        """Of a picture there is no text to show, only its place."""
        return "", self.stored[row].place

    def key(self) -> str:
        """SHA-256 of what tells the pictures from others: files, sizes and times of change."""
        return files_key(self.stored[0].source, self.stored)

    def vectors(
        self, model: Model, side: str, *, task: str | None, mesh: DeviceMesh | None, progress: Progress | None
    ) -> Float[np.ndarray, "N E"]:
        """One a picture, zeros for what cannot be decoded, of which one line is told: a search is no check of a folder. Raises
        DataError when none can be."""
        encoder, bad = encoder_of(model, column=side, task=task, mesh=mesh), {}
        assert isinstance(encoder, PictureEncoder)

        def block(start: int) -> dict[str, np.ndarray]:
            wrong: dict[int, str] = {}
            columns = encoder.tokenize(self.stored[start : start + encoder.block], wrong)
            bad.update({start + at: reason for at, reason in wrong.items()})
            if len(bad) == count:
                raise DataError(f"none of the {count} pictures can be decoded; the first: {bad[0]}")
            return columns

        count = len(self.stored)
        report = (lambda done: progress(done, count)) if progress else None
        vectors = np.concatenate(list(encoder.stream(map(block, range(0, count, encoder.block)), progress=report)))
        vectors[list(bad)] = 0
        if bad:
            told = len(bad), count, bad[min(bad)]
            _log.warning("%d of %d pictures cannot be decoded and are passed over; the first: %s", *told)
        return vectors


def open_corpus(path: str | Path, column: str | None = None) -> Corpus:
    """The texts of a file, but for empty ones, or the functions in a folder's .py files. Raises DataError without any."""
    if Path(path).is_dir() and not any(Path(path).glob("*.parquet")):
        found = list(_functions(Path(path)))
        if not found:
            raise DataError(f"{path}: no Python functions in this folder (--images searches pictures)")
        return Corpus([text for text, _ in found], [place for _, place in found], "identifiers")
    source = open_source(File(path=str(path)))
    name = column_of(source, column)
    texts = {row: text for row in range(len(source)) if (text := string_at(source, row, name)).strip()}
    if not texts:
        raise DataError(f"{path}: column {name!r} has no texts")
    return Corpus(list(texts.values()), [":".join(map(str, source.where(row))) for row in texts])


def open_gallery(path: str | Path, column: str | None = None) -> Gallery:
    """The pictures of a folder, of a table's column of paths or bytes, or of tar archives. Raises DataError without any."""
    source = open_source(source_of(str(path)))
    name = column_of(source, column, ("image",))
    return Gallery([Stored(source, row, name) for row in range(len(source))])


def functions_in(source: str) -> Iterator[tuple[str, int]]:
    """(source without decorators and docstring, line) of every function and method of a module that is not nested in one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the code's own invalid escapes
            module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    scopes: list[ast.Module | ast.ClassDef] = [module]
    while scopes:
        for node in scopes.pop().body:
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield _code(node, lines), node.lineno


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    """As the embedded data set has its functions, so that a model trained on it meets what it knows."""
    kept = list(lines[node.lineno - 1 : node.end_lineno])
    first = node.body[0]
    alone = ast.get_docstring(node) is not None and first.lineno > node.lineno and len(node.body) > 1
    if alone and not lines[first.lineno - 1][: first.col_offset].strip() and node.body[1].lineno > (first.end_lineno or 0):
        del kept[first.lineno - node.lineno : (first.end_lineno or first.lineno) - node.lineno + 1]
    indent = lines[node.lineno - 1][: node.col_offset]
    return "\n".join(line.removeprefix(indent) for line in kept)


def _functions(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.py")):
        if any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue  # as for code that does not parse: a search is no check of the folder
        for code, line in functions_in(source):
            yield code, f"{path}:{line}"
