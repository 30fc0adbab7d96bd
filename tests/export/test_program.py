"""StableHLO programs of a tiny tower: any batch and length, int8 weights, the loader on its own, and what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.evaluate.encode import encode
from embedjax.export import export, gate, int8, programs, stablehlo
from embedjax.export.stablehlo import nested
from embedjax.load import assemble, make_texts
from embedjax.models.embedder import build_embedder
from embedjax.models.families import mpnet

TEXTS = ["red cat", "an old blue dog and a tree", "tree", "blue " * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_wordpiece(["red cat", "blue dog", "old tree"] * 9, 64), folder, max_length=24)
    tower = c.Tower(
        arch=c.Bert(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=24, init_std=0.3),
        pooling="mean", dense=(c.Dense(8, True, "tanh"),), normalize=True, max_length=24, include_prompt=True,
        prompts={"query": "red ", "document": ""},
    )  # fmt: skip
    params = jax.jit(build_embedder(tower).init)(jax.random.key(0))
    one = lambda value: {"text": value}
    return assemble(c.Model(one(tower)), {"towers": one(params)}, one(make_texts(tower, folder)), one(folder), "test")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    assert export(model, folder, programs=("stablehlo",)) < 1e-5
    return folder


def test_vectors_of_texts_are_the_models(model, folder):
    program = stablehlo.read(folder)
    np.testing.assert_allclose(program.encode(TEXTS), encode(model, TEXTS), atol=1e-6)
    np.testing.assert_allclose(program.encode(TEXTS[:1], "query"), encode(model, TEXTS[:1], column="query"), atol=1e-6)
    assert program.encode([]).shape == (0, 8)


def test_one_program_takes_any_batch_and_length(model, folder):
    program, apply = (
        stablehlo.read(folder),
        jax.jit(lambda params, column: model.embedders["text"].apply(params, column).pooled),
    )
    for rows, length in (1, 1), (3, 24):
        ids = np.random.default_rng(0).integers(5, 64, (rows, length)).astype(np.int32)
        mask = np.arange(length)[None] < np.arange(length, length - rows, -1)[:, None]
        expected = apply(model.params["towers"]["text"], {"ids": ids, "mask": mask})
        np.testing.assert_allclose(program(ids, mask), expected, atol=1e-6)


def test_texts_beyond_the_longest_are_an_error(folder):
    with pytest.raises(ValueError, match="texts of 25 tokens; the program takes at most 24"):
        stablehlo.read(folder)(np.ones((1, 25), np.int32), np.ones((1, 25), bool))


def test_what_lies_beside_it(folder):
    about = json.loads((folder / "stablehlo" / "program.json").read_text())
    assert about["inputs"]["ids"] == {"dtype": "int32", "shape": ["batch", "length"]}
    assert (about["max_length"], about["width"], about["jax"]) == (24, 8, jax.__version__)
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["prompts"] == {"query": "red ", "document": ""}
    assert "python stablehlo/load.py" in (folder / "README.md").read_text()


def test_the_loader_runs_where_embedjax_is_not(model, folder, tmp_path):
    blocked = "import sys; sys.modules['embedjax'] = None; sys.path.insert(0, sys.argv[1]); from load import Program; "
    script = blocked + "import numpy; numpy.save(sys.argv[2], Program().encode(sys.argv[3:]))"
    command = [sys.executable, "-c", script, str(folder / "stablehlo"), str(tmp_path / "found.npy"), *TEXTS[:2]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), encode(model, TEXTS[:2]), atol=1e-6)


def test_a_program_of_a_newer_jax_is_told(folder, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.9.0")
    with pytest.raises(ConfigError, match="which jax 0.9.0 is too old to read"):
        stablehlo.read(folder)


def test_int8_weights_are_small_and_near(model, tmp_path):
    programs.write(model, tmp_path, ("stablehlo",), "int8")
    kinds = {path: value.dtype for path, value in load_file(tmp_path / "stablehlo" / "weights.safetensors").items()}
    assert kinds["encoder/blocks/1/attn/out/kernel"] == kinds["encoder/tokens/embedding"] == np.int8
    assert kinds["encoder/blocks/1/attn/out/bias"] == kinds["dense/0/kernel"] == np.float32
    found, wanted = stablehlo.read(tmp_path).encode(TEXTS), encode(model, TEXTS)
    assert (found * wanted).sum(1).min() > 0.99 and np.abs(found - wanted).max() > 1e-6


def test_how_rounded_programs_are_judged(tmp_path):
    assert gate.told(programs.Rounded(0.0125)) == "int8 weights, lowest cosine 0.9875"
    gate.judge(tmp_path, {"onnxruntime": programs.Rounded(0.09), "jax.export": 1e-5, "other": "not installed"})
    for wrong in programs.Rounded(0.11), programs.Rounded("nan"):
        with pytest.raises(CheckFailed, match="by onnxruntime have int8 weights, lowest cosine .* at least 0.9 is allowed"):
            gate.judge(tmp_path, {"onnxruntime": wrong})


def test_int8_products_are_those_of_rounded_rows_and_columns(model):
    tower, params = model.config.towers["text"], programs.layered(model.params["towers"]["text"])
    small = int8.rounded(params)
    kernel, scale = small["encoder/blocks/1/up/kernel"], small["encoder/blocks/1/up/kernel_scale"]
    assert kernel.dtype == np.int8 and kernel.shape == (16, 32) and scale.shape == (32,)
    assert (np.abs(kernel).max(0) == 127).all()
    np.testing.assert_allclose(kernel * scale, params["encoder/blocks/1/up/kernel"], atol=scale.max() / 2)
    assert small["encoder/tokens/embedding_scale"].shape == (64,)
    assert small["dense/0/kernel"].dtype == small["encoder/positions/embedding"].dtype == np.float32
    # Weights that are whole already differ from float32 by the rounding of rows alone.
    back = {path: value for path, value in params.items() if f"{path}_scale" not in small}
    for path in small.keys() & params.keys() - back.keys():
        axis = -1 if path.endswith("kernel") else 0
        spread = small[f"{path}_scale"][None] if axis == -1 else small[f"{path}_scale"][:, None]
        back[path] = small[path] * spread
    column = {"ids": np.arange(5, 17, dtype=np.int32).reshape(2, 6), "mask": np.ones((2, 6), bool)}
    ask = jax.jit(lambda flat: build_embedder(tower).apply(nested(flat), column).pooled)
    assert np.abs(ask(back) - ask(small)).max() < 0.05


def test_a_wrong_program_fails_the_check(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "READERS", {})
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "stablehlo" / "weights.safetensors"
    weights = load_file(file)
    weights["encoder/blocks/1/up/bias"][:3] += 1
    save_file(weights, file)
    assert run(["export", str(broken), "--check"]) == 6
    assert "vectors read by jax.export differ by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "how", "told"),
    [
        ({}, {"programs": ("onx",)}, "unknown program 'onx'.*onnx"),
        ({}, {"programs": ("stablehlo",), "weights": "int4"}, "unknown weights 'int4'.*int8"),
        ({}, {"weights": "int8"}, "name one, --program onnx"),
        ({}, {"programs": ("stablehlo",), "format": "hf"}, "programs lie beside a folder of sentence-transformers, not of hf"),
        ({"include_prompt": False}, {"programs": ("stablehlo",)}, "does not pool the tokens of its prompts"),
        ({"arch": c.ClipText(width=16, heads=2)}, {"programs": ("onnx",)}, "ClipText has no ONNX program here; those of Bert"),
        ({"late": c.Late()}, {"programs": ("stablehlo",)}, "one vector a text; late interaction has none"),
    ],
)
def test_refused(model, changes, how, told):
    tower = dataclasses.replace(model.config.towers["text"], **changes)
    asked = {"programs": (), "weights": "float32", "format": "sentence-transformers"} | how
    with pytest.raises(ConfigError, match=told):
        programs.check(c.Model({"text": tower}), **asked)


def test_pictures_have_no_onnx(pair):
    programs.check(pair.config, ("stablehlo",), "float32", "sentence-transformers")
    with pytest.raises(ConfigError, match="tower 'image' is of pictures, which has no ONNX program here"):
        programs.check(pair.config, ("stablehlo", "onnx"), "float32", "sentence-transformers")


def test_a_missing_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"onnx is not installed: pip install 'embedjax\[onnx\]'"):
        programs.check(model.config, ("onnx",), "float32", "sentence-transformers")


def test_relative_buckets_of_any_length_are_those_of_the_longest():
    near = np.asarray(mpnet.buckets(200, 32))
    assert near.max() == 31 and (near[0, 128:] == 31).all() and near[0, 1] == 17
    np.testing.assert_array_equal(np.asarray(mpnet.buckets(9, 32)), near[:9, :9])
