"""Vectors -> the codes that are stored of them, and back: half floats, bytes in ranges, bits of signs. Numpy arrays only.

The codes are bit for bit those of sentence-transformers' `quantize_embeddings`, which servers and stores know. Order: prefix,
length 1, then quantize. Knows nothing of what the vectors are of; whoever stores codes of bytes stores their ranges with them.
"""

from typing import get_args

import numpy as np
from jaxtyping import Float

from embedjax.config import Precision
from embedjax.config.errors import ConfigError, NonFiniteError

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TYPES: dict[Precision, type[np.generic]] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16,
    "int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8,
}  # fmt: skip
"""The type of the codes. Those of binary and ubinary hold 8 numbers each; those of bfloat16 are its bits, for which files of
numpy's have no type: `codes.view(ml_dtypes.bfloat16)`, or torch.bfloat16, reads them."""

Vectors = Float[np.ndarray, "N E"]
Ranges = Float[np.ndarray, "2 E"]
Codes = np.ndarray  # [N count_of(E)]


def in_ranges(precision: Precision) -> bool:
    """Whether codes mean places in ranges, one of each dimension."""
    return precision in ("int8", "uint8")


def in_bits(precision: Precision) -> bool:
    """Whether codes hold the sign of a number in a bit."""
    return precision in ("binary", "ubinary")


def ranges_of(vectors: Vectors) -> Ranges:
    """[lowest; highest] number of each dimension over a calibration set, float32: 10,000 vectors or more, prepared as those
    that will be stored. What lies outside is stored as the end of the range. Raises ConfigError without vectors,
    NonFiniteError."""
    _check(vectors)
    if not len(vectors):
        raise ConfigError("ranges are taken from vectors; there are none")
    return np.stack([vectors.min(0), vectors.max(0)]).astype(np.float32)


def quantize(vectors: Vectors, precision: Precision, ranges: Ranges | None = None) -> Codes:
    """The codes of vectors.

    int8, uint8: with step = (highest - lowest) / 255, or 1 where these are equal, floor((x - lowest) / step) in 0 ... 255;
    int8 less 128. binary, ubinary: the bit 1 for x > 0, 8 to a byte, the first one highest, the last byte filled with 0; binary
    less 128. Raises ConfigError for ranges that are missing, not needed or do not fit, and for numbers beyond float16 or
    bfloat16; NonFiniteError.
    """
    _check(vectors)
    ranges = _checked(precision, ranges, vectors.shape[1])
    if in_bits(precision):
        packed = np.packbits(vectors > 0, axis=-1)
        return (packed ^ 0x80).view(np.int8) if precision == "binary" else packed
    if ranges is None:
        with np.errstate(over="ignore"):
            codes = _upper_half(vectors) if precision == "bfloat16" else vectors.astype(TYPES[precision])
        if not np.isfinite(_whole(codes, precision)).all():
            most = {"float16": "65504", "bfloat16": "3.39e38", "float32": "3.4e38"}[precision]
            raise ConfigError(f"{precision} holds numbers up to {most}; the largest here is {np.abs(vectors).max():.4g}")
        return codes
    step = _steps(ranges)
    places = np.clip(np.floor((vectors - ranges[0]) / np.where(step == 0, np.float32(1), step)), 0, 255)
    return places.astype(np.uint8) if precision == "uint8" else (places - 128).astype(np.int8)


def dequantize(codes: Codes, precision: Precision, width: int, ranges: Ranges | None = None) -> Float[np.ndarray, "N E"]:
    """Vectors of `width` float32 numbers that the codes stand for.

    A place in a range is its middle, half a step above what `quantize` rounded down to: at most half a step off. A number that
    was the same in all of the calibration set is that number. Signs are numbers of equal size in a vector of length 1, so that
    products with them stay cosines; where a text's tokens are compared this ranks as products with the bits do.
    Raises ConfigError for codes of another type or width.
    """
    ranges = _checked(precision, ranges, width)
    if codes.dtype != TYPES[precision] or codes.ndim != 2 or codes.shape[1] != count_of(precision, width):
        raise ConfigError(
            f"codes of {precision} of {width} numbers are [N {count_of(precision, width)}] of {np.dtype(TYPES[precision])}; "
            f"these are {list(codes.shape)} of {codes.dtype}"
        )
    if in_bits(precision):
        packed = np.ascontiguousarray(codes).view(np.uint8)
        packed = packed ^ np.uint8(0x80) if precision == "binary" else packed
        signs = np.unpackbits(packed, axis=-1, count=width).astype(np.float32) * 2 - 1
        return signs / np.float32(np.sqrt(width))
    if ranges is None:
        return _whole(codes, precision)
    step = _steps(ranges)
    places = codes.astype(np.float32) + (128 if precision == "int8" else 0)
    return ranges[0] + np.where(step == 0, places, (places + np.float32(0.5)) * step)


def count_of(precision: Precision, width: int) -> int:
    """Codes of a vector of `width` numbers."""
    return -(-width // 8) if in_bits(precision) else width


def _upper_half(vectors: Vectors) -> Codes:
    """The bits of bfloat16."""
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _whole(codes: Codes, precision: Precision) -> Float[np.ndarray, "N E"]:
    if precision == "bfloat16":
        return (codes.astype(np.uint32) << 16).view(np.float32)
    return codes.astype(np.float32)


def _steps(ranges: Ranges) -> Float[np.ndarray, " E"]:
    return (ranges[1] - ranges[0]) / 255


def _check(vectors: Vectors) -> None:
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise ConfigError(f"vectors are [N E] of floats; these are {list(vectors.shape)} of {vectors.dtype}")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise NonFiniteError(f"vector {row} of {len(vectors)} holds NaN or infinity, which no code stands for")


def _checked(precision: Precision, ranges: Ranges | None, width: int) -> Ranges | None:
    """The ranges as float32, None where none are needed."""
    if precision not in PRECISIONS:
        raise ConfigError(f"there is no precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if in_ranges(precision) != (ranges is not None):
        raise ConfigError(f"{precision} {'needs the ranges of each dimension' if ranges is None else 'has no ranges'}")
    if ranges is None:
        return None
    if ranges.shape != (2, width):
        raise ConfigError(f"ranges are {list(ranges.shape)}; vectors of {width} numbers need [2, {width}]")
    if not (np.isfinite(ranges).all() and (ranges[0] <= ranges[1]).all()):
        raise ConfigError("ranges are [lowest; highest] of each dimension, finite; these are not")
    return ranges.astype(np.float32, copy=False)
