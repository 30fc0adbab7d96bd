"""The documents that hard negatives are mined from, each text once, and the pairs they are for. Texts stay on the disk."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard

import numpy as np
from jaxtyping import Int, UInt64

from embedjax.config.errors import DataError
from embedjax.data.columns import hash_texts
from embedjax.data.sources import BadRow, Source, select

CHUNK = 4096
"""Rows read before progress is told."""

_log = logging.getLogger(__name__)


class Corpus:
    """The different texts of one or more sources, in the order they first come. Rows without text are passed over.

    Costs 24 bytes of memory a text and one pass over the sources. Raises DataError without any text.
    """

    def __init__(self, parts: Sequence[tuple[Source, Sequence[str]]], progress: Callable[[int, int], None] = lambda *_: None):
        self.parts = parts
        for source, columns in parts:
            select(source, {name: name for name in columns}, "the corpus")
        sizes = [len(source) for source, _ in parts]
        hashes, places = np.empty(sum(sizes), np.uint64), np.empty((sum(sizes), 2), np.int32)
        count = 0
        for at, rows in _chunks(sizes):
            found = {row: text for row in rows if (text := self._read(at, row))}
            hashes[count : count + len(found)] = hash_of(list(found.values()))
            places[count : count + len(found), 0], places[count : count + len(found), 1] = at, list(found)
            count += len(found)
            progress(sum(sizes[:at]) + rows.stop, sum(sizes))
        if not count:
            raise DataError(f"{parts[0][0].name}: no texts in {', '.join(parts[0][1])}")
        lacking = np.subtract(sizes, np.bincount(places[:count, 0], minlength=len(parts)))
        for (source, columns), size, few in zip(parts, sizes, lacking, strict=True):
            if few:
                told = source.name, few, size, ", ".join(columns)
                _log.warning("%s: %d of %d rows have no text in %s and are passed over", *told)
        # np.unique sorts by hash, which `find` searches; `first` says where each text stood first.
        self._hashes, first = np.unique(hashes[:count], return_index=True)
        order = np.argsort(first)
        self._places = places[first[order]]
        self._rank = np.empty(len(order), np.int32)  # place in the sorted hashes -> place in the order of the sources
        self._rank[order] = np.arange(len(order))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> str:
        at, row = self._places[number]
        return self._read(int(at), int(row))

    def take(self, numbers: Iterable[int]) -> list[str]:
        return [self[int(number)] for number in numbers]

    def find(self, texts: Sequence[str]) -> Int[np.ndarray, "n"]:
        """The number of each text, -1 for one that is not here."""
        wanted = hash_of(texts)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[at] == wanted, self._rank[at], -1)

    def _read(self, at: int, row: int) -> str:
        """The columns joined by a space; "" for a row that cannot be read."""
        source, columns = self.parts[at]
        try:
            values = source[row]
        except BadRow:
            return ""
        return " ".join(value for value in map(values.get, columns) if _is_text(value))


class Pairs:
    """The pairs of a source: for each row the number of its anchor among the different anchors, and of its positive in the
    corpus; -1 for rows that cannot be used."""

    def __init__(self, source: Source, anchor: str, positive: str, corpus: Corpus):
        select(source, {"anchor": anchor, "positive": positive}, "the pairs")
        self.source, self.columns = source, (anchor, positive)
        self.anchors = Corpus([(source, [anchor])])
        self.anchor, self.positive = np.full(len(source), -1, np.int32), np.full(len(source), -1, np.int32)
        for _, rows in _chunks([len(source)]):
            good = {row: pair for row in rows if all(pair := self[row])}
            numbers = list(good)
            if good:
                self.anchor[numbers] = self.anchors.find([pair[0] for pair in good.values()])
                self.positive[numbers] = corpus.find([pair[1] for pair in good.values()])
        if not len(self.rows):
            raise DataError(f"{source.name}: no row has texts in both {anchor!r} and {positive!r}")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> tuple[str, str]:
        """(anchor, positive), "" for what is no text."""
        try:
            values = self.source[row]
        except BadRow:
            return "", ""
        anchor, positive = (value if _is_text(value) else "" for value in map(values.get, self.columns))
        return anchor, positive

    @property
    def rows(self) -> Int[np.ndarray, "n"]:
        """The rows that can be used."""
        return np.flatnonzero((self.anchor >= 0) & (self.positive >= 0))

    def known(self, corpus: Corpus) -> "Lists":
        """What is no negative of each anchor: all its positives, and its own text."""
        parts = [corpus.find(self.anchors.take(chunk)) for _, chunk in _chunks([len(self.anchors)])]
        rows, own = self.rows, np.concatenate(parts)
        there = np.flatnonzero(own >= 0)
        return Lists(
            np.concatenate([self.anchor[rows], there]), np.concatenate([self.positive[rows], own[there]]), len(self.anchors)
        )


class Lists:
    """A list of numbers for each of `count` keys, packed."""

    def __init__(self, keys: Int[np.ndarray, "n"], values: Int[np.ndarray, "n"], count: int):
        pairs = np.unique(np.stack([keys, values], 1), axis=0)
        self.values = pairs[:, 1]
        self.starts = np.searchsorted(pairs[:, 0], np.arange(count + 1))

    def padded(self, keys: range) -> Int[np.ndarray, "n P"]:
        """The lists of some keys, filled up with -1."""
        sizes = np.diff(self.starts[keys.start : keys.stop + 1])
        result = np.full((len(keys), max(1, sizes.max(initial=0))), -1, np.int64)
        result[np.arange(result.shape[1])[None] < sizes[:, None]] = self.values[
            self.starts[keys.start] : self.starts[keys.stop]
        ]
        return result

    @property
    def sizes(self) -> Int[np.ndarray, "count"]:
        """The length of each list."""
        return np.diff(self.starts)


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def hash_of(texts: Sequence[str]) -> UInt64[np.ndarray, "n"]:
    """blake2b-64 of each text."""
    return np.ascontiguousarray(hash_texts(texts)).view("<u8")[:, 0] if texts else np.zeros(0, np.uint64)


def _chunks(sizes: Sequence[int]) -> Iterable[tuple[int, range]]:
    """(which, rows) of parts of sources of these sizes."""
    for at, size in enumerate(sizes):
        for start in range(0, size, CHUNK):
            yield at, range(start, min(start + CHUNK, size))
