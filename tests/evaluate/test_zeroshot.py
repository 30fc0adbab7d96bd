"""Zero-shot classification, probes and retrieval of pictures against slow definitions, at prefixes, on any mesh."""

import collections
import dataclasses
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
from embedjax.data.sources import open_source
from embedjax.evaluate.encode import encode, encode_images
from embedjax.evaluate.tasks import evaluate, prepare
from embedjax.models.classifier import Head
from embedjax.sharding import make_mesh

TEMPLATES = ("a photo of a {}.", "the {} {}", "painting of {}")


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def rows_of(folder):
    source = open_source(c.Pictures(str(folder)))
    return [source[row] for row in range(len(source))]


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return c.File(str(path))


def weights_of(pair, names, templates, dim):
    """OpenAI's procedure: a class's weights are the mean of its texts' unit vectors, at length 1."""
    found = []
    for name in names:
        vectors = encode(pair, [template.replace("{}", name) for template in templates], column="query")[:, :dim]
        found.append(unit(unit(vectors).mean(0)))
    return np.stack(found)


def test_zero_shot_at_every_prefix_and_on_every_mesh(pair, pictures):
    task = c.ZeroShot(c.Pictures(str(pictures)), templates=TEMPLATES, dims=(8, 4))
    found = evaluate(pair, (task,))
    rows = rows_of(pictures)
    names = sorted({row["label"].replace("_", " ") for row in rows})
    assert "sea green" in names and len(names) == 7
    wanted = np.array([names.index(row["label"].replace("_", " ")) for row in rows])
    vectors = encode_images(pair, [row["image"] for row in rows])
    for label, dim in (("zero-shot", None), ("zero-shot@8", 8), ("zero-shot@4", 4)):
        logits = unit(vectors[:, :dim]) @ weights_of(pair, names, TEMPLATES, dim).T
        assert found[f"{label}/top1"] == pytest.approx(np.mean(logits.argmax(1) == wanted))
        assert found[f"{label}/top5"] == pytest.approx(metrics.top_k_accuracy_score(wanted, logits, k=5))
        per_class = metrics.balanced_accuracy_score(wanted, logits.argmax(1))
        assert found[f"{label}/mean_per_class"] == pytest.approx(per_class)
    assert len({value for key, value in found.items() if key.endswith("top5")}) > 1, "the prefixes are other models"
    for count in (2, 4, 8):
        again = evaluate(pair, prepare((task,)), mesh=make_mesh(c.Mesh(), jax.devices()[:count]))
        assert again == pytest.approx(found)
    assert task.main_metric == "zero-shot/top1"


def test_names_of_classes(pair, pictures, tmp_path):
    """Labels may be numbers, keys of a table of names, or the names; labels of one name are one class."""
    rows = [row for row in rows_of(pictures) if row["label"] in ("red", "blue", "pink")]
    plain = evaluate(pair, (c.ZeroShot(table(tmp_path / "plain.jsonl", rows)),))
    assert "zero-shot/top5" not in plain, "of three classes five are always right"
    order = ("blue", "pink", "red")
    numbers = [{**row, "label": order.index(row["label"])} for row in rows]
    classes = {str(n): name for n, name in enumerate(order)}
    named = c.ZeroShot(table(tmp_path / "numbers.jsonl", numbers), classes=classes)
    assert evaluate(pair, (named,)) == plain
    by_name = c.ZeroShot(table(tmp_path / "names.jsonl", rows), classes=classes)
    assert evaluate(pair, (by_name,)) == plain
    more = dataclasses.replace(named, classes={**classes, "9": "gold", "10": "grey", "11": "green"})
    assert evaluate(pair, (more,))["zero-shot/top1"] <= plain["zero-shot/top1"]
    assert evaluate(pair, (more,))["zero-shot/mean_per_class"] <= plain["zero-shot/mean_per_class"]
    twins = [{**row, "label": f"{row['label']}-{n % 2}"} for n, row in enumerate(rows)]
    both = {f"{name}-{n}": name for name in order for n in (0, 1)}
    assert evaluate(pair, (c.ZeroShot(table(tmp_path / "twins.jsonl", twins), classes=both),)) == plain


def test_texts_have_classes_too(model, sentences, tmp_path):
    rows = [{"text": text, "label": f"w{n % 6}"} for n, text in enumerate(sentences[:60])]
    task = c.ZeroShot(
        table(tmp_path / "texts.jsonl", rows), {"text": "text", "label": "label"}, templates=("{}", "w9 {}"), dims=(8,)
    )
    found = evaluate(model, (task,))
    names, wanted = [f"w{n}" for n in range(6)], np.arange(60) % 6
    for label, dim in (("zero-shot", None), ("zero-shot@8", 8)):
        logits = unit(encode(model, sentences[:60], column="document")[:, :dim])
        logits = logits @ weights_of(model, names, ("{}", "w9 {}"), dim).T
        assert found[f"{label}/top1"] == pytest.approx(np.mean(logits.argmax(1) == wanted))
        assert found[f"{label}/top5"] == pytest.approx(metrics.top_k_accuracy_score(wanted, logits, k=5))


def test_plain_products_are_averaged_as_they_are(pair, pictures):
    """A model that compares by products has no vectors of length 1, so its means are plain ones."""
    towers = {name: dataclasses.replace(tower, normalize=False, similarity="dot") for name, tower in pair.config.towers.items()}
    embedders = {name: dataclasses.replace(embedder, normalize=False) for name, embedder in pair.embedders.items()}
    dot = dataclasses.replace(pair, config=dataclasses.replace(pair.config, towers=towers), embedders=embedders)
    found = evaluate(dot, (c.ZeroShot(c.Pictures(str(pictures)), templates=TEMPLATES),))
    rows = rows_of(pictures)
    names = sorted({row["label"] for row in rows})
    texts = [t.replace("{}", name.replace("_", " ")) for name in names for t in TEMPLATES]
    weights = encode(dot, texts, column="query").reshape(7, 3, -1).mean(1)
    logits = encode_images(dot, [row["image"] for row in rows]) @ weights.T
    wanted = [names.index(row["label"]) for row in rows]
    assert found["zero-shot/top1"] == pytest.approx(np.mean(logits.argmax(1) == wanted))
    assert found["zero-shot/top5"] == pytest.approx(metrics.top_k_accuracy_score(wanted, logits, k=5))


@pytest.fixture
def labelled(pictures, tmp_path):
    """20 training and 8 test pictures of seven colours."""
    rows = rows_of(pictures)
    test = [n for n in range(28) if n % 7 in (2, 5)]
    train, tested = ([row for n, row in enumerate(rows) if (n in test) == which] for which in (False, True))
    return table(tmp_path / "train.jsonl", train), table(tmp_path / "test.jsonl", tested), train, tested


def test_probe_neighbours_and_clusters_of_pictures(pair, labelled):
    train, test, known, asked = labelled
    columns = {"image": "image", "label": "label"}
    tasks = (
        c.Classification(test, columns, train=train, per_label=0, dims=(8,)),
        c.KnnClassification(test, columns, train=train, k=3, dims=(8,)),
        c.Clustering(train, columns, experiments=2, dims=(8,)),
    )
    found = evaluate(pair, tasks, mesh=make_mesh(c.Mesh(), jax.devices()[:4]))
    learnt, tested = (encode_images(pair, [row["image"] for row in rows]) for rows in (known, asked))
    labels, wanted = ([row["label"] for row in rows] for rows in (known, asked))
    for at, dim in (("", None), ("@8", 8)):
        x, y = unit(learnt[:, :dim]), unit(tested[:, :dim])
        guess = LogisticRegression(max_iter=100).fit(x, labels).predict(y)
        assert found[f"classification{at}/accuracy"] == pytest.approx(np.mean(guess == wanted))
        guess = KNeighborsClassifier(3, metric="cosine").fit(x, labels).predict(y)
        assert found[f"knn{at}/accuracy"] == pytest.approx(np.mean(guess == wanted))
        means = [MiniBatchKMeans(7, batch_size=512, n_init="auto", random_state=seed).fit_predict(x) for seed in (42, 43)]
        assert found[f"clustering{at}/v_measure"] == pytest.approx(np.mean([metrics.v_measure_score(labels, m) for m in means]))
    few = prepare((c.Classification(test, columns, train=train, per_label=1, experiments=2),))[0]
    assert len(few.sides[0].texts) <= 14 and few.sides[0].pictures, "only what a draw learns from is encoded"


def test_a_class_head_of_pictures(pair, labelled):
    train, _, known, _ = labelled
    labels = sorted({row["label"] for row in known})
    kernel = np.random.default_rng(0).normal(size=(12, 7)).astype(np.float32)
    head = Head(tuple(labels), False, "softmax", kernel, np.zeros(7, np.float32))
    task = c.HeadAccuracy(train, {"image": "image", "label": "label"})
    found = evaluate(dataclasses.replace(pair, heads={"colours": head}), (task,))
    guess = (encode_images(pair, [row["image"] for row in known]) @ kernel).argmax(1)
    assert found["head/accuracy"] == pytest.approx(np.mean(guess == [labels.index(row["label"]) for row in known]))


def captions(rows):
    """Two captions a picture, one of which is that of another picture too."""
    for n, row in enumerate(rows):
        for text in (f"a {row['label']} photo", f"photo of {['red', 'cat', 'dog', 'tree', 'stone'][n % 5]} {n // 5}"):
            yield text, n


def test_retrieval_of_pictures_from_pairs_and_from_a_corpus(pair, pictures, tmp_path):
    """R@k both ways with several captions a picture, and the same from BEIR's files with pictures in them."""
    rows = rows_of(pictures)[:25]
    said = list(captions(rows))
    vectors = encode_images(pair, [row["image"] for row in rows])
    texts = list(dict.fromkeys(text for text, _ in said))
    cosines = encode(pair, texts, column="query") @ vectors.T
    right = collections.defaultdict(set)
    for text, n in said:
        right[texts.index(text)].add(n)
    pairs = table(tmp_path / "pairs.jsonl", [{"text": text, "image": rows[n]["image"]} for text, n in said])
    images = table(tmp_path / "images.jsonl", [{"key": f"p{n}", "file": row["image"]} for n, row in enumerate(rows)])
    lines = table(tmp_path / "texts.jsonl", [{"_id": f"t{n}", "text": text} for n, text in enumerate(texts)])
    judged = [{"t": f"t{query}", "p": f"p{n}"} for query, found in right.items() for n in sorted(found)]
    qrels, seen = table(tmp_path / "qrels.jsonl", judged), {"id": "key", "image": "file"}
    to_image = (
        c.Retrieval(pairs, {"query": "text", "document": "image"}, pictures=("document",), name="pairs", dims=(8,)),
        c.Retrieval(
            qrels, {"query_id": "t", "document_id": "p"}, lines, images, corpus_columns=seen, pictures=("document",),
            name="corpus", dims=(8,),
        ),
    )  # fmt: skip
    to_text = (
        c.Retrieval(pairs, {"query": "image", "document": "text"}, pictures=("query",), name="pairs", dims=(8,)),
        c.Retrieval(
            qrels, {"query_id": "p", "document_id": "t"}, images, lines, query_columns=seen, pictures=("query",),
            name="corpus", dims=(8,),
        ),
    )  # fmt: skip
    back = collections.defaultdict(set)
    for query, found in right.items():
        for n in found:
            back[n].add(query)
    for tasks, scores, wanted in ((to_image, cosines, right), (to_text, cosines.T, back)):
        found = evaluate(pair, tasks, mesh=make_mesh(c.Mesh(), jax.devices()[:2]))
        order = np.argsort(-scores, axis=1, kind="stable")
        for k in (1, 5, 10):
            met = [wanted[query] & set(row[:k].tolist()) for query, row in enumerate(order)]
            hit = np.mean([bool(each) for each in met])
            share = np.mean([len(each) / len(wanted[query]) for query, each in enumerate(met)])
            for name in ("pairs", "corpus"):
                assert found[f"{name}/success@{k}"] == pytest.approx(hit)
                assert k == 5 or found[f"{name}/recall@{k}"] == pytest.approx(share)
        assert {key.removeprefix("pairs"): found[key] for key in found if key.startswith("pairs")} == pytest.approx(
            {key.removeprefix("corpus"): found[key] for key in found if key.startswith("corpus")}
        )


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        (c.ZeroShot, {"templates": ()}, "has no templates"),
        (c.ZeroShot, {"templates": ("a {}", "a photo")}, "the template 'a photo' has no {} for the name of the class"),
        (c.ZeroShot, {"templates": ("",)}, "the template '' has no {}"),
        (c.ZeroShot, {"classes": {"a": "red"}}, "classes must be two or more"),
        (c.ZeroShot, {"classes": {"a": "red", "b": " "}}, "names that are not empty"),
        (c.Retrieval, {"pictures": ("image",)}, "pictures names 'image'; it is for query and document"),
    ],
)
def test_what_a_config_cannot_say(kind, fields, reason):
    with pytest.raises(ConfigError) as error:
        kind(**fields)
    assert reason in str(error.value)


def test_faults(pair, model, pictures, tmp_path):
    rows = rows_of(pictures)
    numbers = table(tmp_path / "numbers.jsonl", [{**row, "label": n % 3} for n, row in enumerate(rows)])
    one = table(tmp_path / "one.jsonl", [{**row, "label": "red"} for row in rows])
    lost = table(tmp_path / "lost.jsonl", [*rows, {"image": None, "label": "red"}])
    cut = table(tmp_path / "cut.jsonl", [*rows, {"image": "none.png", "label": "red"}])
    folder = c.Pictures(str(pictures))
    near = {"0": "blue", "1": "gold", "2": "greem"}
    both = {"image": "image", "text": "name", "label": "label"}
    for task, kind, reason in (
        (c.ZeroShot(numbers), DataError, "holds numbers, and nothing says what they mean"),
        (c.ZeroShot(one), DataError, "all 28 rows have the label 'red'"),
        (c.ZeroShot(lost), DataError, "lost.jsonl:29: column 'image' is missing"),
        (c.ZeroShot(cut), DataError, "cut.jsonl:29: column 'image': picture '.*none.png' cannot be read"),
        (c.ZeroShot(folder, classes={"x": "black", "y": "pink"}), DataError, "'blue', none of the 2 classes; known: black, "),
        (c.ZeroShot(folder, classes=near), DataError, "'green', none of the 3 classes; did you mean 'greem'"),
        (c.ZeroShot(folder, {"image": "image", "label": "kind"}), DataError, "no column 'kind'"),
        (c.ZeroShot(folder, both), ConfigError, "'text', which it does not have"),
        (c.ZeroShot(c.Pictures(str(tmp_path / "none"))), DataError, "no such folder"),
        (c.ZeroShot(c.Pictures(str(tmp_path))), DataError, "a folder without pictures"),
        (c.Retrieval(one, {}, one, one, pictures=("document",)), ConfigError, "a column for 'title', which it does not have"),
    ):  # fmt: skip
        with pytest.raises(kind, match=reason) as error:
            evaluate(pair, (task,))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no tower that takes pictures"):
        evaluate(model, (c.ZeroShot(folder),))
    with pytest.raises(ConfigError, match="dims holds 13; the model's vectors have 12"):
        evaluate(pair, (c.ZeroShot(folder, dims=(13,)),))
