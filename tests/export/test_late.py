"""Late interaction as a PyLate folder: written, read back, checked, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.evaluate.late import encode_tokens
from embedjax.export import check_format, export, gate
from embedjax.load import assemble, load, make_texts, read_start, resolve_tower
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
    assert found.texts["text"].tokenizer.token_to_id("[Q] ") == model.texts["text"].tokenizer.token_to_id("[Q] ")


SKIPS = {"pylate": "config_sentence_transformers.json", "sentence-transformers": "3_MultiVectorMask/config.json"}


@pytest.mark.parametrize("format", SKIPS)
def test_the_gate_sees_another_skip_list(model, tmp_path, monkeypatch, format):
    monkeypatch.setattr(gate, "READERS", {"embedjax": gate.READERS["embedjax"]})
    monkeypatch.setattr(gate, "LATE_READERS", {})
    other = tmp_path / "model"
    export(model, other, format)
    assert gate.check(other)["embedjax"] < 1e-6
    change(other / SKIPS[format], skiplist_words=["red"])
    with pytest.raises(CheckFailed):
        gate.judge(other, gate.check(other))


def same_vectors(model, found):
    for side in ("query", "document"):
        one, other = (encode_tokens(each, TEXTS, column=side) for each in (model, found))
        np.testing.assert_array_equal(one.starts, other.starts)
        np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6)


WORDED = {"query": "red ", "document": "", "page-query": "blue "}
FOLDERS = {
    "filled": ({}, {}),
    "not filled": ({"expand": False, "attend": False, "skip": ()}, {}),
    "without markers": ({"query_marker": "", "document_marker": "", "attend": False}, {"page": "cat "}),
    "with prompts": ({}, WORDED),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_multi_vector_folder_is_read_back_whole(model, tmp_path, name):
    changes, prompts = FOLDERS[name]
    tower = dataclasses.replace(model.config.towers["text"], late=dataclasses.replace(LATE, **changes), prompts=prompts)
    texts = {"text": make_texts(tower, model.tokenizers["text"])}
    made = dataclasses.replace(model, config=c.Model({"text": tower}), embedders={"text": build_embedder(tower)}, texts=texts)
    assert export(made, tmp_path / "out", texts=TEXTS) < 1e-6
    found = load(tmp_path / "out")
    assert found.config.towers["text"].late == tower.late and found.config.towers["text"].dense == DENSE
    assert found.config.towers["text"].prompts == {key: text for key, text in prompts.items() if text}
    same_vectors(made, found)
    assert "MultiVectorEncoder" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def multi_vector(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("multi-vector") / "model"
    assert export(model, place) < 1e-6
    return place


@pytest.fixture
def copied(multi_vector, tmp_path):
    return shutil.copytree(multi_vector, tmp_path / "out")


def test_a_multi_vector_folder_key_by_key(multi_vector):
    read = lambda name: json.loads((multi_vector / name).read_text())
    place = "sentence_transformers."
    assert [each["type"] for each in read("modules.json")] == [
        f"{place}base.modules.transformer.Transformer",
        f"{place}base.modules.dense.Dense",
        f"{place}base.modules.dense.Dense",
        f"{place}multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
        f"{place}base.modules.normalize.Normalize",
    ]
    settings = read("config_sentence_transformers.json")
    assert settings["model_type"] == "MultiVectorEncoder" and settings["similarity_fn_name"] == "maxsim"
    assert settings["prompts"] == {"query": "[Q] ", "document": "[D] "}
    encoder = read("sentence_bert_config.json")
    assert encoder["query_expansion"] == {"strategy": "fixed", "attend": True, "token": None, "length": 12}
    assert encoder["document_length"] == 20 and "query_length" not in encoder
    where = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    assert read("4_Normalize/config.json") == where and where.items() <= read("2_Dense/config.json").items()
    assert read("3_MultiVectorMask/config.json")["skiplist_words"] == [".", ","]
    special = {each["content"] for each in read("tokenizer.json")["added_tokens"] if each["special"] and not each["normalized"]}
    assert {"[Q] ", "[D] "} <= special


def test_a_default_prompt_is_that_of_both_sides(model, tmp_path):
    tower = dataclasses.replace(model.config.towers["text"], prompts={"page": "red ", "query": "dog "}, default_prompt="page")
    texts = {"text": make_texts(tower, model.tokenizers["text"])}
    made = dataclasses.replace(model, config=c.Model({"text": tower}), texts=texts)
    for format in ("sentence-transformers", "pylate"):
        assert export(made, tmp_path / format, format) < 1e-6
        same_vectors(made, load(tmp_path / format))
    prompts = json.loads((tmp_path / "sentence-transformers" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "[Q] dog ", "document": "[D] red "}


def test_prompts_that_have_no_marker_are_told(model):
    tower = dataclasses.replace(model.config.towers["text"], prompts={"page": "red "})
    check_format(c.Model({"text": tower}), "pylate")
    with pytest.raises(ConfigError, match="page-query and page-document"):
        check_format(c.Model({"text": tower}), "sentence-transformers")


def test_prompts_without_their_markers_stay_texts(model, copied):
    """Where a prompt has no marker, no token is taken for one: the texts are the same."""
    change(copied / "config_sentence_transformers.json", prompts={"query": "[Q] ", "document": "[D] ", "page": "red "})
    tower = load(copied).config.towers["text"]
    assert (tower.late.query_marker, tower.late.document_marker) == ("", "")
    assert tower.prompts == {"query": "[Q] ", "document": "[D] ", "page": "red "}
    same_vectors(model, load(copied))


MASK, SCALE = "3_MultiVectorMask/config.json", "4_Normalize/config.json"
ENCODER, SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"


@pytest.mark.parametrize(
    "file, values, told",
    [
        (ENCODER, {"query_expansion": {"strategy": "min", "length": 12}}, "strategy 'min' is not supported"),
        (ENCODER, {"query_expansion": {"strategy": "fixed", "length": 12, "token": "[PAD]"}}, "token '\\[PAD\\]'"),
        (ENCODER, {"query_expansion": {"strategy": "fixed"}}, "sentence_bert_config.json: Late.query_length is 0"),
        (ENCODER, {"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs of 'text'"),
        (ENCODER, {"document_length": 99}, "of up to 99 tokens; the encoder has positions for 32"),
        (MASK, {"skiplist_tasks": ["query", "document"]}, "skiplist_tasks"),
        (MASK, {"keep_only_token_ids": [3]}, "keep_only_token_ids"),
        (SCALE, {"module_input_name": "sentence_embedding"}, "scales sentence_embedding"),
        (SETTINGS, {"similarity_fn_name": "meanmaxsim"}, "'meanmaxsim' is not supported"),
        (SETTINGS, {"model_type": "SentenceTransformer"}, "expected 'MultiVectorEncoder'"),
        ("1_Dense/config.json", {"module_input_name": "sentence_embedding"}, "expected 'token_embeddings'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_multi_vector_folders_that_are_not_supported_are_told(copied, file, values, told):
    change(copied / file, **values)
    with pytest.raises(ConfigError, match=told):
        load(copied)


def test_token_vectors_that_are_not_scaled_or_pooled_are_told(copied):
    file = copied / "modules.json"
    modules = json.loads(file.read_text())
    file.write_text(json.dumps(modules[:-1]))
    with pytest.raises(ConfigError, match="MultiVectorMask; expected .*MultiVectorMask Normalize"):
        load(copied)
    kind = "sentence_transformers.multi_vector_encoder.modules.token_pooling.HierarchicalTokenPooling"
    file.write_text(json.dumps([*modules, {**modules[-1], "type": kind}]))
    with pytest.raises(ConfigError, match="HierarchicalTokenPooling' is not supported"):
        load(copied)


@pytest.mark.parametrize("format", ["pylate", "sentence-transformers"])
def test_residual_projections_come_back(model, tmp_path, format):
    dense = (c.Dense(12, True, "tanh", residual=True), c.Dense(12, False, "identity", residual=True))
    tower = dataclasses.replace(model.config.towers["text"], dense=dense)
    embedder = build_embedder(tower)
    params = jax.device_get(jax.jit(embedder.init)(jax.random.key(1)))
    made = dataclasses.replace(
        model, config=c.Model({"text": tower}), embedders={"text": embedder}, params={"towers": {"text": params}}
    )
    assert export(made, tmp_path / "out", format) < 1e-6
    found = load(tmp_path / "out")
    assert found.config.towers["text"].dense == dense
    jax.tree.map(np.testing.assert_array_equal, found.params["towers"]["text"]["dense"], dict(params["dense"]))


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
    with pytest.raises(ConfigError, match="of up to 180 tokens; the encoder has positions for 32"):
        read_tower(tmp_path / "model")
    (tmp_path / "model" / "config_sentence_transformers.json").write_text(
        '{"do_query_expansion": false, "document_length": 30}'
    )
    assert read_tower(tmp_path / "model").late == c.Late("[Q] ", "[D] ", document_length=30, expand=False)
    change(tmp_path / "model" / "1_Dense" / "config.json", use_residual=True)
    tower = read_tower(tmp_path / "model")
    assert tower.dense[0].residual
    with pytest.raises(ConfigError, match="1_Dense .* expected floating-point .*residual.weight"):
        read_params(tmp_path / "model", tower)


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
    assert read_params(tmp_path / "pooled", tower).keys() == {"encoder"} == read_start(tower).keys()


def test_lengths_of_ones_own_on_a_folder_of_late_interaction_are_told(model, tmp_path, caplog):
    """A `late` takes the place of all that the folder says."""
    export(model, tmp_path / "late")
    same = resolve_tower(c.Tower(init=str(tmp_path / "late")))
    assert same.late == resolve_tower(c.Tower(init=str(tmp_path / "late"), late=same.late)).late and not caplog.text
    longer = dataclasses.replace(same.late, document_length=same.late.document_length + 2)
    assert resolve_tower(c.Tower(init=str(tmp_path / "late"), late=longer)).late == longer
    assert f"document_length {longer.document_length}, there {same.late.document_length}" in caplog.text
    assert "query_length" not in caplog.text


def test_words_that_the_tokenizer_lacks_are_not_written(model, tmp_path):
    """PyLate would take one for the unknown token, and skip that."""
    tower = model.config.towers["text"]
    late = dataclasses.replace(tower.late, skip=(*tower.late.skip, "no-such-word"))
    config = c.Model({"text": dataclasses.replace(tower, late=late)})
    for format, file, key in (
        ("pylate", "config_sentence_transformers.json", "skiplist_words"),
        ("sentence-transformers", "3_MultiVectorMask/config.json", "skiplist_words"),
    ):
        export(dataclasses.replace(model, config=config), tmp_path / format, format)
        known = model.texts["text"].tokenizer.token_to_id
        written = json.loads((tmp_path / format / file).read_text())[key]
        assert written == [word for word in tower.late.skip if known(word) is not None]


def test_formats_that_do_not_fit_are_told_before_training(model):
    tower = model.config.towers["text"]
    check_format(model.config, "sentence-transformers")
    with pytest.raises(ConfigError, match='exported as "sentence-transformers" or "pylate"'):
        check_format(model.config, "hf")
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
