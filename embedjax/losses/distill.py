"""Distillation: the student's vectors or scores are to be the teacher's, which take no gradient. Arrays only."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from embedjax.losses.contrastive import floats, normalize
from embedjax.losses.pairwise import Similarity, norm, similarity


def vectors(
    student: Float[Array, "B C D"], teacher: Float[Array, "B C D"], kind: Literal["mse", "l2", "cosine"]
) -> Float[Array, ""]:
    """The mean over texts of the squared difference a number (Reimers & Gurevych 2020, eq. 1), of the Euclidean distance, or of
    1 - cosine (Kim et al. 2023, section 3)."""
    teacher = jax.lax.stop_gradient(floats(teacher))
    if kind == "cosine":
        return (1 - similarity(student, teacher, "cosine")).mean()
    difference = floats(student) - teacher
    return (difference**2).mean() if kind == "mse" else norm(difference).mean()


def scores(anchor: Float[Array, "B D"], candidates: Float[Array, "B C D"], kind: Similarity) -> Float[Array, "B C"]:
    """Of each row's own candidates: the positive first, then the hard negatives."""
    return similarity(anchor[:, None], candidates, kind)


def margin_mse(scores_BC: Float[Array, "B C"], teacher: Float[Array, "B S"]) -> Float[Array, ""]:
    """Hofstätter et al. 2020, eq. 6: the mean squared error of s(positive) - s(negative) against the teacher's, over rows and
    negatives. `teacher` holds these differences [B C-1], or the scores themselves [B C]."""
    teacher = jax.lax.stop_gradient(teacher)
    if teacher.shape[1] == scores_BC.shape[1]:
        teacher = teacher[:, :1] - teacher[:, 1:]
    return ((scores_BC[:, :1] - scores_BC[:, 1:] - teacher) ** 2).mean()


def kl(
    scores_BC: Float[Array, "B C"], teacher: Float[Array, "B C"], temperature: float, teacher_temperature: float
) -> Float[Array, ""]:
    """Lin et al. 2020, eq. 5: the mean over rows of KL(teacher || student) of the softmax over the row's candidates, times the
    square of the student's temperature, so that the gradient keeps its size (Hinton et al. 2015, section 2)."""
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / teacher_temperature, -1)
    return divergence(log_teacher, jax.nn.log_softmax(scores_BC / temperature, -1)).mean() * temperature**2


def spread(scores_BC: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Each row's scores from 0, the lowest, to 1, the highest, as PyLate has a student's before it compares them; where
    all are equal, which have no place between, they are 0."""
    low_B1 = scores_BC.min(1, keepdims=True)
    width_B1 = scores_BC.max(1, keepdims=True) - low_B1
    return (scores_BC - low_B1) / jnp.where(width_B1 > 0, width_B1 + 1e-8, 1)


def contrastive(
    anchor: Float[Array, "B D"],
    candidates: Float[Array, "B C D"],
    teacher: tuple[Float[Array, "B G"], Float[Array, "B C G"]],
    scale: Float[Array, ""] | float,
    teacher_scale: float,
    kinds: tuple[Similarity, Similarity],
) -> Float[Array, ""]:
    """The mean over rows of KL(teacher || student) of the softmax of an anchor over all B C candidates, and of a positive
    (`candidates[:, 0]`) over all anchors, half of each (Yang et al. 2024, the contrastive relational distillation of CLIP-KD).

    `teacher` are anchors and candidates as the teacher has them, `kinds` how the student and the teacher compare vectors.
    """
    student = _logs(anchor, candidates, scale, kinds[0])
    taught = _logs(*jax.lax.stop_gradient(teacher), teacher_scale, kinds[1])
    each = [divergence(log_p, log_q).mean() for log_p, log_q in zip(taught, student, strict=True)]
    return (each[0] + each[1]) / 2


def _logs(
    anchor: Float[Array, "B D"], candidates: Float[Array, "B C D"], scale: Float[Array, ""] | float, kind: Similarity
) -> tuple[Float[Array, "B N"], Float[Array, "B B"]]:
    """The logarithms of both softmaxes: of each anchor, and of each positive."""
    make = normalize if kind == "cosine" else floats
    x_BD, y_BCD = make(anchor), make(candidates)
    # Accelerators multiply float32 in less by default.
    scored = lambda y_ND: scale * jnp.matmul(x_BD, y_ND.T, precision=jax.lax.Precision.HIGHEST)
    of_positives = scored(y_BCD[:, 0])
    whole_BN = of_positives
    if candidates.shape[1] > 1:
        whole_BN = jnp.concatenate([of_positives, scored(y_BCD[:, 1:].reshape(-1, y_BCD.shape[-1]))], 1)
    return jax.nn.log_softmax(whole_BN, -1), jax.nn.log_softmax(of_positives.T, -1)


def divergence(log_p: Float[Array, "*n C"], log_q: Float[Array, "*n C"]) -> Float[Array, "*n"]:
    """KL(p || q)."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
