"""Token pooling: groups that are seen by eye, how many are left, what stays as it is."""

import numpy as np
import pytest

from embedjax.config.errors import ConfigError
from embedjax.evaluate.pool import groups, means, pooled
from embedjax.evaluate.token_vectors import TokenVectors


def unit(*shape, seed=0):
    found = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def test_like_tokens_make_a_group_and_the_first_stays_alone():
    directions = np.eye(5, 8, dtype=np.float32)
    kinds = np.array([0, 1, 2, 3, 1, 2, 3, 1, 3])  # the first is of a kind of its own, and protected
    vectors = directions[kinds] + 0.01 * unit(9, 8)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = groups(vectors, 2, protected=1)
    assert found[0] == 0 and found.max() == 4 and (found[1:] > 0).all()
    at_3 = groups(vectors, 3, protected=1)  # 8 // 3 = 2 groups: a kind is never torn apart
    assert at_3.max() == 2
    for kind in (1, 2, 3):
        assert len(set(at_3[kinds == kind].tolist())) == 1
    made = means(vectors, at_3)
    np.testing.assert_array_equal(made[0], vectors[0])
    for n in (1, 2):
        mean = vectors[at_3 == n].mean(0)
        np.testing.assert_allclose(made[n], mean / np.linalg.norm(mean), rtol=1e-6)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 9, 60])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_how_many_are_left(length, factor, protected):
    vectors = unit(length, 8)
    found = pooled(vectors, factor, protected)
    rest = max(length - protected, 0)
    left = rest if rest <= 1 else max(rest // factor, 1)
    assert len(found) == min(length, protected) + left
    np.testing.assert_array_equal(found[:protected], vectors[:protected])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_equal_tokens_and_a_factor_of_1():
    vectors = np.repeat(unit(1, 8), 20, axis=0)
    np.testing.assert_allclose(pooled(vectors, 2), vectors[: len(pooled(vectors, 2))], rtol=1e-6)
    assert pooled(vectors, 1) is vectors


def test_of_many_texts_before_they_are_quantized():
    texts = [unit(n, 8, seed=n) for n in (5, 0, 12, 1)]
    tokens = TokenVectors.joined(texts, 8)
    made = tokens.pooled(2)
    assert made.lengths.tolist() == [3, 0, 6, 1] and made.nbytes == 10 * 32
    np.testing.assert_array_equal(made.of(2), pooled(texts[2], 2))
    with pytest.raises(ConfigError, match="int8 already; pool them before"):
        tokens.quantized("int8").pooled(2)
    with pytest.raises(ConfigError, match="pool is 0"):
        tokens.pooled(0)
