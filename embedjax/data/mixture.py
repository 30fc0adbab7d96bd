"""Which rows make the batch of a step where sets are drawn by shares, or mixed within a batch: as order.py, a pure function.

Turns, of batches or of rows, are dealt to the sets in blocks. A block gives each set the same number of turns every time,
spread evenly; so how many turns of a set came before is known without counting them, and each set walks through its own
epochs: none of its rows comes again before all have come (but for those left over from whole batches).
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from embedjax.config import Data
from embedjax.data.order import Draw, Held, Order, Rows, Table, permutation, split

BLOCK = 8192
"""Turns of a block: shares are kept to one in so many."""


def make_order(data: Data, sets: Sequence[Rows], *, seed: int, table: Table) -> "Order | Batchwise | Rowwise | Union":
    """What says `at(step)` which rows are drawn: by the config's `mixing`, `temperature` and `draw`."""
    natural = data.mixing == "proportional" and data.temperature == 1
    if natural and (data.draw == "batches" or len(sets) == 1):
        return Order(sets, seed=seed, batch_size=data.batch_size, table=table, shuffle=data.shuffle)
    options = {"seed": seed, "batch_size": data.batch_size, "table": table, "shuffle": data.shuffle}
    if natural:
        return Union(sets, **options)
    if data.mixing == "weights":
        shares = np.array([each.weight for each in data.sets])
    else:
        counts = np.array([float(rows.count) for rows in sets])
        shares = (counts / counts.max()) ** (1 / data.temperature)  # at most 1: no temperature overflows
    return (Batchwise if data.draw == "batches" else Rowwise)(sets, shares, **options)


def apportion(shares: Float[np.ndarray, "S"], turns: int) -> Int[np.ndarray, "S"]:
    """Whole numbers in proportion to the shares that add up to `turns`, each at least 1: by largest remainder."""
    exact = shares / shares.sum() * (turns - len(shares))
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: turns - len(shares) - counts.sum()]] += 1
    return counts + 1


def deal(counts: Int[np.ndarray, "S"], *key: object, shuffle: bool) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
    """(set, how many of it came before in this block) of each turn. The turns of a set lie evenly: one in each of as many
    equal parts of the block, in its middle, or with `shuffle` anywhere in it, as the key has it."""
    sets = np.repeat(np.arange(len(counts)), counts)
    before = np.concatenate([np.arange(count) for count in counts])
    within = np.full(len(sets), 0.5)
    if shuffle:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        stream = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(len(sets))
        within = (stream >> np.uint64(11)) / 2.0**53
    order = np.argsort((before + within) / counts[sets], kind="stable")
    return sets[order], before[order]


@dataclasses.dataclass
class Batchwise:
    """Every batch from one set, drawn by its share; sets have at least `batch_size` rows each."""

    sets: Sequence[Rows]
    shares: Float[np.ndarray, "S"]
    seed: int
    batch_size: int
    table: Table
    shuffle: bool

    def __post_init__(self):
        self.counts = apportion(self.shares, BLOCK)
        self._blocks = Held(lambda block: deal(self.counts, self.seed, "deal", block, shuffle=self.shuffle))
        one = lambda rows: Order([rows], seed=self.seed, batch_size=self.batch_size, table=self.table, shuffle=self.shuffle)
        self._orders = [one(rows) for rows in self.sets]

    def at(self, step: int) -> Draw:
        """The draw of a step: the next batch of the set whose turn it is, as if that set were alone."""
        block, turn = divmod(int(step), BLOCK)
        sets, before = self._blocks[block]
        at = int(sets[turn])
        return dataclasses.replace(self._orders[at].at(block * int(self.counts[at]) + int(before[turn])), set=at)


@dataclasses.dataclass
class Rowwise:
    """Every batch of rows of all sets, drawn by their shares; holds two epochs' permutations of each set, 8 bytes a row each.
    With several buckets, which gather a block's rows by length, a set's next epoch may begin up to a block early."""

    sets: Sequence[Rows]
    shares: Float[np.ndarray, "S"]
    seed: int
    batch_size: int
    table: Table
    shuffle: bool

    def __post_init__(self):
        self.batches = -(-BLOCK // self.batch_size)
        self.counts = apportion(self.shares, self.batches * self.batch_size)
        self._blocks = Held(self._make)
        self._epochs = [Held(functools.partial(permutation, rows.count, self.seed, rows.name)) for rows in self.sets]

    def at(self, step: int) -> Draw:
        """The draw of a step."""
        block, turn = divmod(int(step), self.batches)
        sets, rows, buckets = self._blocks[block]
        return Draw(0, int(buckets[turn]), rows[turn], sets[turn])

    def _make(self, block: int):
        """(sets [M B], rows [M B], bucket [M]) of the batches of a block."""
        sets, before = deal(self.counts, self.seed, "deal", block, shuffle=self.shuffle)
        rows, lengths = np.empty(len(sets), int), np.empty((len(sets), 2), int)
        for at, each in enumerate(self.sets):
            mine = sets == at
            rows[mine] = self._walk(at, block * int(self.counts[at]) + before[mine])
            lengths[mine] = 0 if each.lengths is None else each.lengths[rows[mine]]
        slots, buckets = split(np.arange(len(sets)), self.batch_size, lengths if len(self.table) > 1 else None, self.table)
        if len(self.table) > 1:
            turns = permutation(len(slots), self.seed, "turns", block) if self.shuffle else np.argsort(slots[:, 0])
            slots, buckets = slots[turns], buckets[turns]
        return sets[slots], rows[slots], buckets

    def _walk(self, at: int, places: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """The rows at these places of a set's walk, which is one epoch after the other."""
        epochs, found = np.divmod(places, self.sets[at].count)
        for epoch in np.unique(epochs) if self.shuffle else ():
            here = epochs == epoch
            found[here] = self._epochs[at][int(epoch)][found[here]]
        return found


class Union:
    """Every batch of rows of all sets, which are walked through as if they were one."""

    def __init__(self, sets: Sequence[Rows], *, seed: int, batch_size: int, table: Table, shuffle: bool):
        self.starts = np.array([0, *itertools.accumulate(rows.count for rows in sets)])
        lengths = [rows.lengths for rows in sets if rows.lengths is not None]
        name = "+".join(rows.name for rows in sets)
        whole = Rows(name, int(self.starts[-1]), np.concatenate(lengths) if lengths else None)
        self._order = Order([whole], seed=seed, batch_size=batch_size, table=table, shuffle=shuffle)

    def at(self, step: int) -> Draw:
        """The draw of a step."""
        draw = self._order.at(step)
        sets = np.searchsorted(self.starts, draw.rows, side="right") - 1
        return Draw(0, draw.bucket, draw.rows - self.starts[sets], sets)
