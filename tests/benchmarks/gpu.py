"""Training steps on one GPU in bfloat16, BERT-base and CLIP ViT-B/16: embedjax against torch, at growing batches.

    python tests/benchmarks/gpu.py [--models bert-base,clip-b16] [--first 64] [--steps 20] [--small]

Batches double until one no longer fits, on each side for itself. Both sides: random weights, texts of 64 tokens (CLIP's of 77),
no dropout, in-batch negatives, AdamW; the torch side is transformers' model in a plain loop with scaled-dot-product attention,
autocast and fused AdamW. Every measurement is a process of its own, so that none meets the memory of another. Utilisation
counts the products of a forward and a backward pass against the chip's dense bfloat16 peak, where that is known. `--small` runs
sizes of no interest on any machine, to see that the script works.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from gradcache import MODELS, make_columns, prepared

from embedjax import config as c

LENGTH, SCALE = 64, 20.0
SMALL = {"width": 32, "depth": 2, "heads": 2, "mlp": 64}


def model_of(name: str, small: bool) -> c.Model:
    """A model of the benchmark of GradCache in bfloat16, without dropout."""
    found = MODELS[name]("bfloat16")
    still = {"dropout": 0.0, "attention_dropout": 0.0} | (SMALL if small else {})
    side = {"image": 32} if small else {}
    arch = lambda a: dataclasses.replace(a, **still, **(side if isinstance(a, c.Vit) else {}))
    return c.Model(
        {key: dataclasses.replace(tower, arch=arch(tower.arch)) for key, tower in found.towers.items()}, found.columns
    )


class Prepared(NamedTuple):
    """One side, ready to be measured."""

    run: Callable[[], float]
    """Takes a step; its seconds."""
    used: Callable[[], float]
    """GB of the device at most in use so far."""
    device: str
    """What the maker calls it."""


def embedjax_step(model: c.Model, columns: dict) -> Prepared:
    import jax

    device = jax.devices()[0]
    used = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return Prepared(prepared(model, 1, columns), used, device.device_kind)


def torch_step(model: c.Model, columns: dict) -> Prepared:
    import torch
    from torch.nn.functional import cross_entropy, normalize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, score = (_torch_clip if "image" in model.towers else _torch_bert)(model, columns, device)
    made.to(device).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-5, fused=True)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            anchor, positive, scale = score()
        scores = scale * normalize(anchor.float()) @ normalize(positive.float()).T
        labels = torch.arange(len(scores), device=device)
        loss = cross_entropy(scores, labels)
        if "image" in model.towers:
            loss = (loss + cross_entropy(scores.T, labels)) / 2
        loss.backward()
        optimizer.step()
        wait()
        return time.perf_counter() - start

    if device == "cpu":
        return Prepared(run, lambda: 0.0, "cpu")
    return Prepared(run, lambda: torch.cuda.max_memory_allocated() / 2**30, torch.cuda.get_device_name())


def _torch_bert(model: c.Model, columns: dict, device: str) -> tuple[Any, Callable[[], tuple]]:
    import numpy as np
    import torch
    from transformers import BertConfig, BertModel

    from embedjax.models.families import bert

    arch = model.towers["text"].arch
    made = BertModel._from_config(BertConfig.from_dict(bert.to_hf(arch)), attn_implementation="sdpa", add_pooling_layer=False)
    ids = np.concatenate([columns[name]["ids"] for name in ("anchor", "positive")])
    ids = torch.from_numpy(ids).long().to(device)

    def score() -> tuple:
        anchor, positive = made(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1).chunk(2)
        return anchor, positive, SCALE

    return made, score


def _torch_clip(model: c.Model, columns: dict, device: str) -> tuple[Any, Callable[[], tuple]]:
    import torch
    from transformers import CLIPConfig, CLIPModel

    from embedjax.models import clip

    parts = {side: clip.Part(tower.arch, tower.dense) for side, tower in model.towers.items()}
    made = CLIPModel._from_config(CLIPConfig.from_dict(clip.to_hf(parts)), attn_implementation="sdpa")
    pixels = (torch.from_numpy(columns["positive"]["pixels"]).float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous().to(device)
    ids = torch.from_numpy(columns["anchor"]["ids"]).long().to(device)

    def score() -> tuple:
        found = made(input_ids=ids, pixel_values=pixels)
        return found.text_embeds, found.image_embeds, made.logit_scale.exp()

    return made, score


SIDES = {"embedjax": embedjax_step, "torch": torch_step}


def serve(side: str, name: str, pairs: int, steps: int, small: bool) -> None:
    """One measurement: seconds a step, GB at most in use, the device."""
    model = model_of(name, small)
    made = SIDES[side](model, make_columns(model, pairs, LENGTH))
    for _ in range(2):
        made.run()
    print("found", statistics.median(made.run() for _ in range(steps)), made.used(), made.device, flush=True)


def measured(side: str, name: str, pairs: int, arguments: argparse.Namespace) -> tuple[float, float, str] | None:
    """The same, of a process of its own; None where it ended early, as it does without memory."""
    told = ["--models", name, "--first", str(pairs), "--steps", str(arguments.steps), *["--small"] * arguments.small]
    # By default jax takes three quarters of a GPU's memory, and no more.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    command = [sys.executable, __file__, "--serve", side, *told]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in ended.stdout.splitlines():
        if line.startswith("found "):
            _, seconds, memory, device = line.split(maxsplit=3)
            return float(seconds), float(memory), device
    print(f"{side}, {name}, {pairs} pairs: {(ended.stderr.strip() or 'no word').splitlines()[-1][:200]}", file=sys.stderr)
    return None


def flops(model: c.Model, pairs: int) -> float:
    """Of a step's products."""
    from embedjax.metrics.pace import train_flops

    if "image" not in model.towers:
        return train_flops(model.towers["text"].arch, 2 * pairs, LENGTH)
    image, text = model.towers["image"].arch, model.towers["text"].arch
    return train_flops(image, pairs, image.tokens) + train_flops(text, pairs, text.positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="bert-base,clip-b16", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--first", type=int, default=64, help="the first batch, in pairs")
    parser.add_argument("--most", type=int, default=1 << 20, help="the last, if it fits")
    parser.add_argument("--steps", type=int, default=20, help="measured of each")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.models, arguments.first, arguments.steps, arguments.small)
        return
    from embedjax.metrics.pace import peak_flops

    print("| model | side | device | pairs a batch | pairs/s | utilisation | peak memory, GB |\n" + "|---" * 7 + "|")
    for name in arguments.models.split(","):
        for side in SIDES:
            pairs = arguments.first
            while pairs <= arguments.most and (found := measured(side, name, pairs, arguments)):
                seconds, memory, device = found
                peak = peak_flops(device)
                share = f"{flops(model_of(name, arguments.small), pairs) / seconds / peak:.0%}" if peak else "not known"
                print(f"| {name} | {side} | {device} | {pairs} | {pairs / seconds:.0f} | {share} | {memory:.1f} |", flush=True)
                pairs *= 2


if __name__ == "__main__":
    main()
