"""Losses of labelled pairs (x_i, y_i), i = 1 .. B: contrastive, regression and ranking. Arrays only: no model, no config.

Every one equals sentence-transformers' loss of that name, in float32 or better. Also the similarities and distances of two
vectors that the other losses of vectors use.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from embedjax.losses.contrastive import floats, normalize

Similarity = Literal["cosine", "dot"]
Distance = Literal["cosine", "euclidean", "manhattan"]

# What torch's pairwise_distance adds to every difference of two numbers, and the contrastive losses with it.
OFFSET = 1e-6


def norm(x: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """Euclidean length, whose gradient at the zero vector is zero."""
    return root((x * x).sum(-1))


def root(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The square root, 0 with gradient 0 where x is not above 0. NaN stays NaN: a broken step must not pass for a good one."""
    above = ~(x <= 0)
    return jnp.where(above, jnp.sqrt(jnp.where(above, x, 1)), 0)


def similarity(x: Float[Array, "*n D"], y: Float[Array, "*n D"], kind: Similarity) -> Float[Array, "*n"]:
    """The cosine of two vectors, or their product as they are."""
    make = normalize if kind == "cosine" else floats
    return (make(x) * make(y)).sum(-1)


def distance(x: Float[Array, "*n D"], y: Float[Array, "*n D"], kind: Distance, offset: float = 0.0) -> Float[Array, "*n"]:
    """1 - cosine, or the length of the difference, euclidean or manhattan, with `offset` added to each of its numbers."""
    if kind == "cosine":
        return 1 - similarity(x, y, "cosine")
    difference = floats(x) - floats(y) + offset
    return norm(difference) if kind == "euclidean" else jnp.abs(difference).sum(-1)


def contrastive(
    x: Float[Array, "B D"], y: Float[Array, "B D"], label_B: Num[Array, "B"], kind: Distance, margin: float
) -> Float[Array, ""]:
    """Hadsell et al. 2006, eq. 4: the mean of (l d^2 + (1 - l) max(0, margin - d)^2) / 2, d the distance and l the label."""
    d_B = distance(x, y, kind, OFFSET)
    label_B = label_B.astype(d_B.dtype)
    return (label_B * d_B**2 + (1 - label_B) * jax.nn.relu(margin - d_B) ** 2).mean() / 2


def online_contrastive(
    x: Float[Array, "B D"], y: Float[Array, "B D"], label_B: Num[Array, "B"], kind: Distance, margin: float
) -> Float[Array, ""]:
    """The terms d^2 and max(0, margin - d)^2 of `contrastive`, summed over hard pairs alone: of label 1, those further apart
    than the closest of label 0; of label 0, those closer than the furthest of label 1. For a missing label the other's mean
    stands in. Labels but 0 and 1 count nowhere. (sentence-transformers' OnlineContrastiveLoss; no paper.)
    """
    d_B = distance(x, y, kind, OFFSET)
    far_B, near_B = label_B == 0, label_B == 1
    fixed_B = jax.lax.stop_gradient(d_B)
    mean = lambda of_B: jnp.where(of_B, fixed_B, 0).sum() / jnp.maximum(of_B.sum(), 1)
    furthest = jnp.where(near_B.any(), jnp.where(near_B, fixed_B, -jnp.inf).max(), mean(far_B))
    closest = jnp.where(far_B.any(), jnp.where(far_B, fixed_B, jnp.inf).min(), mean(near_B))
    together_B = jnp.where(near_B & (d_B > closest), d_B, 0) ** 2
    apart_B = jnp.where(far_B & (d_B < furthest), jax.nn.relu(margin - d_B), 0) ** 2
    return (together_B + apart_B).sum()


def regression(
    x: Float[Array, "B D"], y: Float[Array, "B D"], score_B: Float[Array, "B"], kind: Similarity
) -> Float[Array, ""]:
    """The mean squared error of the similarity against the score (Reimers & Gurevych 2019, section 3: regression objective)."""
    return ((similarity(x, y, kind) - score_B) ** 2).mean()


def cosent(
    x: Float[Array, "B D"], y: Float[Array, "B D"], score_B: Float[Array, "B"], scale: float, kind: Similarity
) -> Float[Array, ""]:
    """Huang et al. 2024, eq. 8: `ranking` of scale * similarity."""
    return ranking(scale * similarity(x, y, kind), score_B)


def angle(x: Float[Array, "B D"], y: Float[Array, "B D"], score_B: Float[Array, "B"], scale: float) -> Float[Array, ""]:
    """Li & Li 2024, eq. 5 to 8: `ranking` of scale * |cos + sin|, sin the imaginary part of x times y's conjugate, each vector
    of length 1 and its two halves the real and the imaginary part (of odd D the last imaginary number is 0)."""
    return ranking(scale * jnp.abs(similarity(x, y, "cosine") + _sine(normalize(x), normalize(y))), score_B)


def _sine(x: Float[Array, "B D"], y: Float[Array, "B D"]) -> Float[Array, "B"]:
    padded = lambda v: jnp.pad(v, ((0, 0), (0, v.shape[1] % 2)))
    (real, imaginary), (real_y, imaginary_y) = (jnp.split(padded(v), 2, axis=1) for v in (x, y))
    return (imaginary * real_y - real * imaginary_y).sum(-1)


@jax.custom_vjp
def ranking(s_B: Float[Array, "B"], score_B: Float[Array, "B"]) -> Float[Array, ""]:
    """ln(1 + sum of exp(s_i - s_j) over all i, j with score_i < score_j): what is told to be more alike is to score higher.

    In sorted order the j of an i are all from some place on, so B log B instead of B^2 (as sentence-transformers does it). The
    gradient is taken by hand: autodiff's of a running log-sum-exp is four times the program.
    """
    return _ranking(s_B, score_B)[0]


def _ranking(s_B, score_B):
    order = jnp.argsort(score_B)
    s_B, score_B = s_B[order], score_B[order]
    # [k]: the log of the sum of exp(-s_j) over j >= k, and -inf for none.
    tail = jnp.append(jax.lax.cumlogsumexp(-s_B, reverse=True), -jnp.inf)
    lower_B = s_B + tail[jnp.searchsorted(score_B, score_B, side="right")]
    value = jax.nn.logsumexp(jnp.append(lower_B, 0.0))
    return value, (order, s_B, score_B, lower_B, value)


def _ranking_bwd(kept, g):
    order, s_B, score_B, lower_B, value = kept
    head = jnp.append(-jnp.inf, jax.lax.cumlogsumexp(s_B))
    higher_B = head[jnp.searchsorted(score_B, score_B, side="left")] - s_B
    gradient_B = jnp.exp(lower_B - value) - jnp.exp(higher_B - value)
    return jnp.zeros_like(s_B).at[order].set(g * gradient_B), None


ranking.defvjp(_ranking, _ranking_bwd)
