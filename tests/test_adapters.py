"""A model of several tasks: each set trains its adapter under its prompt, and is served, searched and exported with both."""


import numpy as np
import pytest

from embedjax import config as c
from embedjax.evaluate.encode import encode
from embedjax.export import export
from embedjax.load import adapted, load
from embedjax.train import train

TEXTS = ["red cat 1", "a blue dog", ""]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.tsv"
    rows = [f"{'red' if i % 2 else 'blue'} cat {i}\tblue dog {i}\t{'x' if i % 2 else 'y'}" for i in range(32)]
    file.write_text("a\tb\tlabel\n" + "\n".join(rows) + "\n")
    return c.File(str(file))


@pytest.fixture(scope="module")
def several(rows):
    """A head on the adapter "cls", pairs on the adapter "search"."""
    arch = c.Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16, init_std=0.3)
    lora = dict.fromkeys(("cls", "search"), c.Lora(4, 16.0, "blocks/"))
    tower = c.Tower(arch=arch, tokenizer="wordpiece", max_length=8, lora=lora)
    kinds = c.Set(rows, {"anchor": "a", "label": "label"}, c.Classify(), name="kinds", labels=("x", "y"), adapter="cls")
    pairs = c.Set(rows, {"anchor": "a", "positive": "b"}, name="pairs", adapter="search")
    return c.Config(
        steps=8,
        model=c.Model({"text": tower}),
        data=c.Data(batch_size=16, sets=(kinds, pairs)),
        optim=c.Optim(learning_rate=2e-2),
        export=c.Export(adapter="search"),
    )


@pytest.fixture(scope="module")
def folder(several, tmp_path_factory):
    return train(several, tmp_path_factory.mktemp("several") / "run").folder


def test_a_head_goes_with_the_adapter_it_was_trained_on(folder, tmp_path):
    run = load(folder)
    assert run.heads["kinds"].adapter == "cls"
    assert not load(folder / "export").heads, "a head of another adapter is not exported"
    export(run, tmp_path / "cls", adapter="cls")
    read = load(tmp_path / "cls")
    assert read.heads.keys() == adapted(run, "cls").heads.keys() == {"kinds"} and read.heads["kinds"].adapter == ""
    np.testing.assert_array_equal(read.heads["kinds"].kernel, run.heads["kinds"].kernel)
    np.testing.assert_allclose(encode(read, TEXTS), encode(run, TEXTS, task="cls"), atol=1e-5)
