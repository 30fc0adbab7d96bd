"""The vectors of a corpus, kept in a folder between searches: found there for the same model, texts, prompt and adapter."""

import hashlib
import os
from pathlib import Path

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float

from embedjax import quantize
from embedjax.config import Precision
from embedjax.config.errors import StorageError
from embedjax.evaluate.encode import asked, fingerprint, side_of
from embedjax.evaluate.late import TokenVectors, encode_tokens
from embedjax.evaluate.tasks.side import comparable
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
