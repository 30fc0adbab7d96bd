"""The definition of in-batch softmax against plain loops in float64, in value and gradient, on 1 to 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from embedjax.losses import contrastive
from embedjax.losses.contrastive import Hashes

B, D = 8, 6


def make(negatives, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    # Few distinct words, so that equal anchors, positives and negatives all occur.
    words = lambda *shape: np.stack([rng.integers(0, 4, shape), np.zeros(shape)], -1).astype(np.uint32)
    return draw(B, D), draw(B, 1 + negatives, D), Hashes(words(B), words(B, 1 + negatives))


def loops(anchor, candidates, scale, hashes):
    """The loss, one row and one candidate at a time, in float64."""
    unit = lambda x: x / np.linalg.norm(x)
    total = 0.0
    for i in range(B):
        scores, own = [], None
        for j in range(B):
            for k in range(candidates.shape[1]):
                word = hashes.candidates[j, k].tolist()
                mine = j == i and k == 0
                same_positive = word == hashes.candidates[i, 0].tolist()
                same_anchor = word == hashes.anchor[i].tolist()
                of_equal_anchor = k == 0 and hashes.anchor[j].tolist() == hashes.anchor[i].tolist()
                if not mine and (same_positive or same_anchor or of_equal_anchor):
                    continue
                score = scale * float(unit(anchor[i].astype(np.float64)) @ unit(candidates[j, k].astype(np.float64)))
                own = score if mine else own
                scores.append(score)
        total += np.log(np.exp(scores).sum()) - own
    return total / B


def loss(anchor, candidates, scale, hashes):
    return contrastive.multiple_negatives(anchor, candidates, scale, contrastive.false_negatives(hashes))[0]


@pytest.mark.parametrize("negatives", [0, 1, 7])
def test_equals_plain_loops(negatives):
    anchor, candidates, hashes = make(negatives)
    np.testing.assert_allclose(loss(anchor, candidates, 20.0, hashes), loops(anchor, candidates, 20.0, hashes), rtol=1e-5)


@pytest.mark.parametrize("negatives", [0, 3])
def test_gradient_equals_differences_of_plain_loops(negatives):
    anchor, candidates, hashes = make(negatives, seed=1)
    found = jax.grad(loss, argnums=(0, 1, 2))(anchor, candidates, 5.0, hashes)
    anchor64, candidates64, eps = anchor.astype(np.float64), candidates.astype(np.float64), 1e-6

    def difference(array, index, value):
        moved = []
        for sign in (1, -1):
            array[index] += sign * eps
            moved.append(value())
            array[index] -= sign * eps
        return (moved[0] - moved[1]) / (2 * eps)

    value = lambda: loops(anchor64, candidates64, 5.0, hashes)
    wanted = [np.zeros_like(anchor64), np.zeros_like(candidates64)]
    for array, out in zip((anchor64, candidates64), wanted, strict=True):
        for index in np.ndindex(array.shape):
            out[index] = difference(array, index, value)
    np.testing.assert_allclose(found[0], wanted[0], atol=2e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=2e-6)
    scale = [loops(anchor64, candidates64, 5.0 + sign * eps, hashes) for sign in (1, -1)]
    np.testing.assert_allclose(found[2], (scale[0] - scale[1]) / (2 * eps), rtol=1e-4)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_same_on_any_number_of_devices(devices):
    arrays = make(2, seed=2)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    placed = jax.device_put(arrays, NamedSharding(mesh, P("data")))
    both = jax.jit(jax.value_and_grad(lambda a, c, h: loss(a, c, 20.0, h), argnums=(0, 1)))
    for wanted, found in zip(jax.tree.leaves(both(*arrays)), jax.tree.leaves(both(*placed)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_row_without_negatives_costs_nothing():
    anchor, candidates, _ = make(0)
    same = Hashes(np.zeros((B, 2), np.uint32), np.zeros((B, 1, 2), np.uint32))
    value, grads = jax.value_and_grad(loss)(anchor, candidates, 20.0, same)
    assert value == 0 and not np.any(grads)


def test_zero_vectors_have_finite_gradients():
    zeros = jnp.zeros((B, D)), jnp.zeros((B, 2, D))
    value, grads = jax.value_and_grad(lambda a, c: contrastive.multiple_negatives(a, c, 20.0)[0], argnums=(0, 1))(*zeros)
    np.testing.assert_allclose(value, np.log(2 * B), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in grads)


def test_metrics_count_rows_whose_positive_wins():
    eye = jnp.eye(B, D + 2)
    _, metrics = contrastive.multiple_negatives(eye, eye[:, None], 20.0)
    assert metrics["top1"] == 1 and metrics["positive"] == 1
    _, metrics = contrastive.multiple_negatives(eye, jnp.roll(eye, 1, 0)[:, None], 20.0)
    assert metrics["top1"] == 0
