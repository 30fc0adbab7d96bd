"""What a person sees of a training run: the status line, and the rows of metrics behind it."""

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

import jax

from embedjax.config.errors import NonFiniteError
from embedjax.metrics.pace import Pace
from embedjax.metrics.writers import Writer

# Non-finite steps in a row after which a run stops.
PATIENCE = 3


def duration(seconds: float) -> str:
    """Seconds as 47s, 3m08s or 2h05m."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Status:
    """One line that is rewritten on a terminal, and a plain line every few seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None, every: float = 5.0):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.every = 0.2 if self.live else every
        self.shown = -math.inf
        self.dirty = False

    def due(self) -> bool:
        return time.monotonic() - self.shown >= self.every

    def show(self, text: str) -> None:
        self.shown = time.monotonic()
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be rewritten
            self._write(f"\r\x1b[K{text[:width]}")
            self.dirty = True
        else:
            self._write(text + "\n")

    def line(self, text: str = "") -> None:
        """A line that stays."""
        self._write("\r\x1b[K" * self.dirty + text + "\n")
        self.dirty = False

    def _write(self, text: str) -> None:
        """Nobody may be left to read it, as after `| head`: what is shown goes on without them."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def status_text(step: int, steps: int, seconds_left: float, row: Mapping[str, float], ema: float) -> str:
    """The line that is shown while training: where it is, how fast, and how well."""
    parts = [
        f"step {step}/{steps} {100 * step // steps}%",
        f"eta {duration(seconds_left)}",
        f"{row['pairs_per_second']:.0f} pairs/s",
        f"loss {row['loss']:.3f} (avg {ema:.3f})",
        f"top1 {row['top1']:.2f}" if "top1" in row else "",
        f"lr {row['learning_rate']:.1e}",
        f"grad {row['grad_norm']:.2f}",
        f"data wait {100 * row['data_wait']:.0f}%",
        f"util {100 * row['utilization']:.0f}%" if "utilization" in row else "",
        f"skipped {row['skipped']:.0f}" if row.get("skipped") else "",
    ]
    return "  ".join(part for part in parts if part)


class Progress:
    """Reads the metrics of finished steps, writes every `log_every`-th row, and keeps the status line."""

    def __init__(
        self, *, status: Status, writer: Writer | None, start: int, steps: int, pairs: int, log_every: int, peak: float | None
    ):
        self.status, self.writer, self.start, self.steps = status, writer, start, steps
        self.pairs, self.log_every, self.peak = pairs, log_every, peak
        self.pace = Pace()
        self.ema: float | None = None
        self.seen: set[str] = set()
        self.busy = self.waited = 0.0  # seconds of steps that were not a first call, and of them those for data
        self.counted = 0
        self.waiting_seconds = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        before = time.perf_counter()
        yield
        self.waiting_seconds = time.perf_counter() - before

    def is_new(self, shape: str) -> bool:
        """Whether no step of this compiled shape was read: its first compiles, so its time says nothing of the pace."""
        return shape not in self.seen

    def read(self, step: int, shape: str, flops: float, found: Mapping[str, jax.Array]) -> None:
        """Waits for the metrics of a dispatched step and tells them. Raises NonFiniteError after three bad steps in a row."""
        row = {"step": step, **{key: float(value) for key, value in jax.device_get(dict(found)).items()}}
        row |= {"skipped": int(row["skipped"])}
        bad = int(row.pop("in_a_row"))
        if self.is_new(shape):
            self.seen.add(shape)
            self.pace.restart()
        else:
            before = self.pace.last
            self.pace.step(self.pairs, flops, self.waiting_seconds)
            self.busy += self.pace.last - before
            self.waited += self.waiting_seconds
            self.counted += 1
        if bad == 0:
            self.ema = row["loss"] if self.ema is None else 0.98 * self.ema + 0.02 * row["loss"]
        row |= self.pace.rates()
        if (share := self.pace.utilization(self.peak)) is not None:
            row["utilization"] = share
        if self.writer and (step % self.log_every == 0 or step == self.steps or bad):
            self.writer.write(row)
        if self.status.due() or step == self.steps:
            left = (self.steps - step) * self.busy / max(self.counted, 1)
            self.status.show(status_text(step, self.steps, left, row, self.ema if self.ema is not None else math.nan))
        if bad >= PATIENCE:
            raise NonFiniteError(
                f"step {step}: the loss or its gradient was not finite {bad} steps in a row (loss {row['loss']}, gradient norm "
                f"{row['grad_norm']}); nothing was updated in them. Lower the learning rate or look at the data"
            )

    def summary(self) -> str:
        """One line on the whole run."""
        rate, share = (self.pairs * self.counted / self.busy, self.waited / self.busy) if self.busy else (0.0, 0.0)
        return f"trained {self.steps - self.start} steps, {rate:.0f} pairs/s, data wait {100 * min(1.0, share):.1f}%"
