"""Which pairs of a batch count: false negatives by content hash and by a guide's vectors, own pairs, hardness.

Works on any block of rows and columns, the whole batch or a tile. Every answer is [R T], or None where there is nothing to do.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

SideName = Literal["query", "positive", "negative"]


class Side(NamedTuple):
    """Vectors on one side of a comparison and what decides which pairs count; every leaf is [N, ...] or None.

    `row` is the row of the global batch they belong to; `text` the hash of their text, `partner` that of the row's other
    text (a positive's query, a query's positive; hard negatives have none); `guide` unit vectors of a guide, `floor` the
    guide cosine above which a pair of the row is masked; `inverse` the inverse norms of P Matryoshka prefixes; `bias` is
    added to a row's scores; `valid` is False for padding.
    """

    vectors: Float[Array, "N D"]
    row: Int32[Array, "N"]
    text: UInt32[Array, "N 2"] | None = None
    partner: UInt32[Array, "N 2"] | None = None
    guide: Float[Array, "N G"] | None = None
    floor: Float[Array, "N"] | None = None
    inverse: Float[Array, "N P"] | None = None
    bias: Float[Array, "N"] | None = None
    valid: Bool[Array, "N"] | None = None


@dataclasses.dataclass(frozen=True)
class Term:
    """A comparison of two sides: its scores go into the totals of the rows, and of the columns if `both`."""

    rows: SideName
    columns: SideName
    both: bool = False

    @property
    def holds_positives(self) -> bool:
        return (self.rows, self.columns) == ("query", "positive")

    @property
    def excludes_own(self) -> bool:
        """Texts of one row are not compared with each other, save the query with its documents."""
        return self.rows == self.columns or self.rows == "positive"


def counted(term: Term, rows: Side, columns: Side) -> tuple[Bool[Array, "R T"] | None, Bool[Array, "R T"] | None]:
    """Which pairs count in the totals of the rows, and of the columns. A row's own positive always does."""
    own = rows.row[:, None] == columns.row[None]
    masked = None if rows.text is None else duplicates(term, rows, columns)
    to_row, to_column = masked, masked
    if rows.guide is not None and columns.guide is not None and rows.floor is not None:
        cosine = jnp.matmul(rows.guide, columns.guide.T, precision=jax.lax.Precision.HIGHEST)
        to_row = _either(to_row, cosine > rows.floor[:, None])
        if term.both and columns.floor is not None:
            to_column = _either(to_column, cosine > columns.floor[None])
    if term.excludes_own:
        to_row, to_column = _either(to_row, own), _either(to_column, own)
    elif term.holds_positives:
        to_row, to_column = (None if m is None else m & ~own for m in (to_row, to_column))
    if columns.valid is not None:
        to_row, to_column = _either(to_row, ~columns.valid[None]), _either(to_column, ~columns.valid[None])
    if rows.valid is not None:
        to_row, to_column = _either(to_row, ~rows.valid[:, None]), _either(to_column, ~rows.valid[:, None])
    if to_row is not None:
        to_row = jnp.broadcast_to(~to_row, own.shape)
    if to_column is not None:
        to_column = jnp.broadcast_to(~to_column, own.shape)
    return to_row, to_column


def duplicates(term: Term, rows: Side, columns: Side) -> Bool[Array, "R T"]:
    """Candidates that are no negatives of a row: a text equal to the row's query or to its positive; the positive of an
    equal query; and among queries, the query of an equal positive. Hard negatives of an equal query stay negatives."""
    same = lambda x, y: (x[:, None, 0] == y[None, :, 0]) & (x[:, None, 1] == y[None, :, 1])
    found = same(rows.text, columns.text) | same(rows.partner, columns.text)
    if columns.partner is not None:
        found |= same(rows.partner if term.rows == term.columns else rows.text, columns.partner)
    return found


def hardened(term: Term, hardness: str, rows: Side, columns: Side) -> Bool[Array, "R T"] | bool | None:
    """Pairs whose score is raised in the totals of the rows; only the query's scores of documents are, and no positive's."""
    if hardness == "none" or term.rows != "query" or term.columns == "query":
        return None
    if term.columns == "negative" and hardness == "all":
        return True
    if term.columns == "positive" and hardness == "hard":
        return None
    own = rows.row[:, None] == columns.row[None]
    return own if hardness == "hard" else ~own


def _either(x: Bool[Array, "..."] | None, y: Bool[Array, "..."]) -> Bool[Array, "..."]:
    return y if x is None else x | y
