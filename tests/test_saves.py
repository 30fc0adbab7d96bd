"""RUN@WHICH: which parameters of a run's saves are meant, their mean, and a whole run with an average and adapters."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from embedjax import runs, saves, sharding
from embedjax.checkpoint import Checkpoints
from embedjax.config import Group, Lora
from embedjax.config.errors import ConfigError, Saved, StorageError
from embedjax.evaluate.encode import encode
from embedjax.export import export
from embedjax.load import load
from embedjax.train import train


def state(step, ema):
    leaf = lambda value: {"text": {"kernel": np.full((2, 3), value, np.float32)}}
    average = {"ema": {"towers": leaf(10.0 * step)}} if ema else {}
    return {"params": {"towers": leaf(float(step))}, "extra": {"skipped": np.zeros((), np.int32), **average}}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "ema"])
def run(request, tmp_path_factory):
    """(a folder with saves of steps 1, 2 and 4, the best of which is 2; what a value of step 1 is)."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "checkpoints", keep=5) as checkpoints:
        for step, metric in ((1, 0.1), (2, 0.3), (4, 0.2)):
            checkpoints.save(step, state(step, request.param), position=step, config={}, metrics={"m": metric})
    return folder, 10.0 if request.param else 1.0


@pytest.mark.parametrize(
    ("which", "value", "step"),
    [
        ("", 4, 4), ("best", 2, 2), ("1", 1, 1), ("soup:1,4", 2.5, 4), ("soup:4,1", 2.5, 4), ("soup:last2", 3, 4),
        ("soup:last3", 7 / 3, 4), ("raw", 4, 4), ("raw:best", 2, 2), ("raw:1", 1, 1), ("raw:soup:1,2,4", 7 / 3, 4),
    ],
)  # fmt: skip
def test_which_parameters_are_meant(run, which, value, step):
    folder, unit = run
    params, found = saves.read(folder, which, "m")
    kernel = params["towers"]["text"]["kernel"]
    assert found == step and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, value * (1.0 if which.startswith("raw") else unit), rtol=1e-6)


@pytest.mark.parametrize(
    ("which", "error", "words"),
    [
        ("first", ConfigError, "@first: after @ comes a step, 'best', 'soup:100,200'"),
        ("soup:", ConfigError, "after @ comes"),
        ("soup:1", ConfigError, "after @ comes"),
        ("soup:1,1", ConfigError, "two or more different saves"),
        ("soup:last1", ConfigError, "two or more different saves"),
        ("soup:last4", ConfigError, r"holds 3 saves, not 4; checkpoint.keep .*\[1, 2, 4\]"),
        ("soup:1,3", StorageError, r"no save of step 3; saved: \[1, 2, 4\]"),
        ("3", StorageError, "no save of step 3"),
    ],
)
def test_what_cannot_be_meant_is_refused(run, which, error, words):
    with pytest.raises(error, match=words):
        saves.read(run[0], which, "m")


def test_a_damaged_save_spoils_the_soup(run):
    folder = run[0]
    file = next(file for file in (folder / "checkpoints" / "2" / "state").rglob("*") if file.is_file())
    before = file.read_bytes()
    file.write_bytes(before + b"x")
    try:
        with pytest.raises(StorageError, match="step 2: "):
            saves.read(folder, "soup:1,2", "m")
    finally:
        file.write_bytes(before)


class StopAt:
    """Answers as the event of a signal that came during the n-th step."""

    def __init__(self, n):
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


def every_array(folder, step):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints._read(
            step, {p: np.empty(d["shape"], d["dtype"]) for p, d in checkpoints.record(step).arrays.items()}
        )


@pytest.mark.slow
def test_a_run_with_adapters_and_an_average_goes_on_to_the_bit_and_is_read_in_all_ways(tiny_config, tmp_path, monkeypatch):
    original = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: original(mesh, devices or jax.devices()[:1]))
    tower = tiny_config.model.towers["text"]
    tower = dataclasses.replace(tower, lora={"sts": Lora(2), "search": Lora(2, paths="blocks/")}, freeze_layers=0)
    config = dataclasses.replace(
        tiny_config,
        steps=6,
        model=dataclasses.replace(tiny_config.model, towers={"text": tower}),
        data=dataclasses.replace(tiny_config.data, sets=(dataclasses.replace(tiny_config.data.sets[0], adapter="search"),)),
        optim=dataclasses.replace(tiny_config.optim, ema=0.5, learning_rate=0.1, groups=(Group("lora/search", 0.5),)),
        evaluate=dataclasses.replace(
            tiny_config.evaluate, tasks=(dataclasses.replace(tiny_config.evaluate.tasks[0], prompt="search"),)
        ),
        export=dataclasses.replace(tiny_config.export, adapter="search"),
        checkpoint=dataclasses.replace(tiny_config.checkpoint, every=2, keep=5),
    )
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "stop_signal", lambda: contextlib.nullcontext(StopAt(2)))
        with pytest.raises(Saved, match="saved at step 3"):
            train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    found, wanted = every_array(tmp_path / "parts", 6), every_array(tmp_path / "whole", 6)
    assert found.keys() == wanted.keys() and any(path.startswith("extra/ema/") for path in wanted)
    assert not any("encoder" in path or "lora/sts" in path for path in wanted)
    for path, x in wanted.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    assert runs.evaluations(tmp_path / "parts") == runs.evaluations(tmp_path / "whole")

    texts, name = ["red cat", "a quiet river song"], str(tmp_path / "whole")
    model = load(name)
    as_search = encode(model, texts, task="search")
    np.testing.assert_allclose(encode(load(whole.exported), texts), as_search, atol=1e-6)
    assert np.abs(encode(load(f"{name}@raw"), texts, task="search") - as_search).max() > 1e-4
    assert np.abs(encode(load(f"{name}@soup:2,6"), texts, task="search") - as_search).max() > 1e-4
    untouched = encode(model, texts, task="sts")  # an adapter that was never trained changes nothing
    assert np.abs(untouched - as_search).max() > 1e-4
    export(model, tmp_path / "sts", adapter="sts")
    np.testing.assert_allclose(encode(load(tmp_path / "sts"), texts), untouched, atol=1e-6)
    with pytest.raises(ConfigError, match="adapters sts, search; name one"):
        encode(model, texts)
    with pytest.raises(ConfigError, match="adapters sts, search; name one"):
        export(model, tmp_path / "none")

    # A run that starts from that folder adapts its weights, which stay as they are.
    tower = dataclasses.replace(tower, arch=None, tokenizer="", init=str(tmp_path / "sts"))
    config = dataclasses.replace(
        config,
        steps=1,
        model=dataclasses.replace(config.model, towers={"text": tower}),
        evaluate=dataclasses.replace(config.evaluate, tasks=()),
        export=dataclasses.replace(config.export, format="none"),
    )
    train(config, tmp_path / "second")
    np.testing.assert_allclose(encode(load(tmp_path / "second"), texts, task="sts"), untouched, atol=1e-6)
