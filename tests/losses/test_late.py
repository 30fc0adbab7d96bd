"""MaxSim and XTR's scores against loops in float64, value and gradient; in every form, on 1 to 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from embedjax import config, sharding
from embedjax.losses import contrastive, late
from embedjax.losses.contrastive import Hashes, Pairs, Rule
from embedjax.losses.late import Tokens
from embedjax.sharding import BATCH_AXES

B, C, LQ, LD, E = 8, 2, 5, 7, 6
N = B * C
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}


def texts(seed=0):
    """Queries with holes and one without a token; documents with holes, three of them without a token. What does not count
    would be the best token of all, if it counted."""
    rng = np.random.default_rng(seed)

    def made(count, length):
        vectors, score = rng.normal(size=(count, length, E)), rng.random((count, length)) < 0.7
        vectors[~score] *= 100
        return vectors, score

    (q, q_score), (d, d_score) = made(B, LQ), made(N, LD)
    q_score[3] = False
    d_score[[0, 5, N - 1]] = False
    return Tokens(q, q_score), Tokens(d, d_score)


def looped(query, documents, weight):
    """Scores, and the gradients of their sum times `weight` [B N]."""
    scores, dq, dd = np.zeros((B, N)), np.zeros_like(query.vectors), np.zeros_like(documents.vectors)
    for b in range(B):
        for n in range(N):
            places = np.flatnonzero(documents.score[n])
            for i in np.flatnonzero(query.score[b]) if len(places) else ():
                found = [query.vectors[b, i] @ documents.vectors[n, j] for j in places]
                j = places[int(np.argmax(found))]
                scores[b, n] += max(found)
                dq[b, i] += weight[b, n] * documents.vectors[n, j]
                dd[n, j] += weight[b, n] * query.vectors[b, i]
    return scores, dq, dd


def looped_xtr(k, query, documents, weight):
    """The same of XTR's scores: each query token retrieves the `k` most similar tokens of all documents."""
    scores, dq, dd = np.zeros((B, N)), np.zeros_like(query.vectors), np.zeros_like(documents.vectors)
    tokens = np.argwhere(documents.score)
    for b in range(B):
        best = [{} for _ in range(N)]  # of each document: query token -> (similarity, document token)
        for i in np.flatnonzero(query.score[b]):
            found = [query.vectors[b, i] @ documents.vectors[n, j] for n, j in tokens]
            for place in np.argsort(found)[::-1][:k]:
                n, j = tokens[place]
                best[n][i] = max(best[n].get(i, (-np.inf, 0)), (found[place], j))
        for n, of_token in enumerate(best):
            scores[b, n] = np.mean([similarity for similarity, _ in of_token.values()]) if of_token else 0
            for i, (_, j) in of_token.items():
                dq[b, i] += weight[b, n] / len(of_token) * documents.vectors[n, j]
                dd[n, j] += weight[b, n] / len(of_token) * query.vectors[b, i]
    return scores, dq, dd


WEIGHT = np.random.default_rng(1).normal(size=(B, N))


def both(form, query, documents):
    """Scores and gradients of a form."""

    def value(vectors):
        scores = form(Tokens(vectors[0], query.score), Tokens(vectors[1], documents.score))
        return (scores * WEIGHT.astype(scores.dtype)).sum(), scores

    (_, scores), (dq, dd) = jax.jit(jax.value_and_grad(value, has_aux=True))((query.vectors, documents.vectors))
    return jax.device_get((scores, dq, dd))


def ring(devices, tile, tiled=late.maxsim_tiled):
    mesh = sharding.make_mesh(config.Mesh(*MESHES[devices]), jax.devices()[:devices])
    local = functools.partial(tiled, axis=BATCH_AXES, tile=tile)
    rows = P(BATCH_AXES)
    form = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)
    return lambda *sides: form(*jax.lax.with_sharding_constraint(sides, sharding.rows(mesh)))


FORMS = {"dense": late.maxsim, "tiled": late.maxsim_tiled, "tiled, ragged": functools.partial(late.maxsim_tiled, tile=3)}
FORMS |= {f"ring of {devices}": ring(devices, tile) for devices, tile in ((1, 0), (2, 3), (4, 0), (8, 1))}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_loops_in_value_and_gradient(name):
    query, documents = texts()
    with jax.enable_x64(True):
        found = both(FORMS[name], query, documents)
    for x, y in zip(found, looped(query, documents, WEIGHT), strict=True):
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dense", "tiled", "tiled, ragged", "ring of 4"])
def test_of_equal_tokens_the_first_moves_in_every_form(name):
    """Products of bits are equal all the time."""
    query, documents = (side._replace(vectors=np.sign(side.vectors)) for side in texts())
    with jax.enable_x64(True):
        found = both(FORMS[name], query, documents)
    for x, y in zip(found, looped(query, documents, WEIGHT), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


XTR = functools.partial(functools.partial, late.xtr_tiled)  # XTR(k=9): a form
RETRIEVED = {
    "dense": (9, functools.partial(late.xtr, k=9)),
    "dense, all": (500, functools.partial(late.xtr, k=500)),
    "tiled": (20, XTR(k=20)),
    "tiled, ragged": (9, XTR(k=9, tile=3)),
    "tiled, one": (1, XTR(k=1, tile=3)),
    "tiled, all": (500, XTR(k=500, tile=3)),
    "ring of 1": (9, ring(1, 0, XTR(k=9))),
    "ring of 2": (20, ring(2, 3, XTR(k=20))),
    "ring of 4": (9, ring(4, 0, XTR(k=9))),
    "ring of 8": (40, ring(8, 1, XTR(k=40))),
}


@pytest.mark.parametrize("name", RETRIEVED)
def test_xtr_equals_loops_in_value_and_gradient(name):
    query, documents = texts()
    k, form = RETRIEVED[name]
    with jax.enable_x64(True):
        found = both(form, query, documents)
    for x, y in zip(found, looped_xtr(k, query, documents, WEIGHT), strict=True):
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_xtr_that_retrieves_all_is_the_mean_of_maxsim():
    query, documents = texts()
    with jax.enable_x64(True):
        found, summed = jax.device_get((late.xtr(query, documents, 500), late.maxsim(query, documents)))
    np.testing.assert_allclose(found, summed / np.maximum(query.score.sum(1, keepdims=True), 1), rtol=1e-12)


@pytest.mark.parametrize("name", ["dense", "tiled, ragged", "ring of 4"])
def test_xtr_in_float32_is_finite_where_nothing_counts(name):
    query, documents = texts()
    empty = documents._replace(score=np.zeros_like(documents.score))
    one = empty._replace(score=documents.score & (np.arange(N) == 7)[:, None])
    single = lambda side: side._replace(vectors=side.vectors.astype(np.float32))
    k, form = RETRIEVED[name]
    for these in (documents, empty, one):
        for x, y in zip(both(form, single(query), single(these)), looped_xtr(k, query, these, WEIGHT), strict=True):
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "tiled", "ring of 2"])
def test_vectors_that_are_no_numbers_are_seen_in_the_gradient(name):
    """Of which the trainer then skips the step."""
    query, documents = texts()
    documents.vectors[2] = np.nan
    for form in (FORMS[name], RETRIEVED[name][1]):
        _, dq, dd = both(form, query, documents)
        assert not np.isfinite(np.append(dq, dd)).all()


@pytest.mark.parametrize("name", ["dense", "tiled, ragged", "ring of 4"])
def test_float32_is_close_and_finite_where_nothing_counts(name):
    query, documents = texts()
    empty = documents._replace(score=np.zeros_like(documents.score))
    single = lambda side: side._replace(vectors=side.vectors.astype(np.float32))
    for these in (documents, empty):
        for x, y in zip(both(FORMS[name], single(query), single(these)), looped(query, these, WEIGHT), strict=True):
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)
    assert not np.any(both(FORMS[name], single(query), single(empty))[0])


def test_bfloat16_tokens_are_scored_in_float32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16 if x.dtype == float else bool), texts(2))
    wanted = late.maxsim(*(side._replace(vectors=side.vectors.astype(jnp.float32)) for side in half))
    for form in (late.maxsim, late.maxsim_tiled):
        found = form(*half)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_small_tiles_of_queries_too(monkeypatch):
    query, documents = texts(3)
    monkeypatch.setattr(late, "TILE", 3 * LQ * LD)
    forms = (
        (lambda *sides: late.maxsim_tiled(*sides), looped),
        (lambda *sides: late.xtr_tiled(*sides, 2), functools.partial(looped_xtr, 2)),
    )
    for form, known in forms:
        with jax.enable_x64(True):
            found = both(form, query, documents)
        for x, y in zip(found, known(query, documents, WEIGHT), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_gradients_by_products_are_those_by_places(monkeypatch):
    query, documents = texts(4)
    monkeypatch.setattr(late, "_by_place", late._by_product)  # what accelerators run
    with jax.enable_x64(True):
        found = both(lambda *sides: late.maxsim_tiled(*sides, tile=3), query, documents)
    for x, y in zip(found, looped(query, documents, WEIGHT), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_own_documents_are_a_part_of_all():
    query, documents = texts()
    own = jax.tree.map(lambda x: x.reshape(B, C, *x.shape[1:]), documents)
    with jax.enable_x64(True):
        whole = late.maxsim(query, documents).reshape(B, B, C)
        np.testing.assert_allclose(late.maxsim_own(query, own), whole[np.arange(B), np.arange(B)], rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(),
        Rule(directions=("q2d", "d2q"), partition="per_direction"),
        Rule(hardness="all", strength=2.0),
        Rule("sigmoid"),
    ],
    ids=["softmax", "symmetric", "hardness", "sigmoid"],
)
def test_one_token_a_text_is_the_loss_of_vectors(rule, make_pairs):
    """With texts of a single token MaxSim is the product, and the loss that of one vector a text."""
    pairs = make_pairs(2, duplicates=True)
    with jax.enable_x64(True):
        unit = contrastive.normalize(pairs.anchor), contrastive.normalize(pairs.candidates)
        wanted, known = contrastive.loss(Pairs(*unit, pairs.hashes), rule, 5.0, -2.0)
        tokens = [Tokens(x.reshape(-1, 1, x.shape[-1]), np.ones((x.size // x.shape[-1], 1), bool)) for x in unit]
        scores = late.maxsim_tiled(*tokens).reshape(len(unit[0]), *unit[1].shape[:2])
        found, told = late.loss(scores, rule, 5.0, -2.0, Hashes(*pairs.hashes))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose([told[name] for name in ("top1", "positive")], [known[n] for n in ("top1", "positive")])
