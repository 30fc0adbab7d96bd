"""A run of late interaction from texts to scores, search and resume."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax import runs
from embedjax import search as finder
from embedjax.__main__ import run as command
from embedjax.config.errors import ConfigError
from embedjax.evaluate import tasks
from embedjax.evaluate.encode import encode
from embedjax.evaluate.late import encode_tokens, maxsim_own, maxsim_topk
from embedjax.evaluate.tasks.side import pairwise
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import load, read_start, resolve_tower
from embedjax.sharding import make_mesh
from embedjax.train import train

LATE = c.Late(query_length=8, document_length=10)


@pytest.fixture
def late_config(tiny_config, pairs_file):
    tower = tiny_config.model.towers["text"]
    tower = dataclasses.replace(tower, max_length=None, dense=(c.Dense(8, bias=False, activation="identity"),), late=LATE)
    return dataclasses.replace(
        tiny_config,
        steps=30,
        model=c.Model({"text": tower}),
        optim=dataclasses.replace(tiny_config.optim, learning_rate=1e-2),
        checkpoint=c.Checkpoint(every=15),
        export=c.Export(format="pylate"),
        evaluate=c.Evaluate(tasks=(dataclasses.replace(tiny_config.evaluate.tasks[0], dims=(4,)),), baseline=True),
    )


@pytest.fixture
def run(late_config, tmp_path):
    train(late_config, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_learns_resumes_and_searches(late_config, run, pairs_file, tmp_path):
    first, *_, last = runs.evaluations(run)
    assert last["pairs/ndcg@10"] > first["pairs/ndcg@10"] + 0.1
    assert {"pairs/mrr@10", "pairs/recall@100", "pairs@4/ndcg@10"} <= last.keys()

    # Without its last save the run goes on to the same parameters.
    whole = load(run)
    shutil.rmtree(run / "checkpoints" / "30")
    train(late_config, run)
    model = load(run)
    jax.tree.map(np.testing.assert_array_equal, model.params, whole.params)
    assert model.config.late and model.texts["text"].late == LATE
    exported = load(run / "export")
    jax.tree.map(np.testing.assert_array_equal, exported.params, jax.device_get(dict(model.params)))

    # The scores of the evaluation are those of a loop over the tokens' vectors.
    texts = [line.split("\t") for line in pairs_file.read_text().splitlines()[1:]]
    queries, documents = ([row[k] for row in texts[:6]] for k in (0, 1))
    q, d = encode_tokens(model, queries, column="query"), encode_tokens(model, documents)
    assert q.lengths.tolist() == [8] * 6 and (d.lengths < 10).all()
    wanted = np.array([[(q.of(i) @ d.of(j).T).max(1).sum() for j in range(6)] for i in range(6)])
    scores, places = maxsim_topk(q, d, 4)
    np.testing.assert_allclose(scores, -np.sort(-wanted, axis=1)[:, :4], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(wanted, places, 1), scores, rtol=1e-5)
    np.testing.assert_allclose(pairwise(q, d, "cosine"), np.diag(wanted), rtol=1e-5)

    # Search finds the same, with and without its cache, and over a mesh.
    corpus = finder.Corpus(documents, [str(n) for n in range(6)])
    for mesh, cache in ((None, None), (make_mesh(c.Mesh()), tmp_path / "cache"), (None, tmp_path / "cache")):
        hits = finder.search(whole, corpus, queries[2], 3, mesh=mesh, cache=cache)
        np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-wanted[2])[:3], rtol=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 2

    with pytest.raises(ConfigError, match="encode_tokens"):
        encode(model, documents)
    lines = tmp_path / "points.jsonl"
    arguments = ["encode", str(run), str(pairs_file), str(lines), "--column", "answer", "--pool", "2"]
    assert command(arguments) == 2  # for no engine
    assert command([*arguments, "--for", "qdrant", "--ids", "question"]) == 3  # some are there twice
    assert command([*arguments, "--for", "qdrant", "--field", "tokens"]) == 0
    point = json.loads(lines.read_text().splitlines()[3])
    assert point["id"] == 3 and point["payload"] == {"answer": texts[3][1]}
    np.testing.assert_allclose(point["vector"]["tokens"], encode_tokens(model, [texts[3][1]], pool=2).vectors, atol=1e-5)
    knn = c.KnnClassification(c.File(str(pairs_file)), {"text": "question", "label": "answer"}, name="labels")
    with pytest.raises(ConfigError, match="late interaction is scored by Retrieval"):
        tasks.check_late(knn, model.config)


def test_tokens_start_from_a_run_of_pooled_vectors_without_its_projection(late_config, tiny_config, tmp_path):
    """Its projection is that of one vector; the encoder is taken."""
    tower = dataclasses.replace(tiny_config.model.towers["text"], dense=(c.Dense(8, False, "identity"),))
    pooled = dataclasses.replace(tiny_config, steps=1, model=c.Model({"text": tower}), evaluate=c.Evaluate())
    train(pooled, tmp_path / "pooled")
    start = resolve_tower(c.Tower(init=str(tmp_path / "pooled"), late=LATE))
    assert start.dense == (c.Dense(128, False, "identity"),)
    found, known = read_start(start), load(tmp_path / "pooled").params["towers"]["text"]
    assert found.keys() == {"encoder"} and "dense" in known
    jax.tree.map(np.testing.assert_array_equal, found["encoder"], known["encoder"])


def test_topk_is_exact_on_a_mesh_with_empty_texts_and_ties():
    rng = np.random.default_rng(0)
    make = lambda count, most: TokenVectors.joined(
        [rng.normal(size=(n, 5)).astype(np.float32) for n in rng.integers(0, most, count)], 5
    )
    queries, documents = make(7, 6), make(41, 90)
    twice = TokenVectors.joined([documents.of(n % 41) for n in range(82)], 5)
    best = lambda q, d: (q @ d.T).max(1).sum() if len(d) else 0.0
    wanted = np.array([[best(queries.of(i), twice.of(j)) for j in range(82)] for i in range(7)])
    for mesh in (None, make_mesh(c.Mesh(4, 2), jax.devices())):
        scores, places = maxsim_topk(queries, twice, 9, mesh=mesh)
        order = np.argsort(-wanted, axis=1, kind="stable")[:, :9]
        np.testing.assert_allclose(scores, np.take_along_axis(wanted, order, 1), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(places, order)
    np.testing.assert_allclose(maxsim_own(queries.of(0), twice, [3, 44, 7]), wanted[0, [3, 44, 7]], rtol=1e-5, atol=1e-6)


def test_reranking_pairs_and_triplets_are_scored_by_maxsim(run, tmp_path):
    file = tmp_path / "rerank.jsonl"
    rows = [{"query": "red cat", "positive": "cat red old", "negative": "stone river", "score": n, "label": n} for n in (0, 1)]
    file.write_text("\n".join(map(json.dumps, rows)))
    source, model = c.File(str(file)), load(run)
    a, b = {"a": "query", "b": "positive"}, {"anchor": "query", "positive": "positive", "negative": "negative"}
    found = tasks.evaluate(
        model,
        [
            c.Reranking(source),
            c.TripletAccuracy(source, b),
            c.PairClassification(source, a | {"label": "label"}),
            c.Sts(source, a | {"score": "score"}),
        ],
    )
    assert {"reranking/ndcg@10", "triplets/accuracy", "pairs/ap", "sts/spearman"} <= found.keys()
    assert found["triplets/accuracy"] == 1 and found["reranking/ndcg@10"] == 1
