"""Runs on several sets: each with its own columns and loss, or all in one batch; they stop and go on as runs on one set do."""

import contextlib
import dataclasses
import json

import jax
import pytest

from embedjax import config as c
from embedjax import runs, sharding
from embedjax.config.errors import Saved
from embedjax.metrics.writers import read_rows
from embedjax.train import train


class Stop:
    """The event of a signal that came in the n-th step."""

    def __init__(self, n):
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture
def make(tiny_config, tmp_path, monkeypatch):
    """`make(sets, **data)` -> a run of 8 steps on one device."""
    original = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: original(mesh, devices or jax.devices()[:1]))
    scored = tmp_path / "scored.tsv"
    scored.write_text("a\tb\ts\n" + "".join(f"red cat {k % 9}\tblue fish {k % 4}\t{k % 5 / 4}\n" for k in range(40)))

    def config(**data):
        (pairs,) = tiny_config.data.sets
        more = c.Set(c.File(str(scored)), {"anchor": "a", "positive": "b"}, name="more")
        if data.get("draw") != "rows":
            more = dataclasses.replace(more, columns={**more.columns, "score": "s"}, loss=c.CoSent(), weight=3.0)
        data = dataclasses.replace(tiny_config.data, sets=(pairs, more), **data)
        return dataclasses.replace(tiny_config, steps=8, data=data, evaluate=c.Evaluate(), export=c.Export("none"))

    return config


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """`stopped(config)` -> the folders of a run, and of the same run stopped after five of its eight steps and gone on."""

    def run(config):
        whole = train(config, tmp_path / "whole").folder
        with monkeypatch.context() as patch:
            patch.setattr(runs, "stop_signal", lambda: contextlib.nullcontext(Stop(4)))
            with pytest.raises(Saved, match="saved at step 5 of 8"):
                train(config, tmp_path / "parts")
        return whole, train(config, tmp_path / "parts").folder

    return run


def test_sets_of_different_losses_and_a_stop(make, stopped):
    whole, parts = stopped(make(mixing="weights"))
    assert losses(parts) == losses(whole) and len(losses(whole)) == 8


def test_rows_of_all_sets_in_a_batch_and_a_stop(make, stopped, capsys):
    whole, parts = stopped(make(draw="rows", temperature=2.0))
    assert losses(parts) == losses(whole) and len(set(losses(whole))) == 8
    assert [row["rows"] for row in json.loads((whole / "data.json").read_text())] == [64, 40]
    assert "104 rows" in capsys.readouterr().out
