"""The vectors of a corpus, kept in a folder between searches: found there for the same model, texts, prompt and adapter."""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float, Int

from embedjax import quantize
from embedjax.config import Precision
from embedjax.config.errors import StorageError
from embedjax.evaluate.codes import Coded, coded, ranges_over
from embedjax.evaluate.encode import asked, fingerprint, side_of
from embedjax.evaluate.funnel import Prefix, Prefixes, Stage
from embedjax.evaluate.late import encode_tokens
from embedjax.evaluate.tasks.side import comparable, prefixed
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import Model
from embedjax.search.corpus import Corpus, Gallery, Progress


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


def corpus_codes(
    model: Model,
    corpus: Corpus | Gallery,
    stages: Sequence[Stage],
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Coded], Int[np.ndarray, " n"]]:
    """What each stage of a search compares, and the rows of pictures that could not be decoded. Codes are kept in files of
    codes, the ranges they are places in, and of pictures those rows; whole vectors only where a stage compares these."""
    side = side_of(model.config, "document", corpus.pictures)
    width, prefix = model.embedders[model.config.tower_of(side)].width, prefix_of(model, side)
    key = _key(model, corpus, side, task) if cache else ""
    keeps = cache and (
        any((stage.dim, stage.precision) == (width, "float32") for stage in stages) or (cache / f"{key}.npy").exists()
    )

    @functools.cache
    def whole() -> tuple[Float[np.ndarray, "N E"], Int[np.ndarray, " n"]]:
        options = {"task": task, "mesh": mesh, "progress": progress, "cache": cache if keeps else None}
        vectors = corpus_vectors(model, corpus, **options)
        return vectors, np.flatnonzero(~vectors.any(1)) if corpus.pictures else np.zeros(0, np.int64)

    def codes_of(dim: int, precision: Precision) -> tuple[Coded, Int[np.ndarray, " n"]]:
        if (dim, precision) == (width, "float32"):
            return Coded(whole()[0], precision, width), whole()[1]
        name = f"{key}.dim{dim}.{precision}"
        if cache and (kept := _kept_codes(cache, name, dim, precision, corpus.pictures)):
            return kept
        part = Prefixes(whole()[0], dim, prefix)
        made, lost = coded(part, precision, ranges_for(model, part, precision)), whole()[1]
        parts = {"codes": made.codes, "ranges": made.ranges, "lost": lost if corpus.pictures else None}
        for ending, array in parts.items():
            if cache and array is not None:
                _keep(cache / f"{name}.{ending}.npy", array)
        return made, lost

    found = [codes_of(stage.dim, stage.precision) for stage in stages]
    return [codes for codes, _ in found], found[0][1]


def prefix_of(model: Model, side: str) -> Prefix:
    """The first numbers of a side's vectors as the model compares them: at length 1 where it compares cosines or scales its
    vectors, else cut and no more."""
    tower = model.config.towers[model.config.tower_of(side)]
    return lambda vectors, dim: comparable(prefixed(vectors, dim, tower), model.config.similarity)


def ranges_for(model: Model, vectors: Prefixes, precision: Precision) -> quantize.Ranges | None:
    """The ranges of codes of these prefixes, where they are places in ranges: those of the corpus's own vectors."""
    return ranges_over(vectors) if quantize.in_ranges(precision) else None


def _kept_codes(
    cache: Path, key: str, dim: int, precision: Precision, pictures: bool
) -> tuple[Coded, Int[np.ndarray, " n"]] | None:
    """What `corpus_codes` kept; None if not all of it is there."""
    parts = {"codes": True, "ranges": quantize.in_ranges(precision), "lost": pictures}
    files = {part: cache / f"{key}.{part}.npy" for part, there in parts.items() if there}
    if not all(file.exists() for file in files.values()):
        return None
    found = {part: np.load(file, mmap_mode="r" if part == "codes" else None) for part, file in files.items()}
    return Coded(found["codes"], precision, dim, found.get("ranges")), found.get("lost", np.zeros(0, np.int64))


def corpus_tokens(
    model: Model,
    corpus: Corpus | Gallery,
    *,
    pool: int = 1,
    precision: Precision = "float32",
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TokenVectors:
    """The same for a model of late interaction: the vectors of the texts' tokens, pooled and quantized, in files of vectors,
    starts and, where codes are places in ranges, ranges."""
    side = side_of(model.config, "document", corpus.pictures)
    assert isinstance(corpus, Corpus), "a model of late interaction has towers of texts alone"
    key = _key(model, corpus, side, task) if cache else ""
    small = pool > 1 or precision != "float32"
    form = f".pool{pool}.{precision}" if small else ""
    if cache and (kept := _kept_tokens(cache, f"{key}{form}", precision, model.embedders[model.config.tower_of(side)].width)):
        return kept
    if cache and small and (whole := _kept_tokens(cache, key, "float32", 0)):
        found = whole.pooled(pool)
    else:
        found = encode_tokens(model, corpus.texts, column=side, task=task, mesh=mesh, progress=progress, pool=pool)
    found = found if precision == "float32" else found.quantized(precision)
    for file, array in _token_files(cache, f"{key}{form}", found).items() if cache else ():
        _keep(file, array)
    return found


def _token_files(cache: Path, key: str, tokens: TokenVectors) -> dict[Path, np.ndarray]:
    parts = {"tokens": tokens.vectors, "starts": tokens.starts, "ranges": tokens.ranges}
    return {cache / f"{key}.{part}.npy": array for part, array in parts.items() if array is not None}


def _kept_tokens(cache: Path, key: str, precision: Precision, width: int) -> TokenVectors | None:
    """What `corpus_tokens` kept; None if not all of it is there."""
    parts = ("tokens", "starts", "ranges")[: 3 if quantize.in_ranges(precision) else 2]
    files = [cache / f"{key}.{part}.npy" for part in parts]
    if not all(file.exists() for file in files):
        return None
    vectors, starts, *ranges = (np.load(file, mmap_mode="r") for file in files)
    return TokenVectors(vectors, starts, precision, ranges[0] if ranges else None, width)


def _keep(file: Path, array: np.ndarray) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}.new.npy")
        np.save(new, array)
        os.replace(new, file)
    except OSError as error:
        raise StorageError(f"{file}: cannot keep the corpus's vectors: {error.strerror}") from error


def _key(model: Model, corpus: Corpus | Gallery, side: str, task: str | None) -> str:
    prompt, adapter = asked(model.config, side, task=task)
    decided = f"{fingerprint(model, side)} {prompt} {adapter} {model.config.similarity} {corpus.key()}"
    return hashlib.sha256(decided.encode()).hexdigest()
