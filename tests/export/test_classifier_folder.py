"""A model and its class head as one folder: written, read back and trained on; what the format does not hold is told."""

import dataclasses
import json
import re

import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.build import resolve
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.evaluate.encode import encode
from embedjax.export import check_format, export, gate
from embedjax.load import load, read_start, resolve_tower
from embedjax.models import sequence_classification as form
from embedjax.models.classifier import Head

WIDTH = small_models.SIZES["width"]
SHAPE = {"pooling": "cls", "dense": (c.Dense(WIDTH),), "normalize": False, "prompts": {}}
TEXTS = ["red cat", "an old blue dog", "tree"]
RNG = np.random.default_rng(3)


def head(criterion="softmax", labels=("cats", "dogs", "trees"), pair=False):
    kernel = RNG.normal(size=(WIDTH * (3 if pair else 1), len(labels))).astype(np.float32)
    return Head(labels, pair, criterion, kernel, RNG.normal(size=len(labels)).astype(np.float32))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = small_models.make(small_models.ARCHS["bert"], tmp_path_factory.mktemp("tokenizer"), **SHAPE)
    heads = {"kinds": head(), "words": head("sigmoid", ("old", "new")), "nli": head(pair=True)}
    return dataclasses.replace(made, heads=heads)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    assert export(model, folder, "classifier", head="kinds") < 1e-6
    return folder


def test_the_folder_is_read_back_as_the_tower_and_its_head(model, exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "cats", "1": "dogs", "2": "trees"} and config["num_labels"] == 3
    assert config["label2id"] == {"cats": 0, "dogs": 1, "trees": 2}
    assert config["problem_type"] == "single_label_classification"
    tensors = load_file(exported / "model.safetensors")
    assert {"bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "classifier.bias"} <= tensors.keys()
    assert not (exported / "classifier").exists(), "there is one head, in one place"
    found = load(exported)
    assert found.heads.keys() == {"kinds"} and found.heads["kinds"].labels == ("cats", "dogs", "trees")
    wanted = model.heads["kinds"].scores(encode(model, TEXTS))
    np.testing.assert_allclose(found.heads["kinds"].scores(encode(found, TEXTS)), wanted, atol=1e-5)
    tower = found.config.towers["text"]
    assert (tower.pooling, tower.dense, tower.normalize, tower.max_length) == ("cls", SHAPE["dense"], False, 24)


def test_a_tower_starts_from_it_and_another_folder_is_made_of_it(model, exported, tmp_path):
    tower = resolve_tower(c.Tower(init=str(exported)))
    params = read_start(tower)
    for path in ("kernel", "bias"):
        np.testing.assert_array_equal(params["dense"]["0"][path], model.params["towers"]["text"]["dense"]["0"][path])
    export(load(exported), tmp_path / "again")
    assert load(tmp_path / "again").heads.keys() == {"kinds"}


def test_several_labels_a_text(model, tmp_path):
    export(model, tmp_path / "words", "classifier", head="words")
    assert json.loads((tmp_path / "words" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert load(tmp_path / "words").heads["words"].criterion == "sigmoid"


def test_the_gate_compares_scores(exported, tmp_path, monkeypatch):
    assert load_file(exported / "parity" / "parity.safetensors")["scores"].shape == (gate.TEXTS, 3)
    original = form.to_tensors

    def damaged(*arguments):
        tensors = original(*arguments)
        return tensors | {"classifier.bias": tensors["classifier.bias"] + 0.01}

    monkeypatch.setattr(form, "to_tensors", damaged)
    with pytest.raises(CheckFailed, match="differ by 1.0e-02"):
        export(load(exported), tmp_path / "out", "classifier")
    assert not (tmp_path / "out").exists()


def test_its_card_says_what_it_tells(exported):
    told = (exported / "README.md").read_text()
    assert "which one of 3 classes a text is of: cats, dogs, trees." in told
    assert "pipeline_tag: text-classification" in told and "library_name: transformers" in told
    (code,) = re.findall(r"```python\n(.*?)```", told, re.S)
    compile(code, "card", "exec")
    assert 'pipeline("text-classification"' in code and "--task head" in told


def test_folders_of_others_stay_bare_encoders(exported, tmp_path):
    for key, value in ((form.MARK, None), ("architectures", ["BertModel"])):
        folder = tmp_path / key
        folder.mkdir()
        for file in exported.iterdir():
            (folder / file.name).write_bytes(file.read_bytes()) if file.is_file() else None
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        found = load(folder)
        tower = found.config.towers["text"]
        assert (tower.pooling, tower.dense, tower.normalize, found.heads) == ("mean", (), True, {})


TENSORS = "bert.pooler.dense.weight"
DAMAGES = {
    "no projection": ({}, lambda t: t.pop(TENSORS), f"missing: {TENSORS}"),
    "a small one": ({}, lambda t: t.update({TENSORS: t[TENSORS][1:].copy()}), "is .23, 24., expected .24, 24."),
    "labels without weights": ({"id2label": {"0": "a"}}, lambda t: None, "classifier.weight is .3, 24., expected .1, 24."),
    "a gap in the labels": ({"id2label": {"0": "a", "2": "b", "3": "c"}}, lambda t: None, "id2label has the keys"),
    "another problem": ({"problem_type": "regression"}, lambda t: None, "problem_type 'regression' is not supported"),
    "a mark of another type": ({form.MARK: {"head": 3}}, lambda t: None, "'head' is 3; expected str"),
    "an unknown similarity": ({form.MARK: {"head": "x", "similarity": "sum"}}, lambda t: None, "similarity 'sum'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_told(exported, tmp_path, name):
    changes, change, words = DAMAGES[name]
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((exported / file).read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=words) as failed:
        load(tmp_path)
    assert str(tmp_path) in str(failed.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling": "mean"}, r"needs a tower with pooling='cls', .* normalize=False; tower 'text' has pooling='mean'"),
        ({"normalize": True}, "has .* normalize=True"),
        ({"dense": ()}, r"has .* dense=\(\)"),
        ({"dense": (c.Dense(8),)}, r"has .* dense=\(Dense\(features=8"),
        ({"dense": (c.Dense(WIDTH, activation="relu"),)}, "BertForSequenceClassification.*activation='tanh'.*has.*'relu'"),
        ({"prompts": {"query": "q: "}}, r"the prompts \['query'\]; transformers puts none"),
        ({"arch": small_models.ARCHS["modernbert"]}, "is a ModernBert"),
        ({"arch": small_models.ARCHS["static"]}, "is a Static"),
        ({"late": c.Late(), "normalize": True}, "late interaction is exported as"),
    ],
)
def test_other_towers_are_refused(model, changes, words):
    tower = dataclasses.replace(model.config.towers["text"], **changes)
    with pytest.raises(ConfigError, match=words):
        check_format(c.Model({"text": tower}), "classifier")


def test_two_towers_are_refused(model):
    tower = model.config.towers["text"]
    with pytest.raises(ConfigError, match="of one tower of texts; the model has"):
        check_format(c.Model({"a": tower, "b": tower}, {"anchor": "a", "positive": "b"}), "classifier")


@pytest.mark.parametrize(
    ("heads", "name", "words"),
    [
        ((), "", "the model has none; train one with the loss Classify"),
        (("kinds", "words"), "", r"class heads \['kinds', 'words'\]; name one: --head NAME"),
        (("kinds", "words"), "kind", "no class head 'kind'"),
        (("nli",), "", "'nli' reads pairs of texts"),
    ],
)
def test_other_heads_are_refused(model, tmp_path, heads, name, words):
    few = dataclasses.replace(model, heads={key: model.heads[key] for key in heads})
    with pytest.raises(ConfigError, match=words):
        export(few, tmp_path / "out", "classifier", head=name)
    assert not any(tmp_path.iterdir())


def test_a_head_is_named_for_this_format_alone(model, tmp_path):
    with pytest.raises(ConfigError, match="sentence-transformers has all of them"):
        export(model, tmp_path / "out", head="kinds")
    with pytest.raises(ConfigError, match="export.head is of the format"):
        c.Export(head="kinds")


def test_it_is_refused_before_training(model):
    tower = dataclasses.replace(model.config.towers["text"], tokenizer="wordpiece")
    columns = {"anchor": "text", "label": "label"}
    kinds = c.Set(c.File("kinds.tsv"), columns, c.Classify(classes=3), name="kinds")
    words = dataclasses.replace(kinds, name="words")
    nli = c.Set(c.File("nli.tsv"), {**columns, "positive": "other"}, c.ClassifyPair(classes=3), name="nli")
    asks = lambda sets, tower=tower, head="": c.Config(
        model=c.Model({"text": tower}), data=c.Data(sets=sets), export=c.Export("classifier", head=head)
    )
    for sets in ((kinds,), (kinds, words)):
        resolve(asks(sets, head="kinds"))
    for config, told in (
        (asks((kinds,), dataclasses.replace(tower, pooling="mean")), "has pooling='mean'"),
        (asks((kinds, words)), "name one"),
        (asks((nli,)), "pairs of texts"),
    ):
        with pytest.raises(ConfigError, match=told):
            resolve(config)


def test_the_command(exported, tmp_path, capsys):
    assert run(["export", str(exported), str(tmp_path / "out"), "--format", "classifier", "--head", "kinds"]) == 0
    assert run(["export", str(exported), str(tmp_path / "no"), "--format", "classifier", "--head", "other"]) == 2
    assert "no class head 'other'" in capsys.readouterr().err
