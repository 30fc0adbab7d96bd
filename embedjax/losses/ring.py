"""A trip of columns round the devices: each device meets every block of columns with its own rows, and holds two at a time.

The memory of a device is that of its share of the batch and of one tile. Used inside `shard_map` over the batch axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def trip(
    axis: tuple[str, ...],
    visit: Callable[[Any, Any], tuple[Any, Any]],
    staying: Any,
    travelling: Any,
    *,
    join: Callable[[Any, Any], Any] = jnp.add,
    nothing: float = 0.0,
) -> tuple[Any, Any]:
    """`visit(staying, travelling) -> (staying, gathered)` on each device for every device's `travelling`, nearest first.

    Returns what stayed, and for the block that started here what it gathered on all devices, from `nothing` on and joined to a
    sum, or as `join` says. Without an axis there is one visit.
    """
    if not axis:
        return visit(staying, travelling)
    count = jax.lax.axis_size(axis)
    onwards = lambda tree: jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % count) for i in range(count)]), tree)

    def hop(carry, _):
        staying, travelling, gathered = carry
        # Both transfers are begun before the visit and needed after it, so they overlap with its products.
        following, arrived = onwards((travelling, gathered))
        staying, more = visit(staying, travelling)
        return (staying, following, jax.tree.map(join, arrived, more)), None

    shapes = jax.eval_shape(visit, staying, travelling)[1]
    start = jax.tree.map(lambda x: jnp.full(x.shape, nothing, x.dtype), shapes)
    (staying, _, gathered), _ = jax.lax.scan(hop, (staying, travelling, start), length=count)
    return staying, onwards(gathered)
