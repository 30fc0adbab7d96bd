"""Products of vectors as they are, scores without a bound: the tiled and the ring form equal the dense definition where no
fixed shift would keep exponentials in range."""

import numpy as np
import pytest

CRITERIA = ("softmax", "symmetric", "joint", "gist", "sigmoid")


@pytest.fixture
def large_pairs(make_pairs):
    """`large_pairs(negatives, **options)`: products of up to about 300 in size, of both signs."""

    def make(negatives, **options):
        pairs = make_pairs(negatives, **options)
        scores = np.einsum("bd,ncd->bnc", pairs.anchor, pairs.candidates)
        factor = np.sqrt(300 / np.abs(scores).max())
        pairs = pairs._replace(anchor=factor * pairs.anchor, candidates=factor * pairs.candidates)
        assert scores.min() < -0.7 * np.abs(scores).max() and scores.max() > 0.7 * np.abs(scores).max()
        return pairs

    return make


# Every criterion on one of the four device counts; `slow` runs the others.
@pytest.mark.parametrize(
    ("criterion", "devices"),
    [
        pytest.param(criterion, devices, marks=[] if (c + n) % 4 == 0 else [pytest.mark.slow])
        for c, criterion in enumerate(CRITERIA)
        for n, devices in enumerate((1, 2, 4, 8))
    ],
)
def test_large_products(large_pairs, compare, criterion, devices):
    comparison = compare(criterion, "ring" if devices > 1 else "tiled", devices, similarity="dot")
    for options in ({}, {"duplicates": True, "guide": True}):
        assert comparison(large_pairs(2, **options)) < 1e-10


@pytest.mark.parametrize(("form", "devices"), [("tiled", 1), ("ring", 4)])
def test_large_products_in_float32(large_pairs, compare, form, devices):
    """A score of 300 is known to 2e-5, and so are the weights of two that are close."""
    comparison = compare("symmetric", form, devices, np.float32, "dot", learn_scale=True)
    assert comparison(large_pairs(1)) < 1e-4


def test_prefixes_of_products_are_left_as_long_as_they_are(large_pairs, compare, prefixes):
    assert compare("joint", "ring", 2, similarity="dot", **prefixes)(large_pairs(1)) < 1e-10


def test_strips_of_rows_and_hardness(large_pairs, compare, prefixes):
    """Where only rows have totals the gradient is taken on the way; a raised score is larger still."""
    options = {"tile": 0, "hardness": "all", "hardness_strength": 0.5, "learn_scale": True, **prefixes}
    assert compare("softmax", "tiled", 1, similarity="dot", **options)(large_pairs(2, duplicates=True)) < 1e-10


def test_tiles_without_any_negative(large_pairs, compare):
    """Half the rows hold one text, so that for them whole tiles are masked: totals of nothing join with totals of something."""
    pairs = large_pairs(1)
    for words in (pairs.hashes.anchor, pairs.hashes.candidates):
        words[:8] = 0
    assert compare("joint", "tiled", 1, similarity="dot")(pairs) < 1e-10
