"""The story of a run: set up, resume, loop, evaluate, save, export. The mechanism lives in the files it calls."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from embedjax import build, runs, sharding
from embedjax.checkpoint import Checkpoints
from embedjax.config import Config, serialize
from embedjax.config.errors import Saved
from embedjax.data.sources import manifest
from embedjax.evaluate import report, tasks
from embedjax.export import export
from embedjax.load import Model, assemble, best_metric, read_constants, tokenizer_folders, write_constants
from embedjax.metrics.pace import peak_flops
from embedjax.metrics.progress import Progress, Status
from embedjax.metrics.writers import Writer
from embedjax.objective import combine
from embedjax.step import TrainState


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run left: its folder, the step reached, the scores at the end and the exported folder."""

    folder: Path
    step: int
    scores: Mapping[str, float]
    exported: Path | None


def train(config: Config, folder: Path | None = None, *, fresh: bool = False, profile: range | None = None) -> Result:
    """Runs an experiment in `folder` (default runs/NAME), or goes on with the one that is there.

    `fresh` moves an old run aside first; `profile` is a range of steps to trace. Raises Saved when asked to stop by a signal,
    NonFiniteError after three non-finite steps in a row, and the errors of config, data and storage.
    """
    folder = folder or Path("runs") / config.name
    first = jax.process_index() == 0
    status = Status(sys.stdout if first else open(os.devnull, "w"))
    with runs.opened(folder, fresh), runs.stop_signal() as stopped:
        # ---- set up: an earlier run in this folder decides what may go on here
        stored = runs.stored(folder)
        config = build.resolve(config, stored)
        if stored is not None:
            runs.refuse_changes(folder, stored, config)
        run = build.build(config, folder)
        if first:
            runs.write_facts(folder, config, [row for source in run.sources.values() for row in manifest(source)], sys.argv)
        status.line(build.summary(run))
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep, best=best_metric(config))
        prepared = tasks.prepare(config.evaluate.tasks)

        def evaluate(step: int, state: TrainState, constants: dict) -> Mapping[str, float]:
            scores = tasks.evaluate(_model(run, state, constants, folder, step), prepared, mesh=run.mesh)
            if first and scores:
                runs.add_evaluation(folder, step, scores)
                status.line(f"step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in scores.items()))
            return scores

        def save(step: int, state: TrainState, scores: Mapping[str, float]) -> None:
            checkpoints.save(step, state, position=step, config=serialize.to_json(config), metrics=scores)

        # ---- the state: 1. the newest whole save of this run; 2. pretrained or random weights
        if checkpoints.latest() is not None:
            state, record = checkpoints.restore(None, run.abstract)
            start = record.position
            constants = sharding.put(read_constants(folder), run.mesh)
            status.line(f"going on at step {start} of {config.steps}")
        else:
            start = 0
            state, constants = run.init()
            if first:
                write_constants(folder, constants)
            if config.evaluate.baseline:
                evaluate(0, state, constants)

        # ---- the loop: a step is dispatched before the metrics of the one before it are read
        writer = Writer(folder, config.writers, start, config.name) if first else None
        progress = Progress(
            status=status,
            writer=writer,
            start=start,
            steps=config.steps,
            pairs=config.data.batch_size,
            log_every=config.log_every,
            peak=_peak(run),
        )
        batches = run.batches.iterate(start)
        pending = None
        scores: Mapping[str, float] = {}
        for n in range(start + 1, config.steps + 1):
            with progress.waiting():
                task, columns = next(batches)
            with _traced(folder, profile, n):
                state, found = run.steps[task](state, constants, sharding.place(columns, run.mesh))
            if pending:
                progress.read(*pending)
            pending = (n, build.shape_name(task, columns), build.step_flops(run, columns), found)
            last, stop = n == config.steps, _agreed(stopped.is_set(), n)
            due = bool(config.evaluate.every) and n % config.evaluate.every == 0
            if last or stop or due or n % config.checkpoint.every == 0:
                progress.read(*pending)
                pending = None
                scores = evaluate(n, state, constants) if last or due else {}
                save(n, state, scores)
                if writer and scores:
                    writer.scalars(n, scores)
                progress.pace.restart()
            if stop and not last:
                checkpoints.close()
                raise Saved(f"{folder}: asked to stop; saved at step {n} of {config.steps}, the same command goes on from there")
        checkpoints.close()

        # ---- the end: what was trained becomes a folder, and shows what it can do
        status.line(progress.summary() + f", {100 * run.batches.padding_share():.0f}% padding")
        scores = scores or (runs.evaluations(folder) or [{}])[-1]
        exported = None
        if first and config.export.format != "none":
            exported = folder / "export"
            model = _model(run, state, constants, folder, config.steps)
            difference = export(model, exported, config.export.format, scores=_scores(scores), replace=True)
            status.line(f"exported {exported} (parity: largest difference {difference:.0e})")
        if first and config.evaluate.baseline:
            model = _model(run, state, constants, folder, config.steps)
            for line in report.lines(model, prepared, runs.evaluations(folder), exported or folder):
                status.line(line)
        return Result(folder, config.steps, _scores(scores), exported)


def _model(run: build.Run, state: TrainState, constants: dict, folder: Path, step: int) -> Model:
    """The model as it stands, where its parameters are."""
    details = {"config": run.config, "step": step, "run": str(folder)}
    params = combine(state.params, constants)
    return assemble(run.config.model, params, run.texts, tokenizer_folders(folder, run.config.model), str(folder), details)


def _scores(row: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "step"}


def _peak(run: build.Run) -> float | None:
    peak = peak_flops(run.mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * run.mesh.size


def _agreed(asked: bool, step: int) -> bool:
    """Whether to stop after this step: all processes answer alike, also when only one of them was asked."""
    return asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def _traced(folder: Path, profile: range | None, step: int) -> Iterator[None]:
    """Starts the profiler's trace at the first step of the range and ends it after the last."""
    if profile and step == profile.start:
        jax.profiler.start_trace(str(folder / "profile"))
    yield
    if profile and step == profile.stop - 1:
        jax.profiler.stop_trace()
