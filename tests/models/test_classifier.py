"""The files of class heads: what is written is read back, as torch's Linear has it; damage is told."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedjax.config.errors import ConfigError
from embedjax.models.classifier import Head, read_heads, write_heads

RNG = np.random.default_rng(0)


def head(pair=False, criterion="softmax"):
    width = 12 if pair else 4
    return Head(("x", "y", "z"), pair, criterion, RNG.normal(size=(width, 3)).astype("f4"), RNG.normal(size=3).astype("f4"))


def test_heads_survive_the_way_there_and_back(tmp_path):
    assert read_heads(tmp_path) == {}
    write_heads(tmp_path, {})
    assert not list(tmp_path.iterdir())
    heads = {"kinds": head(), "pairs.of": head(pair=True), "several": head(criterion="sigmoid")}
    write_heads(tmp_path, heads)
    u, v = RNG.normal(size=(2, 5, 4)).astype(np.float32)
    found = read_heads(tmp_path)
    tensors = load_file(tmp_path / "classifier" / "classifier.safetensors")
    assert found.keys() == heads.keys()
    for name, features in {"kinds": u, "pairs.of": np.concatenate([u, v, np.abs(u - v)], 1), "several": u}.items():
        vectors = (u, v) if found[name].pair else (u,)
        wanted = features @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        np.testing.assert_allclose(found[name].scores(*vectors), wanted, rtol=1e-5, atol=1e-6)
        several = name == "several"
        np.testing.assert_array_equal(found[name].predict(*vectors), wanted > 0 if several else wanted.argmax(1))
    short = np.concatenate([u[:, :2], v[:, :2], np.abs(u - v)[:, :2]], 1)  # a prefix of each part
    rows = [0, 1, 4, 5, 8, 9]
    wanted = short @ heads["pairs.of"].kernel[rows] + heads["pairs.of"].bias
    np.testing.assert_allclose(found["pairs.of"].scores(u[:, :2], v[:, :2]), wanted, rtol=1e-5, atol=1e-6)


def test_vectors_that_a_head_cannot_read_are_refused():
    with pytest.raises(ConfigError, match="pairs of texts"):
        head(pair=True).scores(np.zeros((1, 4)))
    with pytest.raises(ConfigError, match="at most 4"):
        head().scores(np.zeros((1, 5)))


def test_damaged_files_are_told(tmp_path):
    write_heads(tmp_path, {"kinds": head()})
    file = tmp_path / "classifier" / "classifier.json"
    told = json.loads(file.read_text())
    for change, word in (({"labels": ["x"]}, "1 classes"), ({"features": "image"}, "'image'"), ({"criterion": "exp"}, "'exp'")):
        file.write_text(json.dumps({"kinds": told["kinds"] | change}))
        with pytest.raises(ConfigError, match=word):
            read_heads(tmp_path)
    file.write_text(json.dumps(told))
    save_file({"other.weight": np.zeros((3, 4), np.float32)}, tmp_path / "classifier" / "classifier.safetensors")
    with pytest.raises(ConfigError, match="no head 'kinds'"):
        read_heads(tmp_path)
