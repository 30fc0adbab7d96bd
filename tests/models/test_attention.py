"""Attention against its definition in value and gradient, with and without dropout, and what it keeps; rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.models import attention, layers, ops
from embedjax.models.attention import attend, attend_again, rope_table, rotate

KEY = jnp.uint32(7)
B, H, L, M, K = 3, 4, 7, 9, 8
MASK = np.arange(M)[None] < np.array([9, 4, 0])[:, None]


def inputs(dtype=np.float32):
    """q, k, v and the cotangent of the result."""
    rng = np.random.default_rng(0)
    shapes = (B, H, L, K), (B, H, M, K), (B, H, M, K), (B, H, L, K)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def definition(q, k, v, bias, keep=1.0):
    """`keep` multiplies the probabilities."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, -1) * keep, v)


def kept(rate):
    """What dropout multiplies the probabilities with, read off values that tell the tokens apart."""
    q, k, v = jnp.zeros((B, H, L, M)), jnp.zeros((B, H, M, M)), jnp.broadcast_to(jnp.eye(M), (B, H, M, M))
    seed, no_bias = ops.token_seeds(KEY, jnp.arange(B), L), jnp.zeros((1, 1, 1, 1))
    probabilities = attend(q, k, v, no_bias, rate=rate, seed=seed, compute="float32")
    return probabilities * M


@pytest.mark.parametrize("form", [attend, attend_again])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (B, 1, 1, M), (1, H, L, M), (B, H, L, M)], ids=str)
def test_attention_is_its_definition_in_value_and_gradient(shape, rate, form):
    q, k, v, g = inputs()
    bias = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    if shape == (B, 1, 1, M):
        bias = bias + layers.padding_bias(MASK)  # one row attends to padding alone
    seed = ops.token_seeds(KEY, jnp.arange(B), L)
    ours = lambda *args: form(*args, rate=rate, seed=seed, compute="float32")
    keep = kept(rate) if rate else 1.0
    value, pull = jax.vjp(jax.jit(ours), q, k, v, bias)
    expected, expected_pull = jax.vjp(lambda *args: definition(*args, keep), q, k, v, bias)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(pull(g), expected_pull(g), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_on_an_accelerator_attention_without_dropout_is_the_same(monkeypatch):
    q, k, v, g = inputs()
    bias = layers.padding_bias(MASK)
    pulled = lambda: jax.vjp(lambda *args: attend(*args, bias, rate=0.0, seed=None, compute="float32"), q, k, v)
    expected, expected_pull = pulled()
    monkeypatch.setattr(attention, "on_cpu", lambda: False)
    value, pull = pulled()
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for found, wanted in zip(pull(g), expected_pull(g), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_drops_its_share_and_keeps_the_mean():
    keep = np.asarray(kept(0.4))
    assert set(np.unique(keep.round(4))) == {0.0, np.float32(1.6667)}
    assert abs((keep == 0).mean() - 0.4) < 5 * np.sqrt(0.24 / keep.size)


@pytest.mark.parametrize("form", [attend, attend_again])
def test_in_bfloat16_the_softmax_is_of_float32(form):
    """Products round their factors to 8 bits, and no more is lost."""
    q, k, v, g = inputs(jnp.bfloat16)
    bias = layers.padding_bias(MASK)
    value, pull = jax.vjp(lambda *args: form(*args, bias, rate=0.0, seed=None, compute="bfloat16"), q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, expected_pull = jax.vjp(lambda *args: definition(*args, bias), *wide)
    assert value.dtype == jnp.bfloat16
    np.testing.assert_allclose(value.astype(jnp.float32), expected, atol=2e-2)
    for found, wanted in zip(pull(g), expected_pull(g.astype(jnp.float32)), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=2e-2 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_nothing_of_all_pairs_of_tokens_is_kept_for_the_gradient(rate):
    shapes = [jax.ShapeDtypeStruct((2, 4, 64, 8), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((2, 1, 1, 64), jnp.float32)]
    seed = ops.token_seeds(KEY, jnp.arange(2), 64)
    kept = jax.eval_shape(
        lambda *args: jax.vjp(lambda *a: attend_again(*a, rate=rate, seed=seed, compute="float32"), *args), *shapes
    )
    assert max(x.size for x in jax.tree.leaves(kept)) == 2 * 4 * 64 * 8


def test_attention_dropout_does_not_depend_on_padding():
    """A longer bucket drops the same probabilities."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 4, 9, 8)).astype(np.float32) for _ in range(3))
    mask = np.arange(9)[None] < np.array([5, 3])[:, None]
    run = lambda L: attend(
        *(a[:, :, :L] for a in (q, k, v)),
        layers.padding_bias(mask[:, :L]),
        rate=0.3,
        seed=ops.token_seeds(KEY, jnp.arange(2), L),
        compute="float32",
    )
    short, long = run(5), run(9)[:, :, :5]
    np.testing.assert_allclose(short, long, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=(1, 1, 1, 8)), (1, 1, 6, 8)).astype(np.float32) for _ in range(2))
    rope = rope_table(6, 8, 10000.0)
    scores = np.asarray(jnp.einsum("bhqd,bhkd->bhqk", rotate(q, rope), rotate(k, rope)))[0, 0]
    for distance in range(-5, 6):
        np.testing.assert_allclose(np.diag(scores, distance), np.diag(scores, distance)[0], rtol=1e-4)
    assert np.ptp(scores) > 0.1
