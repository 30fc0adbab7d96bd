"""Tables that refuse surprises, files that are damaged, and the way there and back for every family."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from embedjax.config import Bert, DistilBert, ModernBert, Mpnet, Roberta
from embedjax.config.errors import ConfigError
from embedjax.models.families import family_of
from embedjax.models.weights import flatten, from_tensors, load_tensors, to_tensors

SMALL = {"vocab_size": 11, "width": 8, "depth": 2, "heads": 2, "mlp": 12, "positions": 9}
ARCHS = [
    Bert(**SMALL),
    Roberta(**SMALL),
    DistilBert(**SMALL),
    DistilBert(**SMALL, sinusoidal=True),
    Mpnet(**SMALL),
    ModernBert(**SMALL, pad_id=0),
]
BERT = ARCHS[0]


def random_tensors(arch):
    """Tensors of an architecture, each filled with its own numbers."""
    rng = np.random.default_rng(0)
    ids = jnp.ones((1, 3), jnp.int32)
    shapes = jax.eval_shape(family_of(arch).Tower(arch).init, jax.random.key(0), ids, ids > 0)["params"]
    return to_tensors(arch, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes))


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"{type(arch).__name__}")
def test_there_and_back(arch):
    tensors = random_tensors(arch)
    params = from_tensors(arch, tensors, file="here")
    ids = jnp.ones((1, 3), jnp.int32)
    expected = jax.eval_shape(family_of(arch).Tower(arch).init, jax.random.key(0), ids, ids > 0)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    back = to_tensors(arch, params)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
        assert back[name].flags.c_contiguous
    assert family_of(arch).from_hf(json.loads(json.dumps(family_of(arch).to_hf(arch)))) == arch


def test_orientation():
    """Kernels are the transposes of [out, in] matrices; layer n is slice n; ModernBERT's fused projection is q, k, v."""
    tensors = random_tensors(BERT)
    params = from_tensors(BERT, tensors, file="here")
    np.testing.assert_array_equal(params["blocks"]["up"]["kernel"][1], tensors["encoder.layer.1.intermediate.dense.weight"].T)
    arch = ARCHS[-1]
    tensors = random_tensors(arch)
    blocks = from_tensors(arch, tensors, file="here")["blocks"]
    fused = tensors["layers.1.attn.Wqkv.weight"]
    for n, part in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(blocks["attn"][part]["kernel"][1], fused[8 * n : 8 * (n + 1)].T)
    assert "layers.0.attn_norm.weight" not in tensors
    np.testing.assert_array_equal(blocks["attn_norm"]["scale"][0], np.ones(8))


def test_sinusoids():
    """Position p, feature 2i: sin(p / 10000^(2i/D)); feature 2i+1: the cosine of the same."""
    arch, ids = ARCHS[3], jnp.ones((1, 3), jnp.int32)
    init = jax.jit(lambda key: family_of(arch).Tower(arch).init(key, ids, ids > 0)["params"]["positions"]["embedding"])
    table = init(jax.random.key(0))
    np.testing.assert_allclose(table[0], [0, 1] * 4, atol=1e-7)
    np.testing.assert_allclose(table[3, 4:6], [np.sin(3 / 100), np.cos(3 / 100)], atol=1e-6)


def test_prefix_old_spelling_and_left_out_tensors_are_accepted():
    tensors = random_tensors(BERT)
    old = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    old["bert.embeddings.LayerNorm.gamma"] = old.pop("bert.embeddings.LayerNorm.weight")
    old["bert.embeddings.LayerNorm.beta"] = old.pop("bert.embeddings.LayerNorm.bias")
    old |= {"bert.pooler.dense.weight": np.ones((8, 8), np.float32), "cls.predictions.bias": np.ones(11, np.float32)}
    old["bert.embeddings.position_ids"] = np.arange(9)[None]
    jax.tree.map(np.testing.assert_array_equal, from_tensors(BERT, old, file="x"), from_tensors(BERT, tensors, file="x"))


def test_every_surprise_is_told_in_one_error():
    tensors = random_tensors(BERT)
    tensors["bert.embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"]
    tensors["encoder.layer.2.output.dense.bias"] = np.ones(8, np.float32)
    tensors["adapter.weight"] = np.ones(8, np.float32)
    del tensors["encoder.layer.1.attention.self.key.bias"]
    tensors["encoder.layer.0.output.dense.weight"] = np.ones((12, 8), np.float32)
    tensors["encoder.layer.0.output.dense.bias"] = np.ones(8, np.int64)
    with pytest.raises(ConfigError) as caught:
        from_tensors(BERT, tensors, file="somewhere/model.safetensors")
    told = str(caught.value)
    assert told.startswith("somewhere/model.safetensors does not hold the tensors of Bert") and "\n" not in told
    for part in (
        "unknown: encoder.layer.2.output.dense.bias, adapter.weight",
        "missing: encoder.layer.1.attention.self.key.bias",
        "doubly set: bert.embeddings.word_embeddings.weight",
        "encoder.layer.0.output.dense.weight is [12, 8], expected [8, 12]",
        "encoder.layer.0.output.dense.bias holds int64",
    ):
        assert part in told


def test_a_depth_out_of_proportion_is_refused_at_once():
    with pytest.raises(ConfigError, match="fewer than the 1000000000000 layers"):
        from_tensors(dataclasses.replace(BERT, depth=10**12), random_tensors(BERT), file="x")


def test_a_foreign_checkpoint_is_told_in_a_short_line():
    with pytest.raises(ConfigError) as caught:
        from_tensors(BERT, random_tensors(ARCHS[-1]), file="x")
    assert "more" in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize("spoil", ["extra", "absent", "shape"])
def test_parameters_that_are_not_the_towers_are_not_written(spoil):
    params = from_tensors(BERT, random_tensors(BERT), file="x")
    if spoil == "extra":
        params["adapter"] = {"kernel": np.ones(3, np.float32)}
    elif spoil == "absent":
        del params["types"]
    else:
        params["blocks"]["up"]["kernel"] = params["blocks"]["up"]["kernel"][:, :, :-1]
    with pytest.raises(ConfigError, match="not those of Bert: .*(adapter|types|intermediate)"):
        to_tensors(BERT, params)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}


# ---- files


def test_halves_become_float32_and_integers_stay(tmp_path):
    values = np.array([[1.5, -2.25], [0.0, 3.0]])
    kinds = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64, "i64": np.int64}
    safetensors.numpy.save_file({name: values.astype(kind) for name, kind in kinds.items()}, tmp_path / "model.safetensors")
    tensors = load_tensors(tmp_path)
    for name in ("f16", "bf16", "f64"):
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], values)
    assert tensors["i64"].dtype == np.int64


def write_shards(folder, places=None, **changes):
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, folder / "one.safetensors")
    safetensors.numpy.save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors"} if places is None else places
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places} | changes))


def test_shards_are_joined(tmp_path):
    write_shards(tmp_path)
    tensors = load_tensors(tmp_path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [0, 0], "b": [1, 1, 1]}


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ({"a": "../model/one.safetensors"}, "lists the shard '../model/one.safetensors'"),
        ({"a": "/etc/passwd"}, "lists the shard '/etc/passwd'"),
        ({"a": "..\\one.safetensors"}, "lists the shard"),
        ({"a": "one.bin"}, "lists the shard 'one.bin'"),
        ({"a": ".."}, "lists the shard"),
        ({"a": "three.safetensors"}, "three.safetensors cannot be read"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "no shard holds: c"),
        ({"a": 1}, "expected a `weight_map`"),
        ([], "expected a `weight_map`"),
    ],
)
def test_indices_that_lie_are_refused(places, told, tmp_path):
    write_shards(tmp_path / "model", places)
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_tensors(tmp_path / "model")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_shards(tmp_path)
    safetensors.numpy.save_file({"a": np.ones(3), "b": np.ones(3)}, tmp_path / "two.safetensors")
    with pytest.raises(ConfigError, match="another shard holds too: a"):
        load_tensors(tmp_path)


def test_every_truncation_and_damaged_header_is_a_config_error(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones((3, 4), np.float32), "b": np.ones(2, np.float16)}, file)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    broken = [whole[:n] for n in range(0, len(whole), 7)] + [b"\xff" * 64, whole + b"x"]
    for _ in range(60):
        place = int(rng.integers(0, header))
        broken.append(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
    refused = 0
    for data in broken:
        file.write_bytes(data)
        try:
            load_tensors(tmp_path)  # a flipped byte may still be a valid header: then it must only not crash
        except ConfigError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(whole) // 7


def test_unusual_types_are_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2, ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="tensor 'a' has type F8_E4M3"):
        load_tensors(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ConfigError, match="only safetensors is read: convert with"):
        load_tensors(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no weights: expected model\.safetensors or"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"weight_map":' + "[" * 5000])
def test_malformed_index(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        load_tensors(tmp_path)
