"""What `embedjax plan` predicts of a training step, its roofline, beside the step itself on this machine's CPU.

    python tests/benchmarks/roofline.py [--pairs 32] [--rounds 5]

The plan knows no CPU: its peaks are measured here first, the rate of large float32 products and that at which memory is read
and written. FLOPs and bytes are then counted as for any chip, from the step's jaxpr and from its compiled program, and the
roofline, the longer of the two times, is a bound from below. Towers have random weights, texts are full, nothing is dropped.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from steps import Step

from embedjax import config as c
from embedjax.plan.flops import flops
from embedjax.plan.traffic import traffic

MINILM = c.Bert(width=384, depth=6, heads=12, mlp=1536, dropout=0.0, attention_dropout=0.0)
BASE = c.Bert(dropout=0.0, attention_dropout=0.0)
CASES = {
    "MiniLM-L6, 64 tokens": (MINILM, 64),
    "MiniLM-L6, 256 tokens": (MINILM, 256),
    "BERT-base, 64 tokens": (BASE, 64),
}


def seconds(run: Callable[[], object], times: int) -> float:
    """The least of some runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found)


def machine() -> tuple[float, float]:
    """FLOP/s of float32 products on this machine, and bytes a second to and from its memory."""
    square, state = jnp.ones((2048, 2048), jnp.float32), [jnp.ones(2**27, jnp.float32)]
    multiply, add = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1, donate_argnums=0)

    def again() -> jax.Array:
        state[0] = add(state[0])
        return state[0]

    return 2 * 2048**3 / seconds(lambda: multiply(square), 10), 2 * state[0].nbytes / seconds(again, 10)


def step_of(arch: c.Bert, length: int, pairs: int) -> Step:
    task = c.Set(columns={"anchor": "a", "positive": "b"}, loss=c.MultipleNegatives(mask_duplicates=False))
    config = c.Config(
        model=c.Model({"text": c.Tower(arch, tokenizer="none", max_length=length)}),
        data=c.Data(batch_size=pairs, sets=(task,)),
    )
    ids = np.random.default_rng(0).integers(1000, 30000, (2, pairs, length)).astype(np.int32)
    text = lambda n: {"ids": ids[n], "mask": np.ones((pairs, length), bool)}
    return Step(config, {"anchor": text(0), "positive": text(1), "row": np.arange(pairs, dtype=np.int32)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each case after the first")
    options = parser.parse_args()
    rate, bandwidth = machine()
    print(f"products {rate / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s, {options.pairs} pairs\n")
    print("| step | GFLOP | GB moved | compute, s | memory, s | measured, s | measured / longest | measured / sum |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (arch, length) in CASES.items():
        step = step_of(arch, length, options.pairs)
        counted = flops(step.traced.jaxpr)
        moved = traffic(step.compiled.as_text() or "", 1)
        step()
        measured = statistics.median(step() for _ in range(options.rounds))
        parts = counted.total / rate, moved.memory / bandwidth
        cells = [f"{counted.total / 1e9:.0f}", f"{moved.memory / 1e9:.1f}", *(f"{x:.2f}" for x in (*parts, measured))]
        cells += [f"{measured / max(parts):.2f}", f"{measured / sum(parts):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
