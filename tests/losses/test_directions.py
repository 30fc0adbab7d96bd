"""The directions of the softmax, in any set and partition: the tiled and the ring form equal the dense definition."""

import itertools

import pytest

OTHERS = ("d2q", "q2q", "d2d", "p2p")
SETS = [
    ("q2d", *few)
    for count in range(4)
    for few in itertools.combinations(OTHERS, count)
    if not {"d2d", "p2p"} <= set(few)  # d2d holds p2p
]
CASES = [(directions, "joint") for directions in SETS] + [(("q2d", "d2q"), "per_direction"), (("q2d",), "per_direction")]
# What `test_forms.py` has no name for, each once; `slow` runs all on two numbers of devices in turn.
FEW = {
    (("q2d", "q2q"), 1),
    (("q2d", "d2q"), 2),
    (("q2d", "q2q", "p2p"), 4),
    (("q2d", "q2q", "p2p"), 1),
    (("q2d", "d2q", "p2p"), 8),
}


@pytest.mark.parametrize(
    ("directions", "partition", "devices"),
    [
        pytest.param(*case, devices, marks=[] if (case[0], devices) in FEW and case[1] == "joint" else [pytest.mark.slow])
        for c, case in enumerate(CASES)
        for n, devices in enumerate((1, 2, 4, 8))
        if (c + n) % 2 == 0 or (case[0], devices) in FEW
    ],
)
def test_every_set_of_directions(make_pairs, compare, directions, partition, devices):
    chosen = {"directions": directions, "partition": partition, "hardness": "all", "hardness_strength": 5.0}
    comparison = compare("softmax", "ring" if devices > 1 else "tiled", devices, guide_margin=0.1, **chosen)
    assert comparison(make_pairs(2, duplicates=True, guide=True)) < 1e-10


@pytest.mark.slow
def test_prefixes_of_the_directions_of_gist(make_pairs, compare, prefixes):
    comparison = compare("gist", "ring", 4, scale=100.0, **prefixes)
    assert comparison(make_pairs(1, guide=True)) < 1e-10


def test_directions_that_only_rows_total_take_strips(make_pairs, compare):
    """Of queries with documents and with queries the gradient is taken on the way, where no tile is asked for."""
    comparison = compare("softmax", "tiled", 1, tile=0, directions=("q2d", "q2q"), learn_scale=True)
    assert comparison(make_pairs(2, duplicates=True, guide=True)) < 1e-10
