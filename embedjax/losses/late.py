"""Late interaction: scores of texts that have one vector a token, and the in-batch loss over them. Arrays only.

Every token i of a query takes the document's token most similar to it, best(i, d) = max over tokens j of d of <q_i, d_j>. Two
scores are made of these:

    MaxSim: the sum of best(i, d) over the tokens of the query (Khattab & Zaharia 2020, eq. 3);
    XTR:    the mean of best(i, d) over those tokens i for which it is among the k largest <q_i, d_j> of all documents; 0 where
            there is none (Lee et al. 2023, section 3.1)

`maxsim` and `xtr` are the definitions and hold B x N x Lq x Ld products. `maxsim_tiled` and `xtr_tiled` give the same scores
and gradients from tiles of them: what they keep is the best and its place, B x N x Lq numbers each, and the k largest of each
query token; on several devices documents travel round.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from embedjax.losses.contrastive import Hashes, Loss, Pairs, Rule, compared, floats, sides
from embedjax.losses.masks import Side, Term
from embedjax.losses.ring import trip

# Products of a tile, and numbers of its documents' vectors: 8 MB, which a CPU's cache about holds, and enough rows to fill an
# accelerator.
TILE = 2**21
# Document tokens of a tile for each of the k largest that are chosen: finding them again among few new ones is what costs.
FRESH = 8

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
    return _summed(_nearest(_products(query, documents)), query.score)


def maxsim_own(query: Tokens, documents: Tokens) -> Float[Array, "B C"]:
    """Scores of each query [B Lq E] with its own documents [B C Ld E], as `maxsim` has them."""
    one = lambda query, documents: maxsim(jax.tree.map(lambda x: x[None], query), documents)[0]
    return jax.vmap(one)(query, documents)


def maxsim_tiled(query: Tokens, documents: Tokens, *, axis: tuple[str, ...] = (), tile: int = 0) -> Float[Array, "B N"]:
    """`maxsim` in tiles of `tile` documents, 0 for a good number.

    With `axis`, inside `shard_map` over those axes, queries and documents are this device's; the columns of its rows are the
    documents of all devices, in their order.
    """
    return _summed(_best(query, documents, 0, axis, tile)[0], query.score)


def xtr(query: Tokens, documents: Tokens, k: int) -> Float[Array, "B N"]:
    """Scores where a token of a document counts for a query's token only among the `k` of all N documents most similar to it;
    with fewer than k all do. Which ones count takes no gradient. What has no tokens is treated as by `maxsim`."""
    product_NTBQ = _products(query, documents)
    product_BQM = jnp.moveaxis(product_NTBQ.reshape(-1, *product_NTBQ.shape[2:]), 0, -1)
    top_BQK = jax.lax.stop_gradient(jax.lax.top_k(product_BQM, min(k, product_BQM.shape[-1]))[0])
    return _averaged(_nearest(product_NTBQ), top_BQK[..., -1], query.score)


def xtr_tiled(query: Tokens, documents: Tokens, k: int, *, axis: tuple[str, ...] = (), tile: int = 0) -> Float[Array, "B N"]:
    """`xtr` in tiles and with an `axis` as `maxsim_tiled` has them; the `k` are those of the documents of all devices."""
    best_NBQ, top_BQK = _best(query, documents, k, axis, tile)
    return _averaged(best_NBQ, top_BQK[..., -1], query.score)


def _products(query: Tokens, documents: Tokens) -> Float[Array, "N T B Q"]:
    """Similarities of all tokens, -inf where the document's does not count. Documents first: the maximum runs over rows of
    numbers that lie side by side."""
    product_NTBQ = jnp.einsum("nte,bqe->ntbq", floats(documents.vectors), floats(query.vectors), precision=HIGHEST)
    return jnp.where(documents.score[..., None, None], product_NTBQ, -jnp.inf)


@jax.custom_vjp
def _nearest(product_NTBQ: Float[Array, "N T B Q"]) -> Float[Array, "N B Q"]:
    """The largest of each document. Of equal ones, which bits have often, the first takes the gradient in every form."""
    return product_NTBQ.max(1)


def _place(product_NTBQ: Float[Array, "N T B Q"], best_NBQ: Float[Array, "N B Q"]) -> Int[Array, "N B Q"]:
    """The first place of the best, as argmax has it: that is a loop over numbers on a CPU, and costs as much as the product."""
    places = _places_of(product_NTBQ)
    return jnp.where(product_NTBQ == best_NBQ[:, None], places, places.size).min(1)


def _places_of(product_NTBQ: Float[Array, "N T B Q"]) -> Int[Array, "1 T 1 1"]:
    return jnp.arange(product_NTBQ.shape[1], dtype=jnp.int32)[None, :, None, None]


def _nearest_forward(product_NTBQ):
    best_NBQ = product_NTBQ.max(1)
    return best_NBQ, (_place(product_NTBQ, best_NBQ), _places_of(product_NTBQ))


def _nearest_backward(kept, g_NBQ):
    place_NBQ, places = kept
    return (jnp.where(places == place_NBQ[:, None], g_NBQ[:, None], 0),)


_nearest.defvjp(_nearest_forward, _nearest_backward)


def _summed(best: Float[Array, "N B Q"], q_mask: Bool[Array, "B Q"]) -> Float[Array, "B N"]:
    """The best of a document without tokens is -inf, which must reach neither the sum nor its gradient."""
    return jnp.where(q_mask[None] & (best != -jnp.inf), best, 0).sum(-1).T


def _averaged(best: Float[Array, "N B Q"], least: Float[Array, "B Q"], q_mask: Bool[Array, "B Q"]) -> Float[Array, "B N"]:
    """`least` is the smallest similarity that counts."""
    counts = q_mask[None] & (best != -jnp.inf) & (best >= least[None])
    return (jnp.where(counts, best, 0).sum(-1) / jnp.maximum(counts.sum(-1), 1)).T


# The best of each query token, in tiles


def _best(
    query: Tokens, documents: Tokens, k: int, axis: tuple[str, ...], tile: int
) -> tuple[Float[Array, "N B Q"], Float[Array, "B Q K"]]:
    """Each query token's best similarity with each document, -inf where that has no token, and its k largest with tokens of all
    documents, largest first, without gradient."""
    found = _tiled(axis, tile, k, floats(query.vectors), floats(documents.vectors), documents.score)
    return cast(tuple[Array, Array], found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled(axis, tile, k, q_BQE, d_NTE, d_mask):
    return _forward(axis, tile, k, q_BQE, d_NTE, d_mask)[0]


def _forward(axis, tile, k, q_BQE, d_NTE, d_mask):
    """The result, and what the gradient needs: for each query token and document the place of the best document token."""
    count, here, n = _places(axis, d_NTE)
    best = jnp.zeros((count, n, *q_BQE.shape[:2]), q_BQE.dtype)
    top_BQK = jnp.full((*q_BQE.shape[:2], k), -jnp.inf, q_BQE.dtype)

    def visit(staying, travelling):
        (whole, top_BQK), (d_NTE, d_mask, block) = staying, travelling
        found, top_BQK = _compared(tile, q_BQE, d_NTE, d_mask, top_BQK)
        put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, block, 0)
        return (jax.tree.map(put, whole, found), top_BQK), None

    start = (best, jnp.zeros_like(best, jnp.int32)), top_BQK
    ((best, places), top_BQK), _ = trip(axis, visit, start, (d_NTE, d_mask, here))
    return (best.reshape(-1, *best.shape[2:]), top_BQK), (q_BQE, d_NTE, places)


def _backward(axis, tile, k, kept, cotangents):
    q_BQE, d_NTE, places = kept
    count, here, n = _places(axis, d_NTE)
    g_PNBQ = cotangents[0].reshape(count, n, *q_BQE.shape[:2])

    def visit(dq_BQE, travelling):
        d_NTE, block = travelling
        pick = lambda whole: jax.lax.dynamic_index_in_dim(whole, block, 0, keepdims=False)
        more, dd_NTE = _gradients(tile, q_BQE, d_NTE, pick(places), pick(g_PNBQ))
        return dq_BQE + more, dd_NTE

    dq_BQE, dd_NTE = trip(axis, visit, jnp.zeros_like(q_BQE), (d_NTE, here))
    return dq_BQE, dd_NTE, None


_tiled.defvjp(_forward, _backward)


def _places(axis: tuple[str, ...], documents: Array) -> tuple[int, Array, int]:
    """How many devices there are, which one this is, and how many documents each has."""
    here = jax.lax.axis_index(axis).astype(jnp.int32) if axis else jnp.int32(0)
    return (jax.lax.axis_size(axis) if axis else 1), here, len(documents)


def _compared(
    tile: int, q_BQE, d_NTE, d_mask, top_BQK
) -> tuple[tuple[Float[Array, "N B Q"], Int[Array, "N B Q"]], Float[Array, "B Q K"]]:
    """Best similarities and their places, a tile of queries and one of documents at a time; and the k largest, of those that
    were the largest so far and these."""
    b, n, k = len(q_BQE), len(d_NTE), top_BQK.shape[-1]
    rows, columns = _sizes(tile, q_BQE, d_NTE, k)

    def one(q_RQE, top_RQK, document):
        d_CTE, d_mask = document
        # Documents first, as in `_products`.
        product = jnp.matmul(d_CTE.reshape(-1, d_CTE.shape[-1]), q_RQE.reshape(-1, q_RQE.shape[-1]).T, precision=HIGHEST)
        product_CTRQ = product.reshape(*d_CTE.shape[:2], *q_RQE.shape[:2])
        product_CTRQ = jnp.where(d_mask[..., None, None], product_CTRQ, -jnp.inf)
        best_CRQ = product_CTRQ.max(1)
        place_CRQ = _place(product_CTRQ, best_CRQ)
        if k:
            product_RQM = jnp.moveaxis(product_CTRQ.reshape(-1, *q_RQE.shape[:2]), 0, -1)
            top_RQK = jax.lax.top_k(jnp.concatenate([top_RQK, product_RQM], -1), k)[0]
        return top_RQK, (best_CRQ, place_CRQ)

    documents = _blocks((d_NTE, d_mask), columns)
    across = lambda query: jax.lax.scan(lambda top, document: one(query[0], top, document), query[1], documents)
    top, found = jax.lax.map(across, _blocks((q_BQE, top_BQK), rows))  # found: [queries' blocks, documents' blocks, C, R, Q]
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(-1, x.shape[0] * x.shape[3], x.shape[4])[:n, :b]
    return jax.tree.map(join, found), top.reshape(top.shape[0] * rows, *top.shape[2:])[:b]


def _gradients(tile: int, q_BQE, d_NTE, places_NBQ, g_NBQ) -> tuple[Float[Array, "B Q E"], Float[Array, "N T E"]]:
    """What the cotangents of the best similarities say to queries and documents: each query token moves with its best document
    token, a tile of documents at a time."""
    _, columns = _sizes(tile, q_BQE, d_NTE, 0)

    def one(dq_BQE, block):
        add = jax.lax.platform_dependent(q_BQE, *block, cpu=_by_place, default=_by_product)
        return dq_BQE + add[0], add[1]

    dq_BQE, dd = jax.lax.scan(one, jnp.zeros_like(q_BQE), _blocks((d_NTE, places_NBQ, g_NBQ), columns))
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


def _sizes(tile: int, q_BQE: Array, d_NTE: Array, k: int) -> tuple[int, int]:
    """Queries and documents of a tile: all queries, if that leaves room for the documents it should have."""
    (b, q, e), (n, t, _) = q_BQE.shape, d_NTE.shape
    least = min(n, max(1, FRESH * k // t))
    rows = min(b, max(1, (TILE // (t * least) - e) // q))
    if tile:
        return rows, min(n, tile)
    most = min(n, max(1, TILE // (t * (rows * q + e))))
    # Blocks that leave no rest are cut without a copy of all documents.
    even = max(size for size in range(1, most + 1) if n % size == 0)
    return rows, even if 2 * even >= most else most


def _blocks(tree, size: int):
    """[N ...] as [blocks, size, ...], the last one filled with zeros, which as masks say that nothing counts."""

    def one(x):
        x = jnp.pad(x, [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(len(x) // size, size, *x.shape[1:])

    return jax.tree.map(one, tree)


# The loss


def loss(
    scores_BBC: Float[Array, "B B C"],
    rule: Rule,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float = 0.0,
    hashes: Hashes | None = None,
) -> Loss:
    """`contrastive.loss` of the scores: those of query b with candidate c of row r are `scores[b, r, c]`. They are few beside
    the tokens they come from, so they are all held. Metrics: `top1`, and `positive`, the mean score of a row's own positive."""
    b, _, c = scores_BBC.shape
    nothing = jnp.zeros((b, 1)), jnp.zeros((b, c, 1))  # texts are compared by the scores

    def similarity(term: Term, rows: Side, columns: Side) -> Float[Array, "R N"]:
        return scores_BBC[:, :, 0] if term.columns == "positive" else scores_BBC[:, :, 1:].reshape(b, -1)

    value, metrics = compared(sides(Pairs(*nothing, hashes), rule), rule, scale, bias, similarity)
    return value, metrics | {"positive": jax.lax.stop_gradient(jnp.diagonal(scores_BBC[:, :, 0]).mean())}
