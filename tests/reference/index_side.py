"""Exact searches by FAISS and usearch, in a process of their own: FAISS crashes when usearch was imported before it.

    python tests/reference/index_side.py FOLDER

FOLDER has queries.npy and vectors.npy (float32), ranges.npy and codes.npy (uint8 in these), signed.npy and signed_queries.npy
(int8). Each search writes FOLDER/NAME.npy, row numbers [Q k].
"""

import pathlib
import sys

import faiss  # before usearch
import numpy as np
from usearch.index import MetricKind
from usearch.index import search as exact


def main(folder: pathlib.Path, k: int = 10) -> None:
    read = lambda name: np.load(folder / f"{name}.npy")
    queries, vectors, codes, (low, high) = map(read, ("queries", "vectors", "codes", "ranges"))
    width = vectors.shape[1]
    flat = faiss.IndexFlatIP(width)
    flat.add(vectors)
    scalar = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    scalar.train(vectors[:1000])
    scalar.add(vectors)
    faiss.copy_array_to_vector(np.concatenate([low, high - low]), scalar.sq.trained)
    faiss.copy_array_to_vector(codes.reshape(-1), scalar.codes)
    bits, asked = np.packbits(vectors > 0, axis=1), np.packbits(queries > 0, axis=1)
    binary = faiss.IndexBinaryFlat(8 * bits.shape[1])
    binary.add(bits)
    found = {
        "flat": flat.search(queries, k)[1],
        "scalar": scalar.search(queries, k)[1],
        "binary": binary.search(asked, k)[1],
        "b1": exact(bits, asked, k, MetricKind.Hamming, exact=True).keys,
        "i8": exact(read("signed"), read("signed_queries"), k, MetricKind.IP, exact=True).keys,
    }
    for name, rows in found.items():
        np.save(folder / f"{name}.npy", rows.astype(np.int64))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
