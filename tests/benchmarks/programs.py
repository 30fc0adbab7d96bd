"""Encoding by the portable programs: ONNX and StableHLO, float32 and int8, against the jitted model and sentence-transformers.

    python tests/benchmarks/programs.py [--model FOLDER] [--texts 2000] [--rounds 5]

Needs the extras `reference` and `onnx`, and the data sets of $EMBEDJAX_DATA. All sides get the same token ids, sorted by
length, in batches of 32 padded to multiples of 16, so that it is the programs that are timed; sentence-transformers is its
modules on the same batches. Each side is warmed up once on every batch; rounds are interleaved, and the table has their
medians. A text alone is one of 16 tokens. Cosines are to the jitted model's vectors, Spearman is that of STS-B's test split.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import corpora
import numpy as np
from encode import mixed_texts
from scipy.stats import spearmanr

BATCH, MULTIPLE = 32, 16
Ask = Callable[[dict[str, np.ndarray]], np.ndarray]
"""{"ids", "mask"} -> vectors."""


def sides(model, folders: dict[str, pathlib.Path], origin: str) -> dict[str, tuple[Ask, float]]:
    """What is compared, and the megabytes that each reads."""
    import jax
    import torch
    from sentence_transformers import SentenceTransformer

    from embedjax.export import onnx, stablehlo

    params = jax.device_put(model.params["towers"]["text"])
    apply = jax.jit(lambda params, column: model.embedders["text"].apply(params, column).pooled)
    peer = SentenceTransformer(origin, device="cpu")

    def by_torch(column):
        inputs = {"input_ids": torch.tensor(column["ids"]).long(), "attention_mask": torch.tensor(column["mask"]).long()}
        with torch.no_grad():
            return peer(inputs)["sentence_embedding"].numpy()

    size = lambda path: path.stat().st_size / 1e6
    weights = size(pathlib.Path(origin) / "model.safetensors")
    found: dict[str, tuple[Ask, float]] = {"jitted model": (lambda column: np.asarray(apply(params, column)), weights)}
    for name, folder in folders.items():
        session, program = onnx.read(folder), stablehlo.read(folder)
        found[f"ONNX {name}"] = (lambda column, s=session: onnx.run(s, column)), size(folder / onnx.PLACE)
        ask = lambda column, p=program: p(column["ids"], column["mask"])
        found[f"StableHLO {name}"] = ask, size(folder / stablehlo.PLACE / "weights.safetensors")
    return found | {"sentence-transformers": (by_torch, weights)}


def batches(model, texts: list[str]) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Batches of texts sorted by length, and the order they were put in."""
    tokenizer = model.texts["text"]
    order = np.argsort(tokenizer.lengths(texts), kind="stable")
    parts = [[texts[i] for i in order[start : start + BATCH]] for start in range(0, len(texts), BATCH)]
    length = lambda part: min(-(-int(tokenizer.lengths(part).max()) // MULTIPLE) * MULTIPLE, tokenizer.max_length)
    return [tokenizer.encode(part, length=length(part)) for part in parts], order


def encoded(ask: Ask, columns: list[dict[str, np.ndarray]], order: np.ndarray) -> np.ndarray:
    """Vectors in the texts' own order."""
    vectors = np.concatenate([ask(column) for column in columns])
    return vectors[np.argsort(order)]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder of one tower of texts; default: MiniLM-L6")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    corpora.with_allocator()
    from embedjax.export import programs
    from embedjax.load import load

    origin = options.model or str(corpora.minilm())
    model = load(origin)
    pairs = corpora.stsb("test")
    sentences, gold = [text for pair in pairs for text in pair[:2]], [pair[2] for pair in pairs]
    rows, order = batches(model, mixed_texts(options.texts))
    sts, sts_order = batches(model, sentences)
    alone = [model.texts["text"].encode([sentences[0]], length=MULTIPLE)]
    with tempfile.TemporaryDirectory() as place:
        folders = {weights: pathlib.Path(place) / weights for weights in programs.WEIGHTS}
        for weights, folder in folders.items():
            programs.write(model, folder, programs.PROGRAMS, weights)
        compared = sides(model, folders, origin)
        vectors = {name: encoded(ask, rows, order) for name, (ask, _) in compared.items()}
        seconds: dict[str, list[float]] = {name: [] for name in compared}
        single: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(options.rounds):
            for name, (ask, _) in compared.items():
                seconds[name].append(timed(lambda ask=ask: [ask(column) for column in rows]))
                ask(alone[0])
                single[name].append(timed(lambda ask=ask: [ask(alone[0]) for _ in range(20)]) / 20)
        print(f"{options.texts} texts of {np.mean([c['mask'].sum(1).mean() for c in rows]):.0f} tokens in the mean\n")
        print("| | texts/s | against the jitted model | one text, ms | MB | cosine, lowest | mean | Spearman, STS-B |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for name, (ask, size) in compared.items():
            ratio = statistics.median(ours / own for ours, own in zip(seconds["jitted model"], seconds[name], strict=True))
            cosines = (vectors[name] * vectors["jitted model"]).sum(1)
            found = encoded(ask, sts, sts_order)
            spearman = spearmanr((found[::2] * found[1::2]).sum(1), gold).statistic
            speed, one = options.texts / statistics.median(seconds[name]), statistics.median(single[name]) * 1e3
            shown = f"{cosines.min():.4f} | {cosines.mean():.4f} | {spearman:.4f}"
            print(f"| {name} | {speed:.0f} | {ratio:.2f} | {one:.1f} | {size:.1f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
