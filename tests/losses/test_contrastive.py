"""The dense definition against loops in float64 that say what counts, pair by pair; gradients against its differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.losses import compose, contrastive
from embedjax.losses.contrastive import Hashes, Pairs, Rule

RULES = {
    "one way": {},
    "clip": {"directions": ("q2d", "d2q"), "partition": "per_direction"},
    "gte": {"directions": ("q2d", "d2q", "q2q", "d2d")},
    "gist": {"directions": ("p2p", "q2q", "q2d")},
    "both ways in one": {"directions": ("q2d", "d2q")},
    "sigmoid": {"criterion": "sigmoid"},
}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Loops:
    """The loss, one pair at a time."""

    def __init__(self, pairs, rule, scale, bias, frozen=None):
        self.rule, self.scale, self.bias, self.hashes = rule, scale, bias, pairs.hashes
        self.frozen = frozen or self
        vectors, guide = (unit(pairs.anchor), unit(pairs.candidates)), pairs.guide
        self.b, self.c = pairs.candidates.shape[:2]
        name = lambda kind, i, k: vectors[0][i] if kind == "query" else vectors[1][i, k]
        self.cosine = lambda x, y: float(name(*x) @ name(*y))
        if guide is not None:
            g = unit(guide.anchor), unit(guide.candidates)
            told = lambda kind, i, k: g[0][i] if kind == "query" else g[1][i, k]
            self.guided = lambda x, y: float(told(*x) @ told(*y))
        self.guide = guide

    def word(self, item):
        kind, i, k = item
        return tuple((self.hashes.anchor[i] if kind == "query" else self.hashes.candidates[i, k]).tolist())

    def counts(self, i, x, y):
        """Whether y is a negative of row i, whose own text x it is compared with."""
        kind, j, k = y
        if self.hashes is not None:
            query, positive = self.word(("query", i, 0)), self.word(("doc", i, 0))
            if self.word(y) in (query, positive):
                return False
            if kind == "doc" and k == 0 and self.word(("query", j, 0)) == query:
                return False
            if kind == "query" and self.word(("doc", j, 0)) == positive:
                return False
        if self.guide is not None:
            own = self.guided(("query", i, 0), ("doc", i, 0))
            share = abs(own) if self.rule.margin_kind == "relative" else 1.0
            if self.guided(x, y) > own - self.rule.margin * share:
                return False
        return True

    def scores(self, i, x, candidates):
        """Scores of text x of row i with those of the candidates that count."""
        found = []
        for y in candidates:
            positive = {x, y} == {("query", i, 0), ("doc", i, 0)}
            if not positive and not self.counts(i, x, y):
                continue
            score = self.scale * self.cosine(x, y) + (self.bias if self.rule.criterion == "sigmoid" else 0.0)
            if x[0] == "query" and y[0] == "doc" and not positive:
                mine = y[1] == i
                if self.rule.hardness == "all" or self.rule.hardness == ("hard" if mine else "in_batch"):
                    score += self.rule.strength * self.frozen.cosine(x, y)
            found.append(score)
        return found

    def row(self, i):
        query, positive = ("query", i, 0), ("doc", i, 0)
        documents = [("doc", j, k) for j in range(self.b) for k in range(self.c)]
        queries = [("query", j, 0) for j in range(self.b)]
        others = lambda items: [item for item in items if item[1] != i]
        compared = {
            "q2d": (query, documents),
            "d2q": (positive, queries),
            "q2q": (query, others(queries)),
            "d2d": (positive, others(documents)),
            "p2p": (positive, others([item for item in documents if item[2] == 0])),
        }
        scores = [self.scores(i, *compared[direction]) for direction in self.rule.directions]
        own = self.scores(i, query, [positive])[0]
        if self.rule.criterion == "sigmoid":
            return np.log1p(np.exp(scores[0])).sum() - own
        parts = [sum(scores, [])] if self.rule.partition == "joint" else scores
        return np.mean([np.log(np.exp(part).sum()) - own for part in parts])

    def value(self):
        return np.mean([self.row(i) for i in range(self.b)])


def smaller(pairs, rows=7, width=6):
    cut = jax.tree.map(lambda x: x[:rows], pairs)
    return cut._replace(anchor=cut.anchor[..., :width], candidates=cut.candidates[..., :width])


def dense(pairs, rule, scale, bias):
    return contrastive.loss(pairs, rule, scale, bias)[0]


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("masks", ["none", "hashes", "guide"])
@pytest.mark.parametrize("name", RULES)
def test_equals_loops_in_value_and_gradient(make_pairs, name, masks, negatives):
    pairs = smaller(make_pairs(negatives, duplicates=True, guide=masks == "guide", seed=negatives))
    pairs = pairs._replace(hashes=None if masks == "none" else pairs.hashes)
    hardness = "none" if name == "sigmoid" else ("in_batch", "hard", "all")[len(masks) % 3]
    kind = "relative" if negatives else "absolute"
    rule = Rule(**RULES[name], hardness=hardness, strength=3.0, margin=0.1, margin_kind=kind)
    scale, bias = 6.0, -1.5
    with jax.enable_x64(True):
        value, (grads, of_scale, of_bias) = jax.value_and_grad(
            lambda vectors, scale, bias: dense(pairs._replace(anchor=vectors[0], candidates=vectors[1]), rule, scale, bias),
            (0, 1, 2),
        )((pairs.anchor, pairs.candidates), jnp.float64(scale), jnp.float64(bias))
    loops = Loops(pairs, rule, scale, bias)
    np.testing.assert_allclose(value, loops.value(), rtol=1e-12)
    # Along a random direction, and along the scale and the bias; the hardness does not move.
    rng, eps = np.random.default_rng(5), 1e-5
    way = rng.normal(size=pairs.anchor.shape), rng.normal(size=pairs.candidates.shape)
    moved = lambda t: pairs._replace(anchor=pairs.anchor + t * way[0], candidates=pairs.candidates + t * way[1])
    at = lambda p, s, b: Loops(p, rule, s, b, frozen=loops).value()
    slope = lambda f: (f(eps) - f(-eps)) / (2 * eps)
    along = sum((np.asarray(g) * w).sum() for g, w in zip(grads, way, strict=True))
    np.testing.assert_allclose(along, slope(lambda t: at(moved(t), scale, bias)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(of_scale, slope(lambda t: at(pairs, scale + t, bias)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(of_bias, slope(lambda t: at(pairs, scale, bias + t)), rtol=1e-6, atol=1e-8)


def test_matryoshka_is_the_weighted_sum_over_normalised_prefixes(make_pairs):
    pairs, rule = smaller(make_pairs(1, duplicates=True)), Rule(**RULES["gte"])
    with jax.enable_x64(True):
        found = compose.matryoshka(contrastive.loss, (6, 2, 3), (1.0, 0.5, 2.0))(pairs, rule, 5.0)[0]
    parts = [Loops(smaller(pairs, width=d), rule, 5.0, 0.0).value() for d in (6, 2, 3)]
    np.testing.assert_allclose(found, parts[0] + 0.5 * parts[1] + 2 * parts[2], rtol=1e-12)


def test_different_texts_mask_nothing(make_pairs):
    pairs = make_pairs(1)
    for rule in (Rule(**options) for options in RULES.values()):
        assert dense(pairs, rule, 10.0, 0.0) == dense(pairs._replace(hashes=None), rule, 10.0, 0.0)


@pytest.mark.parametrize("name", [name for name in RULES if name != "sigmoid"])
def test_a_row_without_negatives_costs_nothing(name, make_pairs):
    pairs = make_pairs(0)
    same = Hashes(np.zeros_like(pairs.hashes.anchor), np.zeros_like(pairs.hashes.candidates))
    value, grads = jax.value_and_grad(lambda a: dense(pairs._replace(anchor=a, hashes=same), Rule(**RULES[name]), 20.0, 0.0))(
        pairs.anchor.astype(np.float32)
    )
    # In one partition of both directions the positive counts twice.
    np.testing.assert_allclose(value, np.log(2) if name in ("gte", "both ways in one") else 0, atol=1e-6)
    assert not np.any(grads)


def test_zero_vectors_have_finite_gradients():
    zeros = jnp.zeros((8, 6)), jnp.zeros((8, 2, 6))
    value, grads = jax.value_and_grad(lambda v: dense(Pairs(*v), Rule(), 20.0, 0.0))(zeros)
    np.testing.assert_allclose(value, np.log(16), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in grads)


def test_metrics_count_rows_whose_positive_wins():
    eye = jnp.eye(8, 10)
    _, metrics = contrastive.loss(Pairs(eye, eye[:, None]), Rule(), 20.0)
    assert metrics["top1"] == 1 and metrics["positive"] == 1
    _, metrics = contrastive.loss(Pairs(eye, jnp.roll(eye, 1, 0)[:, None]), Rule(), 20.0)
    assert metrics["top1"] == 0
