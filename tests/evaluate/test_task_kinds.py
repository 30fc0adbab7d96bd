"""Every kind of task against a slow definition, at prefixes of the vectors, and what they refuse."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from sklearn import metrics
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from embedjax import config as c
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.columns import make_layout, read_row
from embedjax.data.sources import open_source
from embedjax.evaluate import scores
from embedjax.evaluate.encode import Encoder, encode
from embedjax.evaluate.tasks import READERS, classification, evaluate, prepare
from embedjax.models.classifier import Head


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return c.File(str(path))


@pytest.fixture(autouse=True)
def towers_without_compilation(monkeypatch):
    """Means of rows of a random table instead of a transformer, another table for other parameters."""

    def forward(embedder, mesh):
        def apply(params, column):
            seed = int(1e6 * abs(float(jax.tree.leaves(params)[-1].sum())))
            ids, mask = (np.asarray(column[key]) for key in ("ids", "mask"))
            table = np.random.default_rng(seed).normal(size=(64, embedder.width)).astype(np.float32)
            means = (table[ids] * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
            return unit(means) if embedder.normalize else means

        return apply

    monkeypatch.setattr("embedjax.evaluate.encode._forward", forward)


@pytest.fixture
def labelled(tmp_path, sentences):
    """60 training and 30 test texts of 5 classes that their first words hint at; labels are numbers."""
    rows = [{"text": text, "label": (n % 60) // 12} for n, text in enumerate(sentences[:90])]
    return write(tmp_path / "test.jsonl", rows[60:]), write(tmp_path / "train.jsonl", rows[:60]), rows


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vectors_of(model, rows, dim=None):
    return unit(encode(model, [row["text"] for row in rows])[:, :dim])


def test_pairs_and_triplets_at_every_prefix_with_one_encoding(two_towers, sentences, tmp_path, monkeypatch):
    rows = [
        {"x": sentences[n], "y": sentences[n + 40], "z": sentences[n + 80], "same": "yes" if n % 3 else "no"} for n in range(40)
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    pairs = c.PairClassification(file, {"a": "x", "b": "y", "label": "same"}, positive="yes", dims=(8, 4))
    triplets = c.TripletAccuracy(file, {"anchor": "x", "positive": "y", "negative": "z"}, dims=(8,))
    encoded, plain = [], Encoder.embed
    monkeypatch.setattr(
        Encoder, "embed", lambda self, columns, *rest: encoded.append(len(columns["ids"])) or plain(self, columns)
    )
    found = evaluate(two_towers, (pairs, triplets))
    assert encoded == [40] * 5
    texts = lambda key: [row[key] for row in rows]
    x, y = (encode(two_towers, texts(key), column=side) for key, side in (("x", "anchor"), ("y", "positive")))
    right = np.array([row["same"] == "yes" for row in rows])
    for label, dim in (("pairs", None), ("pairs@8", 8), ("pairs@4", 4)):
        cosines = (unit(x[:, :dim]).astype(np.float64) * unit(y[:, :dim])).sum(1)
        assert found[f"{label}/ap"] == pytest.approx(metrics.average_precision_score(right, cosines))
        accuracies = [np.mean((cosines >= threshold) == right) for threshold in [*cosines, np.inf]]
        assert found[f"{label}/accuracy"] == pytest.approx(max(accuracies))
        threshold = found[f"{label}/accuracy_threshold"] - 1e-6  # it may be the lowest cosine itself, rounded otherwise
        assert np.mean((cosines >= threshold) == right) == pytest.approx(max(accuracies))
        f1 = max(metrics.f1_score(right, cosines >= threshold) for threshold in cosines)
        assert found[f"{label}/f1"] == pytest.approx(f1)
        taken = cosines >= found[f"{label}/f1_threshold"] - 1e-6
        assert found[f"{label}/precision"] == pytest.approx(metrics.precision_score(right, taken))
        assert found[f"{label}/recall"] == pytest.approx(metrics.recall_score(right, taken))
    anchor = encode(two_towers, texts("x"), column="query")
    positive, negative = (encode(two_towers, texts(key), column="document") for key in "yz")
    for label, dim in (("triplets", None), ("triplets@8", 8)):
        a, p, n = (unit(part[:, :dim]).astype(np.float64) for part in (anchor, positive, negative))
        assert found[f"{label}/accuracy"] == np.mean((a * p).sum(1) > (a * n).sum(1))


def test_ties_of_scores_stay_together():
    found = scores.binary(np.array([0.5, 0.5, 0.5, 0.1]), np.array([True, False, False, True]))
    assert found["ap"] == pytest.approx(metrics.average_precision_score([1, 0, 0, 1], [0.5, 0.5, 0.5, 0.1]))
    assert found["accuracy"] == 0.5 and found["f1"] == pytest.approx(2 / 3) and found["recall"] == 1
    none = scores.binary(np.array([0.9, 0.5, 0.4, 0.1]), np.array([False, False, False, True]))
    assert none["accuracy"] == 0.75 and none["accuracy_threshold"] > 0.9


def test_similarity_is_the_models(model, sentences, tmp_path):
    """Without normalisation the cosine and the product rank differently; the model says which counts."""
    rows = [
        {"sentence1": a, "sentence2": b, "label": n % 2}
        for n, (a, b) in enumerate(zip(sentences[:40], sentences[40:80], strict=True))
    ]
    task = c.PairClassification(write(tmp_path / "pairs.jsonl", rows), dims=(6,))
    (name, tower), embedder = *model.config.towers.items(), dataclasses.replace(model.embedders["text"], normalize=False)
    a, b = (
        encode(dataclasses.replace(model, embedders={name: embedder}), texts) for texts in (sentences[:40], sentences[40:80])
    )
    right = [row["label"] for row in rows]
    wanted = {"dot": lambda a, b: (a * b).sum(1), "cosine": lambda a, b: (unit(a) * unit(b)).sum(1)}
    for similarity, product in wanted.items():
        changed = dataclasses.replace(tower, normalize=False, similarity=similarity)
        asked = dataclasses.replace(model, config=c.Model({name: changed}), embedders={name: embedder})
        found = evaluate(asked, (task,))
        assert found["pairs/ap"] == pytest.approx(metrics.average_precision_score(right, product(a, b)))
        assert found["pairs@6/ap"] == pytest.approx(metrics.average_precision_score(right, product(a[:, :6], b[:, :6])))


def test_reranking(two_towers, sentences, tmp_path):
    """Lists and single texts, equal queries in one, queries without negatives left out, ties against the model."""
    rows = [
        {"query": sentences[n], "positive": sentences[10 + n], "negative": sentences[20 + 5 * n : 25 + 5 * n]} for n in range(8)
    ]
    rows.append({"query": sentences[0], "positive": [sentences[100]], "negative": sentences[101]})
    rows.append({"query": sentences[9], "positive": [sentences[102]], "negative": []})
    task = c.Reranking(write(tmp_path / "rows.jsonl", rows), dims=(8,))
    (data,) = prepare((task,))
    assert data.sides[0].texts == sentences[:8] and list(data.judgements[0].values()).count(True) == 2
    found = evaluate(two_towers, (data,))
    for label, dim in (("reranking", None), ("reranking@8", 8)):
        queries = unit(encode(two_towers, data.sides[0].texts, column="query")[:, :dim])
        documents = unit(encode(two_towers, data.sides[1].texts, column="document")[:, :dim])
        right = [list(judged.values()) for judged in data.judgements]
        cosines = [documents[list(judged)] @ query for query, judged in zip(queries, data.judgements, strict=True)]
        both = list(zip(right, cosines, strict=True))
        assert found[f"{label}/map"] == pytest.approx(np.mean([metrics.average_precision_score(r, s) for r, s in both]))
        assert found[f"{label}/ndcg@10"] == pytest.approx(np.mean([metrics.ndcg_score([r], [s], k=10) for r, s in both]))
        first = [1 + np.argmax(np.array(r)[np.argsort(-s)]) for r, s in both]
        assert found[f"{label}/mrr@10"] == pytest.approx(np.mean(1 / np.array(first)))
    blind = data.scores([np.ones((8, 4)), np.ones((len(data.sides[1].texts), 4))], "cosine", None)
    assert max(blind.values()) < 0.6, "a model that sees no difference is not rewarded for the order of the rows"


def test_the_probe(model, labelled):
    test, train, rows = labelled
    task = c.Classification(test, train=train, per_label=4, experiments=3, dims=(8,))
    (data,) = prepare((task,))
    known = np.array([row["label"] for row in rows[:60]])
    draws = classification.drawn(known, 4, 3, 42)
    assert [np.bincount(known[rows]).tolist() for rows in draws] == [[4] * 5] * 3 and len(np.unique(draws)) > 20
    texts = [row["text"] for row in rows]
    assert [data.sides[0].texts[n] for n in data.draws[1]] == [texts[n] for n in draws[1]]
    found = evaluate(model, (data,))
    whole = evaluate(model, (dataclasses.replace(task, per_label=0, dims=()),))
    fit = lambda x, y: LogisticRegression(max_iter=100).fit(x, y).predict
    wanted = np.array([row["label"] for row in rows[60:]])
    for label, dim in (("classification", None), ("classification@8", 8)):
        x = vectors_of(model, rows, dim)
        guesses = [fit(x[draw], known[draw])(x[60:]) for draw in draws]
        assert found[f"{label}/accuracy"] == pytest.approx(np.mean([np.mean(guess == wanted) for guess in guesses]))
        f1 = [metrics.f1_score(wanted, guess, average="macro") for guess in guesses]
        assert found[f"{label}/f1"] == pytest.approx(np.mean(f1))
    x = vectors_of(model, rows)
    assert whole["classification/accuracy"] == np.mean(fit(x[:60], known)(x[60:]) == wanted)


def test_a_tasks_prompt(model, labelled):
    test, train, rows = labelled
    task = c.KnnClassification(test, train=train, k=1, prompt="query")
    known, wanted = ([row["label"] for row in part] for part in (rows[:60], rows[60:]))
    x = encode(model, [row["text"] for row in rows], prompt="query")
    assert np.abs(x - vectors_of(model, rows)).max() > 0.1
    found = KNeighborsClassifier(1, metric="cosine").fit(x[:60], known).predict(x[60:])
    assert evaluate(model, (task,))["knn/accuracy"] == np.mean(found == wanted)
    with pytest.raises(ConfigError, match="no prompt and no adapter 'querry'; did you mean 'query'"):
        evaluate(model, (dataclasses.replace(task, prompt="querry"),))


def test_the_prompt_of_each_side(model, two_towers, labelled, sentences, tmp_path, monkeypatch):
    """One tower has the prompts of queries and documents for these alone, as sentence-transformers asks; of two towers each has
    that of its side; a task's own go before both."""
    prompts = {"query": "w1 w2 ", "document": "w3 ", "sts-query": "w4 ", "sts-document": "w5 "}

    def with_prompts(made):
        towers = {name: dataclasses.replace(tower, prompts=prompts) for name, tower in made.config.towers.items()}
        texts = {name: dataclasses.replace(each, prompts=prompts) for name, each in made.texts.items()}
        return dataclasses.replace(made, config=dataclasses.replace(made.config, towers=towers), texts=texts)

    test, train, _ = labelled
    rows = [{"x": sentences[n], "y": sentences[n + 40], "z": sentences[n + 80], "s": n % 2} for n in range(8)]
    file = write(tmp_path / "rows.jsonl", rows)
    met, tokenize = [], Encoder.tokenize
    monkeypatch.setattr(Encoder, "tokenize", lambda self, texts: met.append(self.prompt) or tokenize(self, texts))
    roles, plain, own = ["query", "document"], [None, None], ["sts-query", "sts-document"]
    sts = c.Sts(file, {"a": "x", "b": "y", "score": "s"})
    for task, of_one, of_two in (
        (sts, plain, roles),
        (dataclasses.replace(sts, prompt="sts"), own, own),
        (dataclasses.replace(sts, prompt="query"), ["query"] * 2, ["query"] * 2),
        (c.PairClassification(file, {"a": "x", "b": "y", "label": "s"}), plain, roles),
        (c.BitextMining(file, {"source": "x", "target": "y"}), plain, roles),
        (c.Clustering(train, experiments=1), plain[:1], roles[:1]),
        (c.KnnClassification(test, train=train, k=1), plain, ["query"] * 2),
        (
            c.TripletAccuracy(file, {"anchor": "x", "positive": "y", "negative": "z"}),
            [*roles, "document"],
            [*roles, "document"],
        ),
        (c.Retrieval(file, {"query": "x", "document": "y"}), roles, roles),
    ):
        for made, wanted in ((model, of_one), (two_towers, of_two)):
            met.clear()
            evaluate(with_prompts(made), (task,))
            assert met == wanted, (task.name, task.prompt)


def test_nearest_neighbours_and_clusters(model, labelled):
    test, train, rows = labelled
    found = evaluate(
        model, (c.KnnClassification(test, train=train, k=3, dims=(8,)), c.Clustering(train, experiments=2, dims=(8,)))
    )
    known, wanted = ([row["label"] for row in part] for part in (rows[:60], rows[60:]))
    for dim, at in ((None, ""), (8, "@8")):
        x = vectors_of(model, rows, dim)
        guess = KNeighborsClassifier(3, metric="cosine").fit(x[:60], known).predict(x[60:])
        assert found[f"knn{at}/accuracy"] == np.mean(guess == wanted)
        assert found[f"knn{at}/f1"] == pytest.approx(metrics.f1_score(wanted, guess, average="macro"))
        means = [MiniBatchKMeans(5, batch_size=512, n_init="auto", random_state=seed).fit_predict(x[:60]) for seed in (42, 43)]
        assert found[f"clustering{at}/v_measure"] == pytest.approx(np.mean([metrics.v_measure_score(known, m) for m in means]))


def test_labels_are_numbers_or_words(model, labelled, tmp_path):
    """The same classes by other names are the same task."""
    test, train, rows = labelled
    words = [{**row, "label": f"class {row['label']}"} for row in rows]
    kinds = functools.partial(c.Classification, experiments=1), c.KnnClassification
    tasks = lambda test, train: (*(kind(test, train=train) for kind in kinds), c.Clustering(train, experiments=1))
    renamed = tasks(write(tmp_path / "test2.jsonl", words[60:]), write(tmp_path / "train2.jsonl", words[:60]))
    assert evaluate(model, renamed) == evaluate(model, tasks(test, train))


def test_bitext(two_towers, sentences, tmp_path):
    """Two sources share a translation; an equal text found elsewhere is as good."""
    rows = [{"source": sentences[n], "target": sentences[n] if n % 2 else sentences[n + 40]} for n in range(30)]
    rows.append({"source": sentences[31], "target": rows[1]["target"]})
    found = evaluate(two_towers, (c.BitextMining(write(tmp_path / "rows.jsonl", rows), dims=(8,)),))
    texts = [[row[side] for row in rows] for side in ("source", "target")]
    for label, dim in (("bitext", None), ("bitext@8", 8)):
        source, target = (
            unit(encode(two_towers, part, column=column)[:, :dim])
            for part, column in zip(texts, ("anchor", "positive"), strict=True)
        )
        cosines = source @ target.T
        there = [texts[1][n] == text for n, text in zip(cosines.argmax(1), texts[1], strict=True)]
        back = [texts[0][n] == text for n, text in zip(cosines.argmax(0), texts[0], strict=True)]
        assert found[f"{label}/accuracy_to_target"] == pytest.approx(np.mean(there))
        assert found[f"{label}/accuracy_to_source"] == pytest.approx(np.mean(back))
        assert found[f"{label}/accuracy"] == pytest.approx(np.mean([np.mean(there), np.mean(back)]))
        guess = [texts[1][n] for n in cosines.argmax(1)]
        assert found[f"{label}/f1"] == pytest.approx(metrics.f1_score(texts[1], guess, average="weighted"))


def test_every_task_of_the_config_has_a_reader_and_a_main_metric(two_towers, model, sentences, labelled, tmp_path):
    """Each from the columns it has by default, by files of a few rows."""
    names = ("anchor", "positive", "negative", "query", "sentence1", "sentence2", "source", "target")
    rows = [{name: sentences[n + 12 * i] for i, name in enumerate(names)} | {"score": n, "label": n % 2} for n in range(12)]
    file, (test, train, _) = write(tmp_path / "rows.jsonl", rows), labelled
    assert set(READERS) == set(c.Task.__args__)
    tasks = [kind(test if "text" in kind().columns else file) for kind in READERS]
    tasks = [dataclasses.replace(task, train=train) if hasattr(task, "train") else task for task in tasks]
    words = c.ZeroShot(test, {"text": "text", "label": "label"}, classes={str(n): f"w{n}" for n in range(5)})
    tasks = [words if isinstance(task, c.ZeroShot) else task for task in tasks]  # its default is pictures
    head = Head(tuple("01234"), False, "softmax", np.eye(16, 5, dtype=np.float32), np.zeros(5, np.float32))
    prepared = prepare(tasks)
    assert all({side.column for side in data.sides} == set(data.task.sides) for data in prepared)
    found = evaluate(dataclasses.replace(model, heads={"train": head}), prepared)
    assert {task.main_metric for task in tasks} <= set(found)
    here = ("success@", "top5")  # the last two are of pictures, and of more classes
    assert {key for task in tasks for key in task.keys if not any(part in key for part in here)} == set(found)
    assert all(isinstance(value, float) for value in found.values())


def test_labels_of_a_head_are_names_or_numbers(model, sentences, tmp_path):
    """As training takes them: a number that is no name is that of a class."""
    head = Head(("neg", "pos", "0"), False, "softmax", np.eye(16, 3, dtype=np.float32), np.zeros(3, np.float32))
    model = dataclasses.replace(model, heads={"train": head})
    found = []
    for kind in (("neg", "pos", "0"), (0, "1", 2.0), ("neg", 1, 0)):
        rows = [{"text": text, "label": kind[n % 3]} for n, text in enumerate(sentences[:30])]
        task = c.HeadAccuracy(write(tmp_path / "rows.jsonl", rows))
        found.append(evaluate(model, [task]))
        loss = c.Classify(classes=3)
        trained = c.Set(task.source, {"anchor": "text", "label": "label"}, loss=loss, labels=head.labels)
        if "1" not in kind:  # text that is no name is none to training
            layout = make_layout(trained, source := open_source(task.source))
            assert [read_row(source, layout, row)["label"] for row in range(3)] == [0, 1, 2 if kind[2] == "0" else 0]
    assert found[0] == found[1] != found[2]  # a text "0" is the name of the third, a number 0 the first
    bad = [{"text": sentences[0], "label": ["neg"]}, {"text": sentences[1], "label": ["pos", None]}]
    with pytest.raises(DataError, match="rows.jsonl:2: column 'label' is missing or empty"):
        prepare([c.HeadAccuracy(write(tmp_path / "rows.jsonl", bad))])
    for label, told in ((3, "the head knows no label 3;"), (["neg", "pos"], "the head gives one label a row")):
        bad[1]["label"] = label
        with pytest.raises(DataError, match=f"rows.jsonl:2: task 'head': {told}"):
            evaluate(model, [c.HeadAccuracy(write(tmp_path / "rows.jsonl", bad))])


def test_a_head_for_several_labels_a_row(model, sentences, tmp_path):
    """Accuracy over all yes and no; F1 a mean of the labels' F1, which is another number than F1 over all yes and no."""
    said = [[name for i, name in enumerate("abc") if (n + i) % (i + 2) == 0] for n in range(30)]
    rows = [{"text": text, "label": names} for text, names in zip(sentences, said, strict=False)]
    head = Head(("a", "b", "c"), False, "sigmoid", np.eye(16, 3, dtype=np.float32), np.zeros(3, np.float32))
    task = c.HeadAccuracy(write(tmp_path / "rows.jsonl", rows), dims=(8,))
    found = evaluate(dataclasses.replace(model, heads={"train": head}), (task,))
    wanted = np.array([[name in names for name in "abc"] for names in said])
    guess = encode(model, sentences[:30], column="query")[:, :3] > 0
    assert found["head/accuracy"] == pytest.approx(np.mean(guess == wanted))
    assert found["head/f1"] == pytest.approx(np.mean([metrics.f1_score(wanted[:, i], guess[:, i]) for i in range(3)]))
    assert abs(found["head/f1"] - metrics.f1_score(wanted.ravel(), guess.ravel())) > 1e-3


@pytest.mark.parametrize(
    ("kind", "columns", "hint"),
    [
        (c.PairClassification, {"lable": "label"}, "'lable', which it does not have; did you mean 'label'"),
        (c.Reranking, {"postive_2": "p2"}, "'postive_2', .* did you mean 'positive'"),
        (c.Reranking, {"positive_x": "p2"}, "'positive_x', .* did you mean 'positive'"),
        (c.TripletAccuracy, {"negative_2": "n2"}, "'negative_2', .* did you mean 'negative'"),
        (c.HeadAccuracy, {"othr": "b"}, "'othr', .* did you mean 'other'"),
        (c.KnnClassification, {"other": "b"}, "'other', .*known: label, text"),
    ],
)
def test_a_column_that_a_task_does_not_have_is_refused(tmp_path, kind, columns, hint):
    """Nothing is read before: a misspelled name is not one that is left out, nor a wrong candidate."""
    missing = c.File(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ConfigError, match=hint):
        prepare([kind(missing, kind().columns | columns)])


def test_further_candidates(model, sentences, tmp_path):
    row = {"query": sentences[0], "p1": sentences[1], "p2": sentences[2], "n1": sentences[3], "n2": sentences[4]}
    columns = {"query": "query", "positive": "p1", "positive_2": "p2", "negative": "n1", "negative_12": "n2"}
    (data,) = prepare([c.Reranking(write(tmp_path / "rows.jsonl", [row]), columns)])
    assert dict(zip(data.sides[1].texts, data.judgements[0].values(), strict=True)) == {
        sentences[1]: True, sentences[2]: True, sentences[3]: False, sentences[4]: False,
    }  # fmt: skip


def test_faults(model, labelled, tmp_path):
    test, train, rows = labelled
    other = write(tmp_path / "other.jsonl", [{"text": "w1", "label": "odd"}, {"text": "w2", "label": "even"}])
    bad = write(tmp_path / "bad.jsonl", [{"text": "w1", "label": 1}, {"text": "w2", "label": None}])
    one = write(tmp_path / "one.jsonl", [{"text": "w1", "label": 1, "same": 0}] * 2)
    with pytest.raises(DataError, match=r"other.jsonl:\d: no training row of task 'knn' has the label '(odd|even)'"):
        prepare([c.KnnClassification(other, train=train)])
    with pytest.raises(DataError, match=r"bad.jsonl:2: column 'label' is missing"):
        prepare([c.Classification(test, train=bad)])
    with pytest.raises(DataError, match="all 2 training rows have the label '1'"):
        prepare([c.Classification(test, train=one)])
    with pytest.raises(DataError, match="all 2 rows have the label '1'"):
        prepare([c.Clustering(one)])
    with pytest.raises(DataError, match="0 of 2 labels are '1'; found: 0"):
        prepare([c.PairClassification(one, {"a": "text", "b": "text", "label": "same"})])
    with pytest.raises(DataError, match="no query has both"):
        prepare([c.Reranking(one, {"query": "text", "positive": "text", "negative": "text"})])
    with pytest.raises(ConfigError, match="dims holds 17; the model's vectors have 16 numbers"):
        evaluate(model, [c.Clustering(test, dims=(17,))])
    with pytest.raises(ConfigError, match="an empty path"):
        prepare([c.KnnClassification(test)])
    for wrong in ({"dims": (0,)}, {"dims": (4, 4)}, {"limit": -1}):
        with pytest.raises(ConfigError):
            c.Clustering(test, **wrong)
    for best in ("sts@32/spearman", "sts/spearmann", "sts"):
        with pytest.raises(ConfigError, match=f"evaluate.best is '{best}', which no task finds; .*sts(@64)?/spearman"):
            c.Evaluate(tasks=(c.Sts(dims=(64,)),), best=best)
    for kind, at in ((c.Classification, -1), (c.Clustering, 2**32 - 9)):
        with pytest.raises(ConfigError, match=f"has seed {at}; it must be from 0 to"):
            kind(test, seed=at)
    assert c.Evaluate(tasks=(c.Sts(dims=(64,)),), best="sts@64/spearman").best
