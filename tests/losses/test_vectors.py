"""Losses of pairs, triplets and distillation against loops in numpy, and their gradients against differences, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.losses import compose, distill, pairwise, triplet

B, D = 10, 5
RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(2, B, D))
C = RNG.normal(size=(B, 3, D))
SCORES = RNG.uniform(size=(B, 3)).round(1)  # some are equal
TAUGHT_X, TAUGHT_C = RNG.normal(size=(B, 3)), RNG.normal(size=(B, 3, 3))  # a teacher's vectors, of another width
BINARY = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 0])
CLASSES = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 2])  # one of them has a single text
RELU = lambda x: max(x, 0.0)

OURS = {
    "contrastive": lambda x, y, c: pairwise.contrastive(x, y, BINARY, "cosine", 0.9),
    "online contrastive": lambda x, y, c: pairwise.online_contrastive(x, y, BINARY, "euclidean", 3.5),
    "regression": lambda x, y, c: pairwise.regression(x, y, SCORES[:, 0], "dot"),
    "cosent": lambda x, y, c: pairwise.cosent(x, y, jnp.asarray(SCORES[:, 0]), 5.0, "cosine"),
    "angle": lambda x, y, c: pairwise.angle(x, y, jnp.asarray(SCORES[:, 0]), 5.0),
    "triplet": lambda x, y, c: triplet.triplet(x, y, c, "manhattan", 1.0),
    "batch all": lambda x, y, c: triplet.batch_all(triplet.distances(x, "euclidean"), jnp.asarray(CLASSES), 0.5),
    "batch hard": lambda x, y, c: triplet.batch_hard(triplet.distances(x, "cosine"), jnp.asarray(CLASSES), 0.1),
    "soft margin": lambda x, y, c: triplet.batch_hard_soft_margin(triplet.distances(x, "euclidean"), jnp.asarray(CLASSES)),
    "semi-hard": lambda x, y, c: triplet.batch_semi_hard(triplet.distances(x, "euclidean"), jnp.asarray(CLASSES), 0.5),
    "mega-batch margin": lambda x, y, c: triplet.mega_batch_margin(x, y, 0.8, 0.3),
    "vectors": lambda x, y, c: distill.vectors(c, Y[:, None], "l2"),
    "margin-mse": lambda x, y, c: distill.margin_mse(distill.scores(x, c, "dot"), SCORES),
    "kl": lambda x, y, c: distill.kl(distill.scores(x, c, "cosine"), SCORES, 0.5, 2.0),
    "scores of a batch": lambda x, y, c: distill.contrastive(
        x, c, (jnp.asarray(TAUGHT_X), TAUGHT_C), 4.0, 1.5, ("cosine", "dot")
    ),
    "orthogonal": lambda x, y, c: sum(part.sum() for part in compose.global_orthogonal(jnp.moveaxis(c, 1, 0), "cosine")),
    "layers": lambda x, y, c: compose.layer_divergence({"anchor": c}, {"anchor": jnp.asarray(Y)}, 0.3),
}


def cosine(x, y):
    return x @ y / (math.sqrt(x @ x) * math.sqrt(y @ y))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def ranking(s):
    pairs = [(i, j) for i in range(B) for j in range(B) if SCORES[i, 0] < SCORES[j, 0]]
    return math.log(1 + sum(math.exp(s[i] - s[j]) for i, j in pairs))


def angle(x, y):
    x, y = (np.append(v, 0) / np.linalg.norm(v) for v in (x, y))
    u, v = x[:3] + 1j * x[3:], y[:3] + 1j * y[3:]
    product = (u * v.conj()).sum()
    return abs(product.real + product.imag)


def mined(kind):
    """Of each text: (distances to its label's others, distances to other labels)."""
    distance = (lambda x, y: 1 - cosine(x, y)) if kind == "cosine" else (lambda x, y: np.linalg.norm(x - y))
    for i in range(B):
        d = [distance(X[i], X[j]) for j in range(B)]
        yield (
            [d[j] for j in range(B) if CLASSES[j] == CLASSES[i] and j != i],
            [d[j] for j in range(B) if CLASSES[j] != CLASSES[i]],
        )


def batch_all():
    costs = [p - n + 0.5 for near, far in mined("euclidean") for p in near for n in far]
    return sum(c for c in costs if c > 0) / sum(c > 0 for c in costs)


def semi_hard():
    costs = [RELU(p - min((n for n in far if n > p), default=max(far)) + 0.5) for near, far in mined("euclidean") for p in near]
    return np.mean(costs)


def mega_batch():
    s = np.array([[cosine(x, y) for y in Y] for x in X])
    return np.mean([RELU(0.8 - s[i, i]) + RELU(max(np.delete(s[i], i)) - 0.3) for i in range(B)])


def online():
    d = [np.linalg.norm(x - y + 1e-6) for x, y in zip(X, Y, strict=True)]
    near, far = [v for v, k in zip(d, BINARY, strict=True) if k], [v for v, k in zip(d, BINARY, strict=True) if not k]
    return sum(v**2 for v in near if v > min(far)) + sum(RELU(3.5 - v) ** 2 for v in far if v < max(near))


def kl(p, q):
    return (p * np.log(p / q)).sum()


def of_a_batch():
    """Rows over all candidates, and the columns of the positives over all anchors."""
    student = [[4.0 * cosine(x, y) for y in (*C[:, 0], *C[:, 1], *C[:, 2])] for x in X]
    teacher = [[1.5 * x @ y for y in (*TAUGHT_C[:, 0], *TAUGHT_C[:, 1], *TAUGHT_C[:, 2])] for x in TAUGHT_X]
    student, teacher = np.array(student), np.array(teacher)
    rows = np.mean([kl(softmax(teacher[i]), softmax(student[i])) for i in range(B)])
    columns = np.mean([kl(softmax(teacher[:, j]), softmax(student[:, j])) for j in range(B)])
    return (rows + columns) / 2


def orthogonal():
    total = 0
    for column in np.moveaxis(C, 1, 0):
        s = [cosine(column[i], column[j]) for i in range(B) for j in range(B) if i != j]
        total += np.mean(s) ** 2 + RELU(np.mean(np.square(s)) - 1 / D)
    return total


def wanted():
    d = np.array([1 - cosine(x, y) for x, y in zip(X, Y, strict=True)])
    soft = lambda near, far: math.log(1 + math.exp((max(near) if near else 0) - min(far)))
    s = np.array([[cosine(x, y) for y in row] for x, row in zip(X, C, strict=True)])
    return {
        "contrastive": np.mean([d[i] ** 2 if BINARY[i] else RELU(0.9 - d[i]) ** 2 for i in range(B)]) / 2,
        "online contrastive": online(),
        "regression": np.mean(((X * Y).sum(1) - SCORES[:, 0]) ** 2),
        "cosent": ranking([5 * cosine(x, y) for x, y in zip(X, Y, strict=True)]),
        "angle": ranking([5 * angle(x, y) for x, y in zip(X, Y, strict=True)]),
        "triplet": np.mean([RELU(abs(X[i] - Y[i]).sum() - abs(X[i] - n).sum() + 1) for i in range(B) for n in C[i]]),
        "batch all": batch_all(),
        "batch hard": np.mean([RELU((max(near) if near else 0) - min(far) + 0.1) for near, far in mined("cosine")]),
        "soft margin": np.mean([soft(near, far) for near, far in mined("euclidean")]),
        "semi-hard": semi_hard(),
        "mega-batch margin": mega_batch(),
        "vectors": np.mean([np.linalg.norm(C[i, k] - Y[i]) for i in range(B) for k in range(3)]),
        "margin-mse": np.mean(
            [(X[i] @ (C[i, 0] - C[i, k]) - (SCORES[i, 0] - SCORES[i, k])) ** 2 for i in range(B) for k in (1, 2)]
        ),
        "kl": np.mean([kl(softmax(SCORES[i] / 2), softmax(s[i] / 0.5)) for i in range(B)]) * 0.25,
        "scores of a batch": of_a_batch(),
        "orthogonal": orthogonal(),
        "layers": np.mean([kl(softmax(Y[i] / 0.3), softmax(C[i, k] / 0.3)) for i in range(B) for k in range(3)]) * 3 * 0.3,
    }


@pytest.fixture(scope="module")
def found():
    """Every loss, its gradient, and its values a little way along a direction and back: one program."""
    step = 1e-6
    along = tuple(RNG.normal(size=x.shape) for x in (X, Y, C))

    def run(*vectors):
        values = lambda *v: {name: loss(*v) for name, loss in OURS.items()}
        value = values(*vectors)
        back = {name: jax.grad(loss, (0, 1, 2))(*vectors) for name, loss in OURS.items()}
        ahead, behind = (values(*(x + sign * step * a for x, a in zip(vectors, along, strict=True))) for sign in (1, -1))
        return value, back, jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)

    with jax.enable_x64(True):
        value, back, difference = jax.device_get(jax.jit(run)(X, Y, C))
    slope = {name: sum((g * a).sum() for g, a in zip(grads, along, strict=True)) for name, grads in back.items()}
    return value, slope, difference


@pytest.mark.parametrize("name", OURS)
def test_value_and_gradient(found, name):
    value, slope, difference = found
    np.testing.assert_allclose(value[name], wanted()[name], rtol=1e-10)
    np.testing.assert_allclose(slope[name], difference[name], rtol=1e-6, atol=1e-8)
    assert value[name] > 1e-3


@pytest.mark.parametrize("kind", ["cosine", "euclidean", "manhattan"])
def test_a_vector_that_is_no_number_makes_the_loss_none(kind):
    broken = X.copy()
    broken[3, 2] = np.nan
    assert np.isnan(pairwise.distance(broken, Y, kind)[3])
    assert np.isnan(triplet.triplet(broken, Y, C, kind, 1.0))
    if kind != "manhattan":
        assert np.isnan(triplet.batch_hard_soft_margin(triplet.distances(jnp.asarray(broken), kind), jnp.asarray(CLASSES)))


def test_equal_and_zero_vectors_have_finite_gradients():
    x = np.zeros((4, 3))
    x[2:] = 1.0
    label = jnp.asarray([0, 0, 1, 1])

    def total(x):
        d = triplet.distances(x, "euclidean")
        mine = triplet.batch_all(d, label, 5.0) + triplet.batch_semi_hard(d, label, 5.0) + triplet.batch_hard(d, label, 5.0)
        return mine + sum(pairwise.distance(x, x, kind).sum() for kind in ("cosine", "euclidean", "manhattan"))

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.asarray(x))).all()
