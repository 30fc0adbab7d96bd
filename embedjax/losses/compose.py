"""Losses made of losses. Arrays only."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from embedjax.losses.contrastive import Loss, Pairs


def matryoshka(loss: Callable[..., Loss], dims: Sequence[int], weights: Sequence[float] = ()) -> Callable[..., Loss]:
    """The weighted sum of `loss(pairs, ...)` over the first `dims` numbers of every vector, each prefix normalised anew
    (Kusupati et al. 2022, eq. 1, as in sentence-transformers: summed, weights 1). Metrics are those of the longest prefix.
    """
    weights = tuple(weights) or (1.0,) * len(dims)
    longest = max(range(len(dims)), key=lambda p: dims[p])

    def total(pairs: Pairs, *args, **kwargs) -> Loss:
        prefix = lambda d: pairs._replace(anchor=pairs.anchor[..., :d], candidates=pairs.candidates[..., :d])
        parts = [loss(prefix(d), *args, **kwargs) for d in dims]
        value = jnp.stack([weight * value for weight, (value, _) in zip(weights, parts, strict=True)]).sum()
        return value, parts[longest][1]

    return total
