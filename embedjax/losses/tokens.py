"""Cross-entropy of tokens, as sums of each row, so that rows may be computed in any parts. Arrays only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from embedjax.losses.contrastive import Loss


class Told(NamedTuple):
    """Of each row, over the tokens that count: summed cross-entropy, how many they are, and how many score highest."""

    loss: Float[Array, "B"]
    count: Float[Array, "B"]
    right: Float[Array, "B"]


def cross_entropy(logits: Float[Array, "B P V"], labels: Int[Array, "B P"], counts: Bool[Array, "B P"]) -> Told:
    """Softmax cross-entropy of the tokens `labels` where `counts`."""
    # Selected by comparison, not gathered: the gradient of a gather is a scatter into B P V.
    own_BPV = labels[..., None] == jnp.arange(logits.shape[-1])[None, None]
    score_BP = jnp.where(own_BPV, logits, 0).sum(-1)
    cost_BP = jnp.where(counts, jax.nn.logsumexp(logits, -1) - score_BP, 0)
    right_BP = counts & (score_BP >= logits.max(-1))
    number = lambda x_BP: x_BP.sum(1).astype(logits.dtype)
    return Told(cost_BP.sum(1), number(counts), jax.lax.stop_gradient(number(right_BP)))


def mean(told: Told) -> Loss:
    """The mean over the tokens of all rows, as transformers and sentence-transformers take it; 0 without any. The metric
    `weight` is their number, by which means over parts of a batch are averaged."""
    count = jnp.maximum(told.count.sum(), 1)
    return told.loss.sum() / count, {"accuracy": told.right.sum() / count, "weight": told.count.sum()}
