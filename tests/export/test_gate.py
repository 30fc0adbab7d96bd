"""The parity gate: a folder that does not give the model's vectors never takes the place of one that does."""

import huggingface_hub
import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.config.errors import CheckFailed
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.evaluate.encode import encode
from embedjax.export import export
from embedjax.load import assemble, load, make_texts
from embedjax.models import written
from embedjax.models.embedder import build_embedder

TEXTS = ["red cat", "an old blue dog", "tree"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_wordpiece(["red cat", "blue dog", "old tree"] * 9, 64), folder, max_length=8)
    tower = c.Tower(
        arch=c.Bert(vocab_size=64, width=16, depth=1, heads=2, mlp=32, positions=16),
        pooling="mean", dense=(), normalize=True, max_length=8, prompts={}, include_prompt=True,
    )  # fmt: skip
    params = jax.jit(build_embedder(tower).init)(jax.random.key(0))
    one = lambda value: {"text": value}
    return assemble(c.Model(one(tower)), {"towers": one(params)}, one(make_texts(tower, folder)), one(folder), "test")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    assert export(model, folder) < 1e-6
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def damage(monkeypatch):
    """`damage(by)`: from now on one number of a written weight is off by so much."""
    original = written.to_tensors

    def use(by):
        def changed(*arguments):
            tensors = dict(original(*arguments))
            name = "encoder.layer.0.attention.output.dense.weight"
            tensors[name] = np.array(tensors[name])
            tensors[name][3, 5] += by
            return tensors

        monkeypatch.setattr(written, "to_tensors", changed)

    return use


@pytest.mark.parametrize("format", ["sentence-transformers", "hf"])
def test_a_wrong_weight_fails_and_the_old_folder_stays(model, exported, tmp_path, damage, format):
    folder = tmp_path / "out"
    export(model, folder, format)
    before = contents(folder)
    damage(0.1)
    with pytest.raises(CheckFailed, match="vectors read by embedjax differ by .* at most 1e-04") as failed:
        export(model, folder, format, replace=True)
    assert failed.value.code == 6
    assert contents(folder) == before


def test_the_command_ends_with_6_and_writes_nothing(exported, tmp_path, damage, capsys):
    damage(0.1)
    assert run(["export", str(exported), str(tmp_path / "out")]) == 6
    assert "differ by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_weight_within_rounding_passes(model, tmp_path, damage):
    damage(1e-6)
    assert 0 < export(model, tmp_path / "out") < 1e-5


def test_an_exported_folder_is_loaded_by_its_hub_id(model, exported, monkeypatch):
    asked = []

    def snapshot_download(name, **patterns):
        asked.append((name, patterns))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = load("someone/small-model")
    np.testing.assert_allclose(encode(found, TEXTS), encode(model, TEXTS), atol=1e-6)
    assert found.origin == "someone/small-model"
    ((name, patterns),) = asked
    assert name == "someone/small-model" and "*.safetensors" in patterns["allow_patterns"]
    assert not any(code in pattern for pattern in patterns["allow_patterns"] for code in (".py", ".bin", ".pkl"))
