"""Vectors as they will be stored: the numbers of `embedjax.quantize`, and a gradient that passes as if they were not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import quantize
from embedjax.losses import quantized

N, D = 40, 12
RNG = np.random.default_rng(0)
WEIGHTS = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)


def inside():
    """Vectors whose numbers lie inside a 255th of their dimension's range, away from its borders, and the two ends."""
    low, width = RNG.uniform(-1, 0, (1, D)), RNG.uniform(0.5, 2, (1, D))
    places = RNG.integers(0, 255, (N, D)) + RNG.uniform(0.05, 0.95, (N, D))
    places[0], places[1] = 0, 255
    return (low + width * places / 255).astype(np.float32)


def there_and_back(x, precision):
    ranges = quantize.ranges_of(x) if precision == "int8" else None
    return quantize.dequantize(quantize.quantize(x, precision, ranges), precision, x.shape[1], ranges)


def test_int8_is_what_is_read_back_from_codes():
    x = inside()
    x[:, 3] = 0.25  # all alike: itself, not the middle of a step
    found, wanted = np.asarray(jax.jit(quantized.int8)(x)), there_and_back(x, "int8")
    np.testing.assert_allclose(found[2:], wanted[2:], atol=1e-6)
    half = np.ptp(x, 0) / 255 / 2
    assert (np.abs(found - x) <= half * 1.001).all() and (found[:, 3] == 0.25).all()
    assert all(len(np.unique(found[:, d])) > 10 for d in range(D) if d != 3)


def test_binary_is_what_is_read_back_from_codes():
    x = RNG.normal(size=(N, D)).astype(np.float32)
    x[0, :3] = 0.0, -0.0, 1e-30
    np.testing.assert_array_equal(jax.jit(quantized.binary)(x), there_and_back(x, "binary"))


@pytest.mark.parametrize("store", [quantized.int8, quantized.binary], ids=["int8", "binary"])
def test_the_gradient_is_that_at_the_stored_vector_with_respect_to_the_vector(store):
    """Of f(store(x)) it is f'(store(x)); what is not finite stays visible; half floats are taken as float32."""
    x = jnp.asarray(inside())
    f = lambda y: (WEIGHTS * y**2).sum()
    (value, found), at = jax.jit(lambda x: (jax.value_and_grad(lambda x: f(store(x)))(x), store(x)))(x)
    np.testing.assert_allclose(found, 2 * WEIGHTS * at, rtol=1e-6)
    np.testing.assert_allclose(value, f(at), rtol=1e-5)
    broken = jax.jit(store)(np.where(np.arange(N)[:, None] == 0, [[np.nan]], np.where(np.arange(N)[:, None] == 1, np.inf, x)))
    assert np.isnan(broken[:2]).all()
    assert jax.eval_shape(store, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_ranges_are_those_of_the_vectors_that_count():
    x = inside().reshape(N // 4, 4, D)
    counted = np.arange(N).reshape(N // 4, 4) != 5
    odd = np.where(counted[..., None], x, 1e6)
    found = np.asarray(jax.jit(quantized.int8)(odd, counted))
    np.testing.assert_allclose(found[counted], jax.jit(quantized.int8)(x[counted]), atol=1e-6)


def test_only_named_columns_are_stored_and_at_length_1_only_where_asked():
    vectors = {"anchor": jnp.asarray(inside()), "positive": jnp.asarray(3 * RNG.normal(size=(N, 2, D)), jnp.float32)}
    found = quantized.stored(vectors, "int8", ("positive", "elsewhere"), ())
    assert found.keys() == vectors.keys() and found["anchor"] is vectors["anchor"]
    np.testing.assert_array_equal(found["positive"], quantized.int8(vectors["positive"]))
    unit = quantized.stored(vectors, "int8", ("positive",), ("positive",))["positive"]
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=0.01)
    assert quantized.stored(vectors, "float32", ("anchor", "positive"), ("anchor",)) == vectors
