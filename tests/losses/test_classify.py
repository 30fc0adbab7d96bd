"""Losses of labelled rows and of tokens against numpy in float64, in value; gradients by finite differences."""

import jax
import numpy as np
import pytest

from embedjax.losses import classify, tokens

RNG = np.random.default_rng(0)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def slope(function, x, along, step=1e-6):
    return (function(x + step * along) - function(x - step * along)) / (2 * step)


def assert_gradient(function, x):
    """Along a random direction; in float64."""
    along = np.random.default_rng(1).normal(size=x.shape)
    function = jax.jit(function)
    found = (jax.jit(jax.grad(function))(x) * along).sum()
    np.testing.assert_allclose(found, slope(function, x, along), rtol=1e-6, atol=1e-9)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 3.0)])
def test_cross_entropy_is_a_mean_weighted_by_class(weights, smoothing):
    logits, labels = RNG.normal(size=(6, 3)), np.array([0, 1, 2, 2, 1, 0])
    w = np.array(weights or (1.0, 1.0, 1.0))
    cost = -log_softmax(logits) * w
    own = np.eye(3)[labels]
    wanted = ((1 - smoothing) * (own * cost).sum() + smoothing / 3 * cost.sum()) / w[labels].sum()
    loss = jax.jit(lambda x: classify.cross_entropy(x, labels, weights=weights, smoothing=smoothing))
    value, metrics = loss(logits)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(metrics["weight"], w[labels].sum())
    np.testing.assert_allclose(metrics["accuracy"], (w[labels] * (logits.argmax(1) == labels)).sum() / w[labels].sum())
    assert_gradient(lambda x: loss(x)[0], logits)


def test_means_of_parts_by_weight_are_those_of_the_whole():
    logits, labels, weights = RNG.normal(size=(8, 3)), np.array([0, 1, 2, 2, 1, 0, 2, 2]), (1.0, 0.5, 3.0)
    logits[np.arange(3), labels[:3]] += 9  # some are right, and they weigh differently
    compare = lambda rows: classify.cross_entropy(logits[rows], labels[rows], weights=weights)
    whole, parts = compare(slice(8)), [compare(slice(0, 3)), compare(slice(3, 8))]
    weigh = lambda x: sum(each[1]["weight"] * x(each) for each in parts) / sum(each[1]["weight"] for each in parts)
    np.testing.assert_allclose(weigh(lambda each: each[0]), whole[0], rtol=1e-12)
    np.testing.assert_allclose(weigh(lambda each: each[1]["accuracy"]), whole[1]["accuracy"], rtol=1e-12)
    assert 0 < whole[1]["accuracy"] < 1


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_cannot_pass_unseen(label):
    assert np.isnan(classify.cross_entropy(np.zeros((2, 3)), np.array([0, label]))[0])


def test_multi_label_is_a_mean_over_rows_and_classes():
    logits, labels = RNG.normal(size=(5, 3)), (RNG.random((5, 3)) < 0.5).astype(np.float64)
    weights, e = (1.0, 0.5, 3.0), 0.2
    target = labels * (1 - e) + e / 2
    p = 1 / (1 + np.exp(-logits))
    wanted = -(np.array(weights) * (target * np.log(p) + (1 - target) * np.log(1 - p))).mean()
    loss = jax.jit(lambda x: classify.multi_label(x, labels, weights=weights, smoothing=e))
    np.testing.assert_allclose(loss(logits)[0], wanted, rtol=1e-12)
    assert loss(logits)[1]["accuracy"] == ((p > 0.5) == labels).mean().astype(np.float32)
    assert_gradient(lambda x: loss(x)[0], logits)
    assert np.isfinite(loss(1e4 * logits)[0])


def sup_con(z, labels, scale):
    """Khosla et al. 2020, eq. 2, with loops; the mean over vectors that have a positive."""
    z, costs = z / np.linalg.norm(z, axis=1, keepdims=True), []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        total = np.log(sum(np.exp(scale * z[i] @ z[a]) for a in others))
        if positives:
            costs.append(np.mean([total - scale * z[i] @ z[p] for p in positives]))
    return np.mean(costs)


@pytest.mark.parametrize("views", [1, 2])
def test_sup_con(views):
    vectors, labels = RNG.normal(size=(6, views, 4)), np.array([0, 1, 0, 2, 1, 0])  # with one view the 2 has no positive
    loss = jax.jit(lambda x: classify.sup_con(x, labels, 10.0))
    value, metrics = loss(vectors)
    np.testing.assert_allclose(value, sup_con(vectors.reshape(-1, 4), np.repeat(labels, views), 10.0), rtol=1e-12)
    np.testing.assert_allclose(metrics["paired"], 5 / 6 if views == 1 else 1, rtol=1e-6)
    assert_gradient(lambda x: loss(x)[0], vectors)


def test_sup_con_without_any_positive_is_zero_and_finite():
    vectors = RNG.normal(size=(3, 1, 4))
    value, grad = jax.jit(jax.value_and_grad(lambda x: classify.sup_con(x, np.arange(3), 10.0)[0]))(vectors)
    assert value == 0
    assert np.isfinite(grad).all()


def test_tokens_are_counted_by_row_and_averaged_over_all():
    logits, labels = RNG.normal(size=(3, 4, 7)), RNG.integers(0, 7, (3, 4))
    counts = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
    cost = -np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]
    told = jax.jit(tokens.cross_entropy)(logits, labels, counts)
    np.testing.assert_allclose(told.loss, (cost * counts).sum(1), rtol=1e-12)
    np.testing.assert_array_equal(told.count, counts.sum(1))
    np.testing.assert_array_equal(told.right, ((logits.argmax(-1) == labels) & counts).sum(1))
    value, metrics = tokens.mean(told)
    np.testing.assert_allclose(value, cost[counts].mean(), rtol=1e-12)
    assert metrics["weight"] == 5
    assert_gradient(lambda x: tokens.mean(tokens.cross_entropy(x, labels, counts))[0], logits)
    assert tokens.mean(tokens.cross_entropy(logits, labels, counts & False))[0] == 0
