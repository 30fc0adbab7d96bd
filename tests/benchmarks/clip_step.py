"""Training step of CLIP ViT-B/32 (OpenAI's sizes): embedjax against transformers' CLIPModel, on this machine's CPU.

    python tests/benchmarks/clip_step.py [--cases f32,bf16] [--pairs 32] [--rounds 5] [--preload libtcmalloc_minimal.so.4]

Both sides: the same weights, pictures of 224 x 224, texts of 77 tokens, symmetric softmax with a learned scale, AdamW, the same
number of threads. The torch side is as a careful user runs it: transformers' own model and loss in a plain loop,
scaled-dot-product attention that is told it is causal, fused AdamW, and in bfloat16 autocast. It gets its pictures as
normalised numbers; embedjax gets bytes and normalises them in the step. Each side is a process of its own; their turns
alternate, and the ratio is the median over turns. The losses of the first step show that both compute the same.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
import turns

from embedjax import config as c

SIDE, TOKENS, VOCABULARY, RATE = 224, 77, 49408, 1e-5
CASES = {"f32": "float32", "bf16": "bfloat16"}
CLIP = c.MultipleNegatives(
    directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True, mask_duplicates=False
)


def batch(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [B 224 224 3] and ids [B 77] whose last is the end of the text, random."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY - 2, (pairs, TOKENS)).astype(np.int32)
    ids[:, 0], ids[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return rng.integers(0, 256, (pairs, SIDE, SIDE, 3)).astype(np.uint8), ids


def embedjax_step(compute: str, pairs: int, folder: pathlib.Path) -> Callable[[], float]:
    """The trainer's own step, from the weights in a folder of CLIPModel, that returns its loss."""
    from steps import Step

    from embedjax.models import folders, pictures

    image = dataclasses.replace(pictures.read_image_tower(folder), compute=compute)
    text = dataclasses.replace(folders.read_tower(folder), compute=compute)
    config = c.Config(
        model=c.Model({"image": image, "text": text}, {"anchor": "text", "positive": "image"}),
        data=c.Data(batch_size=pairs, sets=(c.Set(columns={"anchor": "a", "positive": "b"}, loss=CLIP),)),
        optim=c.Optim(learning_rate=RATE, clip_norm=0.0, schedule="constant"),
        export=c.Export("none"),
    )
    towers = {"image": pictures.read_params(folder, "image", image.arch), "text": folders.read_params(folder, text)}
    pixels, ids = batch(pairs)
    columns = {"anchor": {"ids": ids, "mask": np.ones_like(ids, bool)}, "positive": {"pixels": pixels}}
    step = Step(config, columns | {"row": np.arange(pairs, dtype=np.int32)}, towers)

    def run() -> float:
        step()
        return step.loss

    return run


def torch_step(compute: str, pairs: int, folder: pathlib.Path) -> Callable[[], float]:
    """A step of transformers' CLIPModel, whose first weights are saved in the folder, that returns its loss."""
    import contextlib

    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    CLIPModel(CLIPConfig()).save_pretrained(folder)
    model = CLIPModel.from_pretrained(folder, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    pixels, ids = batch(pairs)
    mean, std = c.Pixels().mean, c.Pixels().std
    numbers = ((pixels / 255 - np.array(mean)) / np.array(std)).astype(np.float32).transpose(0, 3, 1, 2)
    # Without a mask of padding, which no text here has, attention is told that it is causal and needs none at all.
    inputs = {"pixel_values": torch.from_numpy(numbers.copy()), "input_ids": torch.from_numpy(ids).long()}
    precision = lambda: torch.autocast("cpu", torch.bfloat16) if compute == "bfloat16" else contextlib.nullcontext()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with precision():
            loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


SIDES = {"torch": torch_step, "embedjax": embedjax_step}  # torch first: it writes the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="f32", help=f"of {', '.join(CASES)}")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side, a step each")
    parser.add_argument("--preload", default="libtcmalloc_minimal.so.4", help="allocator; empty for the system's own")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        side, folder = arguments.serve
        turns.serve(SIDES[side](CASES[arguments.cases], arguments.pairs, pathlib.Path(folder)), 1)
        return
    print(turns.HEADER)
    losses = []
    for case in arguments.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            start = lambda side, case=case, folder=folder: turns.Side(
                ["--cases", case, "--pairs", str(arguments.pairs), "--serve", side, folder], arguments.preload
            )
            sides = {side: start(side) for side in SIDES}
            print(turns.row(case, turns.alternate(sides, arguments.rounds), arguments.pairs), flush=True)
        losses.append(f"{case}: {sides['embedjax'].first.loss:.5f} and {sides['torch'].first.loss:.5f} in torch")
    print(f"\nloss of the first step, {'; '.join(losses)}")


if __name__ == "__main__":
    main()
