"""Losses of triplets: a text is to be closer to one of its kind than to others, by a margin. Arrays only: no model, no config.

`triplet` is given its triplets; the `batch_*` losses find them among B labelled texts, from the B x B distances (Hermans et al.
2017, section 2); `mega_batch_margin` finds negatives among the other rows' positives. Every one equals sentence-transformers'
loss of that name, in float32 or better.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from embedjax.losses.contrastive import floats, normalize
from embedjax.losses.pairwise import Distance, distance, root


def triplet(
    anchor: Float[Array, "B D"], positive: Float[Array, "B D"], negatives: Float[Array, "B K D"], kind: Distance, margin: float
) -> Float[Array, ""]:
    """Schroff et al. 2015, eq. 3 without squares: the mean over rows and negatives of max(0, d(a, p) - d(a, n) + margin)."""
    own_B1 = distance(anchor, positive, kind)[:, None]
    return jax.nn.relu(own_B1 - distance(anchor[:, None], negatives, kind) + margin).mean()


def distances(x: Float[Array, "B D"], kind: Literal["cosine", "euclidean"]) -> Float[Array, "B B"]:
    """Of every vector to every other: 1 - cosine, or the Euclidean distance, whose gradient at 0 is 0."""
    x = normalize(x) if kind == "cosine" else floats(x)
    product_BB = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    if kind == "cosine":
        return 1 - product_BB
    # The squares come from the same product, so that the distance of equal vectors is 0.
    square_B = jnp.diagonal(product_BB)
    return root(square_B[None] - 2 * product_BB + square_B[:, None])


def batch_all(d_BB: Float[Array, "B B"], label_B: Int[Array, "B"], margin: float) -> Float[Array, ""]:
    """Hermans et al. 2017, eq. 6: the sum over all triplets of max(0, d(a, p) - d(a, n) + margin), divided by the number of
    those above 0.

    That is linear in the distances once it is known which triplets are above 0, and sorted rows tell how many each distance
    is part of: B^2 log B instead of B^3.
    """
    same_BB, positive_BB = _kinds(label_B)
    reach_BB = d_BB + margin
    fixed_BB, far_BB = jax.lax.stop_gradient((d_BB, reach_BB))
    negatives_BB = jnp.sort(jnp.where(same_BB, jnp.inf, fixed_BB), 1)
    # A positive's triplets above 0 are with the negatives that are closer than it reaches.
    with_negatives_BB = jnp.where(positive_BB, jax.vmap(jnp.searchsorted)(negatives_BB, far_BB), 0)
    reaches_BB = jnp.sort(jnp.where(positive_BB, far_BB, -jnp.inf), 1)
    reached = jax.vmap(lambda sorted_B, at_B: jnp.searchsorted(sorted_B, at_B, side="right"))(reaches_BB, fixed_BB)
    with_positives_BB = jnp.where(same_BB, 0, d_BB.shape[0] - reached)
    total = (with_negatives_BB * jnp.where(positive_BB, reach_BB, 0)).sum() - (with_positives_BB * d_BB).sum()
    # Counts are summed as floats: in int32 they overflow from 2,000 texts on.
    return total / jnp.maximum(with_negatives_BB.astype(d_BB.dtype).sum(), 1)


def batch_hard(d_BB: Float[Array, "B B"], label_B: Int[Array, "B"], margin: float) -> Float[Array, ""]:
    """Hermans et al. 2017, eq. 5: the mean over texts of max(0, d to the furthest of its label - d to the closest of another +
    margin)."""
    furthest_B, closest_B = _hardest(d_BB, label_B)
    return jax.nn.relu(furthest_B - closest_B + margin).mean()


def batch_hard_soft_margin(d_BB: Float[Array, "B B"], label_B: Int[Array, "B"]) -> Float[Array, ""]:
    """`batch_hard` with softplus for the margin (Hermans et al. 2017, section 2)."""
    furthest_B, closest_B = _hardest(d_BB, label_B)
    return jax.nn.softplus(furthest_B - closest_B).mean()


def _hardest(d_BB: Float[Array, "B B"], label_B: Int[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """For each text the distance to the furthest of its label, 0 if it has no other, and to the closest of another label; where
    there is no other label, twice the row's longest distance at most, as in sentence-transformers."""
    same_BB, positive_BB = _kinds(label_B)
    furthest_B = jnp.where(positive_BB, d_BB, 0).max(1)
    closest_B = jnp.where(same_BB, d_BB + d_BB.max(1, keepdims=True), d_BB).min(1)
    return furthest_B, closest_B


def batch_semi_hard(d_BB: Float[Array, "B B"], label_B: Int[Array, "B"], margin: float) -> Float[Array, ""]:
    """Schroff et al. 2015, section 3.2: the mean over ordered pairs of one label of max(0, d(a, p) - d(a, n) + margin), n the
    closest of another label that is further away than p, or the furthest of another label if none is."""
    same_BB, positive_BB = _kinds(label_B)
    fixed_BB = jax.lax.stop_gradient(d_BB)
    order_BB = jnp.argsort(jnp.where(same_BB, jnp.inf, fixed_BB), 1)
    negatives_BB = jnp.take_along_axis(jnp.where(same_BB, jnp.inf, d_BB), order_BB, 1)
    place_BB = jax.vmap(lambda sorted_B, at_B: jnp.searchsorted(sorted_B, at_B, side="right"))(
        jax.lax.stop_gradient(negatives_BB), fixed_BB
    )
    count_B1 = (~same_BB).sum(1, keepdims=True)
    further_BB = jnp.take_along_axis(negatives_BB, jnp.minimum(place_BB, jnp.maximum(count_B1 - 1, 0)), 1)
    chosen_BB = jnp.where(count_B1 > 0, further_BB, 0)
    cost_BB = jax.nn.relu(d_BB - chosen_BB + margin)
    return jnp.where(positive_BB, cost_BB, 0).sum() / jnp.maximum(positive_BB.sum(), 1)


def _kinds(label_B: Int[Array, "B"]) -> tuple[Bool[Array, "B B"], Bool[Array, "B B"]]:
    """Which texts have one label, and which of these are two texts."""
    same_BB = label_B[:, None] == label_B[None]
    return same_BB, same_BB & ~jnp.eye(label_B.shape[0], dtype=bool)


def mega_batch_margin(
    anchor: Float[Array, "B D"], positive: Float[Array, "B D"], positive_margin: float, negative_margin: float
) -> Float[Array, ""]:
    """Wieting & Gimpel 2018, section 3.2, on cosines: the mean over rows of max(0, positive_margin - cos(a, p)) +
    max(0, cos(a, n) - negative_margin), n the closest positive of another row."""
    cosine_BB = jnp.matmul(normalize(anchor), normalize(positive).T, precision=jax.lax.Precision.HIGHEST)
    own_BB = jnp.eye(cosine_BB.shape[0], dtype=bool)
    closest_B = jnp.where(own_BB, -jnp.inf, cosine_BB).max(1)
    return (jax.nn.relu(positive_margin - jnp.diagonal(cosine_BB)) + jax.nn.relu(closest_B - negative_margin)).mean()
