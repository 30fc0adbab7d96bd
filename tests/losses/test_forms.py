"""Every form equals the dense definition in float64, in value and gradient, on 1 to 8 devices, in float64 and float32."""

import itertools
import re

import jax
import numpy as np
import pytest

from embedjax import sharding
from embedjax.losses import tiles
from embedjax.losses.contrastive import Hashes, Pairs

CRITERIA = ("softmax", "symmetric", "joint", "sigmoid")
NEGATIVES = (0, 1, 7)
DEVICES = (1, 2, 4, 8)
PAIRINGS = tuple(itertools.product(range(len(CRITERIA)), range(len(NEGATIVES))))


def options(criterion, negatives):
    """One hard negative goes with a fixed scale, whose bound is known; the rest with a learned one."""
    return {"scale": 15.0, "learn_scale": negatives != 1} if criterion != "sigmoid" else {}


def check(make_pairs, comparison, negatives, limit):
    for duplicates in (False, True):
        assert comparison(make_pairs(negatives, duplicates=duplicates)) < limit


# Every criterion and number of negatives on two of the four device counts, in float32 on the others; `slow` has one of each.
@pytest.mark.parametrize(
    ("criterion", "negatives", "devices"),
    [
        pytest.param(CRITERIA[c], NEGATIVES[k], DEVICES[n], marks=[] if (c + k + n) % 4 == 1 else [pytest.mark.slow])
        for c, k in PAIRINGS
        for n in range(4)
        if (c + k + n) % 2 == 1
    ],
)
def test_float64(make_pairs, compare, criterion, negatives, devices):
    comparison = compare(criterion, "ring" if devices > 1 else "tiled", devices, **options(criterion, negatives))
    check(make_pairs, comparison, negatives, 1e-10)


@pytest.mark.parametrize(
    ("criterion", "negatives", "devices"),
    [
        pytest.param(CRITERIA[c], NEGATIVES[k], DEVICES[n], marks=[] if (c + k + n) % 4 == 2 else [pytest.mark.slow])
        for c, k in PAIRINGS
        for n in range(4)
        if (c + k + n) % 2 == 0
    ],
)
def test_float32(make_pairs, compare, criterion, negatives, devices):
    form = "ring" if devices > 1 else "tiled"
    comparison = compare(criterion, form, devices, np.float32, **options(criterion, negatives))
    check(make_pairs, comparison, negatives, 1e-5)


FORMS = (("dense", 1), ("dense", 4), ("tiled", 1), ("ring", 4))


# Every criterion with and without prefixes in one of the four forms; `slow` runs the others.
@pytest.mark.parametrize(
    ("criterion", "prefixed", "form", "devices"),
    [
        pytest.param(CRITERIA[c], prefixed, *FORMS[n], marks=[] if (c + 2 * prefixed) % 4 == n else [pytest.mark.slow])
        for c in range(4)
        for prefixed in (False, True)
        for n in range(4)
    ],
)
def test_forms_in_float32_with_and_without_prefixes(make_pairs, compare, prefixes, criterion, prefixed, form, devices):
    comparison = compare(criterion, form, devices, np.float32, **(prefixes if prefixed else {}))
    check(make_pairs, comparison, 1, 3e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_hardness_and_a_guide(make_pairs, compare, criterion):
    extra = {} if criterion == "sigmoid" else {"hardness": "all", "hardness_strength": 5.0}
    comparison = compare(criterion, "ring", 2, guide_margin=0.1, guide_margin_kind="relative", **extra)
    assert comparison(make_pairs(2, duplicates=True, guide=True)) < 1e-10


@pytest.mark.parametrize(("hardness", "scale"), [("in_batch", 95.0), ("hard", 20.0)])
def test_kinds_of_hardness_at_both_ends_of_the_scale(make_pairs, compare, hardness, scale):
    comparison = compare("symmetric", "tiled", 1, scale=scale, hardness=hardness, hardness_strength=9.0)
    assert comparison(make_pairs(2, guide=True)) < 1e-10


@pytest.mark.parametrize("criterion", ["symmetric", "sigmoid"])
def test_without_hashes(make_pairs, compare, criterion):
    assert compare(criterion, "tiled", 1)(make_pairs(1)._replace(hashes=None)) < 1e-10


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scores_at_the_largest_scale_stay_finite_and_right(make_pairs, compare, sign):
    """All candidates alike, and all opposite: exponentials of such scores leave float32's range. Vectors this close to each
    other are badly conditioned: the dense form loses as many digits."""
    pairs = make_pairs(1)
    same = np.ones_like(pairs.candidates) * np.linspace(1, 1.2, 24)
    pairs = pairs._replace(anchor=same[:, 0] + 4e-2 * pairs.anchor, candidates=sign * (same + 4e-2 * pairs.candidates))
    for dtype, limit in ((np.float64, 1e-10), (np.float32, 5e-3)):
        assert compare("joint", "tiled", 1, dtype, scale=100.0, learn_scale=True)(pairs) < limit


@pytest.mark.parametrize(("form", "devices"), [("tiled", 1), ("ring", 4)])
def test_no_array_has_a_score_for_every_pair(make_pairs, compare, form, devices):
    """16 rows of 4 candidates, tiles of 3: no array of the program has even one device's share of the scores."""
    text = compare("symmetric", form, devices, np.float32).lowered(make_pairs(3)).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    # Vectors have the width 24 on their last axis; what is left are scores, masks, hashes and totals.
    scores = max(int(np.prod(shape)) for shape in shapes if 24 not in shape)
    assert scores <= 16 * 4 * 2 < 16 // devices * 16 * 4
    assert "all-gather" not in text and ("collective-permute" in text) == (devices > 1)


def test_the_ring_takes_memory_linear_in_the_batch(compare):
    """Compiled, not run: beyond inputs and results, four times the rows take four times the bytes, where dense takes 16."""

    def extra(form, rows):
        comparison = compare("symmetric", form, 8, np.float32, tile=64)
        place = sharding.rows(comparison.mesh)
        leaf = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)
        pairs = Pairs(leaf("f4", 24), leaf("f4", 2, 24), Hashes(leaf("u4", 2), leaf("u4", 2, 2)))
        params = {"loss": comparison.initial}
        lowered = comparison.both.lower(params, (pairs.anchor, pairs.candidates), (pairs.hashes, None))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert extra("dense", 8192) > 12 * extra("dense", 2048)
    assert extra("ring", 8192) <= 4 * extra("ring", 2048)


@pytest.mark.parametrize(("criterion", "extra"), [("softmax", {"hardness": "all", "hardness_strength": 5.0}), ("sigmoid", {})])
def test_strips_of_rows(make_pairs, compare, prefixes, monkeypatch, criterion, extra):
    """Where only rows have totals the gradient is taken on the way: here in strips of 5 rows of 16, the last one ragged."""
    monkeypatch.setattr(tiles, "STRIP", 5 * 16 * 3 * 5)
    monkeypatch.setattr(tiles, "SHORTEST", 1)
    comparison = compare(criterion, "tiled", 1, tile=0, learn_scale=True, **prefixes, **extra)
    assert comparison(make_pairs(2, duplicates=True, guide=True)) < 1e-10


def test_dense_is_what_auto_gives_to_a_small_batch(make_pairs, compare):
    assert compare("softmax", "auto", 4)(make_pairs(1)) < 1e-10
    assert jax.device_count() == 8
