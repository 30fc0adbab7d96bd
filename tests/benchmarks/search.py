"""Exact search on this machine's CPU: ours, numpy, FAISS and usearch, the ten nearest of 200,000 vectors to each of 100.

    python tests/benchmarks/search.py [--rows 200000] [--width 384] [--queries 100] [--rounds 9] [--parts] [--mapped 4000000]

Vectors of length 1 around 2,000 centres. Every side searches what it was given before (`placed` has the corpus on the device,
`topk` and `streamed` read it from memory each time) and is a process of its own; their turns alternate, so that a busy machine
slows all, and the ratios to ours of the same kind are medians over rounds. `found`: what part of the float32 ten is among the
side's. FAISS SQ8 and our int8 hold places in ranges of each dimension, usearch's i8 is round(127 x). `--parts` tells where ours
spend their time, `--mapped` what memory a search of so many codes in a file takes, compilation included. Ours and numpy run
with tcmalloc if it is there, the others with what they are used with.
"""

import argparse
import functools
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np
import turns

K = 10
STEPS = 3
# The side that the others of a kind are compared with.
SIDES = {
    "numpy": "placed",
    "topk": "placed",
    "placed": "placed",
    "faiss-flat": "placed",
    "usearch-f32": "placed",
    "int8": "int8",
    "int8-streamed": "int8",
    "faiss-sq8": "int8",
    "usearch-i8": "int8",
    "binary": "binary",
    "faiss-binary": "binary",
    "usearch-b1": "binary",
}
Search = Callable[[], np.ndarray]


def write(folder: pathlib.Path, rows: int, queries: int, width: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, width), np.float32)
    made = centres[rng.integers(0, 2000, rows + queries)]
    made += 0.7 * rng.standard_normal(made.shape, np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    np.save(folder / "queries.npy", made[rows:])
    np.save(folder / "vectors.npy", made[:rows])
    np.save(folder / "exact.npy", np.argsort(-(made[rows:] @ made[:rows].T), axis=1)[:, :K])


def ours(side: str, queries: np.ndarray, vectors: np.ndarray) -> Search:
    from embedjax.evaluate import codes, retrieval

    if side == "topk":
        return lambda: retrieval.topk(queries, vectors, K)[1]
    precision = {"placed": "float32"}.get(side, side.removesuffix("-streamed"))
    coded = codes.coded(vectors, precision)
    documents = coded if side.endswith("streamed") else codes.place(coded)
    return lambda: codes.search(queries, documents, K)[1]


def plain(queries: np.ndarray, vectors: np.ndarray) -> Search:
    def search() -> np.ndarray:
        scores = queries @ vectors.T
        some = np.argpartition(-scores, K, axis=1)[:, :K]
        return np.take_along_axis(some, np.argsort(-np.take_along_axis(scores, some, 1), axis=1), 1)

    return search


def faiss(side: str, queries: np.ndarray, vectors: np.ndarray) -> Search:
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    width = vectors.shape[1]
    if side == "faiss-binary":
        queries, vectors = (np.packbits(part > 0, axis=1) for part in (queries, vectors))
        index = faiss.IndexBinaryFlat(8 * vectors.shape[1])
    elif side == "faiss-sq8":
        index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
    else:
        index = faiss.IndexFlatIP(width)
    index.add(vectors)
    return lambda: index.search(queries, K)[1]


def usearch(side: str, queries: np.ndarray, vectors: np.ndarray) -> Search:
    from usearch.index import MetricKind, search

    metric, convert = {
        "usearch-f32": (MetricKind.IP, lambda part: part),
        "usearch-i8": (MetricKind.IP, lambda part: np.round(127 * part).astype(np.int8)),
        "usearch-b1": (MetricKind.Hamming, lambda part: np.packbits(part > 0, axis=1)),
    }[side]
    asked, documents = convert(queries), convert(vectors)
    threads = len(os.sched_getaffinity(0))
    return lambda: search(documents, asked, K, metric, exact=True, threads=threads).keys.astype(np.int64)


def serve(side: str, folder: pathlib.Path) -> None:
    """A worker: what a turn tells for its loss is the part of the exact ten that it found."""
    queries, vectors, exact = (np.load(folder / f"{name}.npy") for name in ("queries", "vectors", "exact"))
    if side == "numpy":
        search = plain(queries, vectors)
    else:
        make = {"faiss": faiss, "usearch": usearch}.get(side.split("-")[0], ours)
        search = make(side, queries, vectors)
    del vectors

    def step() -> float:
        found = search()
        return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))

    turns.serve(step, STEPS)


def parts(folder: pathlib.Path, rounds: int) -> None:
    """Milliseconds of the copies of a search's tiles to the device, of turning them there, of the products with them, and of
    these with the best ten of each tile."""
    import jax

    from embedjax import sharding
    from embedjax.evaluate import codes, retrieval

    queries, vectors = (np.load(folder / f"{name}.npy") for name in ("queries", "vectors"))
    mesh = retrieval.one_device()
    size = retrieval.rows_at_once(len(vectors), mesh, 65536)
    starts = range(0, len(vectors) - size + 1, size)
    asked = {"float32": queries, "int8": queries, "binary": codes.words(np.packbits(queries > 0, axis=1))}
    print(f"| {len(starts) * size} rows, ms | copied | turned | products | and best |\n|---|---|---|---|---|")
    for precision, query in asked.items():
        score = codes.minus_hamming if precision == "binary" else codes.rough_product
        kept = codes.coded(vectors, precision).codes
        blocks = [codes.words(kept[at : at + size]) if precision == "binary" else kept[at : at + size] for at in starts]
        lying, copied = timed(lambda block: retrieval.put(np.array(block), sharding.rows(mesh)), blocks, rounds)
        tiles, turned = timed(codes.turned(mesh, precision == "float32"), lying, rounds)
        steps = jax.jit(score), jax.jit(functools.partial(best, score))
        rest = [timed(functools.partial(step, query), tiles, rounds)[1] for step in steps]
        times = [f"{1000 * statistics.median(taken):.1f}" for taken in (copied, turned, *rest)]
        print(f"| {precision} | " + " | ".join(times) + " |", flush=True)


def best(score: Callable, queries: np.ndarray, tile: np.ndarray) -> tuple:
    from embedjax.evaluate.retrieval import by_groups

    return by_groups(score(queries, tile), K)


def timed(step: Callable, inputs: list, rounds: int) -> tuple[list, list[float]]:
    """What a step makes of each input, and the seconds of each round after the first, which compiles."""
    import jax

    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        results = [jax.block_until_ready(step(each)) for each in inputs]
        taken.append(time.perf_counter() - start)
    return results, taken[1:]


def mapped(folder: pathlib.Path, rows: int, width: int) -> None:
    """Seconds of a search of codes that lie in a file, and what it takes of memory beside the pages of the file."""
    from embedjax.evaluate import codes

    rng, block = np.random.default_rng(0), 1 << 18
    queries = np.load(folder / "queries.npy")
    ranges = np.stack([np.full(width, -0.2, np.float32), np.full(width, 0.2, np.float32)])
    for precision in ("int8", "binary"):
        count = width if precision == "int8" else -(-width // 8)
        file = folder / f"{precision}.npy"
        kept = np.lib.format.open_memmap(file, "w+", np.int8, (rows, count))
        for at in range(0, rows, block):
            kept[at : at + block] = rng.integers(-128, 128, kept[at : at + block].shape, np.int8)
        del kept
        documents = codes.Coded(np.load(file, mmap_mode="r"), precision, width, ranges if precision == "int8" else None)
        before = anonymous()
        codes.search(queries, codes.Coded(documents.codes[:block], precision, width, documents.ranges), K)  # compiles
        seen, ended = [], threading.Event()
        watch = threading.Thread(target=lambda seen=seen, ended=ended: _watch(seen, ended))
        watch.start()
        start = time.perf_counter()
        codes.search(queries, documents, K)
        taken = time.perf_counter() - start
        ended.set()
        watch.join()
        told = f"{documents.nbytes / 2**30:.2f} GB in a file, {taken:.2f} s, {max(seen) - before:.2f} GB of memory"
        print(f"{precision}: {rows} rows, {told}", flush=True)
        file.unlink()


def _watch(seen: list[float], ended: threading.Event) -> None:
    while not ended.wait(0.005):
        seen.append(anonymous())


def anonymous() -> float:
    """GB of memory that is no page of a file."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("width", 384), ("queries", 100), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--mapped", type=int, default=0)
    parser.add_argument("--serve", nargs=2, default=())
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], pathlib.Path(options.serve[1]))
        return
    from embedjax import allocator

    good = str(allocator.find() or "")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, options.rows, options.queries, options.width)
        if options.mapped:
            mapped(folder, options.mapped, options.width)
            return
        if options.parts:
            parts(folder, options.rounds)
            return
        preload = lambda side: "" if side.startswith(("faiss", "usearch")) else good
        sides = {side: turns.Side(["--serve", side, name], preload(side)) for side in options.sides.split(",")}
        found = turns.alternate(sides, options.rounds)
    print("| search | ms (least-most) | times ours of its kind | found |\n|---|---|---|---|")
    for side in sides:
        ms = [1000 * turn[side].seconds for turn in found]
        like = SIDES[side]
        ratios = [turn[side].seconds / turn[like].seconds for turn in found] if like in sides else [float("nan")]
        told = f"{statistics.median(ms):7.1f} ({min(ms):.1f}-{max(ms):.1f}) | {turns.spread(ratios)}"
        print(f"| {side:13} | {told} | {found[-1][side].loss:.4f} |")


if __name__ == "__main__":
    main()
