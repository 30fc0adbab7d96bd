"""Runs that mine their own negatives: mined on time by the model of that step, and resumed as if nothing had happened."""

import contextlib
import dataclasses
import json
import shutil
import tracemalloc
import types

import jax
import numpy as np
import pytest
import test_processes

from embedjax import runs, sharding
from embedjax.config import Evaluate, Export, File, Mine, Triplet
from embedjax.config.errors import ConfigError, Saved
from embedjax.data.corpus import Corpus
from embedjax.data.sources import open_source
from embedjax.evaluate.encode import encode
from embedjax.load import load
from embedjax.metrics.writers import read_rows
from embedjax.mine import again
from embedjax.train import train


class Stop:
    """The event of a signal that came in the n-th step."""

    def __init__(self, n):
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture
def config(tiny_config, tmp_path, monkeypatch):
    """A run of 10 steps on one device that mines two negatives every 4, from the set's positives and 30 texts more."""
    original = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: original(mesh, devices or jax.devices()[:1]))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"t": f"red bird {k % 7} {'tree ' * (k % 5)}", "u": f"{k}"}) + "\n" for k in range(30))
    )
    mine = Mine(num_negatives=2, every=4, corpus=File(str(corpus)), corpus_columns=("t", "u"), range_max=20, sampling="random")
    (pairs,) = tiny_config.data.sets
    data = dataclasses.replace(tiny_config.data, sets=(dataclasses.replace(pairs, mine=mine),))
    return dataclasses.replace(tiny_config, data=data, evaluate=Evaluate(), export=Export("none"))


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]


def mined_in(folder):
    return {path.name: np.load(path) for path in (folder / "mined").iterdir()}


@pytest.mark.slow
def test_a_run_mines_when_due_and_resumes_exactly(config, tmp_path, monkeypatch, capsys):
    whole = train(config, tmp_path / "whole").folder
    mined = mined_in(whole)
    assert sorted(mined) == ["pairs-0.npy", "pairs-4.npy", "pairs-8.npy"] and mined["pairs-0.npy"].shape == (64, 2)
    assert all((mined["pairs-0.npy"] != mined[f"pairs-{step}.npy"]).any() for step in (4, 8))
    assert "step 4: mined " in capsys.readouterr().out
    assert any("corpus.jsonl" in row["file"] for row in json.loads((whole / "data.json").read_text()))
    for steps, at in ((4, 4), (3, 7)):  # saved at the step of a mining, before it; and after it
        with monkeypatch.context() as patch:
            patch.setattr(runs, "stop_signal", lambda n=steps: contextlib.nullcontext(Stop(n - 1)))
            with pytest.raises(Saved, match=f"saved at step {at} "):
                train(config, tmp_path / "parts")
        assert (tmp_path / "parts" / "mined" / "pairs-4.npy").exists() == (at > 4)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "7")  # as after a kill: it goes on at 5
    train(config, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(whole) and len(losses(whole)) == 10
    for name, numbers in mined.items():
        np.testing.assert_array_equal(np.load(tmp_path / "parts" / "mined" / name), numbers)
    with (tmp_path / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"t": "new", "u": "one"}\n')
    with pytest.raises(ConfigError, match="data have changed"):
        train(config, whole)


@pytest.mark.slow
def test_two_processes_mine_what_one_mines(tmp_path, pairs_file, monkeypatch):
    plain = 'name="pairs"),)),'
    mining = 'name="pairs", mine=Mine(num_negatives=2, every=4, range_max=20, sampling="random")),)),'
    monkeypatch.setattr(test_processes, "CONFIG", test_processes.CONFIG.replace(plain, mining, 1))
    folders = tmp_path / "one", tmp_path / "two"
    for folder, count in zip(folders, (1, 2), strict=True):
        with test_processes.Run(folder, pairs_file, count, devices=4 // count) as run:
            assert run.codes() == [0] * count, run.told()
            assert sum("mined negatives of" in line for index in range(count) for line in run.said(index)) == 3
    one, two = map(mined_in, folders)
    assert sorted(one) == sorted(two) == ["pairs-0.npy", "pairs-4.npy", "pairs-8.npy"]
    for name, numbers in one.items():
        np.testing.assert_array_equal(numbers, two[name])
    assert (one["pairs-0.npy"] != one["pairs-8.npy"]).any()
    np.testing.assert_allclose(*map(losses, folders), rtol=2e-6)


def test_vectors_are_in_memory_once(monkeypatch):
    blocks, given = [np.full((1000, 64), k, np.float32) for k in range(20)], []
    monkeypatch.setattr(again, "stream", lambda model, texts, *_, **__: (block + 1 for block in blocks[: len(texts) // 1000]))
    monkeypatch.setattr(again, "negatives", lambda *args, **_: given.append(args[4]) or ())
    config = types.SimpleNamespace(tower_of=lambda column: "text", similarity="cosine")
    model = types.SimpleNamespace(config=config, embedders={"text": types.SimpleNamespace(width=64)})
    pairs = types.SimpleNamespace(anchors=range(1000), anchor=np.zeros(1, int), known=lambda corpus: None)
    tracemalloc.start()
    again.mine(types.SimpleNamespace(pairs=pairs, corpus=range(20_000), how=Mine(), prompt=""), model, 0, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(given[0][:, 5], np.repeat(np.arange(1, 21), 1000))
    assert peak < 1.3 * given[0].nbytes


def test_a_margin_beyond_all_cosines_is_refused_before_the_first_step(config, tmp_path):
    (pairs,) = config.data.sets
    sets = (dataclasses.replace(pairs, mine=Mine(margin=95)),)
    with pytest.raises(ConfigError, match='Mine.margin is 95.*margin_kind "percentage"'):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, sets=sets)), tmp_path / "run")


def test_what_is_mined_is_near_and_no_positive(config, tmp_path):
    (pairs,) = config.data.sets
    near = dataclasses.replace(pairs.mine, sampling="top", every=3, range_max=5)
    sets = (dataclasses.replace(pairs, mine=near, loss=Triplet()),)  # a loss that must have negatives
    config = dataclasses.replace(config, steps=4, data=dataclasses.replace(config.data, sets=sets))
    folder = train(config, tmp_path / "run").folder
    numbers, source = np.load(folder / "mined" / "pairs-3.npy"), open_source(pairs.source)
    corpus = Corpus([(open_source(pairs.mine.corpus), ("t", "u")), (source, ["answer"])])
    model, texts = load(f"{folder}@3"), corpus.take(range(len(corpus)))
    rows = [source[k] for k in range(len(source))]
    vectors = [encode(model, part).astype(np.float64) for part in ([row["question"] for row in rows], texts)]
    scores = vectors[0] @ vectors[1].T
    for row, taken, similar in zip(rows, numbers, scores, strict=True):
        known = {other["answer"] for other in rows if other["question"] == row["question"]} | {row["question"]}
        assert not known & set(corpus.take(taken))
        best = sorted((s for s, t in zip(similar, texts, strict=True) if t not in known), reverse=True)[:2]
        np.testing.assert_allclose(similar[taken], best, atol=1e-5)
