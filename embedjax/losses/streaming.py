"""The numbers of `contrastive.py` without ever holding B x N scores: rows and columns in tiles, totals over them, and a
gradient that computes each tile again. Matryoshka prefixes come out of one product.

`loss` is for one device. `ring.py` gives `totals` an axis of devices round which the columns travel.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from embedjax.losses import ring, sums, tiles
from embedjax.losses.contrastive import Loss, Pairs, Rule, floats, inverse_norm, normalize, sides, terms
from embedjax.losses.masks import Side, Term

Sides = dict[str, Side]


def loss(
    pairs: Pairs,
    rule: Rule,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float = 0.0,
    *,
    bound: float = 100.0,
    dims: Sequence[int] = (),
    weights: Sequence[float] = (),
    chosen: Bool[Array, "P"] | None = None,
    tile: int = 0,
) -> Loss:
    """`contrastive.loss`, or with `dims` `compose.matryoshka` of it, in memory linear in the batch.

    `bound` is what the scale never exceeds: for cosines it decides how exponentials are kept in range. `chosen` are the
    prefixes that count this time, None for all. `tile` is the columns of a tile, 0 for a good size. Metrics: `positive`, the
    mean cosine of anchor and positive.
    """
    made = _prepare(pairs, rule, scale, bias, bound, dims, weights, 0)
    strip = 0 if tile or chosen is not None else _strip(made)
    if not strip:
        options = {"bound": bound, "dims": dims, "weights": weights, "chosen": chosen, "tile": tile}
        value_B, cosine_B = per_row(pairs, rule, scale, bias, **options)
        return value_B.mean(), {"positive": cosine_B.mean()}
    total = cast(Array, one_way(made.form, made.terms, strip, made.factors, made.rows, made.columns, made.lift))
    value = total - _weighted(made.own, jnp.asarray(made.factors, made.own.dtype)).mean()
    return value, {"positive": _cosine(made, scale, bias).mean()}


def per_row(
    pairs: Pairs,
    rule: Rule,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    *,
    bound: float,
    dims: Sequence[int],
    weights: Sequence[float],
    chosen: Bool[Array, "P"] | None,
    tile: int,
    axis: tuple[str, ...] = (),
    first: Array | int = 0,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Each row's loss, the mean of which is the loss, and the cosine of its anchor and positive.

    With `axis` the rows are this device's, inside `shard_map` over those axes, and `first` is the place of its first one.
    """
    made = _prepare(pairs, rule, scale, bias, bound, dims, weights, first)
    sizes = _sizes(made.rows, made.columns, tile)
    found = totals(made.form, made.terms, axis, sizes, made.rows, made.columns, made.lift)
    row_BP, column_BP = cast(tuple[Array, Array | None], found)
    if column_BP is not None:
        row_BP = jnp.logaddexp(row_BP, column_BP) if rule.partition == "joint" else (row_BP + column_BP) / 2
    factor_P = jnp.asarray(made.factors, made.own.dtype)
    if chosen is not None:
        factor_P = jnp.where(chosen[jnp.asarray(sorted(range(len(dims)), key=lambda p: dims[p]))], factor_P, 0)
    return _weighted(row_BP - made.own, factor_P), _cosine(made, scale, bias)


def _weighted(x_BP: Float[Array, "B P"], factor_P: Float[Array, "P"]) -> Float[Array, "B"]:
    """Not a product of matrices, which accelerators take in less than float32."""
    return (x_BP * factor_P[None]).sum(-1)


class _Prepared(NamedTuple):
    """What all forms begin with: the sides, each row's score of its own positive [B P], and the weight of each prefix."""

    form: tiles.Form
    terms: tuple[Term, ...]
    rows: Sides
    columns: Sides
    own: Float[Array, "B P"]
    lift: Float[Array, ""]
    factors: tuple[float, ...]


def _prepare(pairs: Pairs, rule: Rule, scale, bias, bound: float, dims, weights, first: Array | int) -> _Prepared:
    order = sorted(range(len(dims)), key=lambda p: dims[p])
    ascending = tuple(dims[p] for p in order)
    sigmoid, cosines = rule.criterion == "sigmoid", rule.similarity == "cosine"
    bound += rule.strength if rule.hardness != "none" else 0.0
    form = tiles.Form(sums.way(sigmoid, bound if cosines else None), rule.hardness, ascending)
    columns = sides(_floats(pairs, ascending, cosines), rule, first)
    found = terms(rule, columns)
    if ascending and cosines:
        columns = {name: side._replace(inverse=_inverses(side.vectors, ascending)) for name, side in columns.items()}
    rows = {name: _scaled(columns[name], scale) for name in dict.fromkeys(term.rows for term in found)}
    if sigmoid:
        rows["query"] = rows["query"]._replace(bias=jnp.zeros_like(rows["query"].vectors[:, 0]) + bias)
    own_BP = _own(form, rows["query"], columns["positive"])
    used = {name: columns[name] for name in dict.fromkeys(term.columns for term in found)}
    lift = jax.lax.stop_gradient(jnp.asarray(rule.strength / scale, own_BP.dtype))
    factors = tuple(float(weights[p]) for p in order) if weights else (1.0,) * form.prefixes
    return _Prepared(form, found, rows, used, own_BP, lift, factors)


def _cosine(made: _Prepared, scale: Float[Array, ""] | float, bias: Float[Array, ""] | float) -> Float[Array, "B"]:
    score_B = made.own[:, -1] - (0.0 if made.rows["query"].bias is None else bias)
    return jax.lax.stop_gradient(score_B / scale)


def _floats(pairs: Pairs, dims: tuple[int, ...], cosines: bool) -> Pairs:
    """For cosines whole vectors at length 1; prefixes are left as they are, since each is normalised by a factor of its own."""
    make = normalize if cosines and not dims else lambda x: floats(x[..., : dims[-1]] if dims else x)
    return pairs._replace(anchor=make(pairs.anchor), candidates=make(pairs.candidates))


def _inverses(vectors: Float[Array, "N D"], dims: tuple[int, ...]) -> Float[Array, "N P"]:
    return jnp.stack([inverse_norm(vectors[:, :d]) for d in dims], -1)


def _scaled(side: Side, scale: Float[Array, ""] | float) -> Side:
    """The side with the scale in it, so that the scale's gradient costs nothing more."""
    if side.inverse is None:
        return side._replace(vectors=scale * side.vectors)
    return side._replace(inverse=scale * side.inverse)


def _own(form: tiles.Form, rows: Side, columns: Side) -> Float[Array, "B P"]:
    """Each row's score of its own positive."""
    product = rows.vectors * columns.vectors
    found = jnp.stack([product[:, :d].sum(-1) for d in form.dims or (None,)], -1)
    if rows.inverse is not None and columns.inverse is not None:
        found = found * (rows.inverse * columns.inverse)
    return found if rows.bias is None else found + rows.bias[:, None]


def _sizes(rows: Sides, columns: Sides, tile: int) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Rows of a block, and columns of the tiles of each side. A tile that was asked for is taken as it is, else one that
    divides is looked for; either way a block's scores are a few MB."""
    fit = (lambda count, wanted: min(count, wanted)) if tile else tiles.size
    block = fit(rows["query"].row.shape[0], tiles.ASPECT * (tile or tiles.COLUMNS))
    return block, tuple((name, fit(side.row.shape[0], tile or tiles.COLUMNS)) for name, side in columns.items())


def _strip(made: _Prepared) -> int:
    """Rows of a strip for `one_way`; 0 where it does not serve: columns with totals of their own, or too many of them."""
    if any(term.both or term.rows != "query" for term in made.terms):
        return 0
    width = sum(side.row.shape[0] for side in made.columns.values()) * made.form.prefixes
    count = made.rows["query"].row.shape[0]
    length = tiles.size(count, min(max(tiles.STRIP // width, 1), count))
    return length if length >= min(count, tiles.SHORTEST) else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def one_way(
    form: tiles.Form,
    found: tuple[Term, ...],
    strip: int,
    factors: tuple[float, ...],
    rows: Sides,
    columns: Sides,
    lift: Float[Array, ""],
) -> Float[Array, ""]:
    """The mean over rows of their `totals`, weighted by `factors`, where only rows have totals.

    A strip of rows against all columns has its totals at once, so its gradient is taken while its scores are there, and no
    score is computed twice: three products instead of four.
    """
    row_BP, _ = cast(tuple[Array, None], totals(form, found, (), _sizes(rows, columns, 0), rows, columns, lift))
    return _weighted(row_BP, jnp.asarray(factors, row_BP.dtype)).mean()


def _strips(form, found, strip, factors, rows, columns, lift):
    count = rows["query"].row.shape[0]
    share_P = jnp.asarray(factors, rows["query"].vectors.dtype) / count

    def work(to_columns, block):
        parts = [tiles.sums(form, term, block, columns[term.columns], lift)[0] for term in found]
        total_RP = form.way.finish(functools.reduce(form.way.join, parts))
        row_totals = tiles.Totals(total_RP, jnp.broadcast_to(share_P, total_RP.shape))
        pulled = [tiles.gradients(form, term, block, columns[term.columns], lift, row_totals, None) for term in found]
        to_rows = functools.reduce(lambda x, y: jax.tree.map(jnp.add, x, y), [to_row for to_row, _ in pulled])
        more = {term.columns: to_column for term, (_, to_column) in zip(found, pulled, strict=True)}
        return jax.tree.map(jnp.add, to_columns, more), (total_RP, to_rows)

    start = {name: tiles.zeros(side) for name, side in columns.items()}
    to_columns, (totals_, to_rows) = jax.lax.scan(work, start, tiles.cut_side(rows["query"], strip))
    value = _weighted(tiles.uncut(totals_, count), share_P).sum()
    to_rows = {"query": _cotangent(to_rows, count)}
    return value, (to_rows, {name: _as_side(gradient) for name, gradient in to_columns.items()})


def _scaled_strips(form, found, strip, factors, gradients, cotangent):
    return *jax.tree.map(lambda x: x * cotangent, gradients), None


one_way.defvjp(_strips, _scaled_strips)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def totals(
    form: tiles.Form,
    found: tuple[Term, ...],
    axis: tuple[str, ...],
    sizes: tuple[int, tuple[tuple[str, int], ...]],
    rows: Sides,
    columns: Sides,
    lift: Float[Array, ""],
) -> tuple[Float[Array, "B P"], Float[Array, "B P"] | None]:
    """The total of each row over all its terms, and of each positive's column, None where no term wants it: log-sum-exp, or
    the sum of softplus. Differentiable in `vectors`, `inverse` and `bias` of the sides."""
    return _forward(form, found, axis, sizes, rows, columns, lift)[0]


def _forward(form, found, axis, sizes, rows, columns, lift):
    block, widths = sizes
    count = rows["query"].row.shape[0]
    cut_rows = {name: tiles.cut_side(side, block) for name, side in rows.items()}
    cut_columns = {name: tiles.cut_side(columns[name], width) for name, width in widths}

    def visit(row_sums, columns):
        column_sums = None
        for term in found:
            row_sums, own = tiles.add(form, term, cut_rows[term.rows], columns[term.columns], lift, row_sums)
            column_sums = own if term.both else column_sums
        return row_sums, column_sums

    shape = (*cut_rows["query"].row.shape, form.prefixes, form.way.slots)
    start = jnp.full(shape, form.way.nothing, rows["query"].vectors.dtype)
    row_sums, column_sums = ring.trip(axis, visit, start, cut_columns, join=form.way.join, nothing=form.way.nothing)
    finish = lambda grown: form.way.finish(tiles.uncut(grown, count))
    row_BP, column_BP = jax.tree.map(finish, (row_sums, column_sums))
    return (row_BP, column_BP), (rows, columns, lift, row_BP, column_BP)


def _backward(form, found, axis, sizes, kept, cotangents):
    rows, columns, lift, row_BP, column_BP = kept
    block, widths = sizes
    count = rows["query"].row.shape[0]
    cut_rows = {name: tiles.cut_side(side, block) for name, side in rows.items()}
    cut_columns = {name: tiles.cut_side(columns[name], width) for name, width in widths}
    row_totals = tiles.cut(tiles.Totals(row_BP, cotangents[0]), block)
    column_totals = None
    if column_BP is not None:
        column_totals = tiles.cut(tiles.Totals(column_BP, cotangents[1]), dict(widths)["positive"])

    def visit(to_rows, travelling):
        columns, column_totals = travelling
        to_rows, to_columns = dict(to_rows), {}
        for term in found:
            totals = column_totals if term.both else None
            to_rows[term.rows], more = tiles.pull(
                form, term, cut_rows[term.rows], columns[term.columns], lift, row_totals, totals, to_rows[term.rows]
            )
            so_far = to_columns.get(term.columns)
            to_columns[term.columns] = more if so_far is None else jax.tree.map(jnp.add, so_far, more)
        return to_rows, to_columns

    start = {name: tiles.zeros(side) for name, side in cut_rows.items()}
    to_rows, to_columns = ring.trip(axis, visit, start, (cut_columns, column_totals))
    to_rows = {name: _cotangent(gradient, count) for name, gradient in to_rows.items()}
    to_columns = {name: _cotangent(gradient, columns[name].row.shape[0]) for name, gradient in to_columns.items()}
    return to_rows, to_columns, None


def _cotangent(gradient: tiles.Gradient, count: int) -> Side:
    return _as_side(tiles.uncut(gradient, count))


def _as_side(gradient: tiles.Gradient) -> Side:
    """None stands for no gradient."""
    return Side(gradient.vectors, row=None, inverse=gradient.inverse, bias=gradient.bias)  # pyright: ignore[reportArgumentType]


totals.defvjp(_forward, _backward)
