"""Search over codes against all products with the vectors they stand for, on every number of devices."""

import jax
import numpy as np
import pytest

from embedjax import config, sharding
from embedjax.config.errors import ConfigError, NonFiniteError
from embedjax.evaluate import codes, retrieval
from embedjax.quantize import PRECISIONS, dequantize, quantize, ranges_of

WIDTH = 50  # neither bytes nor words of bits are full
QUERIES, ROWS = 5, 700


def unit(seed, rows, width=WIDTH):
    found = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors():
    found = unit(1, ROWS)
    found[:, 7] = 0.25  # a step of 0
    found[100:400:100] = found[50]  # equal ones, on several devices
    return found


def stored(vectors, precision):
    return codes.Coded(
        quantize(vectors, precision, ranges := ranges_of(vectors) if "int8" in precision else None), precision, WIDTH, ranges
    )


def brute(queries, documents, k):
    """By all products; of bits, by those of the queries' own bits."""
    if "binary" in documents.precision:
        queries = dequantize(quantize(queries, "ubinary"), "ubinary", documents.width)
    vectors = documents[:]
    scores = np.round(np.einsum("qd,nd->qn", queries.astype(np.float64), vectors.astype(np.float64)), 6)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def mesh_of(devices):
    return sharding.make_mesh(config.Mesh(), jax.devices()[:devices])


@pytest.mark.parametrize(
    ("precision", "devices"),
    [(p, n) for p in ("int8", "binary") for n in (1, 2, 4, 8)] + [(p, 2) for p in PRECISIONS if p not in ("int8", "binary")],
)
def test_equals_all_products(vectors, precision, devices):
    documents, mesh = stored(vectors, precision), mesh_of(devices)
    queries = unit(0, QUERIES)
    queries[0] = vectors[50]
    placed = codes.place(documents, mesh=mesh, block=128)
    wanted = brute(queries, documents, 10)
    for found in (codes.search(queries, documents, 10, mesh=mesh, block=128), codes.search(queries, placed, 10)):
        np.testing.assert_allclose(found[0], wanted[0], atol=2e-6)
        np.testing.assert_array_equal(found[1], wanted[1])
    assert wanted[1][0, :4].tolist() == [50, 100, 200, 300], "equal scores in the order of rows"


@pytest.mark.parametrize("precision", ["int8", "uint8", "float32"])
def test_what_rounding_may_hide_is_searched_for_again(precision, monkeypatch):
    """Documents closer to each other than a rounded query can tell, among others that are far away."""
    queries = unit(0, QUERIES)
    near = queries[0] + 0.1 * unit(2, 300)
    documents = stored(np.concatenate([unit(1, ROWS), near / np.linalg.norm(near, axis=1, keepdims=True)]), precision)
    placed, asked, plain = codes.place(documents), [], retrieval.topk
    monkeypatch.setattr(retrieval, "topk", lambda q, *rest, **options: asked.append(len(q)) or plain(q, *rest, **options))
    scores, rows = codes.search(queries, placed, 3)
    assert asked == [codes.FILLED], "the query that is near to many"
    wanted = brute(queries, documents, 3)
    np.testing.assert_array_equal(rows, wanted[1])
    np.testing.assert_allclose(scores, wanted[0], atol=2e-6)


@pytest.mark.parametrize("precision", ["int8", "float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1, 300])
def test_rounded_products_are_within_their_bound(vectors, precision, scale):
    queries = unit(0, 40) * scale
    documents = stored(vectors, precision)
    placed = codes.place(documents)
    weights, offsets, error = codes._rounded(queries, placed)
    ((_, tile),) = placed.tiles
    rough = np.asarray(codes.rough_product(weights, tile))[:, :ROWS] + offsets[:, None]
    off = np.abs(rough - queries.astype(np.float64) @ documents[:].T.astype(np.float64)).max(1)
    assert (off <= error).all() and (off > error / 100).all(), "it holds, and is of use"


def test_few_documents_or_none(vectors):
    queries = unit(0, 3)
    for precision in ("int8", "ubinary"):
        documents = stored(vectors, precision)
        few = codes.Coded(documents.codes[:4], precision, WIDTH, documents.ranges)
        np.testing.assert_array_equal(codes.search(queries, few, 9)[1], brute(queries, few, 9)[1])
        none = codes.Coded(documents.codes[:0], precision, WIDTH, documents.ranges)
        assert codes.search(queries, none, 3)[1].shape == (3, 0)
        assert codes.search(queries[:0], few, 3)[0].shape == (0, 3)


def test_a_memory_mapped_corpus(vectors, tmp_path):
    documents = stored(vectors, "int8")
    np.save(tmp_path / "codes.npy", documents.codes)
    mapped = codes.Coded(np.load(tmp_path / "codes.npy", mmap_mode="r"), "int8", WIDTH, documents.ranges)
    queries = unit(0, QUERIES)
    np.testing.assert_array_equal(codes.search(queries, mapped, 10, block=128)[1], brute(queries, documents, 10)[1])


def test_codes_are_made_block_by_block(vectors, monkeypatch):
    monkeypatch.setattr(codes, "QUANTIZED_ROWS", 64)
    for precision in PRECISIONS:
        made, wanted = codes.coded(vectors, precision), stored(vectors, precision)
        np.testing.assert_array_equal(made.codes, wanted.codes)
        assert (made.ranges is None) == (wanted.ranges is None) == ("int8" not in precision)
    np.testing.assert_array_equal(codes.coded(vectors, "int8").ranges, ranges_of(vectors))


def test_rescoring_is_the_best_of_the_shortlist(vectors, monkeypatch):
    monkeypatch.setattr(codes, "NUMBERS", 2 * 20 * WIDTH)  # two queries at a time
    queries, documents = unit(0, QUERIES), stored(vectors, "binary")
    _, shortlist = codes.search(queries, documents, 20)
    for exact in (documents, vectors):
        found = codes.rescored(queries, documents, 5, vectors=None if exact is documents else vectors)
        for query, scores, rows in zip(queries, *found, strict=True):
            candidates = np.sort(shortlist[np.flatnonzero((queries == query).all(1))[0]])
            products = exact[candidates] @ query
            order = np.argsort(-products, kind="stable")[:5]
            np.testing.assert_array_equal(rows, candidates[order])
            np.testing.assert_allclose(scores, products[order], atol=1e-6)
    rows = np.array([[4, -1, 2]] * QUERIES)
    scores, found = codes.rescore(queries, vectors, rows, 5)
    assert found.shape == (QUERIES, 3) and (found[:, -1] == -1).all() and (scores[:, -1] == -np.inf).all()


def test_faults(vectors):
    documents = stored(vectors, "int8")
    with pytest.raises(ConfigError, match=r"queries are \[5, 49\]; the documents' vectors have 50 numbers"):
        codes.search(unit(0, 5, 49), documents, 3)
    with pytest.raises(ConfigError, match="needs the ranges"):
        codes.Coded(documents.codes, "int8", WIDTH)
    with pytest.raises(ConfigError, match=r"\[N 7\]; these are \[700, 50\] of int8"):
        codes.Coded(documents.codes, "binary", WIDTH)
    with pytest.raises(ConfigError, match="at least 1"):
        codes.rescored(unit(0, 5), documents, 3, multiplier=0)
    with pytest.raises(NonFiniteError):
        codes.coded(np.full((2, WIDTH), np.nan, np.float32), "int8")
