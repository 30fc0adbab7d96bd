"""Vectors as they will be stored: to their codes and back, with the gradient straight through. Arrays only.

Forward these are the numbers of `embedjax.quantize`: those of dequantize(quantize(x)). Rounding has derivative 0 or none, so
backward it counts as the identity (Bengio et al. 2013, the straight-through estimator). Clipped (Hubara et al. 2016) and by
tanh (after Yamada et al. 2021) it trained bits no better: tests/benchmarks/straight_through.py.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from embedjax.losses.contrastive import Loss, floats, normalize

Stored = Literal["float32", "int8", "binary"]


def binary(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Signs in a vector of length 1: 1 / sqrt(D) for a number above 0, else -1 / sqrt(D)."""
    x = floats(x)
    size = jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
    return _straight_through(x, jnp.where(x > 0, size, -size))


def int8(x: Float[Array, "*n D"], counted: Bool[Array, "*n"] | None = None) -> Float[Array, "*n D"]:
    """The middle of the 255th of its dimension's range that a number is in; the range is that of all vectors given, or of those
    that are `counted`, and takes no gradient. A number that all have is itself.

    The highest number of a range is in its last 255th: the codes' formula puts it there or just above, as it is rounded.
    """
    x = floats(x)
    low, high = jax.lax.stop_gradient(_range(x, counted))
    step = (high - low) / 255
    place = jnp.clip(jnp.floor((x - low) / jnp.where(step == 0, 1, step)), 0, 254)
    return _straight_through(x, jnp.where(step == 0, low, low + (place + 0.5) * step))


def _range(x: Float[Array, "*n D"], counted: Bool[Array, "*n"] | None) -> tuple[Array, Array]:
    """The lowest and the highest number of each dimension, of the rank of `x`."""
    axes = tuple(range(x.ndim - 1))
    among = lambda other: x if counted is None else jnp.where(counted[..., None], x, other)
    return among(jnp.inf).min(axes, keepdims=True), among(-jnp.inf).max(axes, keepdims=True)


def _straight_through(x: Array, value: Array) -> Array:
    """`value` to the bit, unless x is NaN or infinite: a broken step must not pass for a good one."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))


def stored(
    vectors: Mapping[str, Array],
    precision: Stored,
    columns: Collection[str],
    normalized: Collection[str],
    counted: Mapping[str, Bool[Array, "*n"]] | None = None,
) -> dict[str, Array]:
    """The vectors with those of `columns` as `precision` stores them, at length 1 first if in `normalized`. Ranges are those of
    a column over the global batch; `counted` says which of its vectors count, None for all."""
    found = dict(vectors)
    for name in found.keys() & set(columns) if precision != "float32" else ():
        x = normalize(found[name]) if name in normalized else found[name]
        found[name] = binary(x) if precision == "binary" else int8(x, None if counted is None else counted[name])
    return found


def quantized(
    loss: Callable[..., Loss], precisions: Sequence[Stored], weights: Sequence[float], store: Callable[[Any, Stored], Any]
) -> Callable[..., Loss]:
    """The weighted sum of `loss(vectors, ...)` over the vectors as each precision stores them, weights 1 by default. Metrics:
    those of the first precision, and the loss at each by its name."""

    def total(vectors: Any, *args) -> Loss:
        each = jax.tree.map(lambda *x: jnp.stack(x), *(store(vectors, precision) for precision in precisions))
        # One program of the loss for all: in tiles or in a ring it is a large one.
        found, metrics = jax.lax.map(lambda vectors: loss(vectors, *args), each)
        factors = jnp.asarray(tuple(weights) or (1.0,) * len(precisions), found.dtype)
        told = {name: x[0] for name, x in metrics.items()}
        return (factors * found).sum(), {**told, **dict(zip(precisions, found, strict=True))}

    return total
