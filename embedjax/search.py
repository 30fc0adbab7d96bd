"""`embedjax search`: the texts of a corpus nearest to a query, with the corpus encoded once and kept in the user's cache.

A corpus is a file of texts (.txt, .jsonl, .csv, .tsv, .parquet) or a folder, whose Python functions are its texts.
"""

import ast
import dataclasses
import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float
from rich.console import Console
from rich.text import Text

from embedjax.config import File
from embedjax.config.errors import ConfigError, DataError, StorageError
from embedjax.data.sources import open_source
from embedjax.evaluate.encode import asked, encode, fingerprint
from embedjax.evaluate.late import TokenVectors, encode_tokens, maxsim_topk
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.rows import string_at, text_column
from embedjax.evaluate.tasks.side import comparable
from embedjax.load import Model

LINES_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts and, for each, where it stands: file:line."""

    texts: list[str]
    places: list[str]


@dataclasses.dataclass(frozen=True)
class Hit:
    """A text found: rank from 1, similarity, where it stands."""

    rank: int
    score: float
    text: str
    place: str


def open_corpus(path: str | Path, column: str | None = None) -> Corpus:
    """The texts of a file, but for empty ones, or the functions in a folder's .py files. Raises DataError without any."""
    if Path(path).is_dir() and not any(Path(path).glob("*.parquet")):
        found = list(_functions(Path(path)))
        if not found:
            raise DataError(f"{path}: no Python functions in this folder")
        return Corpus([text for text, _ in found], [place for _, place in found])
    source = open_source(File(path=str(path)))
    name = text_column(source, column)
    texts = {row: text for row in range(len(source)) if (text := string_at(source, row, name)).strip()}
    if not texts:
        raise DataError(f"{path}: column {name!r} has no texts")
    return Corpus(list(texts.values()), [":".join(map(str, source.where(row))) for row in texts])


def search(
    model: Model,
    corpus: Corpus,
    query: str,
    k: int = 5,
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Hit]:
    """The min(k, N) texts nearest to the query, as the model compares. `task` names the prompt, adapter or both to encode with;
    `cache` is a folder that keeps the corpus's vectors."""
    if not query.strip():
        raise ConfigError("the query is empty")
    if k < 1:
        raise ConfigError(f"{k} results were asked for; it must be at least 1")
    if model.config.late:
        tokens = corpus_tokens(model, corpus.texts, task=task, mesh=mesh, cache=cache, progress=progress)
        scores, rows = maxsim_topk(encode_tokens(model, [query], column="query", task=task, mesh=mesh), tokens, k, mesh=mesh)
    else:
        vectors = corpus_vectors(model, corpus.texts, task=task, mesh=mesh, cache=cache, progress=progress)
        wanted = comparable(encode(model, [query], column="query", task=task, mesh=mesh), model.config.similarity)
        scores, rows = topk(wanted, vectors, k, mesh=mesh)
    found = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
    return [Hit(rank, score, corpus.texts[row], corpus.places[row]) for rank, (score, row) in enumerate(found, 1)]


def corpus_vectors(
    model: Model,
    texts: Sequence[str],
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "N E"]:
    """Vectors of the texts as documents, of length 1 if cosines are compared: from the cache if the same model has encoded the
    same texts with the same prompt and adapter, else encoded and kept there."""
    file = cache and cache / f"{_key(model, texts, task)}.npy"
    if file and file.exists():
        return np.load(file, mmap_mode="r")
    vectors = encode(model, texts, column="document", task=task, mesh=mesh, progress=progress)
    vectors = comparable(vectors, model.config.similarity)
    if file:
        _keep(file, vectors)
    return vectors


def corpus_tokens(
    model: Model,
    texts: Sequence[str],
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenVectors:
    """The same for a model of late interaction: the vectors of the texts' tokens, in two files."""
    key = _key(model, texts, task) if cache else ""
    files = [cache / f"{key}.{part}.npy" for part in ("tokens", "starts")] if cache else []
    if files and all(file.exists() for file in files):
        return TokenVectors(*(np.load(file, mmap_mode="r") for file in files))
    found = encode_tokens(model, texts, task=task, mesh=mesh, progress=progress)
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


def _key(model: Model, texts: Sequence[str], task: str | None) -> str:
    prompt, adapter = asked(model.config, "document", task=task)
    decided = f"{fingerprint(model, 'document')} {prompt} {adapter} {model.config.similarity} {len(texts)}\n"
    digest = hashlib.sha256(decided.encode())
    for text in texts:
        raw = text.encode()
        digest.update(f"{len(raw)} ".encode() + raw)
    return digest.hexdigest()
