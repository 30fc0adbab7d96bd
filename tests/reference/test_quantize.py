"""Codes of vectors and pooled tokens against sentence-transformers: bit for bit, and the same groups."""

import numpy as np
import pytest

from embedjax.evaluate.pool import pooled
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.quantize import PRECISIONS, quantize, ranges_of

torch = pytest.importorskip("torch")
quantize_embeddings = pytest.importorskip("sentence_transformers.util.quantization").quantize_embeddings
pooling = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules.token_pooling")
pytestmark = pytest.mark.reference


def unit(*shape, seed=0):
    found = np.random.default_rng(seed).normal(size=shape)
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if "float16" not in p])
@pytest.mark.parametrize("width", [128, 12, 3])
def test_codes_are_sentence_transformers_bit_for_bit(precision, width):
    calibration, vectors = unit(5000, width), unit(3000, width, seed=1)
    vectors[:, 1] = calibration[:, 1] = 0.25  # a step of 0
    vectors[5] = 0
    ranges = ranges_of(calibration) if "int8" in precision else None
    wanted = quantize_embeddings(vectors, precision, ranges=ranges)
    found = quantize(vectors, precision, ranges)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_tokens_of_all_documents_share_their_ranges(precision):
    documents = [unit(n, 32, seed=n) for n in (7, 30, 1, 0, 90)]
    wanted = quantize_embeddings(documents, precision)
    found = TokenVectors.joined(documents, 32).quantized(precision)
    for n, codes in enumerate(wanted):
        np.testing.assert_array_equal(found.vectors[found.starts[n] : found.starts[n + 1]], codes)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("protected", [0, 1, 3])
def test_pooled_tokens_are_sentence_transformers(factor, protected):
    module = pooling.HierarchicalTokenPooling(factor, num_protected_tokens=protected)
    for length in (1, 2, 3, 9, 64, 180):
        vectors = unit(length, 24, seed=length)
        wanted = module.pool_one(torch.from_numpy(vectors)).numpy()
        np.testing.assert_allclose(pooled(vectors, factor, protected), wanted, atol=1e-6)
