"""Index files of FAISS and usearch, read back by these: the same vectors, and the same neighbours as without them."""

import numpy as np
import pytest

faiss = pytest.importorskip("faiss")  # before usearch, or its searches crash
usearch = pytest.importorskip("usearch.index")

from embedjax import quantize  # noqa: E402
from embedjax.evaluate.conventions import from_faiss_ranges, from_usearch, packed_of, usearch_of  # noqa: E402
from embedjax.evaluate.indexes import write_faiss, write_usearch  # noqa: E402
from embedjax.evaluate.kept import Kept  # noqa: E402

pytestmark = pytest.mark.reference
DIM = 48


def unit(rows, seed):
    found = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


VECTORS, QUERIES = unit(3000, 0), unit(20, 1)
RANGES = quantize.ranges_of(unit(2000, 2))


def kept_at(precision):
    return Kept(DIM, True, precision, RANGES if quantize.in_ranges(precision) else None)


def nearest(queries, vectors):
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8", "uint8"])
def test_faiss_holds_our_codes(tmp_path, precision):
    kept = kept_at(precision)
    codes = kept.codes(VECTORS)
    write_faiss(codes, kept, tmp_path / "a.faiss", 700)
    index = faiss.read_index(str(tmp_path / "a.faiss"))
    assert index.ntotal == 3000 and index.metric_type == faiss.METRIC_INNER_PRODUCT
    stand = kept.vectors(codes)
    np.testing.assert_allclose(index.reconstruct_n(0, 3000), stand, atol=2e-7)
    if kept.ranges is not None:
        np.testing.assert_allclose(from_faiss_ranges(faiss.vector_to_array(index.sq.trained)), RANGES, rtol=1e-6)
    found = index.search(QUERIES, 10)
    np.testing.assert_array_equal(found[1], nearest(QUERIES, stand))
    assert [path.name for path in tmp_path.iterdir()] == ["a.faiss"]


def hamming(queries, packed):
    return np.unpackbits(queries[:, None] ^ packed[None], axis=-1).sum(-1)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_faiss_and_usearch_hold_our_bits(tmp_path, precision):
    kept = kept_at(precision)
    codes = kept.codes(VECTORS)
    packed, asked = packed_of(codes, precision), packed_of(kept.codes(QUERIES), precision)
    wanted = np.sort(hamming(asked, packed), axis=1)[:, :10]
    write_faiss(codes, kept, tmp_path / "a.faiss", 700)
    index = faiss.read_index_binary(str(tmp_path / "a.faiss"))
    np.testing.assert_array_equal(index.search(asked, 10)[0], wanted)
    np.testing.assert_array_equal(index.reconstruct(17), packed[17])
    write_usearch(codes, kept, precision, "cosine", tmp_path / "a.usearch", 700)
    other = usearch.Index.restore(str(tmp_path / "a.usearch"))
    assert len(other) == 3000
    np.testing.assert_array_equal(other.search(asked, 10, exact=True).distances, wanted)
    np.testing.assert_array_equal(other.get(17), packed[17])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_usearch_holds_our_vectors(tmp_path, precision, similarity):
    kept = kept_at("float32" if precision == "int8" else precision)
    codes = kept.codes(VECTORS)
    write_usearch(codes, kept, precision, similarity, tmp_path / "a.usearch", 700)
    index = usearch.Index.restore(str(tmp_path / "a.usearch"))
    assert len(index) == 3000 and sorted(index.keys) == list(range(3000))
    stored = np.asarray(index.get(np.arange(3000)))
    if precision == "int8":
        np.testing.assert_array_equal(stored, usearch_of(VECTORS))
        stored = from_usearch(stored)
    stand = stored.astype(np.float32)
    np.testing.assert_allclose(stand, kept.vectors(codes), atol=1e-7 if precision != "int8" else 1 / 253)
    asked = usearch_of(QUERIES) if precision == "int8" else QUERIES
    found = index.search(asked, 10, exact=True)
    overlap = [len(set(a) & set(b)) for a, b in zip(found.keys, nearest(QUERIES, VECTORS), strict=True)]
    assert np.mean(overlap) >= (9 if precision != "int8" else 8.5)
