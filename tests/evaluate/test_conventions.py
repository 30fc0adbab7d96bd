"""Each store's convention, against its bits written out by hand, and back."""

import struct

import numpy as np
import pytest

from embedjax.config.errors import ConfigError
from embedjax.evaluate import conventions as to
from embedjax.quantize import dequantize, quantize, ranges_of

VECTORS = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)


def test_one_byte_of_eight_positive_numbers_to_everyone():
    ones = np.ones((1, 8), np.float32)
    packed = to.packed_of(quantize(ones, "binary"), "binary")
    assert quantize(ones, "binary").tolist() == [[127]] and packed.tolist() == [[255]]
    assert to.vespa_of(packed).tolist() == [[-1]] and to.bit_string(packed[0], 8) == "11111111"
    first = np.float32([[1, -1, -1, -1, -1, -1, -1, -1]])
    assert to.packed_of(quantize(first, "ubinary"), "ubinary").tolist() == [[128]], "the first number is the highest bit"


def test_bits_there_and_back():
    binary, packed = quantize(VECTORS, "binary"), quantize(VECTORS, "ubinary")
    np.testing.assert_array_equal(to.packed_of(binary, "binary"), packed)
    np.testing.assert_array_equal(to.packed_of(packed, "ubinary"), packed)
    np.testing.assert_array_equal(to.binary_of(packed), binary)
    np.testing.assert_array_equal(to.packed_of_vespa(to.vespa_of(packed)), packed)
    for row in packed:
        text = to.bit_string(row, 24)
        assert len(text) == 24
        np.testing.assert_array_equal(to.from_bit_string(text), row)
    assert to.bit_string(packed[0], 21) == to.bit_string(packed[0], 24)[:21]
    with pytest.raises(ConfigError, match="not of int8"):
        to.packed_of(binary, "int8")
    with pytest.raises(ConfigError, match="no bit string"):
        to.from_bit_string("012")


def test_usearchs_bytes_are_of_minus_one_to_one():
    assert to.usearch_of(np.float32([[-1, 1, 0, 0.5, -0.5, 2, 0.0118]])).tolist() == [[-127, 127, 0, 64, -64, 127, 1]]
    back = to.from_usearch(to.usearch_of(UNIT))
    assert back.dtype == np.float32 and np.abs(back - UNIT).max() <= 1 / 254 + 1e-7
    np.testing.assert_array_equal(to.usearch_of(back), to.usearch_of(UNIT))


def test_faiss_ranges_mean_what_ours_do():
    """FAISS decodes lowest + (code + 0.5) / 255 * width."""
    ranges = ranges_of(UNIT)
    trained = to.faiss_ranges(ranges)
    codes = quantize(UNIT, "uint8", ranges)
    decoded = trained[:24] + (codes + np.float32(0.5)) / 255 * trained[24:]
    np.testing.assert_allclose(decoded, dequantize(codes, "uint8", 24, ranges), atol=1e-7)
    np.testing.assert_allclose(to.from_faiss_ranges(trained), ranges, rtol=1e-6)


def test_pgvectors_text_and_bytes():
    assert to.literal([1.0, -2.5, 0.0, 1e-9]) == "[1,-2.5,0,1e-09]"
    for vector in (*UNIT, np.float32([1.1754944e-38, 3.4028235e38])):
        np.testing.assert_array_equal(to.from_literal(to.literal(vector.tolist())), vector)
        np.testing.assert_array_equal(to.from_pgvector_bytes(to.pgvector_bytes(vector)), vector)
    for half in UNIT.astype(np.float16):
        np.testing.assert_array_equal(to.from_literal(to.literal(half.tolist(), 5)).astype(np.float16), half)
        np.testing.assert_array_equal(to.from_pgvector_bytes(to.pgvector_bytes(half), np.float16), half)
    assert to.pgvector_bytes(np.float32([1, -2])) == struct.pack(">HHff", 2, 0, 1, -2)
    assert to.pgvector_bytes(np.float16([1, -2])) == struct.pack(">HHee", 2, 0, 1, -2)
    for wrong in (struct.pack(">HHf", 2, 0, 1), struct.pack(">HHf", 1, 7, 1)):
        with pytest.raises(ConfigError, match="no vector of pgvector's"):
            to.from_pgvector_bytes(wrong)
    with pytest.raises(ConfigError, match="no vector of pgvector's"):
        to.from_literal("{1,2}")
