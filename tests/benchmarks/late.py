"""MaxSim alone on this machine's CPU, tiled and dense, and as an einsum in torch.

    python tests/benchmarks/late.py [--queries 256] [--documents 512] [--only-forward] [--sides tiled,dense,torch] [--rounds 3]

In-batch: value and gradient of the softmax loss of all queries with all documents; `--only-forward` takes scores alone, as a
search does. `--sides tiled,xtr` sets XTR's scores beside MaxSim's, both in tiles. Each side is a process of its own; their
turns alternate, so that a busy machine slows all, and the ratios are medians over turns. Extra memory is the peak resident size
less what was there before the first turn, inputs and gradients.
"""

import argparse
import functools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np


def inputs(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors of queries and documents, and which of the documents' tokens count: some nine in ten."""
    rng = np.random.default_rng(0)
    shapes = (options.queries, options.query_length), (options.documents, options.document_length)
    made = [rng.standard_normal((*shape, options.width), dtype=np.float32) for shape in shapes]
    lengths = rng.integers(options.document_length * 4 // 5, options.document_length + 1, options.documents)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in made]
    return unit[0], unit[1], np.arange(options.document_length) < lengths[:, None]


def ours(form: str, options: argparse.Namespace) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    from embedjax.losses import contrastive, late
    from embedjax.losses.late import Tokens

    query, documents, score = map(jnp.asarray, inputs(options))
    every = jnp.ones(query.shape[:2], bool)
    forms = {"tiled": late.maxsim_tiled, "dense": late.maxsim, "xtr": functools.partial(late.xtr_tiled, k=options.k)}
    scored = forms[form]

    def loss(query, documents):
        scores = scored(Tokens(query, every), Tokens(documents, score))
        if options.only_forward:
            return scores.mean()
        return late.loss(scores.reshape(len(query), len(query), -1), contrastive.Rule(), 1.0)[0]

    made = loss if options.only_forward else jax.value_and_grad(loss, (0, 1))
    compiled = jax.jit(made).lower(query, documents).compile()
    return lambda: float(jax.tree.leaves(jax.block_until_ready(compiled(query, documents)))[0])


def theirs(options: argparse.Namespace) -> Callable[[], float]:
    """As PyLate's colbert_scores and Contrastive have it: an einsum, masked, its maximum over tokens, a sum and a softmax."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    query, documents, score = map(torch.from_numpy, inputs(options))
    vectors = [x.requires_grad_(not options.only_forward) for x in (query, documents)]

    def run() -> float:
        products = torch.einsum("ash,bth->abst", *vectors)
        scores = (products * score[None, :, None]).max(-1).values.sum(-1)
        if options.only_forward:
            return scores.mean().item()
        places = torch.arange(len(query)) * (len(documents) // len(query))
        loss = torch.nn.functional.cross_entropy(scores, places)
        torch.autograd.grad(loss, vectors)
        return loss.item()

    return run


def serve(side: str, options: argparse.Namespace) -> None:
    """A worker: for every line it reads it takes a turn and writes its seconds, its extra GB so far and the value."""
    run = theirs(options) if side == "torch" else ours(side, options)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    vectors = options.queries * options.query_length + options.documents * options.document_length
    before = peak() + (0 if options.only_forward else vectors * options.width * 4 / 1e9)
    for _ in sys.stdin:
        start = time.perf_counter()
        value = run()
        print("turn", time.perf_counter() - start, peak() - before, value, flush=True)


def start(side: str) -> subprocess.Popen:
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(worker: subprocess.Popen) -> tuple[float, ...]:
    print(file=worker.stdin, flush=True)
    for line in worker.stdout:
        if line.startswith("turn "):
            return tuple(map(float, line.split()[1:]))
    raise SystemExit(f"a worker ended with code {worker.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--query-length", type=int, default=32)
    parser.add_argument("--document-length", type=int, default=180)
    parser.add_argument("--width", type=int, default=128, help="numbers of a token's vector")
    parser.add_argument("--only-forward", action="store_true", help="scores without a gradient")
    parser.add_argument("--k", type=int, default=256, help="tokens that XTR retrieves for each token of a query")
    parser.add_argument("--sides", default="tiled,dense,torch", help="of tiled, dense, torch, xtr; tiled is one of them")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side after the first")
    parser.add_argument("--serve", choices=("tiled", "dense", "torch", "xtr"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options)
        return
    workers = {side: start(side) for side in options.sides.split(",")}
    for worker in workers.values():
        turn(worker)
    turns = [{side: turn(worker) for side, worker in workers.items()} for _ in range(options.rounds)]
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print("| side | s | extra GB | time against tiled | value |\n|---|---|---|---|---|")
    for side in workers:
        seconds, extra, value = (statistics.median(each[side][at] for each in turns) for at in range(3))
        ratio = statistics.median(each[side][0] / each["tiled"][0] for each in turns)
        print(f"| {side} | {seconds:.2f} | {extra:.2f} | {ratio:.2f} | {value:.5f} |")


if __name__ == "__main__":
    main()
