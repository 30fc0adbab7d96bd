"""Exact top-k against numpy: on every number of devices, over tiles, with ties and with fewer rows than asked for."""

import jax
import numpy as np
import pytest

from embedjax import config, sharding
from embedjax.evaluate import retrieval
from embedjax.evaluate.retrieval import GROUP, by_groups, topk


def reference(queries, corpus, k):
    scores = queries @ corpus.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def whole_numbers(seed, rows):
    """Products are exact in float32, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, 8)).astype(np.float32)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(("count", "rows", "k", "block"), [(5, 1000, 10, 64), (3, 13, 20, 4096), (70, 4099, 7, 640)])
def test_equals_numpy(devices, count, rows, k, block):
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:devices])
    queries, corpus = whole_numbers(0, count), whole_numbers(1, rows)
    scores, indices = topk(queries, corpus, k, mesh=mesh, block=block, query_block=32)
    wanted_scores, wanted = reference(queries, corpus, k)
    assert indices.shape == (count, min(k, rows))
    np.testing.assert_array_equal(indices, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_negative_scores_and_signed_zeros():
    queries = np.array([[1.0, -1.0]], np.float32)
    corpus = np.array([[-3, 0], [-0.0, 0], [0, 0], [-1, 0], [0, -0.0]], np.float32)
    scores, indices = topk(queries, corpus, 4)
    assert indices.tolist() == [[1, 2, 4, 3]]
    assert scores.tolist() == [[0, 0, 0, -1]]


def test_groups_find_what_is_found_without(monkeypatch):
    monkeypatch.setattr(retrieval, "ENOUGH", 256)  # from five groups on, these are looked at by groups
    scores = np.random.default_rng(0).integers(0, 40, (6, 20 * GROUP)).astype(np.float32)
    for k in (1, 5, 19, 20, 30):
        wanted = jax.lax.top_k(scores, k)
        found = jax.jit(by_groups, static_argnums=1)(scores, k)
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_a_memory_mapped_corpus(tmp_path):
    corpus = whole_numbers(1, 500)
    np.save(tmp_path / "corpus.npy", corpus)
    queries = whole_numbers(0, 4)
    _, indices = topk(queries, np.load(tmp_path / "corpus.npy", mmap_mode="r"), 5, block=GROUP)
    np.testing.assert_array_equal(indices, reference(queries, corpus, 5)[1])


def test_nothing_to_search():
    assert topk(whole_numbers(0, 2), whole_numbers(0, 0), 3)[1].shape == (2, 0)
    assert topk(whole_numbers(0, 0), whole_numbers(0, 4), 3)[1].shape == (0, 3)
