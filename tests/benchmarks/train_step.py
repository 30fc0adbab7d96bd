"""Training step of the real MiniLM-L6 with in-batch negatives: embedjax against sentence-transformers, on this machine's CPU.

    python tests/benchmarks/train_step.py [--cases f32-64,f32-128,bf16-64] [--rounds 7] [--preload libtcmalloc_minimal.so.4]

Both sides: 64 pairs, every text full, dropout 0.1, AdamW, scale 20, the same number of threads. The torch side is as a careful
user runs it: sentence-transformers' own model and loss in a plain loop, scaled-dot-product attention, fused AdamW, and in
bfloat16 autocast. Each side is a process of its own; their turns alternate, so that a busy machine slows both, and the ratio
is the median over turns. `--preload` is the allocator of both processes.
"""

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import turns
from corpora import minilm

from embedjax import config as c

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

    from steps import Step

    from embedjax.models.folders import read_params, read_tower

    tower = dataclasses.replace(read_tower(minilm()), compute=case.compute)
    task = c.Set(columns={"anchor": "a", "positive": "b"}, loss=c.MultipleNegatives(scale=SCALE, mask_duplicates=False))
    config = c.Config(
        model=c.Model({"text": tower}),
        data=c.Data(batch_size=PAIRS, sets=(task,)),
        optim=c.Optim(learning_rate=RATE, clip_norm=0.0),
    )
    ids, mask = token_ids(case.length), np.ones((PAIRS, case.length), bool)
    text = lambda n: {"ids": ids[:, n], "mask": mask}
    columns = {"anchor": text(0), "positive": text(1), "row": np.arange(PAIRS, dtype=np.int32)}
    step = Step(config, columns, {"text": read_params(minilm(), tower)})

    def run() -> float:
        step()
        return step.loss

    return run


def torch_step(case: Case) -> Callable[[], float]:
    """A step of sentence-transformers that returns its loss."""
    import contextlib

    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    torch.set_num_threads(len(os.sched_getaffinity(0)))
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


SIDES = {"embedjax": embedjax_step, "torch": torch_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--preload", default="libtcmalloc_minimal.so.4", help="allocator; empty for the system's own")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        turns.serve(SIDES[arguments.serve](CASES[arguments.cases]), STEPS_PER_TURN)
        return
    print(turns.HEADER)
    for name in arguments.cases.split(","):
        sides = {side: turns.Side(["--serve", side, "--cases", name], arguments.preload) for side in SIDES}
        print(turns.row(name, turns.alternate(sides, arguments.rounds), PAIRS), flush=True)


if __name__ == "__main__":
    main()
