"""Model folders written and read: both spellings of sentence-transformers, plain Hugging Face, and what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import Bert, Dense, Roberta, Tower
from embedjax.config.errors import ConfigError, StorageError
from embedjax.models.families import family_of
from embedjax.models.folders import read_params, read_tower, resolve
from embedjax.models.written import write_hf, write_sentence_transformers

BERT = Bert(vocab_size=11, width=8, depth=2, heads=2, mlp=12, positions=20)
TOWER = Tower(
    arch=BERT,
    pooling="cls",
    include_prompt=False,
    dense=(Dense(6, True, "tanh"), Dense(4, False, "identity")),
    normalize=True,
    similarity="cosine",
    max_length=16,
    prompts={"query": "find: ", "document": ""},
    default_prompt="query",
)


def params_of(tower):
    rng = np.random.default_rng(0)
    ids = jnp.ones((1, 3), jnp.int32)
    shapes = jax.eval_shape(family_of(tower.arch).Tower(tower.arch).init, jax.random.key(0), ids, ids > 0)["params"]
    params = {"encoder": jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)}
    width = tower.arch.width
    for n, spec in enumerate(tower.dense):
        layer = {"kernel": rng.normal(size=(width, spec.features)).astype(np.float32)}
        if spec.bias:
            layer["bias"] = rng.normal(size=spec.features).astype(np.float32)
        params.setdefault("dense", {})[str(n)] = layer
        width = spec.features
    return params


PARAMS = params_of(TOWER)


def write_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 16}))


@pytest.fixture
def folder(tmp_path):
    return write_sentence_transformers(tmp_path / "model", TOWER, PARAMS, write_tokenizer=write_tokenizer)


def change(file, **values):
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (config | values).items() if value is not ...}))


def test_written_folder_comes_back_whole(folder):
    assert read_tower(folder) == dataclasses.replace(TOWER, init=str(folder), tokenizer=str(folder))
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, TOWER), PARAMS)


def test_legacy_spelling_key_by_key(folder):
    """What embedding servers read (facts of their source code): changing any of these breaks one of them."""
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["type"].removeprefix("sentence_transformers.models.") for module in modules] == [
        "Transformer", "Pooling", "Dense", "Dense", "Normalize",
    ]  # fmt: skip
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize"]
    assert json.loads((folder / "1_Pooling" / "config.json").read_text()) == {
        "word_embedding_dimension": 8,
        "pooling_mode_cls_token": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": False,
    }
    assert json.loads((folder / "sentence_bert_config.json").read_text()) == {"max_seq_length": 16, "do_lower_case": False}
    assert json.loads((folder / "2_Dense" / "config.json").read_text()) == {
        "in_features": 8,
        "out_features": 6,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    assert (
        json.loads((folder / "3_Dense" / "config.json").read_text())["activation_function"]
        == "torch.nn.modules.linear.Identity"
    )
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "find: ", "document": ""} and settings["default_prompt_name"] == "query"
    assert settings["similarity_fn_name"] == "cosine" and all(isinstance(v, str) for v in settings["__version__"].values())
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["max_position_embeddings"]) == (["BertModel"], "bert", 20)
    assert (folder / "4_Normalize").is_dir()


def test_newer_spelling_is_read(folder):
    """Class paths of 5.4 to 6, `pooling_mode`, `embedding_dimension`, and the length from the tokenizer."""
    paths = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Dense": "sentence_transformers.base.modules.dense.Dense",
        "Normalize": "sentence_transformers.sentence_transformer.modules.normalize.Normalize",
    }
    file = folder / "modules.json"
    modules = [module | {"type": paths[module["type"].rsplit(".", 1)[1]]} for module in json.loads(file.read_text())]
    file.write_text(json.dumps(modules))
    pooling = {"embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    task = {"transformer_task": "feature-extraction", "modality_config": {}, "module_output_name": "token_embeddings"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(task))
    change(folder / "2_Dense" / "config.json", module_input_name="sentence_embedding", module_output_name="sentence_embedding")
    change(folder / "config_sentence_transformers.json", model_type="SentenceTransformer")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 13}))
    assert read_tower(folder) == dataclasses.replace(TOWER, init=str(folder), tokenizer=str(folder), max_length=13)


def test_modules_in_a_folder_of_their_own(folder):
    """Folders of sentence-transformers 0.x keep the encoder in 0_Transformer."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "sentence_bert_config.json"):
        (folder / name).rename(inner / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert read_tower(folder) == dataclasses.replace(TOWER, init=str(folder), tokenizer=str(inner))
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, TOWER), PARAMS)


def test_plain_folder_has_the_plain_head(tmp_path):
    folder = write_hf(tmp_path / "hf", TOWER, PARAMS, write_tokenizer=lambda folder: None)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    plain = Tower(
        arch=BERT, init=str(folder), tokenizer=str(folder), pooling="mean", include_prompt=True, dense=(), normalize=True,
        similarity="cosine", max_length=20, prompts={}, default_prompt=None,
    )  # fmt: skip
    assert read_tower(folder) == plain
    params = read_params(folder, plain)
    assert params.keys() == {"encoder"}
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], PARAMS["encoder"])


@pytest.mark.parametrize(("stated", "length"), [(512, 17), (1e30, 17), (12, 12), (None, 17)])
def test_length_of_a_plain_folder_is_what_tokenizer_and_positions_allow(stated, length, tmp_path):
    arch = Roberta(vocab_size=11, width=8, depth=1, heads=2, mlp=12, positions=19)  # two rows of its table are padding's
    tower = dataclasses.replace(TOWER, arch=arch, dense=())
    folder = write_hf(tmp_path / "hf", tower, params_of(tower), write_tokenizer=lambda folder: None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": stated}))
    assert read_tower(folder).max_length == length


def test_without_a_normalize_module_vectors_are_not_normalized(tmp_path):
    tower = dataclasses.replace(TOWER, normalize=False, dense=())
    folder = write_sentence_transformers(tmp_path / "m", tower, {"encoder": PARAMS["encoder"]}, write_tokenizer=write_tokenizer)
    assert read_tower(folder).normalize is False and read_tower(folder).dense == ()


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("config.json", {"model_type": "brt"}, "model_type 'brt' is not supported; did you mean 'bert'"),
        ("config.json", {"model_type": ...}, "model_type '' is not supported; known: bert"),
        ("config.json", {"model_type": 3}, "'model_type' is 3; expected str"),
        ("config.json", {"auto_map": {"AutoModel": "modeling.Model"}}, "code of its own (auto_map)"),
        ("config.json", {"hidden_size": ...}, "has no 'hidden_size'"),
        ("config.json", {"hidden_size": "8"}, "does not describe a bert"),
        ("config.json", {"num_hidden_layers": 2.5}, "should be of type int"),
        ("config.json", {"hidden_size": 9}, "not divisible"),
        ("config.json", {"hidden_act": "gealu"}, "did you mean 'gelu'"),
        ("config.json", {"layer_norm_eps": "small"}, "norm_eps"),
        ("config.json", {"layer_norm_eps": float("nan")}, "norm_eps"),
        ("config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}, "code of its own (auto_map)"),
        ("tokenizer_config.json", {"model_max_length": "many"}, None),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}, "pooling ['cls', 'mean'] is not supported"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "mean_sqrt_len_tokens"},
            "pooling ['mean_sqrt_len_tokens'] is not supported",
        ),
        ("1_Pooling/config.json", {"pooling_mode": 3}, "is not supported"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": "yes"}, "expected bool"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 9}, "pools vectors of width 9"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.GELU"}, "activation"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation"),
        ("2_Dense/config.json", {"in_features": 7}, "in_features is 7"),
        ("2_Dense/config.json", {"out_features": 0}, "out_features is 0"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "a projection of 'token_embeddings'"),
        ("2_Dense/config.json", {"module_output_name": "token_embeddings"}, "a projection of 'sentence_embedding'"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "'SparseEncoder' is not supported"),
        ("config_sentence_transformers.json", {"truncate_dim": 4}, "truncate_dim 4"),
        ("config_sentence_transformers.json", {"prompts": {"query": None}}, "prompt 'query' is None"),
        ("config_sentence_transformers.json", {"default_prompt_name": "quary"}, "did you mean 'query'"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "must be at least 1"),
        ("sentence_bert_config.json", {"max_seq_length": True}, "expected int"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task 'fill-mask'"),
        ("sentence_bert_config.json", {"query_length": 8}, "query_length is not supported where texts have one vector"),
    ],
)
def test_what_cannot_be_read_faithfully_is_refused(folder, file, values, told):
    change(folder / file, **values)
    if told is None:  # max_seq_length rules, so the tokenizer's is not looked at
        assert read_tower(folder).max_length == 16
        return
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        read_tower(folder)
    assert file.rsplit("/", 1)[-1] in str(caught.value) or "model" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("sentence_transformers.models.LSTM", "'sentence_transformers.models.LSTM' is not supported"),
        ("sentence_transformers.models.CNN", "is not supported"),
        ("sentence_transformers.sentence_transformer.modules.pooling.Poling", "did you mean 'Pooling'"),
        ("my_module.Pooling", "not one of sentence-transformers' own"),
        ("os.system", "not one of sentence-transformers' own"),
        (
            "sentence_transformers.models.Normalize",
            "expected Transformer Pooling, or StaticEmbedding, then [Dense ...] [Normalize]",
        ),
    ],
)
def test_unknown_modules_are_refused(folder, kind, told):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_tower(folder)


@pytest.mark.parametrize("path", ["../outside", "/etc", "1_Pooling/../../outside", "..", "..\\outside", "link", "a\0b"])
def test_module_paths_stay_inside_the_folder(folder, path):
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "config.json").write_text((folder / "1_Pooling" / "config.json").read_text())
    (folder / "link").symlink_to(folder.parent / "outside")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="leaves the folder"):
        read_tower(folder)


def test_lowercasing_that_the_tokenizer_does_not_do_is_refused(folder):
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    normalizer = {"type": "BertNormalizer", "lowercase": False}
    (folder / "tokenizer.json").write_text(json.dumps({"normalizer": normalizer}))
    with pytest.raises(ConfigError, match="do_lower_case"):
        read_tower(folder)
    nested = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    (folder / "tokenizer.json").write_text(json.dumps({"normalizer": nested}))
    assert read_tower(folder).max_length == 16


@pytest.mark.parametrize("spoil", ["shape", "extra", "dense"])
def test_weights_that_are_not_the_towers_are_refused(folder, tmp_path, spoil):
    if spoil == "shape":
        change(folder / "config.json", intermediate_size=14)
        tower, told = read_tower(folder), "intermediate.dense.weight is [12, 8], expected [14, 8]"
    elif spoil == "extra":
        (folder / "3_Dense" / "model.safetensors").write_bytes((folder / "2_Dense" / "model.safetensors").read_bytes())
        tower, told = TOWER, "3_Dense holds the tensors"
    else:
        tower, told = dataclasses.replace(TOWER, dense=()), "has the projections"
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_params(folder, tower)


# ---- writing


def test_a_folder_that_is_not_empty_is_kept(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="is not empty"):
        write_sentence_transformers(folder, TOWER, PARAMS, write_tokenizer=write_tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before


def test_replacing_leaves_nothing_of_the_old(folder):
    (folder / "stale.txt").write_text("old")
    write_sentence_transformers(folder, TOWER, PARAMS, write_tokenizer=write_tokenizer, replace=True)
    assert not (folder / "stale.txt").exists() and [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    write_hf(tmp_path / "model", TOWER, PARAMS, write_tokenizer=write_tokenizer)
    assert (tmp_path / "model" / "config.json").exists()


def test_a_failure_midway_leaves_no_folder_and_keeps_the_old_one(folder):
    def fail(place):
        (place / "vocab.txt").write_text("half")
        raise RuntimeError("no tokenizer")

    with pytest.raises(RuntimeError, match="no tokenizer"):
        write_sentence_transformers(folder, TOWER, PARAMS, write_tokenizer=fail, replace=True)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert read_tower(folder).pooling == "cls"
    with pytest.raises(RuntimeError):
        write_hf(folder.parent / "new", TOWER, PARAMS, write_tokenizer=fail)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_destinations_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        write_hf(tmp_path / "file", TOWER, PARAMS, write_tokenizer=write_tokenizer)
    with pytest.raises(StorageError, match="cannot be written"):
        write_hf(tmp_path / "file" / "below", TOWER, PARAMS, write_tokenizer=write_tokenizer)


@pytest.mark.parametrize(
    ("changes", "dense", "told"),
    [
        ({"max_length": 21}, None, "positions for 20 tokens"),
        ({"max_length": None}, None, "not resolved"),
        ({"dense": (Dense(6), Dense(5, False, "identity"))}, None, "projection 1 gives 4 features; the tower says 5"),
        ({}, {}, "hold the projections []; the tower has 2"),
    ],
)
def test_towers_and_parameters_that_disagree_are_not_written(tmp_path, changes, dense, told):
    params = PARAMS if dense is None else PARAMS | {"dense": dense}
    with pytest.raises(ConfigError, match=re.escape(told)):
        write_sentence_transformers(
            tmp_path / "m", dataclasses.replace(TOWER, **changes), params, write_tokenizer=write_tokenizer
        )
    assert not list(tmp_path.iterdir())


# ---- names


def test_resolve(tmp_path):
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; expected a model folder"):
        resolve(tmp_path / "file")
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c", "../x", "", "org/name@main"):
        with pytest.raises(ConfigError, match="does not exist"):
            resolve(name)
    with pytest.raises(
        ConfigError, match="'someone/some-model' is no local folder and could not be fetched from the hub"
    ) as caught:
        resolve("someone/some-model")
    assert "\n" not in str(caught.value)


def test_similarity_comes_back_and_others_are_refused(folder):
    file = folder / "config_sentence_transformers.json"
    change(file, similarity_fn_name="dot")
    assert read_tower(folder).similarity == "dot"
    for nothing in (None, ...):
        change(file, similarity_fn_name=nothing)
        assert read_tower(folder).similarity == "cosine"
    change(file, similarity_fn_name="euclidean")
    with pytest.raises(ConfigError, match="'euclidean' is not supported; expected one of cosine, dot"):
        read_tower(folder)


def test_queries_and_documents_are_told_of_the_default_prompt(tmp_path):
    """sentence-transformers asks for theirs by their own names alone."""
    tower = dataclasses.replace(TOWER, prompts={"plain": "text: "}, default_prompt="plain")
    folder = write_sentence_transformers(tmp_path / "model", tower, PARAMS, write_tokenizer=write_tokenizer)
    assert read_tower(folder).prompts == dict.fromkeys(("query", "document", "plain"), "text: ")
