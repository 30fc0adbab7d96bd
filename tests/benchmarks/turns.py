"""Sides of a comparison as processes that take turns, for the scripts beside this file: a busy machine slows all alike, and
what one holds in memory is not counted for another."""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """What a side says of its turn."""

    seconds: float
    """A step."""
    memory: float
    """Its process' peak resident size so far, GB."""
    loss: float


def serve(step: Callable[[], float], steps: int) -> None:
    """A side's process: takes a step, which compiles and warms up, then a turn of so many steps for every line it reads."""
    loss = step()
    print("ready", 0.0, _peak(), loss, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        print("turn", (time.perf_counter() - start) / steps, _peak(), loss, flush=True)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Side:
    """This script started again with `arguments`, by `python` or, if that is empty, by this one, and with `preload` as its
    allocator. `first` is what its first step told."""

    def __init__(self, arguments: Sequence[str], preload: str, python: str = ""):
        environment = os.environ | ({"LD_PRELOAD": preload} if preload else {})
        command = [python or sys.executable, sys.argv[0], *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.first = self._answer()

    def turn(self) -> Turn:
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Turn:
        for line in self.process.stdout:
            if line.startswith(("ready ", "turn ")):
                return Turn(*map(float, line.split()[1:]))
        raise SystemExit(f"a process of this comparison ended with code {self.process.wait()}")


def alternate(sides: Mapping[str, Side], rounds: int) -> list[dict[str, Turn]]:
    """The turns of each round, after one that is not counted; ends the processes."""
    for side in sides.values():
        side.turn()
    turns = [{name: side.turn() for name, side in sides.items()} for _ in range(rounds)]
    for side in sides.values():
        side.close()
    return turns


def spread(values: Sequence[float]) -> str:
    """The median of some numbers, and the least and the largest."""
    return f"{statistics.median(values):5.2f} ({min(values):.2f}-{max(values):.2f})"


def row(name: str, turns: Sequence[Mapping[str, Turn]], pairs: int) -> str:
    """A row of the table of a step: pairs a second of embedjax and torch, the ratio over rounds, peak memory."""
    rate = lambda side: pairs / statistics.median(turn[side].seconds for turn in turns)
    memory = lambda side: max(turn[side].memory for turn in turns)
    return (
        f"| {name:8} | {rate('embedjax'):10.1f} | {rate('torch'):10.1f} | "
        f"{spread([turn['torch'].seconds / turn['embedjax'].seconds for turn in turns])} | "
        f"{memory('embedjax'):8.2f} | {memory('torch'):8.2f} |"
    )


HEADER = "| case     | ours, pairs/s | torch, pairs/s | ratio (range) | ours, GB | torch, GB |\n|---|---|---|---|---|---|"
