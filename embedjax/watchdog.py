"""A watchdog over the steps of a run: one that takes far too long ends the process, and shows where it stands."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

# Times the usual duration that is allowed.
PATIENCE = 10
HUNG = 70
"""Exit code of a process that ended itself."""


class Watchdog:
    """A context. `waiting` inside it allows what it names max(10 x usual, `floor`) seconds; then all threads' stacks are
    printed and the process exits with 70, for neither an exception nor a signal gets through to a hung collective."""

    def __init__(self, floor: float):
        self.floor = floor
        self.armed: tuple[float, str] | None = None  # set whole by one thread, read by the other: no lock
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._closed.set()
        self._thread.join()

    @contextlib.contextmanager
    def waiting(self, what: str, usual: float | None) -> Iterator[None]:
        """Armed inside, if it is known what is usual (seconds); None leaves it unarmed."""
        self.armed = None if usual is None else (time.monotonic() + max(PATIENCE * usual, self.floor), what)
        try:
            yield
        finally:
            self.armed = None

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.floor / 4)):
            if (armed := self.armed) and time.monotonic() >= armed[0]:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                told = f"{armed[1]} takes far longer than usual; the stacks of all threads are above"
                print(f"embedjax: {told}", file=sys.stderr, flush=True)
                os._exit(HUNG)
