"""Codes of vectors from one store's convention to another's, and the text and bytes that stores take for a vector.

`embedjax.quantize` has sentence-transformers' codes. One byte of eight positive numbers is 127 to its `binary`, 255 to FAISS
and usearch, -1 to Vespa and 11111111 to pgvector; mixing them up costs one wrong bit in each byte, and no error. int8 is a
place in a dimension's own range to sentence-transformers and FAISS, but x * 127 to usearch. Qdrant quantizes floats itself.
pgvector's bytes: https://github.com/pgvector/pgvector, vector_send and halfvec_send.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int8, UInt8

from embedjax.config import Precision
from embedjax.config.errors import ConfigError
from embedjax.quantize import Ranges, in_bits

Packed = UInt8[np.ndarray, "N B"]


def packed_of(codes: np.ndarray, precision: Precision) -> Packed:
    """binary or ubinary -> the plain packed bytes, which are ubinary, FAISS's IndexBinary and usearch's b1. Raises ConfigError
    for codes that are no bits."""
    if not in_bits(precision):
        raise ConfigError(f"bits are codes of binary or ubinary, not of {precision}")
    codes = np.ascontiguousarray(codes).view(np.uint8)
    return codes ^ np.uint8(0x80) if precision == "binary" else codes


def binary_of(packed: Packed) -> Int8[np.ndarray, "N B"]:
    """Plain packed bytes -> sentence-transformers' `binary`: each byte less 128."""
    return (np.ascontiguousarray(packed) ^ np.uint8(0x80)).view(np.int8)


def vespa_of(packed: Packed) -> Int8[np.ndarray, "N B"]:
    """Plain packed bytes -> Vespa's int8 cells (its pack_bits): the same bits."""
    return np.ascontiguousarray(packed).view(np.int8)


def packed_of_vespa(cells: Int8[np.ndarray, "N B"]) -> Packed:
    """Vespa's int8 cells -> plain packed bytes."""
    return np.ascontiguousarray(cells).view(np.uint8)


def usearch_of(vectors: Float[np.ndarray, "N E"]) -> Int8[np.ndarray, "N E"]:
    """Vectors of numbers in [-1, 1] -> usearch's i8: the nearest of x * 127. usearch itself cuts the fraction off."""
    return np.rint(np.clip(vectors, -1, 1) * 127).astype(np.int8)


def from_usearch(codes: Int8[np.ndarray, "N E"]) -> Float[np.ndarray, "N E"]:
    """usearch's i8 -> float32 vectors, at most 1/254 off."""
    return codes.astype(np.float32) / np.float32(127)


def faiss_ranges(ranges: Ranges) -> Float[np.ndarray, " 2E"]:
    """Ranges -> what FAISS's QT_8bit holds as `sq.trained`: the lowest numbers, then the widths. Its codes are then uint8, and
    mean lowest + (code + 0.5) / 255 * width, as `dequantize` has it."""
    return np.concatenate([ranges[0], ranges[1] - ranges[0]]).astype(np.float32)


def from_faiss_ranges(trained: Float[np.ndarray, " 2E"]) -> Ranges:
    """`sq.trained` -> ranges."""
    lowest, width = trained.reshape(2, -1)
    return np.stack([lowest, lowest + width]).astype(np.float32)


def literal(vector: Sequence[float], digits: int = 9) -> str:
    """A vector as pgvector's `vector` reads it, '[1,2.5]', and Postgres' COPY: 9 digits tell any float32, 5 any `halfvec`."""
    return "[" + ",".join(f"{x:.{digits}g}" for x in vector) + "]"


def from_literal(text: str) -> Float[np.ndarray, " E"]:
    """pgvector's '[1,2.5]' -> float32."""
    if not (text.startswith("[") and text.endswith("]")):
        raise ConfigError(f"{text[:40]!r} is no vector of pgvector's; such are written [1,2.5]")
    return np.array(text[1:-1].split(","), np.float32)


def bit_string(packed: UInt8[np.ndarray, " B"], width: int) -> str:
    """Plain packed bytes -> Postgres' `bit(width)`: '0110...', the first number first."""
    return "".join(map(str, np.unpackbits(packed, count=width).tolist()))


def from_bit_string(text: str) -> UInt8[np.ndarray, " B"]:
    """Postgres' '0110...' -> plain packed bytes."""
    if set(text) - {"0", "1"}:
        raise ConfigError(f"{text[:40]!r} is no bit string of Postgres")
    return np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0"))


def pgvector_bytes(vector: Float[np.ndarray, " E"]) -> bytes:
    """A vector as COPY ... (FORMAT binary) has it: the dimensions and 0 as two uint16, then the numbers, all big-endian;
    float32 is a `vector`, float16 a `halfvec`."""
    head = np.array([len(vector), 0], ">u2").tobytes()
    return head + vector.astype(vector.dtype.newbyteorder(">")).tobytes()


def from_pgvector_bytes(data: bytes, type: type[np.floating] = np.float32) -> Float[np.ndarray, " E"]:
    """`vector`'s bytes, or with float16 `halfvec`'s -> its numbers."""
    count, zero = np.frombuffer(data[:4], ">u2")
    if zero or len(data) != 4 + int(count) * np.dtype(type).itemsize:
        raise ConfigError(f"{len(data)} bytes are no vector of pgvector's of {np.dtype(type)}")
    return np.frombuffer(data[4:], np.dtype(type).newbyteorder(">")).astype(type)
