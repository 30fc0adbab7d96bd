"""The story of a run: set up, resume, loop, evaluate, save, export. The mechanism lives in the files it calls."""

import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
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
    status = Status(sys.stdout if first else io.StringIO())
    with runs.opened(folder, fresh), runs.stop_signal() as stopped:
        # ---- set up: an earlier run in this folder decides what may go on here
        stored = runs.stored(folder)
        config = build.resolve(config, stored)
        if stored is not None:
            runs.refuse_changes(folder, stored, config)
        run = build.build(config, folder)
        prepared = tasks.prepare(config.evaluate.tasks)
        if first:
            runs.write_facts(folder, config, [row for source in run.sources.values() for row in manifest(source)], sys.argv)
        status.line(build.summary(run))

        def model(step: int) -> Model:
            params = combine(state.params, constants)
            details = {"config": config, "step": step, "run": str(folder)}
            return assemble(config.model, params, run.texts, tokenizer_folders(folder, config.model), str(folder), details)

        def evaluate(step: int) -> Mapping[str, float]:
            scores = tasks.evaluate(model(step), prepared, mesh=run.mesh)
            if first and scores:
                runs.add_evaluation(folder, step, scores)
                status.line(f"step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in scores.items()))
            return scores

        with ExitStack() as ended:
            saves = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep, best=best_metric(config))
            checkpoints = ended.enter_context(saves)

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
                    evaluate(0)

            # ---- the loop: a step is dispatched before the metrics of the one before it are read
            writer = ended.enter_context(closing(Writer(folder, config.writers, start, config.name))) if first else None
            progress = Progress(
                status=status, writer=writer, start=start, steps=config.steps, pairs=config.data.batch_size,
                log_every=config.log_every, peak=_peak(run),
            )  # fmt: skip
            batches = ended.enter_context(closing(run.batches.iterate(start)))
            pending = None
            for n in range(start + 1, config.steps + 1):
                with progress.waiting():
                    task, columns = next(batches)
                with _traced(folder, profile, n):
                    state, found = run.steps[task](state, constants, sharding.place(columns, run.mesh))
                if pending:
                    progress.read(*pending)
                pending = (n, build.shape_name(task, columns), build.step_flops(run, columns), found)
                last, stop = n == config.steps, _agreed(stopped.is_set(), n)
                due = last or bool(config.evaluate.every) and n % config.evaluate.every == 0
                if due or stop or n % config.checkpoint.every == 0:
                    progress.read(*pending)
                    pending = None
                    scores = evaluate(n) if due else {}
                    checkpoints.save(n, state, position=n, config=serialize.to_json(config), metrics=scores)
                    if writer and scores:
                        writer.scalars(n, scores)
                    progress.pace.restart()
                if stop and not last:
                    checkpoints.wait()
                    raise Saved(f"{folder}: asked to stop; saved at step {n} of {config.steps}, the same command goes on there")

        # ---- the end: what was trained becomes a folder, and shows what it can do
        if start < config.steps:
            status.line(f"{progress.summary()}, {100 * run.batches.padding_share():.0f}% padding")
        evaluations = runs.evaluations(folder)
        scores = {key: value for key, value in evaluations[-1].items() if key != "step"} if evaluations else {}
        exported = None
        if first and config.export.format != "none":
            exported = folder / "export"
            difference = export(model(config.steps), exported, config.export.format, scores=scores, replace=True)
            status.line(f"exported {exported} (parity: largest difference {difference:.0e})")
        if first and config.evaluate.baseline:
            for line in report.lines(model(config.steps), prepared, evaluations, exported or folder):
                status.line(line)
        return Result(folder, config.steps, scores, exported)


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
