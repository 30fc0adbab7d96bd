"""The order of rows: complete, disjoint, fitting, the same wherever and whenever it is computed."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from embedjax.config.errors import ConfigError
from embedjax.data.order import Order, Rows, first_fit, make_table, permutation, split

ROOT = pathlib.Path(__file__).parents[2]
TABLE = make_table([(16, 16), (4, 4), (2, 16), (8, 8)])


def test_the_table_is_sorted_and_its_last_bucket_holds_all():
    assert TABLE == ((4, 4), (8, 8), (2, 16), (16, 16))
    with pytest.raises(ConfigError, match=r"\(4, 64\).*\(16, 64\)"):
        make_table([(16, 16), (4, 64)])


def test_first_fit():
    lengths = np.array([[1, 1], [5, 3], [2, 9], [2, 16], [99, 1]])
    assert first_fit(lengths, TABLE).tolist() == [0, 1, 2, 2, 3]
    assert first_fit(lengths, TABLE, after=0).tolist() == [1, 1, 2, 2, 3]
    assert first_fit(lengths, TABLE, after=1).tolist() == [2, 3, 2, 2, 3]


def test_permutations_differ_by_key_and_never_change():
    assert permutation(8, 0, "train", 0).tolist() == [7, 5, 2, 1, 4, 3, 6, 0]
    drawn = permutation(1000, 3, "a", 1)
    assert sorted(drawn) == list(range(1000))
    for other in ((4, "a", 1), (3, "b", 1), (3, "a", 2)):
        assert (permutation(1000, *other) != drawn).mean() > 0.9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [7, 64, 100])
def test_split_fits_and_loses_less_than_a_batch(seed, size):
    lengths = np.random.default_rng(seed).integers(1, 17, (size, 2))
    order = permutation(size, seed)
    rows, buckets = split(order, 7, lengths, TABLE)
    assert rows.shape == (size // 7, 7) and buckets.shape == (size // 7,)
    assert len(np.unique(rows)) == rows.size
    for batch, bucket in zip(rows, buckets, strict=True):
        assert (lengths[batch] <= TABLE[bucket]).all()


def test_left_over_rows_are_promoted_to_a_bucket_they_fit():
    lengths = np.array([[4, 4]] * 5 + [[2, 12]] * 3 + [[12, 12]] * 2)
    rows, buckets = split(np.arange(10), 4, lengths, make_table([(4, 4), (2, 16), (16, 16)]))
    # Row 4 does not fit (2, 16), so it goes past it; the rows of one batch keep the order they were drawn in.
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert buckets.tolist() == [0, 2]


def order(counts=(30,), **options):
    sets = [Rows(f"s{k}", count) for k, count in enumerate(counts)]
    return Order(sets, **{"seed": 1, "batch_size": 4, "table": ((8, 8),), **options})


def test_epochs_are_complete_and_differ():
    drawn = order()
    epochs = [np.concatenate([drawn.at(7 * epoch + step).rows for step in range(7)]) for epoch in range(3)]
    assert all(len(set(epoch)) == 28 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and set(epochs[0]) != set(epochs[1])
    assert np.array_equal(drawn.at(3).rows, epochs[0][12:16])  # after other epochs displaced it


def test_sets_are_met_in_proportion_and_each_wholly():
    drawn = order((40, 12, 4))
    draws = [drawn.at(step) for step in range(28)]
    for half in (draws[:14], draws[14:]):
        assert [sum(draw.set == k for draw in half) for k in range(3)] == [10, 3, 1]
        assert sorted(np.concatenate([draw.rows for draw in half if draw.set == 0])) == list(range(40))
    assert [draw.set for draw in draws[:14]] != [draw.set for draw in draws[14:]]


def test_without_shuffle_rows_come_in_file_order_and_sets_side_by_side():
    assert np.concatenate([order(shuffle=False).at(step).rows for step in range(7)]).tolist() == list(range(28))
    drawn = order((40, 20), shuffle=False)
    assert [drawn.at(step).set for step in range(15)] == [0, 1, 0] * 5
    lengths = np.array([[1, 1], [9, 9]] * 8)
    mixed = Order([Rows("s", 16, lengths)], seed=0, batch_size=4, table=((4, 4), (16, 16)), shuffle=False)
    assert [mixed.at(step).rows.tolist() for step in range(2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_order_is_the_same_in_another_process():
    code = (
        "from embedjax.data.order import Order, Rows;"
        "o = Order([Rows('a', 50), Rows('b', 20)], seed=5, batch_size=4, table=((8, 8),));"
        "print([(d.set, d.rows.tolist()) for d in map(o.at, range(40))])"
    )
    here = Order([Rows("a", 50), Rows("b", 20)], seed=5, batch_size=4, table=((8, 8),))
    expected = [(draw.set, draw.rows.tolist()) for draw in map(here.at, range(40))]
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(expected)
