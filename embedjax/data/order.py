"""Which rows make the batch of a step: a pure function of (seed, step, row lengths), so hosts agree without talking.

Reads no rows itself. An epoch draws every set once; its batches, of all sets, are shuffled together, so that sets
are met in proportion to their number of batches. Permutations come from the raw stream of a Philox generator keyed by
a hash, which numpy keeps stable over its versions: a resumed run meets the same rows.
"""

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int, Integer

from embedjax.config.errors import ConfigError

T = TypeVar("T")

Table = tuple[tuple[int, int], ...]
"""(anchor length, document length) in tokens, smallest first."""


def make_table(buckets: Sequence[tuple[int, int]]) -> Table:
    """The buckets sorted by their tokens; the last must hold whatever the others do, since leftover rows end there."""
    table = tuple(sorted(set(buckets), key=lambda pair: (sum(pair), pair)))
    longest = tuple(max(lengths) for lengths in zip(*table, strict=True))
    if table[-1] != longest:
        raise ConfigError(f"data.buckets: the largest, {table[-1]}, is shorter than another in one length; add {longest}")
    return table


def first_fit(lengths: Integer[np.ndarray, "N 2"], table: Table, *, after: int = -1) -> Int[np.ndarray, "N"]:
    """The first bucket beyond `after` that both lengths fit in, else the last, where longer texts are cut."""
    fits = np.all(lengths[:, None] <= np.array(table)[None], axis=-1)
    fits[:, : after + 1] = False
    fits[:, -1] = True
    return fits.argmax(1)


def permutation(n: int, *key: object) -> Int[np.ndarray, "N"]:
    """A permutation of range(n) that depends on the key alone; the key's parts are told apart by their repr."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    stream = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(n)
    return np.argsort(stream, kind="stable")


def split(order: Int[np.ndarray, "N"], batch_size: int, lengths: Integer[np.ndarray, "N 2"] | None, table: Table):
    """Whole batches of one bucket each, as (rows [M B], bucket [M]).

    Rows left over in a bucket go on to the next one that they fit, in the place the order gives them; what is left of
    the last, fewer than a batch, is dropped. So M is N // B whatever the lengths.
    """
    place = np.zeros(len(order), int) if lengths is None else first_fit(lengths[order], table)
    waiting = [np.flatnonzero(place == k) for k in range(len(table))]
    batches, buckets = [], []
    for k in range(len(table)):
        whole = len(waiting[k]) // batch_size * batch_size
        batches.append(order[waiting[k][:whole]].reshape(-1, batch_size))
        buckets.append(np.full(len(batches[-1]), k))
        left = waiting[k][whole:]
        if lengths is not None and k + 1 < len(table):
            target = first_fit(lengths[order[left]], table, after=k)
            for j in range(k + 1, len(table)):
                waiting[j] = np.sort(np.concatenate([waiting[j], left[target == j]]))
    return np.concatenate(batches), np.concatenate(buckets)


@dataclasses.dataclass(frozen=True)
class Draw:
    """The rows of one global batch: which set, which bucket of the table, which rows."""

    set: int
    bucket: int
    rows: Int[np.ndarray, "B"]
    sets: Int[np.ndarray, "B"] | None = None
    """The set of each row where rows of several are mixed; `set` is then the first."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the order needs to know of one set: its name, number of rows, their lengths where there are several buckets."""

    name: str
    count: int
    lengths: Integer[np.ndarray, "N 2"] | None = None


class Held(Generic[T]):
    """What was made for the two numbers asked for last. Thread-safe."""

    def __init__(self, make: Callable[[int], T]):
        self._make = make
        self._made: dict[int, T] = {}
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> T:
        with self._lock:
            if number not in self._made:
                while len(self._made) > 1:
                    del self._made[max(self._made, key=lambda held: abs(held - number))]
                self._made[number] = self._make(number)
            return self._made[number]


class Order:
    """The rows of every step; holds two epochs' permutations at a time, 8 bytes a row each.

    Every set must have at least `batch_size` rows.
    """

    def __init__(self, sets: Sequence[Rows], *, seed: int, batch_size: int, table: Table, shuffle: bool = True):
        self.sets, self.seed, self.batch_size, self.table, self.shuffle = sets, int(seed), batch_size, table, shuffle
        self.batches_per_epoch = sum(rows.count // batch_size for rows in sets)
        self._epochs = Held(self._make)

    def at(self, step: int) -> Draw:
        """The draw of a step; steps go on over epochs without end."""
        epoch, turn = divmod(int(step), self.batches_per_epoch)
        turns, batches = self._epochs[epoch]
        at, index = turns[turn]
        rows, buckets = batches[at]
        return Draw(int(at), int(buckets[index]), rows[index])

    def _make(self, epoch: int):
        """The epoch's turns [M 2] of (set, batch of the set), and each set's batches."""
        batches, turns, keys = [], [], []
        for at, rows in enumerate(self.sets):
            drawn = permutation(rows.count, self.seed, rows.name, epoch) if self.shuffle else np.arange(rows.count)
            batches.append(split(drawn, self.batch_size, rows.lengths, self.table))
            firsts = batches[-1][0][:, 0]
            turns.append(np.stack([np.full(len(firsts), at), np.arange(len(firsts))], 1))
            # In file order, sets advance side by side: a batch's key is how far into its set it begins.
            keys.append(firsts / rows.count)
        turns = np.concatenate(turns)
        if self.shuffle:
            return turns[permutation(len(turns), self.seed, "turns", epoch)], batches
        return turns[np.argsort(np.concatenate(keys), kind="stable")], batches
