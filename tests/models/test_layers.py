"""Dropout, attention, norm, products and the stack: what must not change a number, and what must change it as stated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import Bert, ModernBert, Roberta
from embedjax.config.errors import ConfigError
from embedjax.models import layers, ops
from embedjax.models.families import family_of

SMALL = Bert(vocab_size=50, width=16, depth=2, heads=4, mlp=24, positions=20, dropout=0.2, attention_dropout=0.2, init_std=0.2)
PRE_NORM = ModernBert(vocab_size=50, width=16, depth=2, heads=4, mlp=24, positions=20, local_window=4, dropout=0.2, pad_id=0)
IDS = np.random.default_rng(0).integers(1, 50, (4, 6)).astype(np.int32)
MASK = np.arange(6)[None] < np.array([6, 3, 1, 5])[:, None]
WEIGHT = np.random.default_rng(1).normal(size=(4, 6, 16)).astype(np.float32)
KEY = jnp.uint32(7)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These programs run once each and take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tower_of(arch, **how):
    return family_of(arch).Tower(arch, **how)


def params_of(arch):
    return jax.jit(tower_of(arch, layers="scan").init)(jax.random.key(0), IDS, MASK)["params"]


def value_and_grad(arch, params, mask=MASK, key=KEY, **how):
    def loss(params):
        tokens, _ = tower_of(arch, **how).apply({"params": params}, IDS, mask, row_B=jnp.arange(4), key=key)
        return (tokens * WEIGHT).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def close(a, b, tolerance=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("arch", [SMALL, PRE_NORM], ids=["post-norm", "pre-norm"])
def test_scanned_unrolled_and_recomputed_layers_are_the_same(arch):
    params = params_of(arch)
    plain = value_and_grad(arch, params, layers="unroll")
    close(plain, value_and_grad(arch, params, layers="scan"))
    close(plain, value_and_grad(arch, params, layers="scan", remat=True))


def test_every_layer_is_returned():
    params = params_of(SMALL)
    outputs = [tower_of(SMALL, layers=how).apply({"params": params}, IDS, MASK, want_layers=True) for how in ("scan", "unroll")]
    close(*outputs)
    (last, each), _ = outputs
    assert each.shape == (3, 4, 6, 16)  # the token embeddings first
    close(each[-1], last, 0)
    assert np.abs(each[0] - each[1]).max() > 0.01


def test_auto_unrolls_on_a_cpu():
    run = lambda how: str(jax.make_jaxpr(lambda p: tower_of(SMALL, layers=how).apply({"params": p}, IDS, MASK))(params))
    params = params_of(SMALL)
    assert "scan[" in run("scan")
    assert "scan[" not in run("auto")
    assert run("auto") == run("unroll")


def test_text_longer_than_the_position_table_is_refused():
    ids = np.ones((1, 19), np.int32)
    jax.eval_shape(tower_of(SMALL).init, jax.random.key(0), ids, ids == 1)
    arch = Roberta(vocab_size=50, width=16, depth=1, heads=4, mlp=24, positions=20)
    with pytest.raises(ConfigError, match=r"19 tokens.* 18 positions"):
        jax.eval_shape(tower_of(arch).init, jax.random.key(0), ids, ids == 1)


def test_roberta_counts_positions_from_after_the_padding_id():
    ids = jnp.array([[0, 7, 1], [1, 5, 2]])
    assert layers.counted_positions(ids, 1).tolist() == [[2, 3, 1], [1, 2, 3]]


def test_bfloat16_is_close_to_float32():
    params = params_of(SMALL)
    exact, rough = (value_and_grad(SMALL, params, compute=compute, layers="scan")[1] for compute in ("float32", "bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rough))
    flatten = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    difference = np.linalg.norm(flatten(rough) - flatten(exact)) / np.linalg.norm(flatten(exact))
    assert 1e-5 < difference < 0.03


def test_layer_norm_is_that_of_the_paper_with_its_gradient():
    rng = np.random.default_rng(0)
    x, scale, bias, g = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 8), (8,), (8,), (5, 8)))
    plain = lambda x, w, b: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[None] + b[None]
    ours, reference = (jax.vjp(f, x, scale, bias) for f in (lambda *a: ops.layer_norm(*a, 1e-5), plain))
    close(ours[0], reference[0], 1e-5)
    close(ours[1](g), reference[1](g), 1e-5)
    close(ops.layer_norm(x, scale, None, 1e-5), reference[0] - bias[None], 1e-5)


@pytest.mark.parametrize("name", list(ops.ACTIVATIONS))
def test_activation_gradient_is_the_slope(name):
    f, x = ops.ACTIVATIONS[name], jnp.concatenate([jnp.linspace(-6, 6, 41), jnp.array([-50.0, 50.0])])
    slope = jax.jit(jax.vmap(jax.grad(lambda t: f(t[None])[0])))(x)
    numeric = (f(x + 1e-2) - f(x - 1e-2)) / 2e-2
    np.testing.assert_allclose(slope[jnp.abs(x) > 0.02], numeric[jnp.abs(x) > 0.02], atol=2e-3)
    assert f(jnp.float32(50.0)[None]) == 50


def test_quick_gelu_has_the_value_and_gradient_of_its_formula():
    x = jnp.concatenate([jnp.linspace(-9, 9, 37), jnp.array([-80.0, -1e-30, 1e-30, 80.0])])  # 0 among them
    g = jnp.cos(jnp.arange(x.size, dtype=jnp.float32))
    ours, reference = (jax.vjp(f, x) for f in (ops.quick_gelu, lambda t: t * jax.nn.sigmoid(1.702 * t)))
    close(ours[0], reference[0], 1e-6)
    close(ours[1](g), reference[1](g), 1e-6)


# ---- dropout


def keep_rates(x):
    return np.asarray(x != 0, np.float64).mean()


def masks(key=3, rows=8, length=16, features=64, site=1, layer=0, rate=0.1):
    seeds = ops.layer_seeds(ops.token_seeds(jnp.uint32(key), jnp.arange(rows), length), jnp.int32(layer))
    return np.asarray(ops.dropout(jnp.ones((rows, length, features)), rate, seeds, site))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_stated_share_and_scales_it(rate):
    x = masks(rows=32, rate=rate)
    error = 5 * np.sqrt(rate * (1 - rate) / x.size)
    assert abs(keep_rates(x) - (1 - rate)) < error
    np.testing.assert_allclose(np.unique(x), [0, 1 / (1 - rate)], rtol=1e-6)
    for axes in ((0, 1), (0, 2), (1, 2)):  # no feature, position or row is kept much more often than another
        means = (x != 0).mean(axes)
        assert np.abs(means - (1 - rate)).max() < 6 * np.sqrt(rate * (1 - rate) * means.size / x.size)


@pytest.mark.parametrize("change", [{"key": 4}, {"layer": 1}, {"site": 2}])
def test_dropout_is_independent_over_keys_layers_and_sites(change):
    a, b = (masks(rate=0.5, **c) != 0 for c in ({}, change))
    assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size)


def test_dropout_is_independent_over_rows_positions_and_features():
    x = (masks(rate=0.5, rows=32) != 0) * 2.0 - 1
    for axis in range(3):
        for shift in (1, 2, 7):
            assert abs((x * np.roll(x, shift, axis)).mean()) < 5 / np.sqrt(x.size)


def test_dropout_gradient_is_dropped_where_the_value_was():
    seeds = ops.token_seeds(KEY, jnp.arange(3), 4)
    drop = lambda x: ops.dropout(x, 0.3, seeds, 1)
    x = jnp.ones((3, 4, 8))
    y, pull = jax.vjp(drop, x)
    np.testing.assert_array_equal(pull(2 * x)[0], 2 * y)
