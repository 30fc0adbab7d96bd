"""The in-batch loss alone, value and gradient on this machine's CPU: dense and tiled, and a dense one in torch.

    python tests/benchmarks/loss.py [--sizes 4096,16384,32768] [--tiled 131072] [--criterion softmax] [--rounds 5] [--width 512]

`--sizes` are measured in all three forms, `--tiled` in the tiled one alone and once (131072 takes minutes, 262144
four times as long).
Each side is a process of its own; their turns alternate, so that a busy machine slows all, and the ratios are medians over
turns. Extra memory is the peak resident size less what inputs, gradients and the compiled program take.
`--preload` is the allocator of all processes.
"""

import argparse
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SCALE = 20.0


def inputs(size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors; a positive is nearer to its anchor than others are."""
    rng = np.random.default_rng(0)
    anchor = rng.standard_normal((size, width), dtype=np.float32)
    positive = anchor + 3 * rng.standard_normal((size, width), dtype=np.float32)
    for x in (anchor, positive):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return anchor, positive


def ours(form: str, criterion: str, size: int, width: int, tile: int) -> Callable[[], float]:
    """A run of the compiled value and gradient that returns the loss."""
    import jax

    from embedjax.losses import contrastive, streaming
    from embedjax.losses.contrastive import Pairs, Rule

    def loss(anchor, positive):
        both = {"directions": ("q2d", "d2q"), "partition": "per_direction"}
        pairs, rule = Pairs(anchor, positive[:, None]), Rule(**(both if criterion == "symmetric" else {}))
        if form == "dense":
            return contrastive.loss(pairs, rule, SCALE)[0]
        return streaming.loss(pairs, rule, SCALE, bound=SCALE, tile=tile)[0]

    vectors = [jax.numpy.asarray(x) for x in inputs(size, width)]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*vectors).compile()

    def run() -> float:
        return float(jax.block_until_ready(compiled(*vectors))[0])

    return run


def theirs(criterion: str, size: int, width: int) -> Callable[[], float]:
    """Cross-entropy of the score matrix, as open_clip and sentence-transformers write it."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vectors = [torch.from_numpy(x).requires_grad_() for x in inputs(size, width)]
    labels = torch.arange(size)

    def run() -> float:
        anchor, positive = (normalize(x, dim=-1) for x in vectors)
        scores = SCALE * anchor @ positive.T
        loss = cross_entropy(scores, labels)
        if criterion == "symmetric":
            loss = (loss + cross_entropy(scores.T, labels)) / 2
        torch.autograd.grad(loss, vectors)
        return loss.item()

    return run


def resident() -> float:
    """GB resident now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def serve(side: str, criterion: str, size: int, width: int, tile: int) -> None:
    """A worker: for every line it reads it takes a turn and writes its seconds, its extra GB so far and the loss."""
    run = theirs(criterion, size, width) if side == "torch" else ours(side, criterion, size, width, tile)
    before = resident()
    for _ in sys.stdin:
        start = time.perf_counter()
        value = run()
        seconds = time.perf_counter() - start
        extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - before - 2 * size * width * 4 / 1e9
        print("turn", seconds, extra, value, flush=True)


class Worker:
    """The process of one side."""

    def __init__(self, side: str, size: int, options: argparse.Namespace):
        command = [sys.executable, __file__, "--serve", side, "--sizes", str(size), "--criterion", options.criterion]
        command += ["--width", str(options.width), "--tile", str(options.tile)]
        environment = os.environ | ({"LD_PRELOAD": options.preload} if options.preload else {}) | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def turn(self) -> tuple[float, float, float]:
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("turn "):
                return tuple(map(float, line.split()[1:]))
        raise SystemExit(f"a worker ended with code {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(size: int, names: list[str], options: argparse.Namespace) -> str:
    """One row of the table."""
    workers = {name: Worker(name, size, options) for name in names}
    first = {name: worker.turn() for name, worker in workers.items()}
    turns = [{name: worker.turn() for name, worker in workers.items()} for _ in range(options.rounds)] or [first]
    for worker in workers.values():
        worker.close()
    losses = [turn[2] for turn in turns[-1].values()]
    assert max(losses) - min(losses) < 1e-3 * max(losses), losses
    cell = lambda name, at: f"{statistics.median(turn[name][at] for turn in turns):.2f}" if name in names else ""
    ratio = lambda name: (
        f"{statistics.median(turn['tiled'][0] / turn[name][0] for turn in turns):.2f}"
        if name in names and "tiled" in names
        else ""
    )
    sides = ("tiled", "dense", "torch")
    cells = [f"{size}", *(cell(side, 0) for side in sides), *(cell(side, 1) for side in sides), ratio("dense"), ratio("torch")]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="4096,16384,32768", help="batch sizes of all sides")
    parser.add_argument("--tiled", default="", help="batch sizes of the tiled form alone")
    parser.add_argument("--sides", default="tiled,dense,torch", help="what is measured at --sizes")
    parser.add_argument("--criterion", choices=("softmax", "symmetric"), default="softmax", help="one-way or CLIP's")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side after the first")
    parser.add_argument("--width", type=int, default=512, help="numbers of an embedding")
    parser.add_argument("--tile", type=int, default=0, help="columns of a tile; 0 for the form's own choice")
    parser.add_argument("--preload", default="libtcmalloc_minimal.so.4", help="allocator; empty for the system's own")
    parser.add_argument("--serve", choices=("tiled", "dense", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",") if size]
    if options.serve:
        serve(options.serve, options.criterion, sizes[0], options.width, options.tile)
        return
    print(f"{options.criterion}, D = {options.width}\n")
    print("| B | tiled, s | dense, s | torch, s | tiled, extra GB | dense, GB | torch, GB | tiled / dense | tiled / torch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in sizes:
        print(compare(size, options.sides.split(","), options), flush=True)
    for size in (int(size) for size in options.tiled.split(",") if size):
        # One turn alone: to warm up is nothing beside minutes.
        print(compare(size, ["tiled"], argparse.Namespace(**{**vars(options), "rounds": 0})), flush=True)


if __name__ == "__main__":
    main()
