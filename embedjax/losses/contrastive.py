"""In-batch contrastive losses, dense: the definition every other form must equal. Arrays only: no model, no config.

Each of B anchors ("queries") is scored against N = B (1 + K) candidates ("documents"): every row's positive and its K hard
negatives. With K = 1, `+` the positive, `-` a negative, `x` a masked false negative (positive 2 is the text of positive 0):

            p0 p1 p2 | n0 n1 n2
    anchor0  +  -  x |  -  -  -
    anchor1  -  +  - |  -  -  -
    anchor2  x  -  + |  -  -  -

Two criteria, each a mean over the B rows, s the scores `scale * cosine`:

* `softmax`: the log-sum-exp of what the row is compared with, less the positive's score. Directions say what that is:
    `q2d` the anchor with all documents (Henderson et al. 2017, eq. 6; van den Oord et al. 2018, eq. 4);
    `d2q` the positive with all anchors, down its column. Only positives have a row: hard negatives are scored by anchors and
          score nothing, as in sentence-transformers;
    `q2q` the anchor with the other anchors;
    `d2d` the positive with the other rows' documents, and `p2p` with their positives alone.
  Partition `joint` is one log-sum-exp over all of them (q2d, d2q, q2q, d2d: Li et al. 2023, eq. 2; q2d, q2q, p2p: GISTEmbed,
  Solatorio 2024), `per_direction` the mean of one for each (q2d, d2q: Radford et al. 2021, figure 3).
* `sigmoid`: softplus(-s) of the positive and softplus(s) of all other documents, s = scale * cosine + bias, summed over the row
  (Zhai et al. 2023, eq. 1).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from embedjax.losses.masks import Side, Term, counted, hardened

Direction = Literal["q2d", "d2q", "q2q", "d2d", "p2p"]

TERMS: dict[Direction, tuple[Term, ...]] = {
    "q2d": (Term("query", "positive"), Term("query", "negative")),
    "q2q": (Term("query", "query"),),
    "d2d": (Term("positive", "positive"), Term("positive", "negative")),
    "p2p": (Term("positive", "positive"),),
}
"""What each compares; d2q takes the scores of q2d, down their columns."""


class Hashes(NamedTuple):
    """Content hashes of the texts, two 32-bit words each: jax truncates 64-bit integers silently."""

    anchor: UInt32[Array, "B 2"]
    candidates: UInt32[Array, "B C 2"]


class Guide(NamedTuple):
    """Vectors of the same texts by another model, of any length; no gradient flows into them."""

    anchor: Float[Array, "B G"]
    candidates: Float[Array, "B C G"]


class Pairs(NamedTuple):
    """What is compared: `candidates[:, 0]` are the positives, the rest hard negatives. `hashes` mask equal texts, `guide`
    what another model finds too close to the anchor; None masks nothing. Late interaction has vectors [L E] for a [D]."""

    anchor: Float[Array, "B *D"]
    candidates: Float[Array, "B C *D"]
    hashes: Hashes | None = None
    guide: Guide | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which loss of a `Pairs`; static under jit. `directions` hold q2d, for the sigmoid nothing else; a partition per direction
    has room for d2q alone, which like q2d has the positive among its scores.

    `hardness` adds `strength` times the cosine, without gradient, to the scores of negatives of a kind: those of other rows
    (Lan et al. 2025, eq. 5), the row's own hard negatives (EmbeddingGemma, Schechter Vera et al. 2025) or both.
    A pair whose guide cosine is above that of the row's anchor and positive, less a margin (absolute, or a share of it), is
    masked (GISTEmbed, Solatorio 2024). With similarity "dot" vectors are multiplied as they are: read "product" for "cosine",
    save in what is said of the guide.
    """

    criterion: Literal["softmax", "sigmoid"] = "softmax"
    directions: tuple[Direction, ...] = ("q2d",)
    partition: Literal["joint", "per_direction"] = "joint"
    hardness: Literal["none", "in_batch", "hard", "all"] = "none"
    strength: float = 0.0
    margin: float = 0.0
    margin_kind: Literal["absolute", "relative"] = "absolute"
    similarity: Literal["cosine", "dot"] = "cosine"


Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


def floats(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """In float32 or better."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalize(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Vectors of length 1 in float32 or better; a zero vector stays zero, with a finite gradient."""
    x = floats(x)
    return x * inverse_norm(x)[..., None]


def inverse_norm(x: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
    return jax.lax.rsqrt(jnp.maximum((x * x).sum(-1), 1e-24))


def sides(pairs: Pairs, rule: Rule, first: Array | int = 0) -> dict[str, Side]:
    """The queries, positives and hard negatives [B K] flat, with what decides which pairs count. `first` is the place of
    row 0 in the global batch. The vectors are left as they come."""
    b, c, *d = pairs.candidates.shape
    row_B = first + jnp.arange(b, dtype=jnp.int32)
    made = {
        "query": Side(pairs.anchor, row_B),
        "positive": Side(pairs.candidates[:, 0], row_B),
        "negative": Side(pairs.candidates[:, 1:].reshape(b * (c - 1), *d), jnp.repeat(row_B, c - 1)),
    }
    if pairs.hashes is not None:
        anchor, positive = pairs.hashes.anchor, pairs.hashes.candidates[:, 0]
        negative = pairs.hashes.candidates[:, 1:].reshape(b * (c - 1), 2)
        made["query"] = made["query"]._replace(text=anchor, partner=positive)
        made["positive"] = made["positive"]._replace(text=positive, partner=anchor)
        made["negative"] = made["negative"]._replace(text=negative)
    if pairs.guide is not None:
        anchor, candidates = jax.lax.stop_gradient((normalize(pairs.guide.anchor), normalize(pairs.guide.candidates)))
        own_B = (anchor * candidates[:, 0]).sum(-1)
        floor_B = own_B - (rule.margin if rule.margin_kind == "absolute" else rule.margin * jnp.abs(own_B))
        made["query"] = made["query"]._replace(guide=anchor, floor=floor_B)
        made["positive"] = made["positive"]._replace(guide=candidates[:, 0], floor=floor_B)
        made["negative"] = made["negative"]._replace(guide=candidates[:, 1:].reshape(b * (c - 1), anchor.shape[-1]))
    return made if c > 1 else {name: made[name] for name in ("query", "positive")}


def terms(rule: Rule, found: dict[str, Side]) -> tuple[Term, ...]:
    """The comparisons of the rule whose sides are there, the one that holds the positives first."""
    wanted = [term for direction, each in TERMS.items() if direction in rule.directions for term in each]
    back = "d2q" in rule.directions
    return tuple(dataclasses.replace(term, both=back and term.holds_positives) for term in wanted if term.columns in found)


def loss(pairs: Pairs, rule: Rule, scale: Float[Array, ""] | float, bias: Float[Array, ""] | float = 0.0) -> Loss:
    """The loss of `rule`, with every score in memory. `bias` counts for the sigmoid alone: softmax does not see it.

    Metrics: `top1`, the share of rows whose positive scores highest among the candidates, and `positive`, its mean cosine.
    """
    make = normalize if rule.similarity == "cosine" else floats
    unit = make(pairs.anchor), make(pairs.candidates)
    found = sides(pairs._replace(anchor=unit[0], candidates=unit[1]), rule)
    value, metrics = compared(found, rule, scale, bias, product)
    positive = (unit[0] * unit[1][:, 0]).sum(-1).mean()
    return value, metrics | {"positive": jax.lax.stop_gradient(positive)}


def product(term: Term, rows: Side, columns: Side) -> Float[Array, "R N"]:
    """The similarity of unit vectors, or of vectors as they are."""
    # Accelerators multiply float32 in less by default; a score's error counts `scale` times.
    return jnp.matmul(rows.vectors, columns.vectors.T, precision=jax.lax.Precision.HIGHEST)


def compared(
    found: dict[str, Side],
    rule: Rule,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    similarity: Callable[[Term, Side, Side], Float[Array, "R N"]],
) -> Loss:
    """The loss of `rule` over the sides' similarities, however they are scored. Metrics: `top1`."""
    rows, columns = [], []
    for term in terms(rule, found):
        x, y = found[term.rows], found[term.columns]
        cosine_RN = similarity(term, x, y)
        score_RN = scale * cosine_RN + (bias if rule.criterion == "sigmoid" else 0.0)
        factor = hardened(term, rule.hardness, x, y)
        hard_RN = score_RN if factor is None else score_RN + rule.strength * factor * jax.lax.stop_gradient(cosine_RN)
        to_row, to_column = counted(term, x, y)
        rows.append(_masked(hard_RN, to_row))
        if term.both:
            columns.append(_masked(score_RN, to_column).T)
    # The positive and the normaliser come from one product: mixing precisions would bias the gradient.
    own_B = jnp.diagonal(rows[0])
    documents_BN = jnp.concatenate(rows[: 1 + ("negative" in found)], 1)
    value = _criterion(rule, jnp.concatenate(rows, 1), columns, own_B)
    return value, {"top1": (documents_BN.argmax(-1) == jnp.arange(len(own_B))).mean(dtype=jnp.float32)}


def _criterion(rule: Rule, rows_BM: Array, columns: list[Array], own_B: Array) -> Float[Array, ""]:
    if rule.criterion == "sigmoid":
        # softplus(-s) = softplus(s) - s, and softplus(-inf) = 0.
        return (jax.nn.softplus(rows_BM).sum(-1) - own_B).mean()
    parts = [jnp.concatenate([rows_BM, *columns], 1)] if rule.partition == "joint" else [rows_BM, *columns]
    return jnp.stack([jax.nn.logsumexp(part_BM, -1) - own_B for part_BM in parts]).mean()


def _masked(scores: Float[Array, "R N"], keep: Bool[Array, "R N"] | None) -> Float[Array, "R N"]:
    return scores if keep is None else jnp.where(keep, scores, -jnp.inf)
