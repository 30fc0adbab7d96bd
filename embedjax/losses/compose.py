"""Losses made of losses, and what is added to them. Arrays only."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from embedjax.losses.contrastive import Loss, Pairs, floats, normalize
from embedjax.losses.distill import divergence
from embedjax.losses.pairwise import Similarity

Weighting = Literal["uniform", "log", "linear"]


def pairs_prefix(pairs: Pairs, length: int) -> Pairs:
    """The first numbers of every vector, hashes and guide as they are."""
    return pairs._replace(anchor=pairs.anchor[..., :length], candidates=pairs.candidates[..., :length])


def vectors_prefix(vectors: Mapping[str, Array], length: int, normalized: Collection[str]) -> dict[str, Array]:
    """The first numbers of every vector, those of the columns in `normalized` at length 1 anew."""
    cut = {name: x[..., :length] for name, x in vectors.items()}
    return {name: normalize(x) if name in normalized else x for name, x in cut.items()}


def matryoshka(
    loss: Callable[..., Loss],
    dims: Sequence[int],
    weights: Sequence[float] = (),
    prefix: Callable[[Any, int], Any] = pairs_prefix,
) -> Callable[..., Loss]:
    """The weighted sum of `loss(vectors, ...)` over the first `dims` numbers of every vector, each prefix normalised anew
    (Kusupati et al. 2022, eq. 1, as in sentence-transformers: summed, weights 1).

    The sum takes `chosen`, which of the prefixes count this time (None: all); the others are not computed. Metrics are those of
    the longest prefix that counts.
    """
    weights = tuple(weights) or (1.0,) * len(dims)
    longest_first = sorted(range(len(dims)), key=lambda p: -dims[p])

    def total(vectors: Any, *args, chosen: Bool[Array, "P"] | None = None, **kwargs) -> Loss:
        value, metrics, seen = 0.0, {}, jnp.asarray(False)
        for p in longest_first:
            one = lambda vectors, p=p: loss(prefix(vectors, dims[p]), *args, **kwargs)
            if chosen is None:
                part, found = one(vectors)
                metrics = metrics or found
            else:
                part, found = _if(chosen[p], one, vectors)
                metrics = jax.tree.map(lambda old, new, seen=seen: jnp.where(seen, old, new), metrics or found, found)
                seen = seen | chosen[p]
            value = value + weights[p] * part
        return jnp.asarray(value), metrics

    return total


def _if(wanted: Bool[Array, ""], loss: Callable[[Any], Loss], vectors: Any) -> Loss:
    """The loss, or zeros without computing it."""
    shapes = jax.eval_shape(loss, vectors)
    zeros = lambda vectors: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(wanted, loss, zeros, vectors)


def layer_weight(layer: Int[Array, ""], weighting: Weighting) -> Float[Array, ""]:
    """Of the loss at a layer, counted from 0."""
    place = layer.astype(jnp.float32)
    if weighting == "log":
        return 1 / (1 + jnp.log1p(place))
    return 1 / (1 + place) if weighting == "linear" else jnp.ones_like(place)


def layer_divergence(
    layers: Mapping[str, Float[Array, "..."]], last: Mapping[str, Float[Array, "..."]], temperature: float
) -> Float[Array, ""]:
    """What draws the vectors [... n E] of n earlier layers to the last layer's [... E], for each column (Li et al. 2024,
    section 3.3): the mean over texts of KL(last || layer) of the softmax over a vector's numbers, each divided by the
    temperature; summed over layers, times the temperature. The last layer's take no gradient."""
    log = lambda x: jax.nn.log_softmax(floats(x) / temperature, -1)
    still = jax.lax.stop_gradient(dict(last))
    each = [divergence(log(still[name])[..., None, :], log(x)).sum() for name, x in layers.items()]
    texts = sum(math.prod(x.shape[:-1]) for x in last.values())
    return jnp.stack(each).sum() * (temperature / texts)


def global_orthogonal(columns: Float[Array, "C B D"], kind: Similarity) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Zhang et al. 2017, eq. 5 and 6, for each column of texts, over the similarities s of its B (B - 1) pairs of rows: the
    squared mean of s, and max(0, mean of s^2 - 1/D)."""
    x = normalize(columns) if kind == "cosine" else floats(columns)
    rows, width = x.shape[1:]
    s_CBB = jnp.einsum("cid,cjd->cij", x, x, precision=jax.lax.Precision.HIGHEST)
    s_CBB = jnp.where(jnp.eye(rows, dtype=bool)[None], 0, s_CBB)
    pairs = max(rows * (rows - 1), 1)
    return (s_CBB.sum((1, 2)) / pairs) ** 2, jax.nn.relu((s_CBB**2).sum((1, 2)) / pairs - 1 / width)
