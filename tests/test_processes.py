"""Runs of several processes on this machine: the numbers of one process, and how all end when one does."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from embedjax import supervise
from embedjax.checkpoint import Checkpoints
from embedjax.evaluate.encode import encode
from embedjax.load import load
from embedjax.metrics.writers import read_rows

CONFIG = """
import os
from embedjax.config import *

def config():
    arch = Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16, dropout=0.1)
    path = os.environ.get("PAIRS", {path!r})
    return Config(
        steps={steps}, log_every=1, export=Export({export!r}), checkpoint=Checkpoint(every={every}),
        model=Model({{"text": Tower(arch=arch, tokenizer="wordpiece", max_length=8)}}),
        data=Data(batch_size=16, sets=(Set(File(path), {{"anchor": "question", "positive": "answer"}}, name="pairs"),)),
        evaluate=Evaluate(tasks=(Retrieval(File({path!r}), {{"query": "question", "document": "answer"}}, name="pairs"),)),
        optim=Optim(learning_rate=1e-4), distributed=Distributed(heartbeat={heartbeat}, start=120, meet=120, step={step}),
    )
"""
HEARTBEAT = 10
LIMIT = 240


class Run:
    """Some processes of one run, each a command of its own."""

    def __init__(
        self,
        folder,
        pairs,
        count,
        *,
        devices=2,
        steps=12,
        export="none",
        heartbeat=HEARTBEAT,
        step=120,
        every=5,
        pairs_of=None,
        options=(),
    ):
        self.folder = folder
        file = folder.parent / f"{folder.name}.py"
        file.write_text(CONFIG.format(path=str(pairs), steps=steps, export=export, heartbeat=heartbeat, step=step, every=every))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Without the cache of compiled programs: a peer that finds one and a peer that compiles wait for each other.
        shared = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        shared |= {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
        if count > 1:
            shared |= {"EMBEDJAX_COORDINATOR": f"127.0.0.1:{port}", "EMBEDJAX_PROCESS_COUNT": str(count)}
        command = [sys.executable, "-m", "embedjax", "train", str(file), "--run-dir", str(folder), *options]
        self.processes, self.files = [], []
        for index in range(count):
            own = {"PAIRS": str((pairs_of or {}).get(index, pairs)), "EMBEDJAX_PROCESS_ID": str(index)}
            self.files.append(folder.parent / f"{folder.name}.{index}.{port}.out")
            with self.files[-1].open("w") as out:
                started = subprocess.Popen(command, env=shared | own, stdout=out, stderr=subprocess.STDOUT)
            self.processes.append(started)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, index):
        """The lines of a process, but for those of Gloo, whose threads write into each other's."""
        ours = lambda line: line and "[Gloo]" not in line and "peer ranks" not in line
        return list(filter(ours, self.files[index].read_text().splitlines()))

    def wait_for(self, step):
        """Until the metrics of a step are written, or a process has ended."""
        end = time.monotonic() + LIMIT
        while not any(row["step"] >= step for row in read_rows(self.folder / "metrics.jsonl")):
            assert time.monotonic() < end and all(process.poll() is None for process in self.processes), self.told()
            time.sleep(0.05)

    def codes(self, limit=LIMIT):
        """The exit codes, in the order of the processes."""
        end = time.monotonic() + limit
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.told()) from None

    def told(self):
        return "\n".join(f"--- {index}\n" + "\n".join(self.said(index)[-25:]) for index in range(len(self.files)))


def losses(folder):
    return np.array([row["loss"] for row in read_rows(folder / "metrics.jsonl")])


def assert_same_losses(found, wanted):
    np.testing.assert_allclose(found[:20], wanted[:20], rtol=1e-6)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)  # rounding grows; another row would change a loss by a tenth


def evaluated(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def child_of(process):
    """The process that trains, under the one that was started."""
    return int(pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def test_two_processes_give_what_one_gives(tmp_path, pairs_file):
    with Run(tmp_path / "two", pairs_file, 2) as two:
        assert two.codes() == [0, 0], two.told()
    # The one is a process of its own too: in one that had run hundreds of other programs it was ended, as by the watchdog.
    with Run(tmp_path / "one", pairs_file, 1, devices=4, options=("--mesh.data", "2", "--mesh.fsdp", "2")) as one:
        assert one.codes() == [0], one.told()
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)
    found, wanted = evaluated(tmp_path / "two"), evaluated(tmp_path / "one")
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    np.testing.assert_allclose([*found[0].values()], [*wanted[0].values()], rtol=1e-6)
    assert two.said(1) == [] and any("step 12/12" in line for line in two.said(0))
    with Checkpoints(tmp_path / "two" / "checkpoints") as saves:
        assert saves.steps() == [10, 12]
    manifests = sorted(file.name for file in (tmp_path / "two" / "checkpoints" / "12").glob("manifest*"))
    assert manifests == ["manifest-0-of-2.json", "manifest-1-of-2.json"]


@pytest.mark.slow
def test_four_processes_with_parameters_split_between_them_export_what_one_does(tmp_path, pairs_file):
    for name, count, mesh in (("four", 4, ["--mesh.tensor", "2"]), ("eight", 4, ["--mesh.fsdp", "4"]), ("one", 1, [])):
        devices = {"four": 1, "eight": 2, "one": 4}[name]
        with Run(tmp_path / name, pairs_file, count, devices=devices, export="sentence-transformers", options=mesh) as run:
            assert run.codes() == [0] * count, run.told()
            assert any("exported" in line for line in run.said(0))
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "four"), rtol=2e-6)
    texts = ["red cat", "a quiet river song"]
    wanted = encode(load(tmp_path / "one" / "export"), texts)
    for name in ("four", "eight"):
        np.testing.assert_allclose(encode(load(tmp_path / name / "export"), texts), wanted, atol=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_other_counts_go_on(tmp_path, pairs_file):
    steps, folder = 300, tmp_path / "parts"
    for count, devices, signalled in ((2, 2, 1), (4, 1, 2), (2, 2, 0)):
        before = len(losses(folder)) if folder.exists() else 0
        with Run(folder, pairs_file, count, devices=devices, steps=steps) as run:
            run.wait_for(before + 5)
            run.processes[signalled].send_signal(signal.SIGTERM)
            assert run.codes() == [75] * count, run.told()
        reached = len(losses(folder))
        assert before < reached < steps
        with Checkpoints(folder / "checkpoints") as saves:
            assert saves.latest() == reached
        told = [line for index in range(count) for line in run.said(index) if "asked to stop" in line]
        assert len(told) == 1 and f"saved at step {reached} of {steps}" in told[0]
    with Run(folder, pairs_file, 1, devices=2, steps=steps) as last:
        assert last.codes() == [0], last.told()
    with Run(tmp_path / "whole", pairs_file, 1, devices=4, steps=steps) as whole:
        assert whole.codes() == [0], whole.told()
    assert_same_losses(losses(folder), losses(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "killed"), [(2, 2, 1), (2, 2, 0), (4, 1, 2)])
def test_a_killed_process_ends_the_others_in_time_with_a_line_of_ours(tmp_path, pairs_file, count, devices, killed):
    with Run(tmp_path / "run", pairs_file, count, devices=devices, steps=100_000) as run:
        run.wait_for(12)
        run.processes[killed].kill()
        began = time.monotonic()
        codes = run.codes(HEARTBEAT + 5)
        assert time.monotonic() - began < HEARTBEAT + 5
        assert codes == [-9 if index == killed else 70 for index in range(count)], run.told()
        for index in set(range(count)) - {killed}:
            assert re.match(rf"embedjax: process {index} of {count} ", run.said(index)[-1]), run.told()
            assert "another process of the run is gone" in run.said(index)[-1], run.told()
    with Checkpoints(tmp_path / "run" / "checkpoints") as saves:
        assert (saves.latest() or 0) >= 5
    with Run(tmp_path / "run", pairs_file, 2, steps=100_000) as again:
        again.wait_for(len(losses(tmp_path / "run")) + 3)
        assert any("going on at step" in line for line in again.said(0))
        again.processes[0].send_signal(signal.SIGTERM)
        assert again.codes() == [75, 75], again.told()
    found = losses(tmp_path / "run")
    with Run(tmp_path / "whole", pairs_file, 1, devices=4, steps=100_000) as whole:
        whole.wait_for(len(found))
        whole.processes[0].send_signal(signal.SIGTERM)
        assert whole.codes() == [75], whole.told()
    assert_same_losses(found, losses(tmp_path / "whole")[: len(found)])


@pytest.mark.slow
def test_bad_data_of_one_process_end_all_with_its_code_and_one_line(tmp_path, pairs_file):
    bad = tmp_path / "bad.tsv"
    lines = pairs_file.read_text().splitlines()
    bad.write_text("\n".join([lines[0], *("without a tab" for _ in lines[1:])]) + "\n")
    with Run(tmp_path / "run", pairs_file, 2, pairs_of={1: bad}) as run:
        assert run.codes() == [3, 3], run.told()
        assert sum("embedjax: " in line for index in (0, 1) for line in run.said(index)) == 1
        assert run.said(1)[-1].startswith("embedjax: process 1 of 2: ") and "bad.tsv" in run.said(1)[-1]
    with Checkpoints(tmp_path / "run" / "checkpoints") as saves:
        assert saves.steps() == []


@pytest.mark.slow
def test_an_error_of_one_process_in_setting_up_ends_all_and_is_told_once(tmp_path, pairs_file):
    with Run(tmp_path / "run", pairs_file, 2, pairs_of={1: tmp_path / "missing.tsv"}) as run:
        assert run.codes() == [3, 3], run.told()
        assert run.said(0) == [] and len(run.said(1)) == 1 and "missing.tsv" in run.said(1)[0]
    held = Run(tmp_path / "held", pairs_file, 2, steps=100_000)
    with held:
        held.wait_for(1)
        with Run(tmp_path / "held", pairs_file, 2, steps=100_000) as second:
            assert second.codes() == [4, 4], second.told()
            assert "is held by process" in second.said(0)[-1] and second.said(1) == []


@pytest.mark.slow
def test_a_step_that_hangs_ends_with_the_stacks_of_all_threads(tmp_path, pairs_file):
    with Run(tmp_path / "run", pairs_file, 2, steps=100_000, heartbeat=100, step=4, every=100_000) as run:
        run.wait_for(5)
        child = child_of(run.processes[1])
        os.kill(child, signal.SIGSTOP)
        assert run.processes[0].wait(60) == 70, run.told()
        assert "takes far longer than usual" in run.said(0)[-1] and any("train.py" in line for line in run.said(0))
        os.kill(child, signal.SIGCONT)
        assert run.processes[1].wait(60) == 70, run.told()


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"EMBEDJAX_COORDINATOR": "auto"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # in an allocation, but not under srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
    ids=str,
)
def test_one_of_several_is_known_by_its_environment(variables, several):
    assert supervise.several(variables) is several


def test_incomplete_variables_are_refused_in_one_line(tmp_path, pairs_file):
    with Run(tmp_path / "run", pairs_file, 1) as run:
        run.processes[0].kill()
    command = [sys.executable, "-m", "embedjax", "train", str(tmp_path / "run.py")]
    environment = os.environ | {"EMBEDJAX_COORDINATOR": "127.0.0.1:1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "EMBEDJAX_PROCESS_COUNT and EMBEDJAX_PROCESS_ID" in done.stderr
    assert len(done.stderr.splitlines()) == 1
