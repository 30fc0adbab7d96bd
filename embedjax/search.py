"""`embedjax search`: the texts or pictures nearest to a text or picture, with the corpus encoded once and kept in the user's
cache.

A corpus is a file of texts (.txt, .jsonl, .csv, .tsv, .parquet), a folder, whose Python functions are its texts, or pictures: a
folder of them, a table of their paths or bytes, or tar archives.
"""

import ast
import dataclasses
import hashlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float
from rich.console import Console
from rich.text import Text

from embedjax.config import File
from embedjax.config.errors import ConfigError, DataError, StorageError
from embedjax.data.sources import open_source, source_of
from embedjax.evaluate.encode import PictureEncoder, asked, encode, encoder_of, fingerprint, side_of
from embedjax.evaluate.late import TokenVectors, encode_tokens, maxsim_topk
from embedjax.evaluate.pictures import Stored, files_key
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.rows import column_of, string_at
from embedjax.evaluate.tasks.side import comparable
from embedjax.load import Model

LINES_SHOWN = 4

Progress = Callable[[int, int], None]
"""Is called with (done, all)."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts and, for each, where it stands: file:line."""

    texts: list[str]
    places: list[str]

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


@dataclasses.dataclass(frozen=True)
class Hit:
    """A text or picture found: rank from 1, similarity, where it stands."""

    rank: int
    score: float
    text: str
    place: str


def open_corpus(path: str | Path, column: str | None = None) -> Corpus:
    """The texts of a file, but for empty ones, or the functions in a folder's .py files. Raises DataError without any."""
    if Path(path).is_dir() and not any(Path(path).glob("*.parquet")):
        found = list(_functions(Path(path)))
        if not found:
            raise DataError(f"{path}: no Python functions in this folder (--images searches pictures)")
        return Corpus([text for text, _ in found], [place for _, place in found])
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


def search(
    model: Model,
    corpus: Corpus | Gallery,
    query: str | Path,
    k: int = 5,
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Hit]:
    """The min(k, N) texts or pictures nearest to the query, a text or the Path of a picture, as the model compares. `task`
    names the prompt, adapter or both to encode with; `cache` is a folder that keeps the corpus's vectors."""
    if isinstance(query, str) and not query.strip():
        raise ConfigError("the query is empty")
    if k < 1:
        raise ConfigError(f"{k} results were asked for; it must be at least 1")
    side = side_of(model.config, "query", isinstance(query, Path))
    # The query before the corpus: it may be wrong.
    if model.config.late:
        asked_for = encode_tokens(model, [str(query)], column=side, task=task, mesh=mesh)
        tokens = corpus_tokens(model, corpus, task=task, mesh=mesh, cache=cache, progress=progress)
        scores, rows = maxsim_topk(asked_for, tokens, k, mesh=mesh)
        lost: Collection[int] = ()
    else:
        wanted = comparable(encode(model, [query], column=side, task=task, mesh=mesh), model.config.similarity)
        vectors = corpus_vectors(model, corpus, task=task, mesh=mesh, cache=cache, progress=progress)
        lost = np.flatnonzero(~vectors.any(1)).tolist() if corpus.pictures else ()
        scores, rows = topk(wanted, vectors, k + len(lost), mesh=mesh)
    found = [pair for pair in zip(scores[0].tolist(), rows[0].tolist(), strict=True) if pair[1] not in lost]
    return [Hit(rank, score, *corpus.shown(row)) for rank, (score, row) in enumerate(found[:k], 1)]


def corpus_vectors(
    model: Model,
    corpus: Corpus | Gallery,
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Float[np.ndarray, "N E"]:
    """Vectors of the texts or pictures as documents, of length 1 if cosines are compared: from the cache if the same model has
    encoded the same ones with the same prompt and adapter, else encoded and kept there."""
    side = side_of(model.config, "document", corpus.pictures)
    file = cache and cache / f"{_key(model, corpus, side, task)}.npy"
    if file and file.exists():
        return np.load(file, mmap_mode="r")
    vectors = comparable(corpus.vectors(model, side, task=task, mesh=mesh, progress=progress), model.config.similarity)
    if file:
        _keep(file, vectors)
    return vectors


def corpus_tokens(
    model: Model,
    corpus: Corpus | Gallery,
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TokenVectors:
    """The same for a model of late interaction: the vectors of the texts' tokens, in two files."""
    side = side_of(model.config, "document", corpus.pictures)
    assert isinstance(corpus, Corpus), "a model of late interaction has towers of texts alone"
    key = _key(model, corpus, side, task) if cache else ""
    files = [cache / f"{key}.{part}.npy" for part in ("tokens", "starts")] if cache else []
    if files and all(file.exists() for file in files):
        return TokenVectors(*(np.load(file, mmap_mode="r") for file in files))
    found = encode_tokens(model, corpus.texts, column=side, task=task, mesh=mesh, progress=progress)
    if files:
        _keep(files[0], found.vectors)
        _keep(files[1], found.starts)
    return found


def _keep(file: Path, array: np.ndarray) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}.new.npy")
        np.save(new, array)
        os.replace(new, file)
    except OSError as error:
        raise StorageError(f"{file}: cannot keep the corpus's vectors: {error.strerror}") from error


def cache_folder() -> Path:
    """Where vectors are kept between searches; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedjax" / "search"


def show(hits: Sequence[Hit], out: TextIO | None = None) -> None:
    """Prints the hits: in colour and cut to the width on a terminal, as `rank score place` and indented text elsewhere."""
    stream: TextIO = out or sys.stdout
    console = Console(file=stream) if stream.isatty() else None
    width = shutil.get_terminal_size().columns
    for hit in hits:
        lines = [line for line in hit.text.splitlines() if line.strip()]
        head, shown = f"{hit.rank}  {hit.score:.3f}  {hit.place}", [f"    {line}" for line in lines[:LINES_SHOWN]]
        if console:
            console.print(Text(head, style="bold"), overflow="ellipsis", no_wrap=True)
            if shown:
                console.print(Text("\n".join(line[: width - 1] for line in shown)))
        else:
            print(head, *shown, sep="\n", file=stream)


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


def _key(model: Model, corpus: Corpus | Gallery, side: str, task: str | None) -> str:
    prompt, adapter = asked(model.config, side, task=task)
    decided = f"{fingerprint(model, side)} {prompt} {adapter} {model.config.similarity} {corpus.key()}"
    return hashlib.sha256(decided.encode()).hexdigest()
