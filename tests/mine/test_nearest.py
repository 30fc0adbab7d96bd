"""The search for near documents: as deep as each block of anchors needs, in bounded memory, of few compiled shapes."""

import types

import numpy as np
import pytest

from embedjax.config import Negatives
from embedjax.data.corpus import Lists
from embedjax.mine import nearest

N, U = 3000, 700


def lists(sizes):
    """So many known documents of each anchor, the first ones."""
    return Lists(np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes]), len(sizes))


@pytest.mark.parametrize("start", [0, 7, 5000])
def test_a_block_is_as_deep_as_its_own_anchors_need(start):
    sizes = np.random.default_rng(0).integers(0, 6, 20_000)
    sizes[[5500, 9999]] = 3000, 100_000
    made, total = list(nearest.blocks(lists(sizes), 100, start)), 0
    assert [block.start for block, _ in made] == [start, *(block.stop for block, _ in made[:-1])]
    assert made[-1][0].stop == 20_000
    for block, k in made:
        longest = int(sizes[block.start : block.stop].max())
        assert 100 + longest <= k < 100 + 2 * longest and k - 100 in {1 << n for n in range(20)}
        assert len(block) <= nearest.ANCHORS and len(block) * k <= nearest.NEAREST
        total += len(block) * k
    assert total < 20_000 * 108 + 2 * nearest.NEAREST and len(made) < 12  # one list would have made all 20 000 as deep


def test_one_anchor_of_many_positives_costs_the_others_nothing(monkeypatch):
    draw = np.random.default_rng(1)
    queries, documents = (draw.standard_normal((n, 8), np.float32) for n in (U, N))
    sizes = draw.integers(1, 5, U)
    sizes[300] = 2000
    known = lists(sizes)
    rows = np.arange(U)
    pairs = types.SimpleNamespace(rows=rows, anchor=rows, positive=np.zeros(U, int))
    how = Negatives(num_negatives=4, range_max=20)
    searched = []

    def topk(queries, documents, k, **options):
        searched.append((len(queries), k))
        return original(queries, documents, k, **options)

    original = nearest.topk
    monkeypatch.setattr(nearest, "topk", topk)
    monkeypatch.setattr(nearest, "NEAREST", 256 * 24)
    found = list(nearest.negatives(how, pairs, known, queries, documents))
    assert [list(block) for block, _ in found] == [
        list(part) for part in (range(256), range(256, 300), range(300, 302), range(302, 558), range(558, 700))
    ]
    assert searched == [(256, 24), (256, 24), (256, 2068), (256, 24), (256, 24)]  # two shapes in all
    scores = queries @ documents.T
    for block, chosen in found:
        for anchor, numbers in zip(block, chosen.numbers, strict=True):
            ranked = [k for k in np.argsort(-scores[anchor]) if k >= sizes[anchor]]
            assert numbers.tolist() == ranked[:4]
