"""Codes in a file -> an index file of FAISS or of usearch, a block at a time; ids are row numbers.

FAISS keeps our codes bit for bit: QT_8bit with our ranges, QT_fp16, QT_bf16, IndexBinaryFlat. An index is built in memory, in
the size of its codes. Importing usearch before faiss in one process makes FAISS crash, so faiss goes first where both are
there.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedjax.config import Precision, Similarity
from embedjax.config.errors import ConfigError
from embedjax.evaluate.conventions import faiss_ranges, packed_of, usearch_of
from embedjax.evaluate.kept import Kept
from embedjax.quantize import in_bits

USEARCH: dict[Precision, str] = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "i8", "binary": "b1", "ubinary": "b1",
}  # fmt: skip
SCALARS: dict[Precision, str] = {"float16": "QT_fp16", "bfloat16": "QT_bf16", "int8": "QT_8bit", "uint8": "QT_8bit"}


def check(ending: str, precision: Precision, dim: int, similarity: Similarity, normalize: bool) -> None:
    """Raises ConfigError for what an index of a kind does not hold, and where its package is not installed."""
    if ending == ".usearch" and precision not in USEARCH:
        raise ConfigError(f"usearch has no {precision}; it has {', '.join(USEARCH)}")
    if in_bits(precision) and dim % 8:
        raise ConfigError(f"an index of bits holds a multiple of 8 dimensions; {dim} are asked for")
    if ending == ".faiss" and similarity == "cosine" and not normalize and not in_bits(precision):
        raise ConfigError(
            "FAISS compares by products, the model by cosines of vectors that are not of length 1: write .usearch"
        )
    (_faiss if ending == ".faiss" else _usearch)()


def write_faiss(codes: np.ndarray, kept: Kept, output: Path, block: int) -> None:
    """IndexFlatIP of float32, IndexBinaryFlat of bits, else IndexScalarQuantizer, by inner product."""
    faiss = _faiss()
    add: Callable[[np.ndarray], Any]
    if in_bits(kept.precision):
        index = faiss.IndexBinaryFlat(kept.dim)
        add = lambda part: index.add(packed_of(part, kept.precision))
    elif kept.precision == "float32":
        index = faiss.IndexFlatIP(kept.dim)
        add = index.add
    else:
        index = faiss.IndexScalarQuantizer(
            kept.dim, getattr(faiss.ScalarQuantizer, SCALARS[kept.precision]), faiss.METRIC_INNER_PRODUCT
        )
        if kept.ranges is not None:
            faiss.copy_array_to_vector(faiss_ranges(kept.ranges), index.sq.trained)
            index.is_trained = True
        flipped = np.uint8(0x80 if kept.precision == "int8" else 0)
        add = lambda part: index.add_sa_codes(part.view(np.uint8) ^ flipped)
    for _, part in _blocks(codes, block):
        add(part)
    new = f"{output}.partial.new"
    write = faiss.write_index_binary if in_bits(kept.precision) else faiss.write_index
    write(index, new)
    os.replace(new, output)


def write_usearch(
    codes: np.ndarray, kept: Kept, precision: Precision, similarity: Similarity, output: Path, block: int
) -> None:
    """usearch's index: cosines (`cos`) or products (`ip`), bits by `hamming`. For int8 the codes given are float32, of which
    usearch's own i8 are made: it knows no ranges."""
    metric = "hamming" if in_bits(precision) else "cos" if similarity == "cosine" else "ip"
    index = _usearch().Index(ndim=kept.dim, metric=metric, dtype=USEARCH[precision])
    for at, part in _blocks(codes, block):
        if in_bits(precision):
            part = packed_of(part, kept.precision)
        elif precision == "int8":
            part = usearch_of(part)
        elif precision == "bfloat16":
            part = kept.vectors(part)
        index.add(np.arange(at, at + len(part), dtype=np.uint64), part)
    new = f"{output}.partial.new"
    index.save(new)
    os.replace(new, output)


def _blocks(codes: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, len(codes), block):
        yield at, np.ascontiguousarray(codes[at : at + block])


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("an index of FAISS needs its package: pip install 'embedjax[faiss]'") from None
    return faiss


def _usearch() -> Any:
    with contextlib.suppress(ImportError):
        import faiss  # noqa: F401  (before usearch, or its searches crash)
    try:
        from usearch import index
    except ImportError:
        raise ConfigError("an index of usearch needs its package: pip install 'embedjax[usearch]'") from None
    return index
