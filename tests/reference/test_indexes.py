"""The ten nearest of 200,000 vectors by FAISS and usearch: the same as ours, of floats, bytes and bits."""

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from embedjax.evaluate import codes, retrieval
from embedjax.quantize import quantize

if not all(importlib.util.find_spec(name) for name in ("faiss", "usearch")):
    pytest.skip("needs faiss-cpu and usearch", allow_module_level=True)
pytestmark = pytest.mark.reference
ROWS, WIDTH, QUERIES, K = 200_000, 384, 100, 10


@pytest.fixture(scope="module")
def vectors():
    """Unit vectors around 2,000 centres, and queries around the same."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, WIDTH), np.float32)
    made = centres[rng.integers(0, 2000, ROWS + QUERIES)] + 0.7 * rng.standard_normal((ROWS + QUERIES, WIDTH), np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made[ROWS:], made[:ROWS]


@pytest.fixture(scope="module")
def whole(vectors):
    """Numbers as usearch's i8 has them: round(127 x)."""
    return [np.round(127 * part).astype(np.int8) for part in vectors]


@pytest.fixture(scope="module")
def theirs(vectors, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes")
    coded = codes.coded(vectors[1], "uint8")
    arrays = dict(zip(("queries", "vectors", "signed_queries", "signed"), (*vectors, *whole), strict=True))
    for name, array in (arrays | {"codes": coded.codes, "ranges": coded.ranges}).items():
        np.save(folder / f"{name}.npy", array)
    side = pathlib.Path(__file__).with_name("index_side.py")
    done = subprocess.run([sys.executable, side, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return coded, {name: np.load(folder / f"{name}.npy") for name in ("flat", "scalar", "binary", "b1", "i8")}


def same(ours, theirs, score, rounding):
    """The scores of both are one list, and rows differ only among those whose score is that of the last, but for rounding."""
    assert theirs.shape == ours.shape == (QUERIES, K)
    for query in range(QUERIES):
        mine, other = (score(query, rows[query]) for rows in (ours, theirs))
        np.testing.assert_allclose(np.sort(mine), np.sort(other), rtol=0, atol=rounding)
        sure = [set(rows[query][found > found.min() + rounding]) for rows, found in ((ours, mine), (theirs, other))]
        assert sure[0] <= set(theirs[query]) and sure[1] <= set(ours[query])


@pytest.mark.parametrize("where", ["streamed", "placed"])
def test_floats(vectors, theirs, where):
    queries, corpus = vectors
    if where == "streamed":
        rows = retrieval.topk(queries, corpus, K)[1]
    else:
        rows = codes.search(queries, codes.place(codes.Coded(corpus, "float32", WIDTH)), K)[1]
    same(rows, theirs[1]["flat"], lambda q, some: corpus[some].astype(np.float64) @ queries[q], 1e-6)


def test_bytes_in_ranges_are_those_of_faiss(vectors, theirs):
    coded, found = theirs
    rows = codes.search(vectors[0], coded, K)[1]
    same(rows, found["scalar"], lambda q, some: coded[some].astype(np.float64) @ vectors[0][q], 1e-6)


def test_bytes_of_even_steps_are_those_of_usearch(whole, theirs):
    """127 x as a place in ranges of steps of 1/127, of which a place stands for its middle."""
    ranges = np.repeat(np.array([[-128.5 / 127], [126.5 / 127]], np.float32), WIDTH, axis=1)
    rows = codes.search(whole[0] / np.float32(127), codes.Coded(whole[1], "int8", WIDTH, ranges), K)[1]
    queries, corpus = (part.astype(np.int64) for part in whole)
    same(rows, theirs[1]["i8"], lambda q, some: corpus[some] @ queries[q], 0)


@pytest.mark.parametrize("library", ["binary", "b1"])
@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits(vectors, theirs, library, precision):
    queries, corpus = vectors
    scores, rows = codes.search(queries, codes.coded(corpus, precision), K)
    signs = [np.packbits(part > 0, axis=1) for part in vectors]
    minus = lambda q, some: -np.unpackbits(signs[1][some] ^ signs[0][q], axis=1).sum(1, dtype=np.int64)
    same(rows, theirs[1][library], minus, 0)
    np.testing.assert_allclose(scores[0], 1 + 2 * minus(0, rows[0]) / WIDTH, atol=1e-6)
    np.testing.assert_array_equal(quantize(queries, "ubinary"), signs[0])
