"""Losses with heads: the same number and gradient plain, accumulated and cached, on any number of devices; what is refused; and
that they teach."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, sharding, step
from embedjax.config import serialize
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.columns import make_layout, read_row
from embedjax.data.sources import BadRow, open_source
from embedjax.evaluate.encode import encode
from embedjax.evaluate.tasks import evaluate
from embedjax.load import load, read_constants
from embedjax.losses import classify, contrastive
from embedjax.models.classifier import read_heads
from embedjax.models.embedder import Embedder, Output
from embedjax.plan.shapes import shapes
from embedjax.train import train

B, L, V = 16, 10, 40
KEY = jnp.uint32(7)
ARCH = config.Bert(
    vocab_size=V, width=16, depth=1, heads=2, mlp=32, positions=L, dropout=0.2, attention_dropout=0.2, init_std=0.2
)
ONE = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
WEIGHTS = (0.5, 2.0, 1.0)
LOSSES = {
    "classify": config.Classify(classes=3, label_smoothing=0.1, class_weights=WEIGHTS),
    "pair": config.ClassifyPair(classes=3),
    "several labels": config.Classify(classes=3, criterion="sigmoid", class_weights=WEIGHTS),
    "masked words": config.MaskedLanguage(share=0.3, whole_words=True, mask_id=4),
    "denoising": config.DenoisingAutoEncoder(),
    "contrastive": config.SupCon(),
}
HEAD = config.Classify(classes=3)
NAMES = {"anchor": "text", "positive": "other", "label": "kind"}


class Bag:
    """A tower without layers: the mean of a text's token vectors."""

    width, normalize = 16, False

    def init(self, key):
        return {"encoder": {"tokens": {"embedding": jax.random.normal(key, (V, self.width))}}}

    def apply(self, params, column, **options):
        return Output(pooled=params["encoder"]["tokens"]["embedding"][column["ids"]].mean(-2))


def columns_of(loss):
    wanted = {"anchor"} if hasattr(loss, "words") else set(loss.needs)
    return {name: NAMES[name] for name in NAMES if name in wanted}


def batch(loss):
    rng = np.random.default_rng(0)

    def text():
        length = rng.integers(4, L + 1, (B, 1))
        mask = np.arange(L) < length
        ids = np.where(mask, rng.integers(5, V, (B, L)), 0)
        inside = mask & (np.arange(L) > 0) & (np.arange(L) < length - 1)
        word = np.where(inside, np.cumsum(inside & (rng.random((B, L)) < 0.7), 1), -1)
        return {"ids": ids.astype(np.int32), "mask": mask, "word": word.astype(np.int32)}

    columns = {"anchor": text(), "positive": text(), "row": np.arange(B, dtype=np.int32)}
    labels = rng.integers(0, 3, B)
    several = (rng.random((B, 3)) < 0.5).astype(np.float32)
    columns["labels"] = several if getattr(loss, "criterion", "") == "sigmoid" else labels.astype(np.int32)
    return columns


def parts(loss, mesh=ONE, arch=ARCH):
    """(objective, params); what reads single vectors has a tower that costs nothing."""
    task = config.Set(columns=columns_of(loss), loss=loss)
    embedders = {"text": Embedder(arch) if hasattr(loss, "words") else Bag()}
    model = config.Model({"text": config.Tower(arch=arch)})
    made = objective.make(task, model, embedders, mesh)
    init = lambda: {
        "towers": {"text": embedders["text"].init(jax.random.key(1))},
        "loss": objective.loss_params(task, model, embedders, jax.random.key(2)),
    }
    rng = np.random.default_rng(1)  # a compiled init would take longer than all else
    params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), jax.eval_shape(init))
    return made, params if params["loss"] else {"towers": params["towers"]}


@functools.cache
def plain(name):
    made, params = parts(LOSSES[name])
    return jax.jit(step.plain(made))(params, {}, batch(LOSSES[name]), KEY)


GRID = [
    (name, way, devices)
    for name in LOSSES
    for way in ("plain", "accumulated", "cached")
    for devices in (1, 2, 4, 8)
    if (way, devices) != ("plain", 1) and (name, way) != ("contrastive", "accumulated")
]
CHOSEN = {
    ("classify", "accumulated", 4),
    ("pair", "cached", 2),
    ("several labels", "plain", 8),
    ("masked words", "accumulated", 2),
    ("contrastive", "cached", 4),
}


@pytest.mark.parametrize(
    ("name", "way", "devices"),
    [pytest.param(*case, marks=() if case in CHOSEN else pytest.mark.slow, id="-".join(map(str, case))) for case in GRID],
)
def test_the_same_however_the_batch_is_split(name, way, devices):
    shape = (devices // 2, 2) if devices > 1 else (1, 1)
    mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[:devices])
    made, params = parts(LOSSES[name], mesh)
    gradient = {
        "plain": lambda: step.plain(made),
        "accumulated": lambda: step.accumulated(made, 2),
        "cached": lambda: step.cached(made, 2, mesh),
    }[way]()
    params = jax.device_put(params, sharding.shardings(params, mesh))
    seen = sharding.in_sight(mesh, gradient)
    (value, metrics), grads = jax.jit(seen)(params, {}, sharding.place(batch(LOSSES[name]), mesh), KEY)
    (wanted, told), wanted_grads = plain(name)
    np.testing.assert_allclose(value, wanted, rtol=2e-6)
    assert metrics.keys() == told.keys()
    for key in told:
        np.testing.assert_allclose(metrics[key], told[key], rtol=1e-5, err_msg=key)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted_grads))
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * largest, err_msg=sharding.path_of(path))


# ---- runs


LABELS = ("cat", "dog", "bird")


@pytest.fixture
def labelled(tmp_path):
    """96 texts whose label is the animal among their words, and pairs that name the same animal or not."""
    rng, others = np.random.default_rng(0), ("red", "green", "old", "new", "round", "flat", "river", "house")
    lines = []
    for i in range(96):
        a, b = LABELS[i % 3], LABELS[rng.integers(3)]
        extra = lambda: " ".join(rng.choice(others, 2))
        lines.append(f"{extra()} {a}\t{b} {extra()}\t{a}\t{int(a == b)}")
    path = tmp_path / "labelled.tsv"
    path.write_text("text\tother\tkind\tsame\n" + "\n".join(lines) + "\n")
    return path


def run_config(path, loss, columns, *, steps=60, labels=(), tower=None, freeze=(), tasks=(), rate=5e-3):
    arch = config.Bert(vocab_size=128, width=32, depth=1, heads=2, mlp=64, positions=16, dropout=0.1)
    tower = tower or config.Tower(arch=arch, tokenizer="wordpiece", max_length=8)
    return config.Config(
        name="run",
        steps=steps,
        model=config.Model({"text": tower}),
        data=config.Data(
            batch_size=24, sets=(config.Set(config.File(str(path)), columns, loss=loss, name="rows", labels=labels),)
        ),
        optim=config.Optim(learning_rate=rate, freeze=freeze),
        evaluate=config.Evaluate(tasks=tasks),
        log_every=1,
    )


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_a_classifier_is_trained_exported_loaded_and_scored(labelled, tmp_path):
    task = config.HeadAccuracy(config.File(str(labelled)), {"text": "text", "label": "kind"}, name="kinds", dims=(16,))
    loss = config.Classify(label_smoothing=0.05, matryoshka=(32, 16))
    columns = {"anchor": "text", "label": "kind"}
    result = train(run_config(labelled, loss, columns, labels=LABELS, tasks=(task,)), tmp_path / "run")
    assert result.scores["kinds/accuracy"] > 0.95
    assert result.scores["kinds@16/accuracy"] > 0.95
    for place in (result.exported, tmp_path / "run"):
        model = load(place)
        assert model.heads["rows"].labels == LABELS
    assert evaluate(load(result.exported), [task]) == pytest.approx(result.scores, abs=0.02)
    head = read_heads(result.exported)["rows"]
    vectors = encode(model, ["red old cat", "green new dog", "flat house bird"])
    assert [head.labels[i] for i in head.predict(vectors)] == list(LABELS)
    with pytest.raises(ConfigError, match="no class head 'other'; .*rows"):
        evaluate(model, [dataclasses.replace(task, head="other")])


@pytest.mark.slow
def test_a_head_alone_is_trained_on_a_frozen_tower(labelled, tmp_path):
    pair = {"anchor": "text", "positive": "other", "label": "same"}
    told = [line.rsplit("\t", 1)[1] for line in labelled.read_text().splitlines()[1:]]
    only = run_config(labelled, config.ClassifyPair(classes=2), pair, steps=150, freeze=("^towers/",), rate=5e-2)
    result = train(only, tmp_path / "run")
    before, after = read_constants(tmp_path / "run")["towers"]["text"], load(result.exported).params["towers"]["text"]
    jax.tree.map(np.testing.assert_array_equal, before, after)
    pairs = config.HeadAccuracy(config.File(str(labelled)), {"text": "text", "other": "other", "label": "same"})
    model = load(result.exported)
    assert evaluate(model, [pairs])["head/accuracy"] > 0.1 + max(map(told.count, "01")) / len(told)  # than the commoner label
    with pytest.raises(DataError, match=r"labelled.tsv:2: .* knows no label 'cat'"):
        evaluate(model, [dataclasses.replace(pairs, columns=pairs.columns | {"label": "kind"})])


def test_a_tower_learns_hidden_words_and_is_exported(labelled, tmp_path):
    words = run_config(labelled, config.MaskedLanguage(whole_words=True), {"anchor": "text"}, steps=40)
    first = train(words, tmp_path / "words")
    found = losses_of(tmp_path / "words")
    assert found[0] > 4 > 3 > found[-1]  # ln 128 is 4.9
    stored = serialize.read(tmp_path / "words" / "config.json")
    assert stored.data.sets[0].loss.mask_id == 4
    assert not load(first.exported).heads


@pytest.mark.slow
def test_from_scratch_masked_words_then_pairs_then_hard_negatives(labelled, pairs_file, tmp_path):
    words = run_config(labelled, config.MaskedLanguage(), {"anchor": "text"}, steps=4)
    first = train(words, tmp_path / "words")
    tower = config.Tower(init=str(first.exported))
    columns = {"anchor": "question", "positive": "answer"}
    second = train(run_config(pairs_file, config.MultipleNegatives(), columns, steps=3, tower=tower), tmp_path / "pairs")
    tower = config.Tower(init=str(second.exported))
    columns = {"anchor": "text", "positive": "other", "negative": "kind"}
    third = train(run_config(labelled, config.MultipleNegatives(), columns, steps=2, tower=tower), tmp_path / "negatives")
    assert encode(load(third.exported), ["red cat"]).shape == (1, 32)


@pytest.mark.slow
def test_the_denoising_auto_encoder_learns_to_write(labelled, tmp_path):
    train(run_config(labelled, config.DenoisingAutoEncoder(), {"anchor": "text"}, steps=60), tmp_path / "run")
    found = losses_of(tmp_path / "run")
    assert found[0] > 4 > 2 > found[-1]


# ---- SimCSE, and what is refused


def test_simcse_is_the_in_batch_loss_with_one_text_twice():
    """The two views of a text drop differently, and its own positive is not masked though the texts are equal."""
    task = config.Set(columns={"anchor": "text", "positive": "text"}, loss=config.MultipleNegatives())
    made = objective.make(task, config.Model({"text": config.Tower(arch=ARCH)}), {"text": Embedder(ARCH)}, ONE)
    column = {name: x for name, x in batch(config.SupCon())["anchor"].items() if name != "word"}
    words = np.random.default_rng(1).integers(0, 2**32, (B, 2), dtype=np.uint32)
    words[1] = words[0]  # rows 0 and 1 hold one text: each is masked for the other
    columns = {
        "anchor": column,
        "positive": column,
        "row": np.arange(B, dtype=np.int32),
        "hash": {"anchor": words, "positive": words},
    }
    params = {"towers": {"text": parts(config.MaskedLanguage(mask_id=4))[1]["towers"]["text"]}}
    outputs = jax.jit(made.encode)(params, {}, columns, KEY)
    u, v = contrastive.normalize(outputs["anchor"]), contrastive.normalize(outputs["positive"][:, 0])
    assert (np.abs(u - v).max(1) > 1e-3).all()
    scores = 20 * np.asarray(u @ v.T, np.float64)
    scores[0, 1] = scores[1, 0] = -np.inf
    wanted = (np.log(np.exp(scores).sum(1)) - np.diagonal(scores)).mean()
    value, _ = made.loss(params, outputs, made.targets({}, columns), KEY)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "columns", "labels", "word"),
    [
        (config.MaskedLanguage(mask_id=4), {"anchor": "a", "positive": "b"}, (), "no column 'positive'"),
        (config.MaskedLanguage(mask_id=V), {"anchor": "a"}, (), "below the 40 tokens"),
        (config.Classify(), {"anchor": "a", "label": "c"}, (), "`labels`"),
        (config.Classify(classes=3), {"anchor": "a", "label": "c"}, ("x", "y"), "2 labels for 3"),
        (config.Classify(classes=3), {"anchor": "a"}, (), "needs column 'label'"),
        (config.ClassifyPair(classes=3), {"anchor": "a", "label": "c"}, (), "needs column 'positive'"),
        (config.Classify(class_weights=(1.0,)), {"anchor": "a", "label": "c"}, ("x", "y"), "1 class_weights for 2"),
        (config.Contrastive(), {"anchor": "a", "positive": "b", "label": "c"}, ("x", "y", "z"), "two labels apart"),
    ],
)
def test_sets_that_do_not_fit_are_refused(loss, columns, labels, word):
    task = config.Set(columns=columns, loss=loss, labels=labels)
    with pytest.raises(ConfigError, match=word):
        objective.make(task, config.Model({"text": config.Tower(arch=ARCH)}), {"text": Embedder(ARCH)}, ONE)


@pytest.mark.parametrize(
    ("loss", "count"),
    [
        (HEAD, 3),
        (config.Sum(losses=(config.SupCon(), HEAD)), 3),
        (config.Contrastive(), 2),
        (config.OnlineContrastive(), 2),
        (config.Sum(losses=(config.CosineRegression(), config.Contrastive())), 2),
    ],
)
def test_a_label_beyond_the_classes_is_a_bad_row(loss, count, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(f"text\tother\tkind\nred\ta\t{count - 1}\nblue\tb\t{count}\ngreen\tc\t-1\n")
    columns = {"anchor": "text", "positive": "other", "label": "kind"}
    source = open_source(config.File(str(path)))
    layout = make_layout(config.Set(columns=columns, loss=loss), source)
    assert read_row(source, layout, 0)["label"] == count - 1
    for row, label in ((1, count), (2, -1)):
        with pytest.raises(BadRow, match=f"'{label}'"):
            read_row(source, layout, row)


SEVERAL = config.Classify(criterion="sigmoid")


@pytest.mark.parametrize("loss", [SEVERAL, config.Sum(losses=(SEVERAL, config.GlobalOrthogonal()))])
def test_the_plan_knows_the_labels_of_a_set(loss):
    task = config.Set(columns={"anchor": "a", "label": "b"}, loss=loss, labels=("x", "y", "z"))
    tower = config.Tower(arch=ARCH, max_length=8)
    planned = config.Config(model=config.Model({"text": tower}), data=config.Data(batch_size=B, sets=(task,)))
    [(_, columns)] = shapes(planned)
    assert (columns["labels"].shape, columns["labels"].dtype) == ((B, 3), np.float32)


def test_hard_negatives_in_a_sum_are_no_positives_of_the_label():
    """They are there for another loss, and may be of any label."""
    rng = np.random.default_rng(0)
    outputs = {"anchor": rng.normal(size=(B, 16)), "positive": rng.normal(size=(B, 3, 16))}
    labels = jnp.asarray(rng.integers(0, 3, B), jnp.int32)
    columns = {name: name for name in ("anchor", "positive", "negative", "negative_2", "label")}
    loss = config.Sum(losses=(config.SupCon(), config.Triplet()), weights=(1.0, 0.0))
    model = config.Model({"text": config.Tower(arch=ARCH)})
    made = objective.make(config.Set(columns=columns, loss=loss), model, {"text": Bag()}, ONE)
    value, _ = made.loss({}, outputs, (labels, None), None)
    views = jnp.stack([outputs["anchor"], outputs["positive"][:, 0]], 1)
    np.testing.assert_allclose(value, classify.sup_con(views, labels, 10.0)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("arch", "loss", "word"),
    [
        (config.DistilBert(), config.DenoisingAutoEncoder(), "BERT and RoBERTa"),
        (config.Static(), config.MaskedLanguage(mask_id=4), "transformer"),
    ],
)
def test_towers_that_do_not_fit_are_refused(arch, loss, word):
    task = config.Set(columns={"anchor": "a"}, loss=loss)
    with pytest.raises(ConfigError, match=word):
        objective.make(task, config.Model({"text": config.Tower(arch=arch)}), {"text": Embedder(arch)}, ONE)


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (config.Classify, {"classes": 1}, "at least 2"),
        (config.Classify, {"label_smoothing": 1.0}, "label_smoothing"),
        (config.Classify, {"classes": 3, "class_weights": (1.0, 2.0)}, "2 numbers for 3"),
        (config.Classify, {"class_weights": (1.0, 0.0)}, "above 0"),
        (config.SupCon, {"scale": 0.0}, "at most 100"),
        (config.MaskedLanguage, {"share": 0.0}, "share"),
        (config.MaskedLanguage, {"mask_id": -1}, "mask_id"),
        (config.DenoisingAutoEncoder, {"deleted": 1.0}, "deleted"),
    ],
)
def test_values_that_make_no_sense_are_refused(kind, options, word):
    with pytest.raises(ConfigError, match=word):
        kind(**options)
