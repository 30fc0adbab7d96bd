"""Training step of the real MiniLM-L6 with in-batch negatives: embedjax against sentence-transformers, on this machine's CPU.

    python tests/benchmarks/train_step.py [--cases f32-64,f32-128,bf16-64] [--rounds 7] [--preload libtcmalloc_minimal.so.4]

Both sides: 64 pairs, every text full, dropout 0.1, AdamW, scale 20, the same number of threads. The torch side is as a careful
user runs it: sentence-transformers' own model and loss in a plain loop, scaled-dot-product attention, fused AdamW, and in
bfloat16 autocast. Each side is a process of its own; their turns alternate, so that a busy machine slows both, and the ratio
is the median over turns. `--preload` is the allocator of both processes.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from corpora import minilm

PAIRS, STEPS_PER_TURN, RATE, SCALE = 64, 2, 2e-5, 20.0


class Case(NamedTuple):
    """A length in tokens and a compute type."""

    length: int
    compute: str


CASES = {
    f"{short}-{length}": Case(length, long)
    for short, long in (("f32", "float32"), ("bf16", "bfloat16"))
    for length in (64, 128)
}


def token_ids(length: int) -> np.ndarray:
    """Random ids [B 2 L]: anchors and positives."""
    return np.random.default_rng(0).integers(1000, 30000, (PAIRS, 2, length)).astype(np.int32)


def embedjax_step(case: Case) -> Callable[[], float]:
    """The trainer's own jitted step, that returns its loss."""
    import dataclasses

    import jax

    from embedjax import config, objective, optim, sharding, step
    from embedjax.models.embedder import build_embedder
    from embedjax.models.folders import read_params, read_tower

    tower = dataclasses.replace(read_tower(minilm()), compute=case.compute)
    model, embedders = config.Model({"text": tower}), {"text": build_embedder(tower)}
    loss = config.MultipleNegatives(scale=SCALE, mask_duplicates=False)
    task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=loss)
    params = jax.tree.map(jax.numpy.asarray, {"towers": {"text": read_params(minilm(), tower)}})
    tx, schedule = optim.make(config.Optim(learning_rate=RATE, clip_norm=0.0), 1000, params)
    state = step.init_state(params, tx)
    mesh = sharding.make_mesh(config.Mesh())
    shardings = sharding.shardings(jax.eval_shape(lambda: state), mesh)
    made = step.make(step.plain(objective.make(task, model, embedders, mesh)), tx, schedule, seed=0)
    jitted = step.jitted(made, shardings)
    ids, mask = token_ids(case.length), np.ones((PAIRS, case.length), bool)
    text = lambda n: {"ids": ids[:, n], "mask": mask}
    columns = {"anchor": text(0), "positive": text(1), "row": np.arange(PAIRS, dtype=np.int32)}
    columns = sharding.place(columns, mesh)
    state = jax.device_put(state, shardings)

    def run() -> float:
        nonlocal state
        state, metrics = jitted(state, {}, columns)
        return float(metrics["loss"])

    return run


def torch_step(case: Case) -> Callable[[], float]:
    """A step of sentence-transformers that returns its loss."""
    import contextlib

    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    torch.set_num_threads(os.cpu_count() or 1)
    model = SentenceTransformer(str(minilm()), device="cpu", model_kwargs={"attn_implementation": "sdpa"})
    loss = losses.MultipleNegativesRankingLoss(model, scale=SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    ids = torch.from_numpy(token_ids(case.length)).long()
    columns = [{"input_ids": ids[:, n].contiguous(), "attention_mask": torch.ones_like(ids[:, n])} for n in (0, 1)]
    model.train()
    precision = lambda: torch.autocast("cpu", torch.bfloat16) if case.compute == "bfloat16" else contextlib.nullcontext()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with precision():
            value = loss([dict(column) for column in columns], None)
        value.backward()
        optimizer.step()
        return value.item()

    return run


def serve(side: str, case: Case) -> None:
    """A worker: for every line it reads it takes a turn and writes seconds a step, peak memory in GB and the loss."""
    run = {"embedjax": embedjax_step, "torch": torch_step}[side](case)
    run()
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS_PER_TURN):
            value = run()
        seconds = (time.perf_counter() - start) / STEPS_PER_TURN
        print("turn", seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, value, flush=True)


class Worker:
    """The process of one side."""

    def __init__(self, side: str, name: str, preload: str):
        command = [sys.executable, __file__, "--serve", side, "--cases", name]
        environment = os.environ | ({"LD_PRELOAD": preload} if preload else {})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def turn(self) -> tuple[float, float, float]:
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("turn "):
                return tuple(map(float, line.split()[1:]))
        raise SystemExit(f"a worker ended with code {self.process.wait()}")


def compare(name: str, rounds: int, preload: str) -> str:
    """One row of the table."""
    sides = {side: Worker(side, name, preload) for side in ("embedjax", "torch")}
    for worker in sides.values():
        worker.turn()
    turns = [{side: worker.turn() for side, worker in sides.items()} for _ in range(rounds)]
    for worker in sides.values():
        worker.process.stdin.close()
        worker.process.wait()
    ratios = sorted(turn["torch"][0] / turn["embedjax"][0] for turn in turns)
    rate = lambda side: PAIRS / statistics.median(turn[side][0] for turn in turns)
    memory = lambda side: max(turn[side][1] for turn in turns)
    return (
        f"| {name:8} | {rate('embedjax'):10.1f} | {rate('torch'):10.1f} | {statistics.median(ratios):5.2f} "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f}) | {memory('embedjax'):8.2f} | {memory('torch'):8.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--preload", default="libtcmalloc_minimal.so.4", help="allocator; empty for the system's own")
    parser.add_argument("--serve", choices=("embedjax", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, CASES[arguments.cases])
        return
    print("| case     | ours, pairs/s | torch, pairs/s | ratio (range) | ours, GB | torch, GB |\n|---|---|---|---|---|---|")
    for name in arguments.cases.split(","):
        print(compare(name, arguments.rounds, arguments.preload), flush=True)


if __name__ == "__main__":
    main()
