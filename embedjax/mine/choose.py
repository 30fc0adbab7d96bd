"""Which of the nearest documents become hard negatives. Arrays only: no model, no text."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from embedjax.config import Negatives

TRIES = 64
"""Random documents tried for one place before one that was taken already will do."""


class Chosen(NamedTuple):
    """Documents of each anchor, nearest first, -1 where there are too few, and their scores, -inf there."""

    numbers: Int[np.ndarray, "Q K"]
    scores: Float[np.ndarray, "Q K"]


def choose(
    how: Negatives,
    numbers: Int[np.ndarray, "Q k"],
    scores: Float[np.ndarray, "Q k"],
    *,
    known: Int[np.ndarray, "Q P"],
    positive: Float[np.ndarray, "Q"],
    anchors: Int[np.ndarray, "Q"],
    seed: int = 0,
) -> Chosen:
    """The negatives of Q anchors among their k nearest documents, of which `known` (-1 for none) are no negatives.

    `positive` is the lowest score of an anchor's positives, which a margin is measured from. With random sampling the choice
    is a function of (seed, number of the anchor, number of the document): it does not depend on who else is in the call.
    """
    fit = (numbers >= 0) & ~_among(numbers, known)
    rank = np.cumsum(fit, axis=1) - 1
    fit &= (rank >= how.range_min) & (rank < how.range_max)
    if how.min_score is not None:
        fit &= scores >= how.min_score
    limit = highest(how, positive)
    fit &= scores <= limit[:, None]
    order = np.broadcast_to(np.arange(numbers.shape[1], dtype=np.uint64), numbers.shape)
    if how.sampling == "random":
        order = mixed(seed, anchors[:, None], numbers) >> np.uint64(1)
    last = np.iinfo(np.uint64).max
    first = np.argsort(np.where(fit, order, last), axis=1, kind="stable")[:, : how.num_negatives]
    first = np.sort(np.where(np.take_along_axis(fit, first, 1), first, numbers.shape[1]), axis=1)
    widen = lambda array, value: np.pad(array, ((0, 0), (0, how.num_negatives)), constant_values=value)
    if (missing := how.num_negatives - first.shape[1]) > 0:
        first = np.pad(first, ((0, 0), (0, missing)), constant_values=numbers.shape[1])
    taken = [np.take_along_axis(widen(a, v), first, 1) for a, v in ((numbers, -1), (scores, -np.inf))]
    return Chosen(taken[0].astype(np.int32), taken[1].astype(np.float32))


def highest(how: Negatives, positive: Float[np.ndarray, "Q"]) -> Float[np.ndarray, "Q"]:
    """The score that a negative of each anchor may reach. Relative margins and percentages are of the score's size, so that
    they lower the limit of a positive with a score below 0 too."""
    limit = np.full(len(positive), np.inf)
    if how.margin is not None:
        limits = {
            "absolute": positive - how.margin,
            "relative": positive - np.abs(positive) * how.margin,
            "percentage": positive - np.abs(positive) * (1 - how.margin / 100),
        }
        limit = limits[how.margin_kind].astype(np.float64)
    return limit if how.max_score is None else np.minimum(limit, how.max_score)


def filled(
    chosen: Int[np.ndarray, "Q K"], known: Int[np.ndarray, "Q P"], anchors: Int[np.ndarray, "Q"], *, total: int, seed: int
) -> Int[np.ndarray, "Q K"]:
    """`chosen` with random documents of the `total` in place of -1: none known and none twice, as long as there are such."""
    result, tries = chosen.copy(), 0
    enough = TRIES * chosen.shape[1]
    while len(rows := np.flatnonzero((result < 0).any(1))):
        at = (result[rows] < 0).argmax(1)
        drawn = (mixed(seed, anchors[rows], np.full(len(rows), tries)) % np.uint64(total)).astype(np.int32)
        refused = [known[rows]] * (tries < 2 * enough) + [result[rows]] * (tries < enough)
        good = ~_among(drawn[:, None], np.concatenate([*refused, np.full((len(rows), 1), -1)], 1))[:, 0]
        result[rows[good], at[good]] = drawn[good]
        tries += 1
    return result


def mixed(seed: int, a: Int[np.ndarray, "..."], b: Int[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """64 bits that depend on the three numbers alone: splitmix64 (Steele et al. 2014), once for each."""
    found = np.uint64(seed % 2**64)
    for part in (a, b):
        z = (found ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found = z ^ (z >> np.uint64(31))
    return found


def _among(numbers: Int[np.ndarray, "Q k"], known: Int[np.ndarray, "Q P"]) -> Bool[np.ndarray, "Q k"]:
    """Whether each number is among the known ones of its own row. Pairs of (row, number) are compared as one number each, for
    Q x k x P comparisons would not fit where an anchor has many positives."""
    row = np.arange(len(numbers), dtype=np.int64)[:, None] << 32
    return np.isin(row + numbers, (row + known)[known >= 0])
