"""Poolings against plain numpy loops, and every head finite for a text without tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import Dense
from embedjax.models import heads

RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(6, 5, 4)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
PROMPT = np.array([2, 1, 1, 0, 3, 0])  # leading real tokens that are the prompt's; row 4 has no others


def looped(pooling, tokens, mask, pool):
    """One text."""
    first = int(np.argmax(mask))
    places = np.flatnonzero(pool)
    if not places.size:
        return np.zeros(tokens.shape[-1])
    if pooling == "mean":
        return sum(tokens[i] for i in places) / max(len(places), 1e-9)
    if pooling == "weightedmean":
        weights = [i + 1 - first for i in places]
        return sum(w * tokens[i] for w, i in zip(weights, places, strict=True)) / sum(weights)
    if pooling == "max":
        return np.max([tokens[i] for i in places], 0)
    return tokens[places[0 if pooling == "cls" else -1]]


def without_prompt():
    pool = MASK.copy()
    for row, n in enumerate(PROMPT):
        pool[row, np.flatnonzero(MASK[row])[:n]] = False
    return pool


@pytest.mark.parametrize("pooling", list(heads.POOLINGS))
@pytest.mark.parametrize("pool", [MASK, without_prompt()], ids=["all", "no prompt"])
def test_pooling_equals_a_loop(pooling, pool):
    ours = heads.pool(TOKENS, MASK, pool, pooling)
    expected = [looped(pooling, *row) for row in zip(TOKENS, MASK, pool, strict=True)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", list(heads.POOLINGS))
def test_pooling_reads_pooled_tokens_only_and_is_finite(pooling):
    pool = without_prompt()
    loss = lambda tokens: (heads.normalize(heads.pool(tokens, MASK, pool, pooling)) ** 3).sum()
    for tokens in (TOKENS, np.zeros_like(TOKENS)):
        value, gradient = jax.value_and_grad(loss)(tokens)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert (gradient[~pool] == 0).all()
    assert (jax.grad(loss)(TOKENS)[pool] != 0).any()


def test_normalize_is_the_unit_vector():
    x = heads.normalize(TOKENS)
    np.testing.assert_allclose(x * np.linalg.norm(TOKENS, axis=-1, keepdims=True), TOKENS, rtol=1e-5, atol=1e-6)
    tiny = heads.normalize(jnp.full((1, 4), 1e-13))
    np.testing.assert_allclose(tiny, np.full((1, 4), 0.1), rtol=1e-4)  # divided by 1e-12, not by its own length


def test_projections_are_applied_in_order():
    specs = (Dense(3, True, "tanh"), Dense(2, False, "identity"))
    params = heads.init_projections(jax.random.key(0), 4, specs)
    assert jax.tree.map(jnp.shape, params) == {"0": {"kernel": (4, 3), "bias": (3,)}, "1": {"kernel": (3, 2)}}
    assert 0.3 < np.abs(params["0"]["kernel"]).max() <= 0.5
    x = TOKENS[:, 0]
    expected = np.tanh(x @ params["0"]["kernel"] + params["0"]["bias"][None]) @ params["1"]["kernel"]
    np.testing.assert_allclose(heads.project(params, x, specs), expected, rtol=1e-5, atol=1e-6)


def test_relu_leaves_out_what_is_negative():
    specs = (Dense(6, True, "relu"),)
    params = heads.init_projections(jax.random.key(0), 4, specs)
    before = TOKENS[:, 0] @ params["0"]["kernel"] + params["0"]["bias"][None]
    assert (before < 0).any() and (before > 0).any()
    np.testing.assert_allclose(heads.project(params, TOKENS[:, 0], specs), np.maximum(before, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [3, 4], ids=["another width", "the same width"])
def test_a_residual_is_added_after_the_activation(features):
    specs = (Dense(features, True, "tanh", residual=True), Dense(2, False, "identity"))
    params = heads.init_projections(jax.random.key(0), 4, specs)
    own = jax.device_get(params["0"])
    assert ("residual" in own) == (features == 3) and "residual" not in params["1"]
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    known = np.tanh(x @ own["kernel"] + own["bias"][None]) + (x @ own["residual"]["kernel"] if features == 3 else x)
    np.testing.assert_allclose(heads.project(params, x, specs), known @ params["1"]["kernel"], atol=1e-6)
