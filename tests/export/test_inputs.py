"""Damaged folders given to `embedjax export`: each ends with one line that names what is wrong, and nothing is written."""

import json
import shutil

import pytest
import small_models
from safetensors.numpy import load_file, save_file

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.export import _write

FORMAT = "sentence-transformers"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    dense = (c.Dense(8, True, "tanh"),)
    model = small_models.make(small_models.ARCHS["bert"], folder / "tokenizer", dense=dense)
    _write(model, folder / "model", FORMAT)
    return folder / "model"


def cut(file, count=100):
    file.write_bytes(file.read_bytes()[:-count])


def changed(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def weights(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def linked(file, target):
    file.unlink() if file.is_file() else shutil.rmtree(file)
    file.symlink_to(target)


BIAS = "encoder.layer.0.attention.self.query.bias"
DAMAGES = {
    "truncated weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read as safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
    "a header beyond the file": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors cannot"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "a folder for weights": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors cannot be read",
    ),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights"),
    "a wrong shape": (
        lambda f: weights(f / "model.safetensors", lambda t: t.update({BIAS: t[BIAS][:-1].copy()})),
        f"misshapen: {BIAS} is [23], expected [24]",
    ),
    "a missing tensor": (lambda f: weights(f / "model.safetensors", lambda t: t.pop(BIAS)), f"missing: {BIAS}"),
    "an unknown tensor": (
        lambda f: weights(f / "model.safetensors", lambda t: t.update(more=t[BIAS].copy())),
        "unknown: more",
    ),
    "integers for floats": (
        lambda f: weights(f / "model.safetensors", lambda t: t.update({BIAS: t[BIAS].astype("int32")})),
        f"{BIAS} holds int32, expected floating-point numbers",
    ),
    "other sizes": (lambda f: changed(f / "config.json", lambda x: x.update(intermediate_size=48)), "misshapen"),
    "more layers than weights": (
        lambda f: changed(f / "config.json", lambda x: x.update(num_hidden_layers=10**9)),
        "fewer than the 1000000000 layers",
    ),
    "truncated config": (lambda f: cut(f / "config.json", 9), "config.json is not readable JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "truncated projection": (lambda f: cut(f / "2_Dense" / "model.safetensors", 8), "2_Dense/model.safetensors cannot be read"),
    "no projection": (lambda f: shutil.rmtree(f / "2_Dense"), "2_Dense/config.json does not exist"),
    "no pooling": (lambda f: shutil.rmtree(f / "1_Pooling"), "1_Pooling/config.json does not exist"),
    "no tokenizer": (
        lambda f: [(f / name).unlink(missing_ok=True) for name in ("tokenizer.json", "vocab.txt")],
        "has no tokenizer",
    ),
    "truncated tokenizer": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json: the tokenizer cannot be read"),
    "a tokenizer of more tokens": (
        lambda f: changed(f / "tokenizer.json", lambda x: x["model"]["vocab"].update({f"t{n}": n for n in range(60, 99)})),
        "the tower's vocab_size is 64",
    ),
    "truncated modules": (lambda f: cut(f / "modules.json", 9), "modules.json is not readable JSON"),
    "an unknown module": (
        lambda f: changed(f / "modules.json", lambda x: x[1].update(type="sentence_transformers.models.LSTM")),
        "module 'sentence_transformers.models.LSTM' is not supported",
    ),
    "code of its own": (
        lambda f: changed(f / "modules.json", lambda x: x[1].update(type="custom.Pooling")),
        "code of a folder is never run",
    ),
    "a path above": (
        lambda f: changed(f / "modules.json", lambda x: x[1].update(path="../other")),
        "module path '../other' leaves the folder",
    ),
    "an absolute path": (
        lambda f: changed(f / "modules.json", lambda x: x[1].update(path="/etc")),
        "module path '/etc' leaves the folder",
    ),
    "a link out of the folder": (lambda f: linked(f / "1_Pooling", f.parent), "module path '1_Pooling' leaves the folder"),
    "a link to itself": (lambda f: linked(f / "config.json", f / "config.json"), "config.json"),
    "a link to nothing": (lambda f: linked(f / "model.safetensors", f / "gone"), "holds no weights"),
    "a shard above": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        ),
        "lists the shard '../model.safetensors'",
    ),
    "prompts that are none": (
        lambda f: changed(f / "config_sentence_transformers.json", lambda x: x.update(prompts={"query": 3})),
        "config_sentence_transformers.json: prompt 'query' is 3",
    ),
    "damaged classes": (
        lambda f: ((f / "classifier").mkdir(), (f / "classifier" / "classifier.json").write_text("{")),
        "classifier.json is not readable JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_line_and_nothing_written(damage, sound, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    spoil, told = DAMAGES[damage]
    spoil(folder)
    assert run(["export", str(folder), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line and str(folder) in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("place", "told"), [("link", "is a link"), ("dangling", "is a link"), ("file", "is a file")])
def test_places_that_are_not_written(place, told, sound, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("kept")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(["export", str(sound), str(tmp_path / place)]) == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line and str(tmp_path / place) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before and not any((tmp_path / "there").iterdir())
