"""Losses of labelled rows: cross-entropy of one class, of several yes-or-no labels, and supervised contrastive. Arrays only."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from embedjax.losses.contrastive import Loss, normalize


def cross_entropy(
    logits: Float[Array, "B C"], labels: Int[Array, "B"], *, weights: Sequence[float] = (), smoothing: float = 0.0
) -> Loss:
    """Softmax cross-entropy, a mean over rows weighted by the weight of the row's class, as torch's CrossEntropyLoss.

    With smoothing e the target is (1 - e) of the label and e / C of every class (Szegedy et al. 2016, section 7). Metrics:
    `accuracy`, the share of rows that are right, weighted as in the loss, and `weight`, the sum of the rows' weights, by which
    means over parts of a batch are averaged. A label that is no class makes the loss NaN.
    """
    weight_C, known_B = _weights(logits, weights), (labels >= 0) & (labels < logits.shape[1])
    own_BC = (labels[:, None] == jnp.arange(logits.shape[1])[None]).astype(weight_C.dtype)
    cost_BC = weight_C[None] * -jax.nn.log_softmax(logits.astype(weight_C.dtype), -1)
    cost_B = ((1 - smoothing) * own_BC + smoothing / logits.shape[1]) * cost_BC
    weight_B = (own_BC * weight_C[None]).sum(1)
    total = jnp.maximum(weight_B.sum(), 1e-9)
    value = jnp.where(known_B, cost_B.sum(1), jnp.nan).sum() / total
    accuracy = jnp.where(logits.argmax(1) == labels, weight_B, 0).sum() / total
    return value, {"accuracy": accuracy, "weight": weight_B.sum()}


def multi_label(
    logits: Float[Array, "B C"], labels: Float[Array, "B C"], *, weights: Sequence[float] = (), smoothing: float = 0.0
) -> Loss:
    """Sigmoid cross-entropy, each class a yes (1) or no (0), the mean over rows and classes, as torch's BCEWithLogitsLoss with
    `weight`. With smoothing e a target y becomes (1 - e) y + e / 2. Metric `accuracy`: the share of labels that are right."""
    weight_C = _weights(logits, weights)
    target_BC, s_BC = (1 - smoothing) * labels.astype(weight_C.dtype) + smoothing / 2, logits.astype(weight_C.dtype)
    value = (weight_C[None] * (jax.nn.softplus(s_BC) - target_BC * s_BC)).mean()
    return value, {"accuracy": ((logits > 0) == (labels > 0.5)).mean(dtype=jnp.float32)}


def _weights(logits: Array, weights: Sequence[float]) -> Float[Array, "C"]:
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    return jnp.asarray(weights, dtype) if weights else jnp.ones(logits.shape[1:], dtype)


def sup_con(views: Float[Array, "B V E"], labels: Int[Array, "B"], scale: Float[Array, ""] | float) -> Loss:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2) of V vectors a row: the mean over those that have a positive.

    For vector i, P(i) the others of its label, A(i) all others: the mean over p in P(i) of
    logsumexp_A(scale cos(i, a)) - scale cos(i, p). Metrics: `positive`, the mean cosine of equal labels, and `paired`, the
    share of vectors that have a positive.
    """
    B, V, E = views.shape
    z_NE, label_N = normalize(views).reshape(B * V, E), jnp.repeat(labels, V)
    cosine_NN = jnp.matmul(z_NE, z_NE.T, precision=jax.lax.Precision.HIGHEST)
    other_NN = ~jnp.eye(B * V, dtype=bool)
    same_NN = other_NN & (label_N[:, None] == label_N[None])
    count_N = same_NN.sum(1)
    paired_N = count_N > 0
    normalizer_N = jax.nn.logsumexp(jnp.where(other_NN, scale * cosine_NN, -jnp.inf), 1)
    positive_N = jnp.where(same_NN, cosine_NN, 0).sum(1) / jnp.maximum(count_N, 1)
    mean = lambda x_N: jnp.where(paired_N, x_N, 0).sum() / jnp.maximum(paired_N.sum(), 1)
    value = mean(normalizer_N - scale * positive_N)
    return value, {
        "positive": jax.lax.stop_gradient(mean(positive_N)),
        "paired": paired_N.mean(dtype=jnp.float32),
    }
