"""Late interaction: MaxSim scores of texts that have one vector a token, and the in-batch loss over them. Arrays only.

Every token of a query takes the document's token most similar to it; the score is the sum of these similarities (Khattab &
Zaharia 2020, eq. 3):

    score(q, d) = sum over tokens i of q of max over tokens j of d of <q_i, d_j>

`maxsim` is the definition and holds B x N x Lq x Ld products. `maxsim_tiled` gives the same scores and gradients from tiles of
them: what it keeps is which token was the best, B x N x Lq numbers; on several devices documents travel round.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from embedjax.losses.contrastive import Hashes, Loss, Pairs, Rule, compared, floats, sides
from embedjax.losses.masks import Side, Term
from embedjax.losses.ring import trip

# Products of a tile: 8 MB of them, which a CPU's cache about holds, and enough rows to fill an accelerator.
TILE = 2**21

HIGHEST = jax.lax.Precision.HIGHEST


class Tokens(NamedTuple):
    """Texts as the vectors of their tokens; `score` says which tokens count, whatever the others hold."""

    vectors: Float[Array, "*N L E"]
    score: Bool[Array, "*N L"]


def maxsim(query: Tokens, documents: Tokens) -> Float[Array, "B N"]:
    """Scores of B queries [B Lq E] with N documents [N Ld E], float32 or better.

    Tokens that do not count are left out exactly: of a document they are never the best, of a query they add nothing. A
    document without tokens scores 0, without gradient.
    """
    q_BQE, d_NTE = floats(query.vectors), floats(documents.vectors)
    # Documents first: the maximum runs over rows of numbers that lie side by side.
    product_NTBQ = jnp.einsum("nte,bqe->ntbq", d_NTE, q_BQE, precision=HIGHEST)
    best_NBQ = jnp.where(documents.score[..., None, None], product_NTBQ, -jnp.inf).max(1)
    return _summed(best_NBQ, query.score, documents.score).T


def maxsim_own(query: Tokens, documents: Tokens) -> Float[Array, "B C"]:
    """Scores of each query [B Lq E] with its own documents [B C Ld E], as `maxsim` has them."""
    one = lambda query, documents: maxsim(jax.tree.map(lambda x: x[None], query), documents)[0]
    return jax.vmap(one)(query, documents)


def maxsim_tiled(query: Tokens, documents: Tokens, *, axis: tuple[str, ...] = (), tile: int = 0) -> Float[Array, "B N"]:
    """`maxsim` in tiles of `tile` documents, 0 for a good number.

    With `axis`, inside `shard_map` over those axes, queries and documents are this device's; the columns of its rows are the
    documents of all devices, in their order.
    """
    vectors = floats(query.vectors), floats(documents.vectors)
    return _tiled(axis, tile, *vectors, query.score, documents.score)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(axis, tile, q_BQE, d_NTE, q_mask, d_mask):
    return _forward(axis, tile, q_BQE, d_NTE, q_mask, d_mask)[0]


def _forward(axis, tile, q_BQE, d_NTE, q_mask, d_mask):
    """Scores, and what the gradient needs: for each query token and document the place of the best document token."""
    count, here, n = _places(axis, d_NTE)
    scores = jnp.zeros((count, n, len(q_BQE)), q_BQE.dtype)
    places = jnp.zeros((count, n, *q_BQE.shape[:2]), jnp.int32)

    def visit(staying, travelling):
        d_NTE, d_mask, block = travelling
        found = _scored(tile, q_BQE, d_NTE, q_mask, d_mask)
        put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, block, 0)
        return jax.tree.map(put, staying, found), None

    (scores, places), _ = trip(axis, visit, (scores, places), (d_NTE, d_mask, here))
    return scores.reshape(-1, len(q_BQE)).T, (q_BQE, d_NTE, q_mask, d_mask, places)


def _backward(axis, tile, kept, g_BM):
    q_BQE, d_NTE, q_mask, d_mask, places = kept
    count, here, n = _places(axis, d_NTE)
    g_PNB = g_BM.T.reshape(count, n, -1)

    def visit(dq_BQE, travelling):
        d_NTE, d_mask, block = travelling
        pick = lambda whole: jax.lax.dynamic_index_in_dim(whole, block, 0, keepdims=False)
        g_NB = jnp.where(d_mask.any(-1, keepdims=True), pick(g_PNB), 0)
        more, dd_NTE = _gradients(tile, q_BQE, d_NTE, q_mask, pick(places), g_NB)
        return dq_BQE + more, dd_NTE

    dq_BQE, dd_NTE = trip(axis, visit, jnp.zeros_like(q_BQE), (d_NTE, d_mask, here))
    return dq_BQE, dd_NTE, None, None


_tiled.defvjp(_forward, _backward)


def _places(axis: tuple[str, ...], documents: Array) -> tuple[int, Array, int]:
    """How many devices there are, which one this is, and how many documents each has."""
    here = jax.lax.axis_index(axis).astype(jnp.int32) if axis else jnp.int32(0)
    return (jax.lax.axis_size(axis) if axis else 1), here, len(documents)


def _scored(tile: int, q_BQE, d_NTE, q_mask, d_mask) -> tuple[Float[Array, "N B"], Int[Array, "N B Q"]]:
    """Scores and best places, a tile of documents and one of queries at a time."""
    b, n = len(q_BQE), len(d_NTE)
    rows, columns = _sizes(tile, q_BQE, d_NTE)

    def one(block):
        (q_RQE, q_mask), (d_CTE, d_mask) = block
        # Documents first: maxima run over rows of numbers that lie side by side.
        product = jnp.matmul(d_CTE.reshape(-1, d_CTE.shape[-1]), q_RQE.reshape(-1, q_RQE.shape[-1]).T, precision=HIGHEST)
        product_CTRQ = product.reshape(*d_CTE.shape[:2], *q_RQE.shape[:2])
        product_CTRQ = jnp.where(d_mask[..., None, None], product_CTRQ, -jnp.inf)
        best_CRQ = product_CTRQ.max(1)
        # The first place of the best, as argmax has it: that is a loop over numbers on a CPU, and costs as much as the product.
        places = jnp.arange(d_CTE.shape[1], dtype=jnp.int32)[None, :, None, None]
        place_CRQ = jnp.where(product_CTRQ == best_CRQ[:, None], places, places.size).min(1)
        return _summed(best_CRQ, q_mask, d_mask), place_CRQ

    documents, queries = _blocks((d_NTE, d_mask), columns), _blocks((q_BQE, q_mask), rows)
    across = lambda document: jax.lax.map(lambda query: one((query, document)), queries)
    found = jax.lax.map(across, documents)  # [documents' blocks, queries' blocks, C, R, ...]
    join = lambda x: x.swapaxes(1, 2).reshape(x.shape[0] * x.shape[2], -1, *x.shape[4:])[:n, :b]
    return jax.tree.map(join, found)


def _gradients(tile: int, q_BQE, d_NTE, q_mask, places_NBQ, g_NB) -> tuple[Float[Array, "B Q E"], Float[Array, "N T E"]]:
    """What the score's cotangents say to queries and documents: each query token moves with its best document token, a tile of
    documents at a time."""
    weight_NBQ = jnp.where(q_mask[None], g_NB[..., None], 0)
    _, columns = _sizes(tile, q_BQE, d_NTE)

    def one(dq_BQE, block):
        d_CTE, place_CBQ, weight_CBQ = block
        add = jax.lax.platform_dependent(q_BQE, d_CTE, place_CBQ, weight_CBQ, cpu=_by_place, default=_by_product)
        return dq_BQE + add[0], add[1]

    blocks = _blocks((d_NTE, places_NBQ, weight_NBQ), columns)
    dq_BQE, dd = jax.lax.scan(one, jnp.zeros_like(q_BQE), blocks)
    return dq_BQE, dd.reshape(-1, *d_NTE.shape[1:])[: len(d_NTE)]


def _by_place(q_BQE, d_CTE, place_CBQ, weight_CBQ):
    """By gathering and scattering rows: far less work than a product, for a processor that is good at it."""

    def one(d_TE, place_BQ, weight_BQ):
        dq_BQE = weight_BQ[..., None] * d_TE[place_BQ]
        return dq_BQE, jnp.zeros_like(d_TE).at[place_BQ].add(weight_BQ[..., None] * q_BQE)

    def add(total, document):
        dq_BQE, dd_TE = one(*document)
        return total + dq_BQE, dd_TE

    return jax.lax.scan(add, jnp.zeros_like(q_BQE), (d_CTE, place_CBQ, weight_CBQ))


def _by_product(q_BQE, d_CTE, place_CBQ, weight_CBQ):
    """By products with the places as rows of one weight each: accelerators scatter slowly."""
    here_CBQT = place_CBQ[..., None] == jnp.arange(d_CTE.shape[1], dtype=jnp.int32)[None, None, None]
    chosen_CBQT = jnp.where(here_CBQT, weight_CBQ[..., None], 0)
    dq_BQE = jnp.einsum("cbqt,cte->bqe", chosen_CBQT, d_CTE, precision=HIGHEST)
    return dq_BQE, jnp.einsum("cbqt,bqe->cte", chosen_CBQT, q_BQE, precision=HIGHEST)


def _summed(best: Float[Array, "N B Q"], q_mask: Bool[Array, "B Q"], d_mask: Bool[Array, "N T"]) -> Float[Array, "N B"]:
    """The best of a document without tokens is -inf, which must reach neither the sum nor its gradient."""
    counts = q_mask[None] & d_mask.any(-1)[:, None, None]
    return jnp.where(counts, best, 0).sum(-1)


def _sizes(tile: int, q_BQE: Array, d_NTE: Array) -> tuple[int, int]:
    """Queries and documents of a tile: all queries, if that leaves room for a document."""
    q, t = q_BQE.shape[1], d_NTE.shape[1]
    rows = min(len(q_BQE), max(1, TILE // (q * t)))
    return rows, min(len(d_NTE), tile or max(1, TILE // (rows * q * t)))


def _blocks(tree, size: int):
    """[N ...] as [blocks, size, ...], the last one filled with zeros, which as masks say that nothing counts."""

    def one(x):
        x = jnp.pad(x, [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(one, tree)


# The loss


def loss(
    scores_BBC: Float[Array, "B B C"],
    rule: Rule,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float = 0.0,
    hashes: Hashes | None = None,
) -> Loss:
    """`contrastive.loss` of MaxSim scores: those of query b with candidate c of row r are `scores[b, r, c]`. The scores are few
    beside the tokens they come from, so they are all held. Metrics: `top1`, and `positive`, the mean score of a row's own
    positive."""
    b, _, c = scores_BBC.shape
    nothing = jnp.zeros((b, 1)), jnp.zeros((b, c, 1))  # texts are compared by the scores

    def similarity(term: Term, rows: Side, columns: Side) -> Float[Array, "R N"]:
        return scores_BBC[:, :, 0] if term.columns == "positive" else scores_BBC[:, :, 1:].reshape(b, -1)

    value, metrics = compared(sides(Pairs(*nothing, hashes), rule), rule, scale, bias, similarity)
    return value, metrics | {"positive": jax.lax.stop_gradient(jnp.diagonal(scores_BBC[:, :, 0]).mean())}
