"""Matryoshka prefixes from one product equal the plain sum over prefixes, on 1 to 8 devices; `test_forms.py` has float32."""

import pytest

CRITERIA = ("softmax", "symmetric", "joint", "sigmoid")
NEGATIVES = (0, 1, 7)
DEVICES = (1, 2, 4, 8)
FEW = {(0, 2, 2), (1, 2, 3), (2, 2, 0), (3, 2, 1)}


# Every criterion with seven negatives on one of the four device counts; `slow` has half the others.
@pytest.mark.parametrize(
    ("criterion", "negatives", "devices"),
    [
        pytest.param(CRITERIA[c], NEGATIVES[k], DEVICES[n], marks=[] if (c, k, n) in FEW else [pytest.mark.slow])
        for c in range(4)
        for k in range(3)
        for n in range(4)
        if (c + k + n) % 2 == 0
    ],
)
def test_five_prefixes(make_pairs, compare, prefixes, criterion, negatives, devices):
    comparison = compare(criterion, "ring" if devices > 1 else "tiled", devices, learn_scale=negatives == 1, **prefixes)
    for duplicates in (False, True):
        assert comparison(make_pairs(negatives, duplicates=duplicates)) < 1e-10


def test_prefixes_in_any_order_that_leave_the_end_out(make_pairs, compare):
    comparison = compare("softmax", "tiled", 1, matryoshka=(16, 4), matryoshka_weights=(1.0, 3.0))
    assert comparison(make_pairs(1, guide=True)) < 1e-10
