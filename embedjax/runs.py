"""A run folder: who holds it, what may go on in it, and the facts written there."""

import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from embedjax import distributed
from embedjax.config import Config, serialize
from embedjax.config.errors import ConfigError, StorageError
from embedjax.config.run import run_folder
from embedjax.lock import hold
from embedjax.metrics.writers import read_rows

PACKAGES = ("embedjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy")

# Seconds within which a second signal is the first again: launchers signal a process and its parent, which passes it on.
SAME_SIGNAL = 2.0

# What may change when a run goes on: none of it changes what a step computes. Everything else is refused.
FREE = (
    "name",
    "mesh",
    "distributed",
    "checkpoint",
    "evaluate",
    "export",
    "writers",
    "log_every",
    "data.threads",
    "data.prefetch",
    "data.bad_share",
)


@contextmanager
def opened(folder: Path, fresh: bool) -> Iterator[None]:
    """Makes and holds a run folder; `fresh` first moves the run in it to a sibling folder with the time in its name.

    Of several processes the first does it. Raises ConfigError for a URL, StorageError when another run holds it or it cannot
    be written.
    """
    if not distributed.first():
        yield
        return
    run_folder(folder)
    try:
        if fresh and (folder / "config.json").exists():
            with hold(folder):
                folder.rename(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be used as a run folder ({error.strerror})") from error
    with hold(folder):
        yield


def stored(folder: Path) -> Config | None:
    """The config the run in this folder was started with, None if there is no run."""
    return serialize.read(folder / "config.json") if (folder / "config.json").exists() else None


def refuse_changes(folder: Path, old: Config, new: Config) -> None:
    """Raises ConfigError naming every difference that would change the meaning of the run."""
    found = serialize.differences(serialize.to_json(old), serialize.to_json(new))
    found = {path: pair for path, pair in found.items() if not any(path == f or path.startswith(f + ".") for f in FREE)}
    if found:
        told = "; ".join(f"{path}: {a!r} -> {b!r}" for path, (a, b) in sorted(found.items()))
        raise ConfigError(f"{folder} holds a run of another config ({told}); use another --run-dir, or --fresh to start anew")


def known_data(folder: Path) -> list[dict]:
    """What the run's files were at its last start; nothing before the first."""
    path = folder / "data.json"
    return json.loads(path.read_text()) if path.exists() else []


def refuse_other_data(folder: Path, new: list[dict]) -> None:
    """Raises ConfigError when the training data are no longer those the run began with: rows would be others unnoticed.

    Paths may differ, as they do between machines."""
    old = known_data(folder) or new
    facts = lambda files: [(file["bytes"], file["sha256"], file["rows"]) for file in files]
    if facts(old) != facts(new):
        changed = [b["file"] for a, b in zip(old, new, strict=False) if facts([a]) != facts([b])] or ["their number"]
        raise ConfigError(f"{folder}: the data have changed since the run began ({changed[0]}); --fresh starts anew")


def write_facts(folder: Path, config: Config, data: list[dict], command: list[str]) -> None:
    """config.json, env.json (one entry a start) and data.json: what is needed to say later what was run on what."""
    write_json(folder / "config.json", serialize.to_json(config))
    write_json(folder / "data.json", data)
    devices = jax.devices()
    started = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": {"count": len(devices), "platform": devices[0].platform, "kind": devices[0].device_kind},
        "processes": jax.process_count(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_", "LD_PRELOAD", "EMBEDJAX_"))},
    }
    path = folder / "env.json"
    earlier = json.loads(path.read_text())["starts"] if path.exists() else []
    write_json(path, {"starts": [*earlier, started]})


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all. Raises StorageError when the folder cannot be written."""
    part = path.with_suffix(".partial")
    try:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        part.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


def add_evaluation(folder: Path, step: int, scores: Mapping[str, float]) -> None:
    """Appends the scores of a step to evaluations.jsonl, in place of an earlier evaluation of the same step."""
    path = folder / "evaluations.jsonl"
    rows = [row for row in read_rows(path) if row["step"] < step] + [{"step": step, **scores}]
    part = path.with_suffix(".partial")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def evaluations(folder: Path) -> list[dict]:
    """The evaluations of a run, in order of steps."""
    return read_rows(folder / "evaluations.jsonl")


def scores_beside(config: Config) -> dict[str, dict[str, float]]:
    """Run folder -> its last scores, of all that `evaluate.beside` names: those of tasks that are the same in both."""
    found = {}
    for name in config.evaluate.beside:
        other, rows = stored(Path(name)), evaluations(Path(name))
        tasks = [task for task in config.evaluate.tasks if other and task in other.evaluate.tasks]
        labels = {label for task in tasks for label in task.labels}
        if rows:
            found[name] = {key: value for key, value in rows[-1].items() if key.rpartition("/")[0] in labels}
    return found


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, so that the loop can save at the next step. A second one acts at once.

    Outside the main thread signals are left alone.
    """
    stopped, came = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal came
        if stopped.is_set():
            if time.monotonic() - came > SAME_SIGNAL:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        came = time.monotonic()
        stopped.set()
        if distributed.first():
            print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
