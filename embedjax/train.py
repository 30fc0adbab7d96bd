"""The story of a run: set up, resume, loop, evaluate, save, export. The mechanism lives in the files it calls."""

import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax

from embedjax import build, distributed, runs, sharding
from embedjax.checkpoint import Checkpoints
from embedjax.config import Config, serialize
from embedjax.config.errors import Saved
from embedjax.data.sources import manifest
from embedjax.evaluate import report, tasks
from embedjax.export import export, quantize
from embedjax.load import (
    Model,
    assemble,
    best_metric,
    heads_of,
    read_constants,
    scale_and_bias,
    tokenizer_folders,
    write_constants,
)
from embedjax.metrics.pace import peak_flops
from embedjax.metrics.progress import Progress, Status
from embedjax.metrics.writers import Writer
from embedjax.mine import mining_due, renew
from embedjax.objective import combine
from embedjax.step import weights
from embedjax.watchdog import Watchdog


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
    NonFiniteError after three non-finite steps in a row, and the errors of config, data and storage. Of several processes
    (`distributed.start`) all call this; the first writes and speaks, and where one raises an error all do.
    """
    folder = (folder or Path("runs") / config.name).absolute()
    first, patience = distributed.first(), config.distributed.meet
    with ExitStack() as ended:
        status = Status(None if first else ended.enter_context(open(os.devnull, "w")))
        with distributed.together("opening the run folder", patience):
            ended.enter_context(runs.opened(folder, fresh))
        stopped = ended.enter_context(runs.stop_signal())
        # ---- set up: an earlier run in this folder decides what may go on here
        with distributed.together("setting up", patience):
            stored = runs.stored(folder)
            config = build.resolve(config, stored)
            if stored is not None:
                runs.refuse_changes(folder, stored, config)
            elif first:
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)  # of a start that failed before there was a run
            run = build.build(config, folder)
            prepared, beside = build.prepare(config), runs.scores_beside(config)
            if first:
                corpora = [mined.source for mined in run.mined.values() if mined.source]
                known = runs.known_data(folder)
                data = [row for source in (*run.sources.values(), *corpora) for row in manifest(source, known)]
                runs.refuse_other_data(folder, data)
                runs.write_facts(folder, config, data, sys.argv)
        saves = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep, best=best_metric(config), limit=patience)
        checkpoints = ended.enter_context(saves)
        status.line(build.summary(run))

        def model(step: int, place: Callable = lambda params: params) -> Model:
            params = place(combine(weights(state), constants))
            loss = scale_and_bias(config, params)
            details = {"config": config, "step": step, "run": str(folder), "loss": loss}
            tokenizers, heads = tokenizer_folders(folder, config.model), heads_of(config, params)
            return assemble(config.model, params, run.texts, tokenizers, str(folder), details, heads)

        def evaluate(step: int) -> None:
            checkpoints.wait()  # whatever happens here, what was trained is saved
            scores = tasks.evaluate(model(step), prepared, mesh=run.mesh)
            if not scores:
                return
            checkpoints.annotate(step, scores)
            if writer is not None:
                runs.add_evaluation(folder, step, scores)
                writer.scalars(step, scores)
            status.line(f"step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in scores.items()))

        def mine(step: int) -> None:
            make = functools.partial(model, step)
            for line in renew(run.mined, make, step, seed=config.seed, mesh=run.mesh, patience=patience):
                status.line(line)

        def due(step: int) -> bool:
            return step == config.steps or bool(config.evaluate.every) and step % config.evaluate.every == 0

        # ---- the state: 1. the newest whole save of this run; 2. pretrained or random weights
        resumed = bool(distributed.gather("looking for a save", int(checkpoints.latest() is not None), limit=patience)[0])
        if resumed:
            state, record = checkpoints.restore(None, run.abstract)
            start = record.position
            constants = sharding.put(read_constants(folder), run.mesh)
            status.line(f"going on at step {start} of {config.steps}")
        else:
            start = 0
            state, constants = run.init()
            host = distributed.whole(constants)
            with distributed.together("writing what is not trained", patience):
                if first:
                    write_constants(folder, host)
        with distributed.together("opening the metrics", patience):
            writer = ended.enter_context(closing(Writer(folder, config.writers, start, config.name))) if first else None
        evaluated = runs.evaluations(folder)
        if due(start) if resumed else config.evaluate.baseline:
            wanted = {label for task in config.evaluate.tasks for label in task.labels}
            if not any(row["step"] == start and wanted == {key.split("/")[0] for key in row} - {"step"} for row in evaluated):
                evaluate(start)

        if start < config.steps:
            mine(start)

        # ---- the loop: a step is dispatched before the metrics of the one before it are read
        progress = Progress(
            status=status, writer=writer, start=start, steps=config.steps, pairs=config.data.batch_size,
            log_every=config.log_every, peak=_peak(run),
        )  # fmt: skip
        trace = Trace(folder / "profile", profile, start, config.steps)
        batches = ended.enter_context(closing(run.batches.iterate(start)))
        ended.callback(trace.stop)
        ballot = distributed.Ballot(run.mesh)
        watchdog = ended.enter_context(Watchdog(config.distributed.step))
        pending, compiling = None, False  # whether the pending step is the first of its shape: another process may compile yet
        usual = lambda *compiling: None if any(compiling) else progress.pace.usual()
        for n in range(start + 1, config.steps + 1):
            with progress.waiting():
                task, columns = ballot.draw(batches, functools.partial(run.batches.blank, n - 1))
            shape = build.shape_name(task, columns)
            if pending and progress.is_new(shape):  # this dispatch compiles: not to be counted as the time of the last step
                with watchdog.waiting(f"step {n - 1}", usual(compiling)):
                    progress.read(*pending)
                pending = None
            trace.before(n)
            before, compiling = bool(pending) and compiling, progress.is_new(shape)
            with watchdog.waiting(f"step {n}", usual(before, compiling)):
                state, found = run.steps[task](state, constants, sharding.place(columns, run.mesh))
                trace.after(n, found)
                stop = ballot.cast(stopped.is_set()) and n < config.steps
                if pending:
                    progress.read(*pending)
            pending = (n, shape, build.step_flops(run, columns), found)
            if stop or due(n) or n % config.checkpoint.every == 0 or mining_due(run.mined, n):
                with watchdog.waiting(f"step {n}", usual(compiling)):
                    ballot.settle()
                    progress.read(*pending)
                pending = None
                checkpoints.save(n, state, position=n, config=serialize.to_json(config))
                # Asked to stop there may be seconds left: what is due is evaluated when the run goes on.
                if due(n) and not stop:
                    evaluate(n)
                if n < config.steps and not stop:
                    mine(n)
                progress.pace.restart()
            if stop:
                checkpoints.wait()
                raise Saved(f"{folder}: asked to stop; saved at step {n} of {config.steps}, the same command goes on there")
        checkpoints.wait()

        # ---- the end: what was trained becomes a folder, and shows what it can do
        if start < config.steps:
            shapes, padding = run.batches.compilations(), 100 * run.batches.padding_share()
            status.line(f"{progress.summary()}, {shapes} compiled shapes, {padding:.0f}% padding")
        evaluated = runs.evaluations(folder)
        scores = {key: value for key, value in evaluated[-1].items() if key != "step"} if evaluated else {}
        exported = None
        if config.export.format != "none":
            exported, final = folder / "export", model(config.steps, distributed.whole)
            with distributed.together("the export", patience):
                if first:
                    texts = [text for row in run.batches.decoded(0, 64) for text, _ in row.values()]
                    difference = export(
                        final, exported, config.export.format, texts=texts, pictures=run.batches.pictures(0, 64),
                        scores=scores, replace=True, title=config.name, adapter=config.export.adapter,
                        head=config.export.head,
                    )  # fmt: skip
                    status.line(f"exported {_shown(exported)} (parity: largest difference {difference:.0e})")
                    for line in quantize.at_the_end(exported, config.export, prepared):
                        status.line(line)
        if config.evaluate.baseline:
            shown = _shown(exported or folder)
            told = report.lines(model(config.steps), prepared, evaluated, shown, run.mesh, _shown(folder), beside)
            with distributed.together("the report", patience):
                for line in told if first else ():
                    status.line(line)
        return Result(folder, config.steps, scores, exported)


def _shown(folder: Path) -> Path:
    """A folder as a person would type it from here."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _peak(run: build.Run) -> float | None:
    peak = peak_flops(run.mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * run.mesh.size


class Trace:
    """The profiler's trace of a range of steps, from the first of them that is run to the last."""

    def __init__(self, folder: Path, wanted: range | None, start: int, steps: int):
        self.folder = folder
        self.first = max(wanted.start, start + 1) if wanted else 0
        self.last = min(wanted.stop - 1, steps) if wanted else 0
        self.running = False

    def before(self, step: int) -> None:
        if self.first <= step <= self.last and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, found: Any) -> None:
        if self.running and step == self.last:
            jax.block_until_ready(found)  # dispatched is not done
            self.stop()

    def stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
