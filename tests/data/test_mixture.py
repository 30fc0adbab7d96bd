"""Mixtures: the shares asked for, epochs of each set that are whole, the same draw whenever and wherever it is asked for."""

import collections

import numpy as np
import pytest

from embedjax.config import Data, MultipleNegatives, Set
from embedjax.config.errors import ConfigError
from embedjax.data import mixture
from embedjax.data.mixture import BLOCK, Batchwise, apportion, deal, make_order
from embedjax.data.order import Order, Rows, permutation

TABLE = ((8, 8),)
BUCKETS = ((3, 3), (8, 8))


def lengths(count):
    return np.stack([np.arange(count) % 5 + 1, np.arange(count) % 3 + 1], 1)


def mixed(counts=(40, 12, 6), *, table=TABLE, seed=1, weights=None, **data):
    sets = tuple(Set(name=f"s{k}", weight=(weights or (1.0,) * len(counts))[k]) for k in range(len(counts)))
    config = Data(**{"batch_size": 4, "sets": sets, "mixing": "weights" if weights else "proportional", **data})
    rows = [Rows(f"s{k}", count, lengths(count) if len(table) > 1 else None) for k, count in enumerate(counts)]
    return make_order(config, rows, seed=seed, table=table)


def told(order, steps):
    return [(draw.set, draw.bucket, draw.rows.tolist()) for draw in map(order.at, steps)]


@pytest.mark.parametrize("data", [{}, {"draw": "rows"}])
def test_runs_that_began_before_mixtures_go_on_with_the_same_rows(data):
    one, options = (Set(),), {"batch_size": 4, **data}
    order = make_order(Data(sets=one, **options), [Rows("train", 11)], seed=3, table=TABLE)
    assert told(order, range(5)) == [
        (0, 0, [0, 7, 5, 3]), (0, 0, [9, 2, 4, 8]), (0, 0, [10, 6, 8, 9]), (0, 0, [4, 1, 2, 0]), (0, 0, [1, 6, 9, 2])
    ]  # fmt: skip
    order = make_order(Data(sets=one, **options), [Rows("train", 11, lengths(11))], seed=3, table=BUCKETS)
    assert told(order, range(5)) == [
        (0, 1, [9, 4, 8, 3]), (0, 0, [2, 0, 7, 5]), (0, 1, [4, 6, 8, 9]), (0, 0, [1, 2, 0, 10]), (0, 0, [1, 6, 2, 0])
    ]  # fmt: skip
    two = (Set(name="a"), Set(name="b"))
    order = make_order(Data(sets=two, batch_size=4), [Rows("a", 9), Rows("b", 5)], seed=3, table=TABLE)
    assert told(order, range(5)) == [
        (0, 0, [1, 2, 8, 0]), (1, 0, [1, 4, 3, 2]), (0, 0, [5, 7, 6, 4]), (0, 0, [3, 7, 2, 1]), (0, 0, [6, 0, 5, 4])
    ]  # fmt: skip


def test_mixed_rows_stay_those_of_runs_that_began_before():
    sets = (Set(name="a", weight=3.0), Set(name="b"))
    data = Data(sets=sets, batch_size=4, draw="rows", mixing="weights")
    order = make_order(data, [Rows("a", 9), Rows("b", 5)], seed=3, table=TABLE)
    assert [(draw.sets.tolist(), draw.rows.tolist()) for draw in map(order.at, (0, 1, 5000))] == [
        ([0, 0, 0, 1], [5, 7, 6, 1]), ([0, 1, 0, 0], [4, 4, 1, 2]), ([1, 0, 0, 0], [4, 2, 1, 7])
    ]  # fmt: skip


def test_an_epoch_of_mixed_rows_is_shuffled_once(monkeypatch):
    made = collections.Counter()

    def counted(n, *key):
        made[key] += 1
        return permutation(n, *key)

    monkeypatch.setattr(mixture, "permutation", counted)
    order = mixed((40_000, 20_000), draw="rows", weights=(1.0, 1.0))
    for step in range(0, 8 * 2048, 1024):  # eight blocks of 4096 rows a set
        order.at(step)
    assert made == {(1, "s0", 0): 1, (1, "s1", 0): 1, (1, "s1", 1): 1}


def test_apportion():
    assert apportion(np.array([3.0, 1]), 8).tolist() == [6, 2]
    assert apportion(np.array([1e-9, 1, 1]), 9).tolist() == [1, 4, 4]
    for seed in range(20):
        shares = np.random.default_rng(seed).exponential(size=7)
        counts = apportion(shares, 1000)
        assert counts.sum() == 1000 and (abs(counts / 1000 - shares / shares.sum()) < 0.006).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_turns_are_dealt_evenly(shuffle):
    counts = apportion(np.array([0.6, 0.3, 0.1]), 1000)
    sets, before = deal(counts, "key", shuffle=shuffle)
    for at, count in enumerate(counts):
        assert before[sets == at].tolist() == list(range(count))
        met = np.cumsum(sets == at) - np.arange(1, 1001) * count / 1000
        assert abs(met).max() < 3  # so that a short run has its shares too
    again, other = deal(counts, "key", shuffle=shuffle)[0], deal(counts, "other", shuffle=shuffle)[0]
    assert (sets == again).all() and (sets == other).all() != shuffle


@pytest.mark.parametrize(
    "options, shares",
    [
        ({"weights": (1.0, 1.0, 2.0)}, [0.25, 0.25, 0.5]),
        ({"temperature": 2.0}, np.sqrt([40, 12, 6]) / np.sqrt([40, 12, 6]).sum()),
        ({"temperature": 1e9}, [1 / 3] * 3),
        ({"temperature": 1e-3}, [1, 0, 0]),  # 40 ** 1000 is beyond float64
    ],
)
@pytest.mark.parametrize("draw", ["batches", "rows"])
def test_shares_are_those_asked_for(options, shares, draw):
    order = mixed(draw=draw, **options)
    draws = [order.at(step) for step in range(2000)]
    sets = np.array([[draw.set] * 4 if draw.sets is None else draw.sets for draw in draws])
    for part in (sets[:400], sets):
        assert np.bincount(part.ravel(), minlength=3) / part.size == pytest.approx(shares, abs=0.01)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("table", [TABLE, BUCKETS])
def test_each_set_is_walked_as_if_it_were_alone(table, shuffle):
    order = mixed(weights=(1.0, 2.0, 3.0), table=table, shuffle=shuffle)
    draws = [order.at(step) for step in range(120)]
    for at, count in enumerate((40, 12, 6)):
        alone = Order([Rows(f"s{at}", count, lengths(count))], seed=1, batch_size=4, table=table, shuffle=shuffle)
        rows = [draw.rows.tolist() for draw in draws if draw.set == at]
        assert rows == [alone.at(step).rows.tolist() for step in range(len(rows))]
        whole = count // 4
        for epoch in range(len(rows) // whole):
            assert len(set(np.ravel(rows[epoch * whole : (epoch + 1) * whole]))) == 4 * whole


def test_blocks_join_without_a_seam():
    order = mixed(weights=(1.0, 2.0, 3.0))
    assert isinstance(order, Batchwise)
    draws = [order.at(step) for step in range(BLOCK - 60, BLOCK + 60)]
    for at, count in enumerate((40, 12, 6)):
        alone = Order([Rows(f"s{at}", count)], seed=1, batch_size=4, table=TABLE)
        rows = [draw.rows.tolist() for draw in draws if draw.set == at]
        first = int(order.counts[at]) - sum(draw.set == at for draw in draws[:60])
        assert rows == [alone.at(step).rows.tolist() for step in range(first, first + len(rows))]


@pytest.mark.parametrize("options", [{"weights": (5.0, 2.0, 1.0)}, {"temperature": 3.0}, {}])
@pytest.mark.parametrize("shuffle", [True, False])
def test_mixed_rows_walk_each_set_by_epochs(options, shuffle):
    order = mixed(draw="rows", shuffle=shuffle, **options)
    draws = [order.at(step) for step in range(3000)]  # over a block's end, after 2048
    sets, rows = (np.concatenate([getattr(draw, name) for draw in draws]) for name in ("sets", "rows"))
    if not options:  # the union leaves out 58 % 4 of its rows each epoch
        epochs = (rows + np.array([0, 40, 52])[sets])[: 3000 // 14 * 14 * 4].reshape(-1, 56)
        assert all(len(set(epoch)) == 56 for epoch in epochs)
        return
    for at, count in enumerate((40, 12, 6)):
        walk = rows[sets == at]
        epochs = walk[: len(walk) // count * count].reshape(-1, count)
        assert (np.sort(epochs, 1) == np.arange(count)).all()
        assert (epochs[0] == epochs[1]).all() != shuffle


@pytest.mark.parametrize("options", [{"weights": (5.0, 2.0, 1.0)}, {}])
def test_mixed_rows_fit_their_bucket(options):
    order = mixed(draw="rows", table=BUCKETS, **options)
    draws = [order.at(step) for step in range(2048)]
    assert {draw.bucket for draw in draws} == {0, 1}
    for draw in draws:
        found = np.stack(
            [lengths(count)[row] for at, row in zip(draw.sets, draw.rows, strict=True) for count in [(40, 12, 6)[at]]]
        )
        assert (found <= BUCKETS[draw.bucket]).all()
    if options:  # all that was dealt in the block was drawn
        met = np.bincount(np.concatenate([draw.rows for draw in draws])[np.concatenate([draw.sets for draw in draws]) == 0])
        assert met.max() - met.min() <= 1


@pytest.mark.parametrize("draw", ["batches", "rows"])
@pytest.mark.parametrize("options", [{"weights": (5.0, 2.0, 1.0)}, {}])
@pytest.mark.parametrize("table", [TABLE, BUCKETS])
def test_a_draw_is_a_function_of_seed_and_step(draw, options, table):
    order, other = mixed(draw=draw, table=table, **options), mixed(draw=draw, table=table, seed=2, **options)
    steps = [9000, 3, 8191, 8192, 40, 3]
    expected = [(found.set, found.bucket, found.rows.tolist(), np.array(found.sets).tolist()) for found in map(order.at, steps)]
    for step, wanted in zip(reversed(steps), reversed(expected), strict=True):  # a run that begins there
        found = mixed(draw=draw, table=table, **options).at(step)
        assert (found.set, found.bucket, found.rows.tolist(), np.array(found.sets).tolist()) == wanted
    assert told(order, range(20)) != told(other, range(20))


PAIRS, MORE = {"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": "b", "negative": "c"}


@pytest.mark.parametrize(
    "data, message",
    [
        ({"sets": (Set(weight=2.0),)}, "set 'train' has a weight"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 2.0, "mixing": "weights"}, "leave it at 1"),
        ({"draw": "rows", "sets": (Set(columns=PAIRS, name="a"), Set(columns=MORE, name="b"))}, "'a' and 'b' differ in their"),
        ({"draw": "rows", "sets": (Set(name="a"), Set(loss=MultipleNegatives(scale=9.0), name="b"))}, "differ in their loss"),
        ({"draw": "rows", "sets": (Set(name="a"), Set(labels=("x",), name="b"))}, "differ in their labels"),
        ({"draw": "rows", "sets": (Set(name="a"), Set(adapter="x", name="b"))}, "differ in their adapter"),
    ],
)  # fmt: skip
def test_mixtures_that_cannot_be(data, message):
    with pytest.raises(ConfigError, match=message):
        Data(**data)
