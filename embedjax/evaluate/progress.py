"""How far a long job over rows is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from embedjax.metrics.progress import duration

SECONDS_BETWEEN_LINES = 10.0


class Display:
    """A context that is called with (rows done, all rows); rows done at the first call do not count towards the rate."""

    def __init__(self, what: str, out: TextIO | None = None):
        self.what, self.out = what, out or sys.stderr
        self.first: int | None = None
        self.started = self.told = 0.0
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.started, self.told = done, now, now
            self._open_bar()
        rate = (done - self.first) / max(now - self.started, 1e-9)
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, rate=f"{rate:,.0f}/s" if done > self.first else "")
        elif done == total or now - self.told >= SECONDS_BETWEEN_LINES:
            self.told = now
            left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
            print(
                f"{self.what}: {done:,} of {total:,} ({done / max(total, 1):.0%}), {rate:,.0f}/s{left}",
                file=self.out,
                flush=True,
            )

    def _open_bar(self) -> None:
        """Only once there is something to tell: what was encoded before shows no bar."""
        if self.out.isatty():
            rate = TextColumn("{task.fields[rate]}")
            parts = (TextColumn(self.what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            self.bar = Progress(*parts, console=Console(file=self.out))
            self.task = self.bar.add_task(self.what, total=None, rate="")
            self.bar.start()


class Stages:
    """A context that is called with (what, done, total): a Display for each `what`, one after the other."""

    def __init__(self, out: TextIO | None = None):
        self.out = out
        self.shown: Display | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        if self.shown:
            self.shown.__exit__(*error)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.shown is None or self.shown.what != what:
            self.__exit__()
            self.shown = Display(what, self.out)
        self.shown(done, total)
