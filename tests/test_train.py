"""Whole runs: what they leave, how they go on, and what stops them."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from embedjax import build, distributed, runs, sharding
from embedjax import config as c
from embedjax.checkpoint import Checkpoints
from embedjax.config import Evaluate, Export, Model, MultipleNegatives, serialize
from embedjax.config.errors import ConfigError, DataError, NonFiniteError, Saved, StorageError
from embedjax.evaluate import tasks
from embedjax.evaluate.encode import encode
from embedjax.evaluate.tasks import retrieval
from embedjax.load import load
from embedjax.lock import hold
from embedjax.metrics.progress import Progress
from embedjax.metrics.writers import read_rows
from embedjax.train import train
from embedjax.watchdog import Watchdog

TIMINGS = {"pairs_per_second", "data_wait"}


@pytest.fixture
def use_devices(monkeypatch):
    """Makes runs use so many of the simulated devices."""
    original = sharding.make_mesh

    def use(count):
        some = lambda mesh, devices=None: original(mesh, devices or jax.devices()[:count])
        monkeypatch.setattr(sharding, "make_mesh", some)

    use(1)
    return use


class StopAt:
    """Answers as the event of a signal that came during the n-th step."""

    def __init__(self, n):
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


def stop_at(monkeypatch, n):
    monkeypatch.setattr(runs, "stop_signal", lambda: contextlib.nullcontext(StopAt(n - 1)))


def rows(folder):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(folder / "metrics.jsonl")]


def saved(folder, step=None):
    """Every array of a save, by path, and its step."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = step or checkpoints.latest()
        arrays = checkpoints.record(step).arrays
        return checkpoints._read(step, {path: np.empty(d["shape"], d["dtype"]) for path, d in arrays.items()}), step


def assert_bitwise(found, wanted):
    assert found.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(wanted[path]), err_msg=path)


def test_a_run_leaves_all_that_is_promised(tiny_config, tmp_path, use_devices, capsys):
    result = train(tiny_config, tmp_path / "run")
    folder = result.folder
    for name in ("config.json", "env.json", "data.json", "metrics.jsonl", "metrics.csv", "evaluations.jsonl"):
        assert (folder / name).stat().st_size > 0, name
    assert serialize.read(folder / "config.json").steps == 10
    assert json.loads((folder / "data.json").read_text())[0]["rows"] == 64
    assert len(json.loads((folder / "data.json").read_text())[0]["sha256"]) == 64
    assert [row["step"] for row in rows(folder)] == list(range(1, 11))
    assert len((folder / "metrics.csv").read_text().splitlines()) == 11
    assert result.scores.keys() >= {"pairs/ndcg@10", "pairs/recall@1"}
    assert (result.exported / "modules.json").exists()
    out = capsys.readouterr().out
    assert "step 10/10" in out and "pairs/s" in out and "exported" in out
    texts = ["red cat", "a quiet river song"]
    np.testing.assert_allclose(encode(load(folder), texts), encode(load(result.exported), texts), atol=1e-6)
    np.testing.assert_array_equal(encode(load(f"{folder}@5"), texts).shape, (2, 16))
    with pytest.raises(StorageError, match="step 7"):
        load(f"{folder}@7")


def test_five_steps_a_stop_and_five_more_equal_ten_bitwise(tiny_config, tmp_path, use_devices, monkeypatch):
    train(tiny_config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Saved, match="saved at step 5 of 10"):
            train(tiny_config, tmp_path / "parts")
    assert saved(tmp_path / "parts")[1] == 5
    train(tiny_config, tmp_path / "parts")
    assert_bitwise(saved(tmp_path / "parts")[0], saved(tmp_path / "whole")[0])
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert runs.evaluations(tmp_path / "parts") == runs.evaluations(tmp_path / "whole")


def test_other_device_counts_see_the_same_rows_and_losses(tiny_config, tmp_path, use_devices, monkeypatch):
    slow = dataclasses.replace(tiny_config.optim, learning_rate=1e-4)
    config = dataclasses.replace(tiny_config, optim=slow, evaluate=Evaluate(), export=Export("none"))
    use_devices(4)
    train(config, tmp_path / "whole")
    for devices, stop in ((4, 3), (2, 3), (8, None)):
        use_devices(devices)
        if stop is None:
            train(config, tmp_path / "parts")
            continue
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            with pytest.raises(Saved):
                train(config, tmp_path / "parts")
    wanted, found = ([row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert len(found) == 10
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # At step 4 the two-device run took over: the same rows give the same loss, another row would not.
    assert abs(wanted[3] - wanted[4]) > 1e-3


def test_a_changed_meaning_is_refused_and_named(tiny_config, tmp_path, use_devices):
    folder = tmp_path / "run"
    train(dataclasses.replace(tiny_config, steps=1, evaluate=dataclasses.replace(tiny_config.evaluate, tasks=())), folder)
    changed = dataclasses.replace(tiny_config, steps=1, data=dataclasses.replace(tiny_config.data, batch_size=32))
    with pytest.raises(ConfigError, match="data.batch_size: 16 -> 32"):
        train(changed, folder)
    free = dataclasses.replace(tiny_config, steps=1, log_every=3, data=dataclasses.replace(tiny_config.data, threads=1))
    assert train(free, folder).step == 1
    train(changed, folder, fresh=True)
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("run.")]) == 1


def test_the_watchdog_is_armed_wherever_a_compiled_step_is_waited_for(tiny_config, tmp_path, use_devices, monkeypatch):
    """Also before a save, and before a shape that is new is dispatched."""
    use_devices(1)
    made, read, settled = [], [], []

    class Kept(Watchdog):
        def __init__(self, floor):
            super().__init__(floor)
            made.append(self)

    armed = lambda: made[-1].armed and made[-1].armed[1]

    def keep(kind, name, where):
        old = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *rest: (where.append(armed()), old(self, *rest))[1])

    monkeypatch.setattr("embedjax.train.Watchdog", Kept)
    keep(Progress, "read", read)
    keep(distributed.Ballot, "settle", settled)
    train(dataclasses.replace(tiny_config, steps=8, checkpoint=c.Checkpoint(every=3)), tmp_path / "run")
    # The first step's wait is not armed: another process may be compiling it yet.
    assert settled == ["step 3", "step 6", "step 8"]
    assert read == [None, "step 3", "step 3", "step 5", "step 6", "step 6", "step 8", "step 8"]


def test_a_held_folder_is_refused(tiny_config, tmp_path):
    with hold(tmp_path / "run"), pytest.raises(StorageError, match="held by process"):
        train(tiny_config, tmp_path / "run")


def test_three_steps_that_are_not_finite_stop_the_run(tiny_config, tmp_path, use_devices):
    config = dataclasses.replace(tiny_config, optim=dataclasses.replace(tiny_config.optim, learning_rate=1e38, clip_norm=0.0))
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        train(config, tmp_path / "run")
    assert [row["skipped"] for row in rows(tmp_path / "run")][-3:] == [1, 2, 3]


def test_frozen_parameters_are_saved_once_and_come_back(tiny_config, tmp_path, use_devices, monkeypatch):
    config = dataclasses.replace(tiny_config, optim=dataclasses.replace(tiny_config.optim, freeze=("encoder/tokens",)))
    stop_at(monkeypatch, 2)
    with pytest.raises(Saved):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    use_devices(1)
    before = (tmp_path / "run" / "constants.safetensors").read_bytes()
    result = train(dataclasses.replace(config, export=dataclasses.replace(config.export, format="none")), tmp_path / "run")
    assert result.exported is None and (tmp_path / "run" / "constants.safetensors").read_bytes() == before
    assert encode(load(tmp_path / "run"), ["red cat"]).shape == (1, 16)
    (tmp_path / "run" / "constants.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(StorageError, match="damaged"):
        load(tmp_path / "run")


def test_a_run_does_not_need_the_folder_it_started_from_again(tiny_config, tmp_path, use_devices, monkeypatch):
    first = train(dataclasses.replace(tiny_config, steps=1), tmp_path / "first")
    tower = dataclasses.replace(tiny_config.model.towers["text"], arch=None, tokenizer="", init=str(first.exported))
    config = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, towers={"text": tower}))
    stop_at(monkeypatch, 2)
    with pytest.raises(Saved):
        train(config, tmp_path / "second")
    monkeypatch.undo()
    use_devices(1)
    shutil.rmtree(first.exported)
    assert train(config, tmp_path / "second").step == 10


def test_profile_writes_a_trace(tiny_config, tmp_path, use_devices):
    train(dataclasses.replace(tiny_config, steps=3), tmp_path / "run", profile=range(2, 3))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_other_data_under_the_same_run_are_refused(tiny_config, tmp_path, pairs_file, use_devices):
    config = dataclasses.replace(tiny_config, steps=1, evaluate=dataclasses.replace(tiny_config.evaluate, tasks=()))
    train(config, tmp_path / "run")
    pairs_file.write_text(pairs_file.read_text().replace("cat", "cow"))
    with pytest.raises(ConfigError, match=r"data have changed .*pairs.tsv"):
        train(config, tmp_path / "run")


def test_a_start_that_failed_leaves_no_tokenizer_behind(tiny_config, tmp_path, pairs_file, use_devices):
    config = dataclasses.replace(tiny_config, steps=1, evaluate=dataclasses.replace(tiny_config.evaluate, tasks=()))
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=128))
    with pytest.raises(DataError, match="64 rows"):
        train(few, tmp_path / "run")
    pairs_file.write_text(pairs_file.read_text().replace("cat", "zebra"))
    train(config, tmp_path / "run")
    assert "zebra" in (tmp_path / "run" / "tokenizer" / "text" / "vocab.txt").read_text().split()


def scores_of(folder):
    """The scores that each save has."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return {step: checkpoints.record(step).metrics for step in checkpoints.steps()}


def test_a_stop_at_an_evaluation_saves_first_and_evaluates_on_return(tiny_config, tmp_path, use_devices, monkeypatch):
    """The scores are then those of the save too, which may be the best."""
    config = dataclasses.replace(
        tiny_config, evaluate=dataclasses.replace(tiny_config.evaluate, every=4), checkpoint=c.Checkpoint(every=5, keep=9)
    )
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Saved):
            train(config, tmp_path / "parts")
    assert runs.evaluations(tmp_path / "parts") == [] and scores_of(tmp_path / "parts") == {4: {}}
    train(config, tmp_path / "parts")
    found = runs.evaluations(tmp_path / "parts")
    assert [row["step"] for row in found] == [4, 8, 10]
    assert found == runs.evaluations(tmp_path / "whole")
    assert scores_of(tmp_path / "parts") == scores_of(tmp_path / "whole")
    assert {5: {}} | {row.pop("step"): row for row in found} == scores_of(tmp_path / "whole")


@pytest.mark.parametrize("error", [NonFiniteError("not finite"), MemoryError("out of memory")], ids=repr)
def test_an_evaluation_that_fails_costs_no_training(tiny_config, tmp_path, use_devices, monkeypatch, error):
    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "evaluate", fails)
        with pytest.raises(type(error)):
            train(tiny_config, tmp_path / "run")
    assert saved(tmp_path / "run")[1] == 10
    monkeypatch.setattr(Checkpoints, "save", lambda *_, **__: pytest.fail("trained again"))
    assert train(tiny_config, tmp_path / "run").scores == scores_of(tmp_path / "run")[10] != {}


LABELLED = c.Set(columns={"anchor": "question", "label": "kind"}, loss=c.Classify(), name="kinds", labels=("odd", "even"))


@pytest.mark.parametrize(
    ("sets", "task", "words"),
    [
        ((), c.Sts(dims=(8, 17)), "task 'sts', tower 'text': dims holds 17; .* 16"),
        ((), c.Sts(prompt="serach"), "task 'sts', tower 'text': there is no prompt .* 'serach'; did you mean 'search'"),
        ((), c.HeadAccuracy(), "'tiny' has no class head"),
        ((LABELLED,), c.HeadAccuracy(head="kind"), "no class head 'kind'; did you mean 'kinds'"),
        ((LABELLED, dataclasses.replace(LABELLED, name="others")), c.HeadAccuracy(), r"\['kinds', 'others'\]; say which"),
        ((LABELLED,), c.HeadAccuracy(columns={"text": "a", "other": "b", "label": "c"}), "the class head reads single texts"),
    ],
)
def test_a_task_that_the_model_cannot_be_scored_on_is_refused_before_training(tiny_config, sets, task, words):
    tower = dataclasses.replace(tiny_config.model.towers["text"], prompts={"search": "find: "})
    config = dataclasses.replace(
        tiny_config,
        model=Model({"text": tower}),
        data=dataclasses.replace(tiny_config.data, sets=(*tiny_config.data.sets, *sets)),
        evaluate=Evaluate(tasks=(task,)),
    )
    with pytest.raises(ConfigError, match=words):
        build.resolve(config)
    right = Evaluate(tasks=(c.Sts(dims=(8, 16), prompt="search"), *(c.HeadAccuracy(head=kinds.name) for kinds in sets[:1])))
    build.resolve(dataclasses.replace(config, evaluate=right))


def test_labels_that_no_head_will_know_are_refused_before_training(tiny_config, tmp_path, use_devices):
    file = tmp_path / "labels.tsv"
    file.write_text("text\tlabel\nred cat\todd\nblue dog\tevne\n")
    config = dataclasses.replace(
        tiny_config,
        data=dataclasses.replace(tiny_config.data, sets=(*tiny_config.data.sets, LABELLED)),
        evaluate=Evaluate(tasks=(c.HeadAccuracy(c.File(str(file))),)),
    )
    with pytest.raises(DataError, match="labels.tsv:3: task 'head': the head knows no label 'evne'; did you mean 'even'"):
        build.prepare(build.resolve(config))
    file.write_text(file.read_text().replace("evne", "even"))
    assert build.prepare(build.resolve(config))[0].labels == [("odd",), ("even",)]


def test_a_baseline_run_ends_with_three_queries_answered_on_the_mesh(tiny_config, tmp_path, use_devices, monkeypatch, capsys):
    use_devices(2)
    asked, topk = [], retrieval.topk
    record = lambda queries, *rest, mesh: asked.append((len(queries), mesh and mesh.size)) or topk(queries, *rest, mesh=mesh)
    monkeypatch.setattr(retrieval, "topk", record)
    evaluate = dataclasses.replace(tiny_config.evaluate, baseline=True)
    train(dataclasses.replace(tiny_config, steps=1, evaluate=evaluate, export=Export("none")), tmp_path / "run")
    assert asked == [(20, 2), (20, 2), (3, 2)]
    said = capsys.readouterr().out
    assert said.count("\n? ") == 3 and "untrained" in said and "BM25" in said


def test_runs_beside_are_those_with_the_same_task(tiny_config, tmp_path):
    other, score = tmp_path / "other", {f"{tiny_config.evaluate.tasks[0].name}/ndcg@10": 0.5}
    other.mkdir()
    runs.write_json(other / "config.json", serialize.to_json(tiny_config))
    runs.add_evaluation(other, 3, {**score, "elsewhere/ndcg@10": 0.1})
    named = lambda evaluate: dataclasses.replace(evaluate, beside=(str(other), str(tmp_path / "no such run")))
    config = dataclasses.replace(tiny_config, evaluate=named(tiny_config.evaluate))
    assert runs.scores_beside(config) == {str(other): score}
    tasks = tuple(dataclasses.replace(task, limit=7) for task in tiny_config.evaluate.tasks)
    changed = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, tasks=tasks))
    assert runs.scores_beside(changed) == {str(other): {}}


def test_bfloat16_runs_pass_the_gate_and_accumulation_trains(tiny_config, tmp_path, use_devices):
    tower = dataclasses.replace(tiny_config.model.towers["text"], compute="bfloat16")
    config = dataclasses.replace(
        tiny_config,
        steps=3,
        model=dataclasses.replace(tiny_config.model, towers={"text": tower}),
        optim=dataclasses.replace(tiny_config.optim, accumulate=2),
    )
    result = train(config, tmp_path / "run")
    assert json.loads((result.exported / "parity" / "parity.json").read_text())["max_difference"] == 0
    assert np.isfinite([row["loss"] for row in rows(result.folder)]).all()


def test_a_guided_cached_run_trains_one_tower_and_exports_it(tiny_config, tmp_path, use_devices):
    """A frozen guide masks false negatives, GradCache and prefixes on: the export holds the trained tower alone."""
    use_devices(2)
    task, tower = tiny_config.data.sets[0], tiny_config.model.towers["text"]
    loss = MultipleNegatives(guide="guide", guide_margin=0.05, matryoshka=(16, 8), form="ring")
    model = Model({"text": tower, "guide": tower}, {"anchor": "text", "positive": "text"})
    config = dataclasses.replace(
        tiny_config,
        steps=4,
        model=model,
        data=dataclasses.replace(tiny_config.data, sets=(dataclasses.replace(task, loss=loss),)),
        optim=dataclasses.replace(tiny_config.optim, freeze=("^towers/guide/",), cached=4),
    )
    result = train(config, tmp_path / "run")
    trained, exported = load(tmp_path / "run"), load(result.exported)
    np.testing.assert_allclose(encode(exported, ["red cat"]), encode(trained, ["red cat"]), atol=1e-5)
    assert set(exported.config.towers) == {"text"} and set(trained.config.towers) == {"text", "guide"}
    assert {path.split("/")[2] for path in saved(tmp_path / "run")[0] if path.startswith("params/")} == {"text"}
