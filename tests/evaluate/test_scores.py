"""The metrics against ir-measures (trec_eval) and scipy, on ties, grades, and queries with nothing relevant."""

import ir_measures
import numpy as np
import pytest
import scipy.stats
from ir_measures import AP, RR, R, nDCG

from embedjax.evaluate import scores

MEASURES = {nDCG @ 10: "ndcg", RR @ 10: "mrr", AP @ 20: "map", R @ 1: "recall1", R @ 10: "recall10"}


def ours(ranked, judgements):
    gains, ideal = scores.gains_of(ranked, judgements), scores.ideal_gains(judgements)
    return {
        "ndcg": scores.ndcg_at(gains, ideal, 10),
        "mrr": scores.mrr_at(gains, 10),
        "map": scores.map_at(gains, ideal, 20),
        "recall1": scores.recall_at(gains, ideal, 1),
        "recall10": scores.recall_at(gains, ideal, 10),
    }


@pytest.mark.parametrize("depth", [3, 25])
def test_ranking_metrics_are_those_of_trec_eval(depth):
    rng = np.random.default_rng(depth)
    ranked = np.stack([rng.permutation(30)[:depth] for _ in range(40)])
    judgements = [{int(d): int(rng.integers(-1, 4)) for d in rng.choice(30, rng.integers(1, 25), False)} for _ in range(40)]
    judgements[3] = {5: 0, 7: 0}
    judgements[4] = {29: 3}
    qrels = [ir_measures.Qrel(str(q), str(d), g) for q, judged in enumerate(judgements) for d, g in judged.items()]
    run = [ir_measures.ScoredDoc(str(q), str(d), -float(i)) for q, row in enumerate(ranked) for i, d in enumerate(row)]
    found = ours(ranked, judgements)
    seen = 0
    for metric in ir_measures.iter_calc(list(MEASURES), qrels, run):
        assert found[MEASURES[metric.measure]][int(metric.query_id)] == pytest.approx(metric.value, abs=1e-6), metric
        seen += 1
    assert seen == 40 * len(MEASURES)
    assert all(value[3] == 0 for value in found.values())


def test_missing_ranks_are_not_relevant():
    found = ours(np.array([[-1, -1, 2]]), [{2: 1, 0: 1}])
    assert found["mrr"] == pytest.approx(1 / 3)
    assert found["recall10"] == pytest.approx(1 / 2)


def test_ndcg_by_hand():
    gains, ideal = np.array([[0.0, 3.0, 1.0]]), np.array([[3.0, 2.0, 1.0]])
    wanted = (3 / np.log2(3) + 1 / 2) / (3 + 2 / np.log2(3) + 1 / 2)
    assert scores.ndcg_at(gains, ideal, 10) == pytest.approx(wanted)


@pytest.mark.parametrize("levels", [3, 1000])
def test_correlations_are_scipys(levels):
    rng = np.random.default_rng(levels)
    x = rng.integers(0, levels, 200).astype(float)
    y = x + rng.integers(0, levels, 200)
    assert scores.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert scores.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
    assert scores.average_ranks(x) == pytest.approx(scipy.stats.rankdata(x))


def test_correlation_with_a_constant_is_not_a_number():
    assert np.isnan(scores.spearman(np.ones(5), np.arange(5.0)))
