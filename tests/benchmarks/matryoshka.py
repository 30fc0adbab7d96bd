"""Matryoshka over five prefixes against the loss of the whole embedding, both tiled, value and gradient, on one device.

    python tests/benchmarks/matryoshka.py [--size 4096] [--dims 768,512,256,128,64] [--criterion softmax] [--rounds 7]

Turns alternate in one process, so that a busy machine slows all; ratios are medians over turns. The naive sum is the tiled
loss of each prefix by itself. Set LD_PRELOAD=libtcmalloc_minimal.so.4 on a CPU, whose own allocator is slow.
"""

import argparse
import statistics
import time

CRITERIA = {
    "softmax": {},
    "symmetric": {"directions": ("q2d", "d2q"), "partition": "per_direction"},
    "joint": {"directions": ("q2d", "d2q", "q2q", "d2d")},
    "sigmoid": {"criterion": "sigmoid"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="batch size")
    parser.add_argument("--dims", default="768,512,256,128,64", help="prefix lengths; the longest is the whole embedding")
    parser.add_argument("--criterion", choices=CRITERIA, default="softmax")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--tile", type=int, default=0, help="columns of a tile; 0 for the form's own choice")
    options = parser.parse_args()
    import jax
    import numpy as np

    from embedjax.losses import compose, streaming
    from embedjax.losses.contrastive import Pairs, Rule

    dims = tuple(map(int, options.dims.split(",")))
    rng = np.random.default_rng(0)
    anchor = rng.standard_normal((options.size, max(dims)), dtype=np.float32)
    vectors = jax.device_put((anchor, anchor + 3 * rng.standard_normal(anchor.shape, dtype=np.float32)))

    def tiled(pairs, dims=()):
        return streaming.loss(pairs, Rule(**CRITERIA[options.criterion]), 20.0, bound=20.0, dims=dims, tile=options.tile)

    forms = {"single": tiled, "five": lambda pairs: tiled(pairs, dims), "naive": compose.matryoshka(tiled, dims)}
    compiled = {}
    for name, loss in forms.items():
        value = lambda anchor, positive, loss=loss: loss(Pairs(anchor, positive[:, None]))[0]
        compiled[name] = jax.jit(jax.value_and_grad(value, (0, 1))).lower(*vectors).compile()
    losses = {name: float(run(*vectors)[0]) for name, run in compiled.items()}
    assert abs(losses["five"] - losses["naive"]) < 1e-4 * losses["naive"], losses
    turns = []
    for _ in range(options.rounds):
        turn = {}
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*vectors))
            turn[name] = time.perf_counter() - start
        turns.append(turn)
    print(f"{options.criterion}, B = {options.size}, D = {max(dims)}, {jax.devices()[0].device_kind}\n")
    print("| form | s | times the single loss (range) | extra GB |\n|---|---|---|---|")
    for name, run in compiled.items():
        ratios = sorted(turn[name] / turn["single"] for turn in turns)
        seconds = statistics.median(turn[name] for turn in turns)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"| {name} | {seconds:.3f} | {spread} | {run.memory_analysis().temp_size_in_bytes / 1e9:.2f} |")


if __name__ == "__main__":
    main()
