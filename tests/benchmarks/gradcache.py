"""What GradCache costs and saves: the cached step against the plain one, the same batch, on this machine.

    python tests/benchmarks/gradcache.py [--towers minilm,bert-base] [--pairs 32] [--length 64] [--chunks 4] [--rounds 5]

Both are the trainer's own jitted steps with random weights, dropout 0.1 and AdamW, in one process; their turns alternate and
the ratio is the median over turns (4/3 would be one forward pass more and nothing else). Memory is the compiler's: what the
program needs besides its arguments and results. On a GPU or TPU add `--compute bfloat16`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from embedjax import config, objective, optim, sharding, step
from embedjax.models.embedder import Embedder

TOWERS = {
    "minilm": config.Bert(width=384, depth=6, heads=12, mlp=1536),
    "bert-base": config.Bert(width=768, depth=12, heads=12, mlp=3072),
}


def make_columns(pairs: int, length: int) -> dict:
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30000, (2, pairs, length)).astype(np.int32)
    text = lambda n: {"ids": ids[n], "mask": np.ones((pairs, length), bool)}
    return {"anchor": text(0), "positive": text(1), "row": np.arange(pairs, dtype=np.int32)}


def prepared(arch: config.Bert, compute: config.model.Dtype, chunks: int, columns: dict) -> tuple[Callable[[], float], float]:
    """A step that gives its seconds, compiled and run once, and the GB the program needs."""
    embedders = {"text": Embedder(arch, compute=compute)}
    model = config.Model({"text": config.Tower(arch=arch)})
    task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=config.MultipleNegatives(mask_duplicates=False))
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    made = objective.make(task, model, embedders, mesh)
    gradient = step.plain(made) if chunks == 1 else step.cached(made, chunks, mesh)
    init = lambda: {"towers": {"text": embedders["text"].init(jax.random.key(0))}}
    tx, schedule = optim.make(config.Optim(), 1000, jax.eval_shape(init))
    start = lambda: step.init_state(init(), tx)
    shardings = sharding.shardings(jax.eval_shape(start), mesh)
    state, batch = jax.jit(start, out_shardings=shardings)(), sharding.place(columns, mesh)
    compiled = step.jitted(step.make(gradient, tx, schedule, seed=0), shardings).lower(state, {}, batch).compile()

    def run() -> float:
        nonlocal state
        begun = time.perf_counter()
        state, metrics = compiled(state, {}, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begun

    run()
    memory = compiled.memory_analysis()
    return run, (0 if memory is None else memory.temp_size_in_bytes) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--towers", default=",".join(TOWERS), help=f"of {', '.join(TOWERS)}")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens a text")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(
        "| tower     | plain, s | cached, s | ratio (range)    | plain, GB | cached, GB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    columns = make_columns(arguments.pairs, arguments.length)
    for name in arguments.towers.split(","):
        (plain, plain_gb), (cached, cached_gb) = (
            prepared(TOWERS[name], arguments.compute, chunks, columns) for chunks in (1, arguments.chunks)
        )
        turns = [(plain(), cached()) for _ in range(arguments.rounds)]
        ratios = sorted(c / p for p, c in turns)
        seconds = [statistics.median(side) for side in zip(*turns, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(
            f"| {name:9} | {seconds[0]:8.2f} | {seconds[1]:9.2f} | {spread:16} | {plain_gb:9.2f} | {cached_gb:10.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
