"""Quantized tokens and search in stages against a loop over all tokens, on one device and on a mesh."""

import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax.config.errors import ConfigError
from embedjax.evaluate import token_vectors
from embedjax.evaluate.late import maxsim_own, maxsim_topk
from embedjax.evaluate.stages import by_ranking, by_tokens, rerank
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.quantize import PRECISIONS, dequantize, quantize, ranges_of
from embedjax.sharding import make_mesh


def tokens(count, most, width=16, seed=0):
    """Texts of up to `most` tokens, some of none."""
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    each = [unit(rng.normal(size=(n, width))).astype(np.float32) for n in rng.integers(0, most, count)]
    return TokenVectors.joined(each, width)


def looped(queries, documents):
    best = lambda q, d: (q @ d.T).max(1).sum() if len(d) else 0.0
    return np.array([[best(queries.of(i), documents.of(j)) for j in range(len(documents))] for i in range(len(queries))])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [16, 12])
def test_scores_of_quantized_documents_are_those_of_what_they_stand_for(precision, width, monkeypatch):
    monkeypatch.setattr(token_vectors, "QUANTIZED_ROWS", 100)  # several blocks
    queries, whole = tokens(5, 9, width, 1), tokens(40, 30, width)
    documents = whole if precision == "float32" else whole.quantized(precision)
    ranges = ranges_of(whole.vectors) if "int8" in precision else None
    codes = quantize(whole.vectors, precision, ranges)
    np.testing.assert_array_equal(documents.vectors, codes)
    floats = TokenVectors(dequantize(codes, precision, width, ranges), whole.starts)
    wanted, size = looped(queries, floats), 6
    for mesh in (None, make_mesh(c.Mesh(4, 2), jax.devices())):
        scores, places = maxsim_topk(queries, documents, size, mesh=mesh)
        np.testing.assert_allclose(scores, -np.sort(-wanted, axis=1)[:, :size], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(wanted, places, 1), scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(maxsim_own(queries.of(1), documents, [3, 0, 39]), wanted[1, [3, 0, 39]], rtol=1e-5, atol=1e-6)
    some = documents.take([7, 2])
    assert some.precision == documents.precision and some.lengths.tolist() == documents.lengths[[7, 2]].tolist()
    np.testing.assert_array_equal(some.of(0), documents.of(7))
    assert documents.width == width and some.width == width


def test_codes_are_made_once_with_ranges_of_any_calibration_set():
    whole = tokens(30, 20)
    ranges = ranges_of(tokens(30, 20, seed=5).vectors)
    found = whole.quantized("uint8", ranges)
    np.testing.assert_array_equal(found.vectors, quantize(whole.vectors, "uint8", ranges))
    with pytest.raises(ConfigError, match="uint8 already"):
        found.quantized("binary")
    none = TokenVectors.joined([], 16).quantized("binary")
    assert len(none) == 0 and none.vectors.shape == (0, 2)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("devices", [1, 8])
def test_candidates_are_the_documents_of_each_tokens_nearest_tokens(precision, devices):
    queries, documents = tokens(6, 7, seed=1), tokens(50, 12)
    documents = documents if precision == "float32" else documents.quantized(precision)
    owner = np.repeat(np.arange(50), documents.lengths)
    mesh = make_mesh(c.Mesh(devices), jax.devices()[:devices])
    for k in (1, 3):
        found = by_tokens(queries, documents, k, mesh=mesh)
        for n, some in enumerate(found):
            products = queries.of(n) @ documents.rows(slice(None)).T
            order = np.argsort(-products, axis=1, kind="stable")[:, :k]
            # Codes tie: any of the tokens that are as near will do, and the first ones are taken.
            assert some.tolist() == sorted(set(owner[order].ravel().tolist()))
    everything = by_tokens(queries, documents, 10_000, mesh=mesh)
    with_tokens = np.flatnonzero(documents.lengths).tolist()
    assert all(some.tolist() == (with_tokens if queries.lengths[n] else []) for n, some in enumerate(everything))


def test_the_final_list_has_exact_scores_of_the_candidates_alone():
    queries, documents = tokens(6, 7, seed=1), tokens(50, 12)
    wanted = looped(queries, documents)
    candidates = [np.array(some, np.int64) for some in ([4, 9, 30], [], [7], list(range(50)), [1, 2], [0, 3])]
    scores, places = rerank(lambda n, some: maxsim_own(queries.of(n), documents, some), candidates, 4)
    for n, some in enumerate(candidates):
        order = some[np.argsort(-wanted[n, some], kind="stable")][:4]
        assert places[n].tolist() == [*order.tolist(), *[-1] * (4 - len(order))]
        np.testing.assert_allclose(scores[n, : len(order)], wanted[n, order], rtol=1e-5, atol=1e-6)
        assert np.isneginf(scores[n, len(order) :]).all()
    ties = rerank(lambda n, some: np.zeros(len(some), np.float32), [np.array([3, 5, 8])], 2)
    assert ties[1].tolist() == [[3, 5]]
    assert [x.tolist() for x in by_ranking(np.array([[5, 2, -1], [-1, -1, -1]]))] == [[2, 5], []]
