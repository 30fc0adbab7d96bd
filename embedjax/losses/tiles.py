"""Blocks of scores: what one block of rows and one tile of columns add to the totals, and to the gradients.

A block lives in memory only while it is worked on. `sums.py` says how its scores add up.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from embedjax.losses.masks import Side, Term, counted, hardened
from embedjax.losses.sums import Way

# Columns of a tile, and rows of a block for each of them.
COLUMNS, ASPECT = 1024, 2
# Scores of a strip of rows against all columns, and the fewest rows it may have: the columns' gradient is read and written
# once a strip.
STRIP, SHORTEST = 2**23, 64


@dataclasses.dataclass(frozen=True)
class Form:
    """What the blocks compute; static under jit. `dims` are ascending Matryoshka prefixes, or () for whole vectors."""

    way: Way
    hardness: str
    dims: tuple[int, ...]

    @property
    def prefixes(self) -> int:
        return max(len(self.dims), 1)


class Totals(NamedTuple):
    """Of rows or of columns, [N P]: `value`, the log-sum-exp (sigmoid: the sum of softplus) over their counted pairs, and
    `cotangent`, the loss' derivative by it."""

    value: Float[Array, "N P"]
    cotangent: Float[Array, "N P"]


def size(count: int, wanted: int) -> int:
    """A block size of at most `wanted` for `count` things: a divisor if one is near, so that no block is padded."""
    blocks = -(-count // wanted)
    for number in range(blocks, 2 * blocks + 1):
        if count % number == 0:
            return count // number
    return -(-count // blocks)


def cut(tree: Any, length: int) -> Any:
    """[N, ...] -> [blocks, length, ...], the last block padded with zeros."""
    padded = lambda x: jnp.pad(x, [(0, -x.shape[0] % length)] + [(0, 0)] * (x.ndim - 1))
    return jax.tree.map(lambda x: padded(x).reshape(-1, length, *x.shape[1:]), tree)


def cut_side(side: Side, length: int) -> Side:
    """A side in blocks; padding is marked as not valid."""
    count = side.row.shape[0]
    if count % length:
        side = side._replace(valid=jnp.ones(count, bool))
    return cut(side, length)


def uncut(tree: Any, count: int) -> Any:
    """The inverse of `cut`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], tree)


def add(form: Form, term: Term, rows: Side, columns: Side, lift: Array, row_sums: Array) -> tuple[Array, Array | None]:
    """Row sums [blocks R P S] with this term's added, and its column sums [tiles T P S], None unless it has both.

    `rows` and `columns` are cut; `lift` is the hardness strength as a share of the scale.
    """
    shape = (columns.row.shape[1], *row_sums.shape[2:])
    start = jnp.full(shape, form.way.nothing, row_sums.dtype) if term.both else None

    def tile(row_sums, columns):
        def block(column_sums, one):
            rows, mine = one
            to_row, to_column = sums(form, term, rows, columns, lift)
            return jax.tree.map(form.way.join, column_sums, to_column), form.way.join(mine, to_row)

        return _swap(jax.lax.scan(block, start, (rows, row_sums)))

    return jax.lax.scan(tile, row_sums, columns)


class Gradient(NamedTuple):
    """Of a Side: what flows into `vectors`, `inverse` and `bias`, in blocks like the side."""

    vectors: Array
    inverse: Array | None
    bias: Array | None


def zeros(side: Side) -> Gradient:
    return jax.tree.map(jnp.zeros_like, Gradient(side.vectors, side.inverse, side.bias))


def pull(
    form: Form,
    term: Term,
    rows: Side,
    columns: Side,
    lift: Array,
    row_totals: Totals,
    column_totals: Totals | None,
    row_gradient: Gradient,
) -> tuple[Gradient, Gradient]:
    """The gradient of the rows with this term's added, and that of the columns. Everything is cut; scores are computed again,
    tile by tile."""

    def tile(row_gradient, one):
        columns, column_totals = one

        def block(column_gradient, one):
            rows, row_totals, mine = one
            to_row, to_column = gradients(form, term, rows, columns, lift, row_totals, column_totals)
            return jax.tree.map(jnp.add, column_gradient, to_column), jax.tree.map(jnp.add, mine, to_row)

        return _swap(jax.lax.scan(block, zeros(columns), (rows, row_totals, row_gradient)))

    return jax.lax.scan(tile, row_gradient, (columns, column_totals))


def _swap(pair: tuple) -> tuple:
    return pair[1], pair[0]


def _product(x: Array, y: Array) -> Array:
    # Accelerators multiply float32 in less by default; a score's error counts `scale` times.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _products(form: Form, rows: Side, columns: Side) -> list[Float[Array, "R T"]]:
    """The inner products of each prefix: the partial sums of one product."""
    if not form.dims:
        return [_product(rows.vectors, columns.vectors.T)]
    found = []
    for low, high in _segments(form):
        part = _product(rows.vectors[:, low:high], columns.vectors[:, low:high].T)
        found.append(found[-1] + part if found else part)
    return found


def _segments(form: Form) -> list[tuple[int, int]]:
    return list(zip((0, *form.dims[:-1]), form.dims, strict=True))


def _scores(form: Form, rows: Side, columns: Side, product: Array, p: int) -> Float[Array, "R T"]:
    if rows.inverse is not None and columns.inverse is not None:
        product = product * (rows.inverse[:, p, None] * columns.inverse[None, :, p])
    return product if rows.bias is None else product + rows.bias[:, None]


def sums(form: Form, term: Term, rows: Side, columns: Side, lift: Array) -> tuple[Array, Array | None]:
    """What a block adds to the sums of its rows [R P S] and columns [T P S]."""
    to_row, to_column = counted(term, rows, columns)
    factor = hardened(term, form.hardness, rows, columns)
    row_sums, column_sums = [], []
    for p, product in enumerate(_products(form, rows, columns)):
        score = _scores(form, rows, columns, product, p)
        hard = score if factor is None else score * (1 + lift * factor)
        row_sums.append(form.way.add(hard, to_row, 1))
        if term.both:
            # Where scores and masks are those of the rows, XLA finds that the exponentials are too.
            column_sums.append(form.way.add(score, to_column, 0))
    return jnp.stack(row_sums, 1), jnp.stack(column_sums, 1) if term.both else None


def gradients(
    form: Form, term: Term, rows: Side, columns: Side, lift: Array, row_totals: Totals, column_totals: Totals | None
) -> tuple[Gradient, Gradient]:
    """What a block adds to the gradients of its rows and of its columns."""
    masks = counted(term, rows, columns)
    factor = hardened(term, form.hardness, rows, columns)
    products = _products(form, rows, columns)
    through, row_inverse, column_inverse, bias = [], [], [], jnp.zeros((), rows.vectors.dtype)
    for p, product in enumerate(products):
        score = _scores(form, rows, columns, product, p)
        column = None if column_totals is None else (column_totals.value[:, p], column_totals.cotangent[:, p])
        # The lift of a hard score takes no gradient: d score is d hard.
        hard = score if factor is None else score * (1 + lift * factor)
        weight = form.way.weigh(score, hard, (row_totals.value[:, p], row_totals.cotangent[:, p]), column, masks)
        if rows.bias is not None:
            bias = bias + weight.sum(1)
        if rows.inverse is not None and columns.inverse is not None:
            x, y = rows.inverse[:, p], columns.inverse[:, p]
            weight = weight * (x[:, None] * y[None])
            radial = weight * product
            row_inverse.append(radial.sum(1) / x)
            column_inverse.append(radial.sum(0) / y)
        through.append(weight)
    row_vectors, column_vectors = _back(form, rows, columns, through)
    pack = lambda parts: jnp.stack(parts, -1) if parts else None
    return (
        Gradient(row_vectors, pack(row_inverse), None if rows.bias is None else bias),
        Gradient(column_vectors, pack(column_inverse), None),
    )


def _back(form: Form, rows: Side, columns: Side, weights: list[Array]) -> tuple[Array, Array]:
    """The products of the gradient; a segment of the width serves every prefix that holds it at once."""
    if not form.dims:
        return _product(weights[0], columns.vectors), _product(weights[0].T, rows.vectors)
    to_rows, to_columns, total = [], [], None
    for (low, high), weight in zip(reversed(_segments(form)), reversed(weights), strict=True):
        total = weight if total is None else total + weight
        to_rows.append(_product(total, columns.vectors[:, low:high]))
        to_columns.append(_product(total.T, rows.vectors[:, low:high]))
    return jnp.concatenate(to_rows[::-1], 1), jnp.concatenate(to_columns[::-1], 1)
