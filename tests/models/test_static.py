"""A static table: the mean of its tokens' vectors, without special tokens; its folders; its place in every table of paths."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from embedjax import build, optim, sharding
from embedjax.config import Config, Data, Dense, Mesh, Model, Set, Static, Tower
from embedjax.config.errors import ConfigError
from embedjax.data.tokenizer import save_tokenizer, save_truncating, train_wordpiece
from embedjax.load import make_texts, resolve_tower
from embedjax.models.embedder import build_embedder
from embedjax.models.families.static import LONGEST
from embedjax.models.folders import read_params, read_tower
from embedjax.models.written import write_hf, write_sentence_transformers

TOWER = resolve_tower(
    Tower(arch=Static(vocab_size=64, width=8, init_std=0.5), max_length=4, normalize=False, dense=(Dense(4),))
)
TEXTS = ["red cat", "", "a cat a cat a cat", "cat"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_wordpiece(["red cat", "a cat"], 64, lowercase=True), folder, max_length=8)
    return make_texts(TOWER, folder)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, build_embedder(TOWER).init(jax.random.key(0)))


def test_the_mean_of_the_first_tokens_without_special_ones(texts, params):
    column = texts.encode(TEXTS)
    vocabulary = texts.tokenizer.get_vocab()
    wanted = [[vocabulary[word] for word in text.split()][:4] for text in TEXTS]
    assert [ids[mask].tolist() for ids, mask in zip(column["ids"], column["mask"], strict=True)] == wanted
    table, dense = params["encoder"]["tokens"]["embedding"].astype(np.float64), params["dense"]["0"]
    means = np.stack([table[ids].mean(0) if ids else np.zeros(8) for ids in wanted])

    def loss(params):
        pooled = build_embedder(TOWER).apply(params, column).pooled
        return pooled.sum(), pooled

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(found, np.tanh(means @ dense["kernel"] + dense["bias"]), atol=1e-6)
    of_table = np.asarray(gradient["encoder"]["tokens"]["embedding"])
    used = sorted({token for ids in wanted for token in ids})
    assert np.abs(of_table[used]).min(1).all() and not np.delete(of_table, used, 0).any()


def write_tokenizer(texts):
    return lambda folder: save_truncating(texts.tokenizer, folder, max_length=4)


def test_a_folder_comes_back_whole(texts, params, tmp_path):
    folder = write_sentence_transformers(tmp_path / "m", TOWER, params, write_tokenizer=write_tokenizer(texts))
    assert not (folder / "config.json").exists() and (folder / "1_Dense").is_dir()
    read = read_tower(folder)
    assert (read.arch, read.max_length, read.normalize, read.dense) == (Static(64, 8), 4, False, TOWER.dense)
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, read), params)
    again = make_texts(read, folder)
    jax.tree.map(np.testing.assert_array_equal, again.encode(TEXTS), texts.encode(TEXTS))
    with pytest.raises(ConfigError, match="no Hugging Face model"):
        write_hf(tmp_path / "hf", TOWER, params, write_tokenizer=write_tokenizer(texts))


def test_tables_of_model2vec(texts, params, tmp_path):
    """Fewer rows than tokens, with a factor for each token; a tokenizer without a limit has model2vec's, while a table that
    sentence-transformers wrote has none."""
    folder = write_sentence_transformers(tmp_path / "m", TOWER, params, write_tokenizer=write_tokenizer(texts))
    rows, mapping = np.arange(24, dtype=np.float32).reshape(3, 8), np.arange(64) % 3
    factors = np.linspace(0, 1, 64).astype(np.float32)
    tensors = {"embeddings": rows, "mapping": mapping, "weights": factors}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    kept = json.loads((folder / "tokenizer.json").read_text()) | {"truncation": None}
    (folder / "tokenizer.json").write_text(json.dumps(kept))
    read = read_tower(folder)
    assert (read.arch, read.max_length) == (Static(64, 8), 512)
    long = write_sentence_transformers(tmp_path / "long", TOWER, params, write_tokenizer=lambda folder: None)
    (long / "tokenizer.json").write_text(json.dumps(kept))
    unlimited = read_tower(long)
    assert unlimited.max_length == LONGEST and make_texts(unlimited, long).encode(["cat " * 600])["mask"].sum() == 600
    sets = (Set(columns={"anchor": "a", "positive": "b"}),)
    with pytest.raises(ConfigError, match="'text' takes texts of any length, .* set its max_length"):
        build.resolve(Config(model=Model({"text": Tower(init=str(long))}), data=Data(sets=sets)))
    build.resolve(Config(model=Model({"text": Tower(init=str(long), max_length=32)}), data=Data(sets=sets)))
    found = read_params(folder, read)["encoder"]["tokens"]["embedding"]
    np.testing.assert_allclose(found, rows[mapping] * factors[:, None])


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"other": np.zeros((3, 8), np.float32)}, "expected a table"),
        ({"embedding.weight": np.zeros(3, np.float32)}, "expected a table"),
        ({"embedding.weight": np.zeros((3, 8), np.int8)}, "floating-point"),
        ({"embedding.weight": np.zeros((3, 8), np.float32), "odd": np.zeros(1, np.float32)}, "odd"),
        ({"embeddings": np.zeros((3, 8), np.float32), "mapping": np.array([0, 3])}, "points outside"),
        ({"embeddings": np.zeros((3, 8), np.float32), "weights": np.zeros(2, np.float32)}, "for 3 tokens"),
    ],
)
def test_tensors_that_are_no_table_are_refused(texts, params, tmp_path, tensors, told):
    folder = write_sentence_transformers(tmp_path / "m", TOWER, params, write_tokenizer=write_tokenizer(texts))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=told):
        read_params(folder, read_tower(folder))


def test_tables_of_paths_know_it(params):
    tree = {"towers": {"query": {"encoder": params["encoder"]}}}
    assert optim.decays(tree)["towers"]["query"]["encoder"]["tokens"]["embedding"] is True
    mesh = sharding.make_mesh(Mesh(fsdp=2, tensor=2))
    placed = sharding.shardings(tree, mesh)["towers"]["query"]["encoder"]["tokens"]["embedding"]
    assert placed.spec == jax.sharding.PartitionSpec(None, ("fsdp", "tensor"))
