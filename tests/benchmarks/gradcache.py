"""What GradCache costs and saves: the cached step against the plain one, the same batch, on this machine.

    python tests/benchmarks/gradcache.py [--towers minilm,clip-b16] [--pairs 32] [--length 64] [--chunks 4] [--rounds 5]

Both are the trainer's own jitted steps with random weights, without remat, dropout 0.1 for texts, and AdamW, in one process;
their turns alternate and the ratio is the median over turns (4/3 would be one forward pass more and nothing else). The texts of
`clip-b16`, a ViT-B/16 with CLIP's text tower, have 77 tokens. Memory is the compiler's: what the program needs besides its
arguments and results. On a GPU or TPU add `--compute bfloat16`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import turns
from steps import Step

from embedjax import config as c

PROJECTION = (c.Dense(512, bias=False, activation="identity"),)


def texts(arch: c.Bert, compute: c.model.Dtype) -> c.Model:
    return c.Model({"text": c.Tower(arch, max_length=arch.positions, compute=compute)})


def clip(image: str, compute: c.model.Dtype) -> c.Model:
    """OpenAI's CLIP of one of its image towers."""
    towers = {
        "image": c.ImageTower(c.VITS[f"clip-{image}"], dense=PROJECTION, compute=compute),
        "text": c.Tower(c.ClipText(), pooling="lasttoken", max_length=77, dense=PROJECTION, compute=compute),
    }
    return c.Model(towers, {"anchor": "text", "positive": "image"})


MODELS: dict[str, Callable[[Any], c.Model]] = {
    "minilm": lambda compute: texts(c.Bert(width=384, depth=6, heads=12, mlp=1536), compute),
    "bert-base": lambda compute: texts(c.Bert(width=768, depth=12, heads=12, mlp=3072), compute),
    "clip-b16": lambda compute: clip("B/16", compute),
}
LOSSES = {
    1: c.MultipleNegatives(mask_duplicates=False),
    2: c.MultipleNegatives(
        directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True, mask_duplicates=False
    ),
}
"""By the number of towers."""


def make_columns(model: c.Model, pairs: int, length: int) -> dict:
    """A batch of random texts, all of a length, and where the model has a tower of pictures random ones."""
    rng = np.random.default_rng(0)
    image = model.towers.get("image")
    size = 77 if image else length
    text = lambda: {
        "ids": rng.integers(1000, 30000, (pairs, size)).astype(np.int32),
        "mask": np.ones((pairs, size), bool),
    }
    pixels = lambda side: {"pixels": rng.integers(0, 256, (pairs, side, side, 3)).astype(np.uint8)}
    positive = pixels(image.arch.image) if image else text()
    return {"anchor": text(), "positive": positive, "row": np.arange(pairs, dtype=np.int32)}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def prepared(model: c.Model, chunks: int, columns: dict, clock: str = "wall") -> Step:
    """The step, compiled and run once."""
    task = c.Set(columns={"anchor": "a", "positive": "b"}, loss=LOSSES[len(model.towers)])
    data = c.Data(batch_size=len(columns["row"]), sets=(task,))
    config = c.Config(model=model, data=data, optim=c.Optim(cached=chunks), export=c.Export("none"))
    step = Step(config, columns, clock=CLOCKS[clock])
    step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--towers", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens a text")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: what this process takes, on a machine that is shared"
    )
    arguments = parser.parse_args()
    print(
        "| model     | plain, s | cached, s | ratio (range)    | plain, GB | cached, GB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in arguments.towers.split(","):
        model = MODELS[name](arguments.compute)
        columns = make_columns(model, arguments.pairs, arguments.length)
        plain, cached = (prepared(model, chunks, columns, arguments.clock) for chunks in (1, arguments.chunks))
        rounds = [(plain(), cached()) for _ in range(arguments.rounds)]
        seconds = [statistics.median(side) for side in zip(*rounds, strict=True)]
        ratio = turns.spread([slow / fast for fast, slow in rounds])
        print(
            f"| {name:9} | {seconds[0]:8.2f} | {seconds[1]:9.2f} | {ratio:16} | {plain.extra_memory:9.2f} | "
            f"{cached.extra_memory:10.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
