"""Late interaction as a PyLate folder: written, read back, checked, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.evaluate.late import encode_tokens
from embedjax.export import check_format, export, gate
from embedjax.load import assemble, load, make_texts, resolve_tower
from embedjax.models.embedder import build_embedder
from embedjax.models.folders import read_params, read_tower

ARCH = c.Bert(vocab_size=90, width=16, depth=1, heads=2, mlp=32, positions=32)
DENSE = (c.Dense(12, True, "tanh"), c.Dense(8, False, "identity"))
LATE = c.Late("[Q] ", "[D] ", query_length=12, document_length=20, attend=True, skip=(".", ","))
TEXTS = ["red green, blue.", "cat dog! (old) new? house", "red"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its tokenizer's folder has no markers: they are added to it."""
    place = tmp_path_factory.mktemp("late")
    save_tokenizer(train_wordpiece(TEXTS * 3, 80), place, max_length=20)
    tower = resolve_tower(c.Tower(arch=ARCH, tokenizer=str(place), late=LATE, dense=DENSE))
    params = jax.device_get(jax.jit(build_embedder(tower).init)(jax.random.key(0)))
    texts = {"text": make_texts(tower, place)}
    return assemble(c.Model({"text": tower}), {"towers": {"text": params}}, texts, {"text": place}, "here")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported") / "model"
    assert export(model, place, "pylate", texts=TEXTS) < 1e-6
    return place


def test_a_folder_is_read_back_whole(model, folder):
    found = load(folder)
    assert found.config.towers["text"].late == LATE and found.config.towers["text"].dense == DENSE
    jax.tree.map(np.testing.assert_array_equal, found.params, dict(model.params))
    for side in ("query", "document"):
        one, other = (encode_tokens(each, TEXTS, column=side) for each in (model, found))
        np.testing.assert_array_equal(one.starts, other.starts)
        np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6)
    assert gate.check(folder)["embedjax"] < 1e-6 and gate.check(folder)["sentence-transformers"] == "does not read this format"
    assert found.texts["text"].tokenizer.token_to_id("[Q] ") == model.texts["text"].tokenizer.token_to_id("[Q] ")


def test_the_gate_sees_another_skip_list(model, folder, tmp_path):
    other = tmp_path / "model"
    export(model, other, "pylate")
    change(other / "config_sentence_transformers.json", skiplist_words=["red"])
    with pytest.raises(CheckFailed):
        gate.judge(other, gate.check(other))


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "values, told",
    [
        ({"similarity_fn_name": "cosine"}, "MaxSim"),
        ({"model_type": "SentenceTransformer"}, "expected 'ColBERT'"),
        ({"query_length": "32"}, "query_length"),
        ({"skiplist_words": "abc"}, "skiplist_words"),
        ({"document_length": 2}, "document_length is 2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_that_are_not_pylates_are_told(model, tmp_path, values, told):
    export(model, tmp_path / "model", "pylate")
    change(tmp_path / "model" / "config_sentence_transformers.json", **values)
    with pytest.raises(ConfigError, match=told):
        read_tower(tmp_path / "model")


def test_what_a_folder_does_not_say_is_pylates_default(model, tmp_path):
    export(model, tmp_path / "model", "pylate")
    (tmp_path / "model" / "config_sentence_transformers.json").write_text('{"do_query_expansion": false}')
    late = read_tower(tmp_path / "model").late
    assert late == c.Late("[Q] ", "[D] ", expand=False)
    change(tmp_path / "model" / "1_Dense" / "config.json", use_residual=True)
    with pytest.raises(ConfigError, match="residual"):
        read_tower(tmp_path / "model")


def test_a_token_head_on_another_models_encoder_starts_anew(model, tmp_path):
    plain = dataclasses.replace(model.config.towers["text"], late=None, normalize=True)
    pooled = assemble(c.Model({"text": plain}), {"towers": dict(model.params["towers"])}, model.texts, model.tokenizers, "here")
    with pytest.raises(ConfigError, match="vector a token"):
        encode_tokens(pooled, TEXTS)
    pooled = dataclasses.replace(pooled, texts={"text": make_texts(plain, model.tokenizers["text"])})
    export(pooled, tmp_path / "pooled")
    tower = resolve_tower(
        c.Tower(init=str(tmp_path / "pooled"), late=dataclasses.replace(LATE, query_marker="", document_marker=""))
    )
    assert tower.dense == (c.Dense(128, False, "identity"),) and tower.max_length == 20
    assert read_params(tmp_path / "pooled", tower).keys() == {"encoder"}


def test_formats_that_do_not_fit_are_told_before_training(model):
    tower = model.config.towers["text"]
    with pytest.raises(ConfigError, match='exported as "pylate"'):
        check_format(model.config, "sentence-transformers")
    with pytest.raises(ConfigError, match="is for late interaction"):
        check_format(c.Model({"text": dataclasses.replace(tower, late=None)}), "pylate")
    two = c.Model({"q": tower, "d": tower}, {"anchor": "q", "positive": "d"})
    with pytest.raises(ConfigError, match="one tower"):
        check_format(two, "pylate")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"similarity": "dot"}, "cosines"),
        ({"normalize": False}, "cosines"),
        ({"max_length": 64}, "Late.query_length"),
        ({"late": c.Late(document_length=180)}, "above the 32"),
        ({"arch": c.Static()}, "Static has no late interaction"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_towers_that_cannot_be_late_are_told(changes, told):
    with pytest.raises(ConfigError, match=told):
        resolve_tower(c.Tower(**{"arch": ARCH, "late": LATE, **changes}))
