"""A run that is stopped half way and started again, for the scripts beside this file: its metrics are those of one that was
not, bit for bit."""

import dataclasses
import json
import os
import pathlib
import signal
import threading

from embedjax.config import Config
from embedjax.config.errors import Saved
from embedjax.metrics.writers import read_rows
from embedjax.train import Result, train

TIMED = ("pairs_per_second", "data_wait", "utilization")


def restarted(config: Config, folder: pathlib.Path) -> Result:
    """Trains, asks this process to stop by SIGTERM once half the steps are done, and trains on. Ends the script where the run
    was over before."""
    done = threading.Event()
    watcher = threading.Thread(target=_stop_half_way, args=(config, folder, done))
    watcher.start()
    try:
        train(config, folder)
    except Saved as stopped:
        print(stopped, flush=True)
    else:
        raise SystemExit(f"{folder}: the run ended before it could be stopped; give it more steps")
    finally:
        done.set()
        watcher.join()
    return train(config, folder)


def _stop_half_way(config: Config, folder: pathlib.Path, done: threading.Event) -> None:
    while not done.wait(0.05):
        rows = read_rows(folder / "metrics.jsonl")
        if rows and rows[-1]["step"] >= config.steps // 2:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Where the metrics or scores of two run folders differ by a bit, times left out."""
    found = []
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        sides = [[_untimed(row) for row in read_rows(folder / file)] for folder in (one, other)]
        if len(sides[0]) != len(sides[1]):
            found.append(f"{file} has {len(sides[0])} and {len(sides[1])} rows")
        found += [f"{file}: {json.dumps(a)} and {json.dumps(b)}" for a, b in zip(*sides, strict=False) if a != b]
    return found


def _untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMED}


def check(config: Config, work: pathlib.Path, steps: int = 40) -> str:
    """One line: whether so many steps of a config have the same metrics and scores, taken at once and with a stop half way."""
    short = dataclasses.replace(config, steps=steps, log_every=1)
    train(short, work / "whole")
    restarted(short, work / "parts")
    if found := differences(work / "whole", work / "parts"):
        return f"stopped half way and started again: NOT the same run, {len(found)} differences, first {found[0]}"
    return f"stopped half of {steps} steps in and started again: the same metrics of every step, the same scores, bit for bit"
