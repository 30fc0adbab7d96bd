"""A run in a process of its own, killed at random moments or asked to stop: it goes on as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from embedjax.checkpoint import Checkpoints
from embedjax.metrics.writers import read_rows

pytestmark = pytest.mark.slow

CONFIG = """
from embedjax.config import *

def config():
    arch = Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16, dropout=0.1)
    return Config(
        steps={steps}, log_every=1, export=Export("none"), checkpoint=Checkpoint(every=20),
        model=Model({{"text": Tower(arch=arch, tokenizer="wordpiece", max_length=8)}}),
        data=Data(batch_size=16, sets=(Set(File({path!r}), {{"anchor": "question", "positive": "answer"}}, name="pairs"),)),
        optim=Optim(learning_rate=1e-3),
    )
"""
ENVIRONMENT = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}


def start(tmp_path, pairs_file, folder, steps):
    (tmp_path / "my.py").write_text(CONFIG.format(steps=steps, path=str(pairs_file)))
    command = [sys.executable, "-m", "embedjax", "train", str(tmp_path / "my.py"), "--run-dir", str(folder)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, word):
    """Reads the process's output until a word appears."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if word in line:
            return
    raise AssertionError("".join(seen))


def state(folder):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest()
        arrays = checkpoints.record(step).arrays
        return step, checkpoints._read(step, {path: np.empty(d["shape"], d["dtype"]) for path, d in arrays.items()})


def test_twenty_kills_lose_nothing_but_the_save_in_flight(tmp_path, pairs_file):
    steps, rng = 2000, random.Random(0)
    whole = start(tmp_path, pairs_file, tmp_path / "whole", steps)
    out = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, out
    folder, reached, kills = tmp_path / "run", 0, 0
    while kills < 20:
        process = start(tmp_path, pairs_file, folder, steps)
        wait_for(process, "step ")
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.communicate()
        kills += 1
        with Checkpoints(folder / "checkpoints") as checkpoints:
            latest = checkpoints.latest() or 0
        assert latest >= reached, "a save that counted is gone"
        reached = latest
    last = start(tmp_path, pairs_file, folder, steps)
    out = last.communicate(timeout=600)[0]
    assert last.returncode == 0, out
    (wanted_step, wanted), (found_step, found) = state(tmp_path / "whole"), state(folder)
    assert wanted_step == found_step == steps and kills == 20 and reached > 0
    for path in wanted:
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(wanted[path]), err_msg=path)
    losses = lambda run: [(row["step"], row["loss"]) for row in read_rows(run / "metrics.jsonl")]
    assert losses(folder) == losses(tmp_path / "whole")


def test_sigterm_saves_and_exits_with_75(tmp_path, pairs_file):
    process = start(tmp_path, pairs_file, tmp_path / "run", 100_000)
    wait_for(process, "step ")
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 75, out
    assert "the same command goes on" in out
    step, _ = state(tmp_path / "run")
    assert 0 < step < 100_000
    again = start(tmp_path, pairs_file, tmp_path / "run", 100_000)
    wait_for(again, f"going on at step {step}")
    second = start(tmp_path, pairs_file, tmp_path / "run", 100_000)
    held = second.communicate(timeout=120)[0]
    assert second.returncode == 4 and f"process {again.pid}" in held
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    assert again.returncode == 75
