"""How the scores of blocks add up to the totals of rows and columns, and what each score then weighs in the gradient.

Four ways, one of them chosen by what scores there are. Softplus is summed as it is. Cosines are bounded by the scale: their
exponentials need no running maximum, but are summed at one or two fixed shifts that keep them inside float32's range. Products
of vectors have no bound: their total is the log-sum-exp so far.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# exp holds about +-87 in float32. Scores within NARROW need no shift, the log of the number of candidates included.
NARROW, WIDE, SHIFT = 50.0, 110.0, 50.0
# A sum at the upper shift below this has lost terms to underflow; then no score is above -17, and the lower shift is exact.
LOST = 8e-30

Keep = Bool[Array, "R T"] | None  # which scores count; None for all


class Way(NamedTuple):
    """While it grows a total is `slots` numbers, each `nothing` at first."""

    slots: int
    nothing: float
    add: Callable[[Array, Keep, int], Array]
    """`(scores [R T], keep, axis) -> [N S]`: what the scores of a block along an axis come to."""
    join: Callable[[Array, Array], Array]
    """Two such sums as one."""
    finish: Callable[[Array], Array]
    """`[... S] -> [...]`: the total."""
    weigh: Callable[..., Array]
    """`(score, hard, row, column, masks) -> [R T]`: the loss's derivative by each score. `hard` are the scores of rows, which
    hardness may have raised; `row`, and `column` unless it is None, are (totals, the loss's derivative by them)."""


def way(sigmoid: bool, bound: float | None) -> Way:
    """For scores within +-bound, or of any size. Raises ValueError when two shifts are not enough."""
    if sigmoid:
        return SOFTPLUS
    if bound is None:
        return RUNNING
    if bound > WIDE:
        raise ValueError(f"scores reach {bound:.0f}; tiles hold scales up to {WIDE:.0f}, hardness strength included")
    return PLAIN if bound <= NARROW else SHIFTED


def _softplus(score: Array, keep: Keep, axis: int) -> Float[Array, "N 1"]:
    return _kept(jax.nn.softplus(score), keep).sum(axis)[:, None]


def _exponentials(shifts: tuple[float, ...], score: Array, keep: Keep, axis: int) -> Float[Array, "N S"]:
    return jnp.stack([_kept(jnp.exp(score - shift), keep).sum(axis) for shift in shifts], -1)


def _log_sum(score: Array, keep: Keep, axis: int) -> Float[Array, "N 1"]:
    return jax.nn.logsumexp(score if keep is None else jnp.where(keep, score, -jnp.inf), axis)[:, None]


def _only(sums: Array) -> Array:
    return sums[..., 0]


def _log(sums: Array) -> Array:
    return jnp.log(sums[..., 0])


def _log_of_shifted(sums: Array) -> Array:
    return jnp.where(sums[..., 0] > LOST, jnp.log(sums[..., 0]) + SHIFT, jnp.log(sums[..., 1]) - SHIFT)


def _slope(score: Array, hard: Array, row: tuple, column: tuple | None, masks: tuple[Keep, Keep]) -> Float[Array, "R T"]:
    return _kept(jax.nn.sigmoid(hard) * row[1][:, None], masks[0])


def _share(score: Array, hard: Array, row: tuple, column: tuple | None, masks: tuple[Keep, Keep]) -> Float[Array, "R T"]:
    """The softmax of rows, and that of columns."""
    weight = _kept(jnp.exp(hard - _finite(row[0])[:, None]) * row[1][:, None], masks[0])
    if column is None:
        return weight
    return weight + _kept(jnp.exp(score - _finite(column[0])[None]) * column[1][None], masks[1])


def _share_of_narrow(
    score: Array, hard: Array, row: tuple, column: tuple | None, masks: tuple[Keep, Keep]
) -> Float[Array, "R T"]:
    """One exponential serves both directions: e^(s - r) = e^s e^-r, and neither leaves float32's range."""
    row_R = row[1] * jnp.exp(-_finite(row[0]))
    if column is None:
        return _kept(jnp.exp(hard) * row_R[:, None], masks[0])
    column_T = column[1] * jnp.exp(-_finite(column[0]))
    if hard is score and masks[0] is None and masks[1] is None:
        return jnp.exp(score) * (row_R[:, None] + column_T[None])
    to_column = _kept(jnp.exp(score) * column_T[None], masks[1])
    return _kept(jnp.exp(hard) * row_R[:, None], masks[0]) + to_column


def _kept(x: Array, keep: Keep) -> Array:
    return x if keep is None else jnp.where(keep, x, 0)


def _finite(total: Array) -> Array:
    """A total of no pair is -inf; its weights are masked, and must not be NaN."""
    return jnp.where(jnp.isfinite(total), total, 0)


SOFTPLUS = Way(1, 0.0, _softplus, jnp.add, _only, _slope)
PLAIN = Way(1, 0.0, functools.partial(_exponentials, (0.0,)), jnp.add, _log, _share_of_narrow)
SHIFTED = Way(2, 0.0, functools.partial(_exponentials, (SHIFT, -SHIFT)), jnp.add, _log_of_shifted, _share)
RUNNING = Way(1, -jnp.inf, _log_sum, jnp.logaddexp, _only, _share)
