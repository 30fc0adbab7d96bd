"""In-batch contrastive losses, dense: the definition every other form must equal.

Each of B anchors is scored against N = B (1 + K) candidates: every row's positive and its K hard negatives. With K = 1,
`+` the positive, `-` a negative, `x` a masked false negative (candidate 4 equals candidate 0):

            p0 n0 p1 n1 p2 n2
    anchor0  +  -  -  -  x  -
    anchor1  -  -  +  -  -  -
    anchor2  x  -  -  -  +  -
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32


class Hashes(NamedTuple):
    """Content hashes of the texts, two 32-bit words each: jax truncates 64-bit integers silently."""

    anchor: UInt32[Array, "B 2"]
    candidates: UInt32[Array, "B C 2"]


def normalize(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Vectors of length 1 in float32; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def false_negatives(hashes: Hashes) -> Bool[Array, "B N"]:
    """Candidates that are no negatives of a row: another text equal to its positive or to its anchor, and the positives of
    other rows with an equal anchor. A row's own positive is never masked."""
    b, c, _ = hashes.candidates.shape
    flat_N2 = hashes.candidates.reshape(b * c, 2)
    equal = lambda x_B2, y_N2: (x_B2[:, None] == y_N2[None]).all(-1)
    as_positive_BN = equal(hashes.candidates[:, 0], flat_N2)
    as_anchor_BN = equal(hashes.anchor, flat_N2)
    of_equal_anchor_BN = equal(hashes.anchor, jnp.repeat(hashes.anchor, c, 0)) & (jnp.arange(b * c) % c == 0)[None]
    own_BN = jnp.arange(b * c)[None] == (jnp.arange(b) * c)[:, None]
    return (as_positive_BN | as_anchor_BN | of_equal_anchor_BN) & ~own_BN


def multiple_negatives(
    anchor: Float[Array, "B D"],
    candidates: Float[Array, "B C D"],
    scale: Float[Array, ""] | float,
    masked: Bool[Array, "B N"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Multiple negatives ranking loss (Henderson et al. 2017, eq. 6; InfoNCE of van den Oord et al. 2018, eq. 4):
    the mean over rows of -log softmax(scale * cosine) at the row's own positive.

    `candidates[:, 0]` are the positives, the rest hard negatives; every row is scored against all N = B C of them except
    the `masked`. Metrics: `top1`, the share of rows whose positive scores highest, and `positive`, its mean cosine.
    """
    b, c, d = candidates.shape
    # Accelerators multiply float32 in less by default; a score's error counts `scale` times.
    cosine_BN = jnp.matmul(normalize(anchor), normalize(candidates).reshape(b * c, d).T, precision=jax.lax.Precision.HIGHEST)
    scores_BN = scale * cosine_BN
    if masked is not None:
        scores_BN = jnp.where(masked, -jnp.inf, scores_BN)
    own_B = jnp.arange(b) * c
    # The positive and the normaliser come from one product: mixing precisions would bias the gradient.
    positive_B = jnp.take_along_axis(scores_BN, own_B[:, None], 1)[:, 0]
    loss = (jax.nn.logsumexp(scores_BN, -1) - positive_B).mean()
    top1 = (scores_BN.argmax(-1) == own_B).mean(dtype=jnp.float32)
    return loss, {"top1": top1, "positive": jax.lax.stop_gradient(positive_B / scale).mean()}
