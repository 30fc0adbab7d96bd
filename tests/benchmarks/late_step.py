"""Training step of late interaction from the real MiniLM-L6: embedjax against PyLate, on this machine's CPU.

    EMBEDJAX_PYLATE=PYTHON python tests/benchmarks/late_step.py [--pairs 32] [--rounds 5] [--preload libtcmalloc_minimal.so.4]

PYTHON is that of an environment with PyLate, which pins an older sentence-transformers. Both sides have the same model, which
PyLate made of MiniLM (128 numbers a token), 32 queries of 32 tokens and 32 documents of 180, every text full, in-batch MaxSim,
dropout 0.1, AdamW, float32 and the same number of threads. PyLate's is its own model and loss in a plain loop, with
scaled-dot-product attention and fused AdamW. Each side is a process of its own; their turns alternate, so that a busy machine
slows both, and the ratio is the median over turns. `--no-dropout` shows that both begin with the same loss.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import turns
from corpora import minilm

LENGTHS = {"anchor": 32, "positive": 180}
STEPS_PER_TURN, RATE = 2, 3e-6
MAKE = pathlib.Path(__file__).parents[1] / "reference" / "pylate_side.py"


def token_ids(pairs: int) -> dict[str, np.ndarray]:
    """Random words [B L] behind [CLS], none of them punctuation, which PyLate's documents are not compared by."""
    rng = np.random.default_rng(0)
    found = {name: rng.integers(2000, 30000, (pairs, length)).astype(np.int32) for name, length in LENGTHS.items()}
    for ids in found.values():
        ids[:, 0] = 101
    return found


def embedjax_step(options: argparse.Namespace) -> Callable[[], float]:
    """The trainer's own jitted step, that returns its loss."""
    import dataclasses

    from steps import Step

    from embedjax import config as c
    from embedjax.models.folders import read_params, read_tower

    tower = read_tower(options.folder)
    assert tower.arch is not None
    if options.no_dropout:
        tower = dataclasses.replace(tower, arch=dataclasses.replace(tower.arch, dropout=0.0, attention_dropout=0.0))
    task = c.Set(columns={"anchor": "a", "positive": "b"}, loss=c.MultipleNegatives(mask_duplicates=False))
    config = c.Config(
        model=c.Model({"text": tower}),
        data=c.Data(batch_size=options.pairs, sets=(task,)),
        optim=c.Optim(learning_rate=RATE, clip_norm=0.0),
        export=c.Export(format="pylate"),
    )
    text = lambda ids: {"ids": ids, "mask": np.ones_like(ids, bool), "score": np.ones_like(ids, bool)}
    columns = {name: text(ids) for name, ids in token_ids(options.pairs).items()}
    columns["row"] = np.arange(options.pairs, dtype=np.int32)
    step = Step(config, columns, {"text": read_params(options.folder, tower)})

    def run() -> float:
        step()
        return step.loss

    return run


def pylate_step(options: argparse.Namespace) -> Callable[[], float]:
    """A step of PyLate that returns its loss."""
    import torch
    from pylate.losses import Contrastive
    from pylate.models import ColBERT

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = ColBERT(options.folder, device="cpu", model_kwargs={"attn_implementation": "sdpa"})
    loss = Contrastive(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    texts = [torch.from_numpy(ids).long() for ids in token_ids(options.pairs).values()]
    columns = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    model.train(not options.no_dropout)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss([dict(column) for column in columns])
        value.backward()
        optimizer.step()
        return value.item()

    return run


SIDES = {"embedjax": embedjax_step, "torch": pylate_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--preload", default="libtcmalloc_minimal.so.4", help="allocator; empty for the system's own")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        turns.serve(SIDES[options.serve](options), STEPS_PER_TURN)
        return
    pylate = os.environ.get("EMBEDJAX_PYLATE") or sys.exit("set EMBEDJAX_PYLATE to the python of an environment with PyLate")
    with tempfile.TemporaryDirectory() as place:
        folder, made = pathlib.Path(place) / "model", pathlib.Path(place) / "options.json"
        made.write_text("{}")
        subprocess.run([pylate, MAKE, "make", minilm(), folder, made], check=True)
        given = [*sys.argv[1:], "--folder", str(folder)]
        sides = {
            side: turns.Side([*given, "--serve", side], options.preload, pylate if side == "torch" else "") for side in SIDES
        }
        print("loss of the first step:", {name: round(side.first.loss, 5) for name, side in sides.items()})
        print(turns.HEADER)
        print(turns.row(f"{options.pairs} pairs", turns.alternate(sides, options.rounds), options.pairs), flush=True)


if __name__ == "__main__":
    main()
