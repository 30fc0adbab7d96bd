"""Codes of vectors and back: the formulas by a loop, what an error is at most, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from embedjax.config.errors import ConfigError, NonFiniteError
from embedjax.quantize import PRECISIONS, dequantize, quantize, ranges_of


@pytest.fixture
def vectors():
    found = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def ranges_for(precision, vectors):
    return ranges_of(vectors) if precision in ("int8", "uint8") else None


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_bytes_are_places_in_ranges(vectors, precision):
    """Each number by itself, in float32; numbers outside the ranges are their ends."""
    ranges = np.stack([vectors[:150].min(0) + np.float32(0.05), vectors[:150].max(0)])
    found = quantize(vectors, precision, ranges)
    assert found.dtype == precision and found.shape == vectors.shape
    for row, column in [(n, e) for n in range(0, 200, 7) for e in range(12)]:
        low, high = ranges[:, column]
        place = int(np.floor((vectors[row, column] - low) / ((high - low) / np.float32(255))))
        assert found[row, column] == min(max(place, 0), 255) - (128 if precision == "int8" else 0)
    assert (vectors < ranges[0]).any() and (vectors > ranges[1]).any()


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_a_byte_is_at_most_half_a_step_off(vectors, precision):
    ranges = ranges_of(vectors)
    back = dequantize(quantize(vectors, precision, ranges), precision, 12, ranges)
    half = (ranges[1] - ranges[0]) / 255 / 2
    assert back.dtype == np.float32 and (np.abs(back - vectors) <= half * 1.001 + 1e-7).all()
    assert np.abs((back - vectors).mean(0)).max() < half.max() / 4, "the middle of a step, not its lower end"


def test_a_number_that_is_always_the_same_comes_back_as_it_is(vectors):
    """Its step would be 0: the code counts in ones, but there is no half of one to add."""
    vectors[:, 3] = 0.25
    ranges = ranges_of(vectors)
    for precision in ("int8", "uint8"):
        codes = quantize(vectors, precision, ranges)
        assert len(set(codes[:, 3].tolist())) == 1
        np.testing.assert_array_equal(dequantize(codes, precision, 12, ranges)[:, 3], np.float32(0.25))
    one = vectors[:1]
    np.testing.assert_array_equal(dequantize(quantize(one, "int8", ranges_of(one)), "int8", 12, ranges_of(one)), one)


@pytest.mark.parametrize("width", [8, 12, 3])
def test_bits_are_signs_the_first_one_highest(vectors, width):
    vectors = vectors[:, :width].copy()
    vectors[0] = 0  # not above 0
    found = {precision: quantize(vectors, precision) for precision in ("binary", "ubinary")}
    for row in range(0, 200, 11):
        bits = "".join("1" if x > 0 else "0" for x in vectors[row]).ljust(-(-width // 8) * 8, "0")
        codes = [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
        assert found["ubinary"][row].tolist() == codes
        assert found["binary"][row].tolist() == [code - 128 for code in codes]
    for precision, codes in found.items():
        back = dequantize(codes, precision, width)
        np.testing.assert_array_equal(back > 0, vectors > 0)
        np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, rtol=1e-6)


def test_halves_and_wholes(vectors):
    np.testing.assert_array_equal(dequantize(quantize(vectors, "float32"), "float32", 12), vectors)
    half = quantize(vectors, "float16")
    assert half.dtype == np.float16 and dequantize(half, "float16", 12).dtype == np.float32
    np.testing.assert_allclose(half, vectors, atol=5e-4)
    with pytest.raises(ConfigError, match="float16 holds numbers up to 65504; the largest here is 1e.05"):
        quantize(np.full((1, 2), 1e5, np.float32), "float16")


def test_bfloat16_is_the_upper_half_rounded_to_even(vectors):
    """Of numbers of all sizes, of those half-way between two, of zeros and of the smallest."""
    numbers = np.concatenate([vectors, vectors * 1e30, vectors * 1e-39, np.float32([[1.00390625, -1.01171875, 0, -0.0] * 3])])
    codes = quantize(numbers, "bfloat16")
    wanted = numbers.astype(ml_dtypes.bfloat16)
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes, wanted.view(np.uint16))
    np.testing.assert_array_equal(dequantize(codes, "bfloat16", 12), wanted.astype(np.float32))
    with pytest.raises(ConfigError, match="bfloat16 holds numbers up to 3.39e38"):
        quantize(np.full((1, 2), np.finfo(np.float32).max), "bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes_and_no_vectors(vectors, precision):
    ranges = ranges_for(precision, vectors)
    codes = quantize(vectors, precision, ranges)
    sizes = {"float32": 48, "float16": 24, "bfloat16": 24, "int8": 12, "uint8": 12, "binary": 2, "ubinary": 2}
    assert codes.nbytes == 200 * sizes[precision]
    none = quantize(vectors[:0], precision, ranges)
    assert none.shape == (0, codes.shape[1]) and none.dtype == codes.dtype
    assert dequantize(none, precision, 12, ranges).shape == (0, 12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_cannot_be_stored_or_read_is_refused(vectors, precision):
    ranges, broken = ranges_for(precision, vectors), vectors.copy()
    broken[17, 4] = np.nan
    with pytest.raises(NonFiniteError, match="vector 17 of 200"):
        quantize(broken, precision, ranges)
    with pytest.raises(ConfigError, match=r"vectors are \[N E\] of floats; these are \[200, 12\] of int32"):
        quantize(vectors.astype(np.int32), precision, ranges)
    codes = quantize(vectors, precision, ranges)
    with pytest.raises(ConfigError, match="these are"):
        dequantize(codes[:, 1:], precision, 12, ranges)
    with pytest.raises(ConfigError, match="these are .* of int64"):
        dequantize(codes.astype(np.int64), precision, 12, ranges)


def test_ranges_that_do_not_fit_are_refused(vectors):
    ranges = ranges_of(vectors)
    with pytest.raises(ConfigError, match="int8 needs the ranges"):
        quantize(vectors, "int8")
    with pytest.raises(ConfigError, match="binary has no ranges"):
        quantize(vectors, "binary", ranges)
    with pytest.raises(ConfigError, match=r"ranges are \[2, 8\]; vectors of 12 numbers need \[2, 12\]"):
        quantize(vectors, "uint8", ranges[:, :8])
    for wrong in (ranges[::-1], np.where(ranges == ranges[0, 0], np.nan, ranges)):
        with pytest.raises(ConfigError, match="lowest; highest"):
            quantize(vectors, "uint8", wrong)
    with pytest.raises(ConfigError, match="there are none"):
        ranges_of(vectors[:0])
    with pytest.raises(ConfigError, match="no precision 'int4'"):
        quantize(vectors, "int4")  # pyright: ignore[reportArgumentType]
