"""The choice of hard negatives: against a plain loop over each anchor's documents."""

import numpy as np
import pytest

from embedjax.config import Mine, Negatives
from embedjax.config.errors import ConfigError
from embedjax.mine.choose import choose, filled, highest, mixed

Q, K, TOTAL = 40, 30, 60


@pytest.fixture(scope="module")
def ranked():
    """Nearest documents of 40 anchors, their scores, what is known of each, the lowest score of its positives."""
    generator = np.random.default_rng(0)
    numbers = np.stack([generator.permutation(TOTAL)[:K] for _ in range(Q)]).astype(np.int32)
    scores = -np.sort(-generator.uniform(-0.5, 1, (Q, K)).astype(np.float32), axis=1)
    numbers[3, 20:], scores[3, 20:] = -1, -np.inf  # fewer documents than asked for
    known = np.where(generator.random((Q, 5)) < 0.6, numbers[:, :5], -1).astype(np.int64)
    return numbers, scores, known, generator.uniform(-0.3, 1, Q).astype(np.float32)


def plain(how, numbers, scores, known, positive):
    """Row by row, document by document."""
    rows = []
    for near, found, refused, own in zip(numbers, scores, known, positive, strict=True):
        candidates = [(n, s) for n, s in zip(near, found, strict=True) if n >= 0 and n not in refused]
        left = []
        for number, score in candidates[how.range_min : how.range_max]:
            margin = {
                None: True,
                "absolute": score <= own - (how.margin or 0),
                "relative": score <= own - abs(own) * (how.margin or 0),
                "percentage": score <= own - abs(own) * (1 - (how.margin or 0) / 100),
            }[how.margin_kind if how.margin is not None else None]
            if margin and score <= (np.inf if how.max_score is None else how.max_score):
                left += [number] if how.min_score is None or score >= how.min_score else []
        rows.append(left)
    return rows


HOWS = [
    Negatives(),
    Negatives(num_negatives=4, range_min=3, range_max=12),
    Negatives(num_negatives=3, min_score=0.2, max_score=0.7),
    Negatives(num_negatives=3, margin=0.1),
    Negatives(num_negatives=3, margin=0.05, margin_kind="relative"),
    Negatives(num_negatives=3, margin=95, margin_kind="percentage", range_min=2),
    Negatives(num_negatives=50, range_max=1000),
]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("sampling", ["top", "random"])
def test_choose(ranked, how, sampling):
    numbers, scores, known, positive = ranked
    how = Negatives(**{**vars(how), "sampling": sampling})
    options = {"known": known, "positive": positive, "anchors": np.arange(Q)}
    found = choose(how, numbers, scores, **options)
    assert found.numbers.shape == found.scores.shape == (Q, how.num_negatives)
    assert found.numbers.dtype == np.int32 and found.scores.dtype == np.float32
    for row, left in enumerate(plain(how, *ranked)):
        taken = found.numbers[row][found.numbers[row] >= 0].tolist()
        assert len(taken) == min(how.num_negatives, len(left)) and (found.numbers[row, len(taken) :] == -1).all()
        assert (found.scores[row, len(taken) :] == -np.inf).all() and (np.diff(found.scores[row, : len(taken)]) <= 0).all()
        assert (
            taken == left[: how.num_negatives]
            if sampling == "top"
            else set(taken) <= set(left) and len(set(taken)) == len(taken)
        )
        np.testing.assert_array_equal(found.scores[row, : len(taken)], [scores[row][numbers[row] == n][0] for n in taken])


def test_random_choices_depend_on_anchor_and_document_alone(ranked):
    numbers, scores, known, positive = ranked
    how = Negatives(num_negatives=3, sampling="random")
    whole = choose(how, numbers, scores, known=known, positive=positive, anchors=np.arange(Q), seed=5)
    part = choose(
        how, numbers[7:9], scores[7:9], known=known[7:9], positive=positive[7:9], anchors=np.array([7, 8]), seed=5
    )  # fmt: skip
    np.testing.assert_array_equal(part.numbers, whole.numbers[7:9])
    other = choose(how, numbers, scores, known=known, positive=positive, anchors=np.arange(Q), seed=6)
    assert (other.numbers != whole.numbers).mean() > 0.5
    counts = np.zeros(K)
    for seed in range(200):  # every rank has its turn
        taken = choose(
            how, numbers[:1], scores[:1], known=known[:1] * 0 - 1, positive=positive[:1], anchors=np.zeros(1, int), seed=seed
        )
        counts[np.isin(numbers[0], taken.numbers[0])] += 1
    assert counts.sum() == 600 and counts.min() > 5 and counts.max() < 45


def test_relative_margins_lower_the_limit_of_any_positive():
    positive = np.array([0.8, -0.2], np.float32)
    assert highest(Negatives(margin=0.1, margin_kind="relative"), positive) == pytest.approx([0.72, -0.22])
    assert highest(Negatives(margin=90, margin_kind="percentage"), positive) == pytest.approx([0.72, -0.22])
    assert highest(Negatives(margin=0.1, max_score=0.5), positive) == pytest.approx([0.5, -0.3])


def test_a_margin_beyond_all_cosines_is_told_what_it_may_have_meant():
    with pytest.raises(ConfigError, match='Mine.margin is 95.*margin_kind "percentage"'):
        Mine(margin=95).check("cosine")
    for how, similarity in ((Negatives(margin=95), "dot"), (Negatives(margin=2), "cosine"), (Negatives(), "cosine")):
        how.check(similarity)
    Negatives(margin=95, margin_kind="percentage").check("cosine")


def test_filled_takes_what_is_left():
    chosen = np.array([[4, -1, -1], [-1, -1, -1], [0, 1, 2]], np.int32)
    known = np.array([[0, 1], [2, -1], [3, 4]])
    found = filled(chosen, known, np.arange(3), total=5, seed=0)
    assert sorted(found[0]) == [2, 3, 4] and found[0, 0] == 4 and 2 not in found[1] and len(set(found[1])) == 3
    assert found[2].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(filled(chosen[1:2], known[1:2], np.array([1]), total=5, seed=0)[0], found[1])
    few = filled(np.full((1, 4), -1, np.int32), np.array([[0]]), np.arange(1), total=2, seed=0)
    assert few.tolist() == [[1, 1, 1, 1]]  # twice rather than a positive
    assert filled(np.full((1, 2), -1, np.int32), np.array([[0]]), np.arange(1), total=1, seed=0).tolist() == [[0, 0]]


def test_mixed_is_splitmix64():
    def reference(x):
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert mixed(7, np.array([3, 4]), np.array([5, 6])).tolist() == [
        reference(reference(7 ^ a) ^ b) for a, b in ((3, 5), (4, 6))
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"range_min": 5, "range_max": 5}, "no room"),
        ({"range_min": 5, "range_max": 7, "num_negatives": 3}, "no room for 3"),
        ({"max_score": float("nan")}, "max_score is nan"),
        ({"margin": 120.0, "margin_kind": "percentage"}, "at most 100"),
        ({"margin": 95.0, "margin_kind": "relative"}, "margin is 95.0; as a share"),
        ({"margin": 1.0, "margin_kind": "relative"}, "below 1"),
        ({"margin": -0.1, "margin_kind": "relative"}, "at least 0"),
        ({"margin_kind": "percentage"}, 'margin_kind is "percentage" but no margin'),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Negatives(**options)
    with pytest.raises(ConfigError, match="every is 0"):
        Mine(every=0)
