"""The funnel against its definition, stage by stage in numpy, and what is said of stages that do not go together."""

import jax
import numpy as np
import pytest

from embedjax import config, sharding
from embedjax.config.errors import ConfigError
from embedjax.evaluate import codes, funnel
from embedjax.evaluate.funnel import Stage
from embedjax.quantize import dequantize, quantize, ranges_of

WIDTH, ROWS, QUERIES, K = 40, 300, 4, 5


@pytest.fixture(scope="module")
def vectors():
    """Numbers that fall off, as those of a model trained for its prefixes do."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(ROWS + QUERIES, WIDTH)) * 0.95 ** np.arange(WIDTH)
    return funnel.unit_prefix(found.astype(np.float32), WIDTH)


def defined(query, vectors, stages, k):
    """Rows of one query: in each stage, the best of what is left."""
    left = np.arange(len(vectors))
    for stage in stages:
        part, whole = (funnel.unit_prefix(x, stage.dim) for x in (query[None], vectors))
        ranges = ranges_of(whole) if "int8" in stage.precision else None
        stand_for = dequantize(quantize(whole, stage.precision, ranges), stage.precision, stage.dim, ranges)[left]
        count = stage.shortlist or k
        if stage is stages[0] and "binary" in stage.precision:
            signs = dequantize(quantize(part, "ubinary"), "ubinary", stage.dim)
            distances = np.round((1 - stand_for @ signs[0]) * stage.dim / 2)
            if len(stages) > 1:
                left = np.sort(np.argsort(distances, kind="stable")[:count])
                continue
            left = np.sort(np.argsort(distances, kind="stable")[: codes.AGAIN * k])
            stand_for = stand_for[left]
        scores = stand_for @ part[0]
        order = np.argsort(-scores, kind="stable")[:count]
        left = left[order] if stage is stages[-1] else np.sort(left[order])
    return left


FUNNELS = {
    "the issue's": (Stage(8, "float32", 50), Stage(WIDTH)),
    "three": (Stage(8, "binary", 60), Stage(24, "int8", 20), Stage(WIDTH)),
    "to bytes": (Stage(8, "int8", 60), Stage(24, "float16", 20), Stage(WIDTH, "uint8")),
    "finer": (Stage(WIDTH, "ubinary", 30), Stage(WIDTH, "int8", 10), Stage(WIDTH)),
    "bits alone": (Stage(WIDTH, "binary"),),
    "bytes alone": (Stage(24, "int8"),),
    "one": (Stage(WIDTH),),
}


@pytest.mark.parametrize("name", FUNNELS)
def test_equals_its_definition(vectors, name):
    stages, queries, corpus = FUNNELS[name], vectors[:QUERIES], vectors[QUERIES:]
    documents = funnel.prepare(corpus, stages)
    wanted = [defined(query, corpus, stages, K) for query in queries]
    scores, rows = funnel.funnel(queries, documents, stages, K)
    np.testing.assert_array_equal(rows, wanted)
    last, stand_for = stages[-1], documents[-1]
    for query, found, said in zip(queries, rows, scores, strict=True):
        np.testing.assert_allclose(said, stand_for[found] @ funnel.unit_prefix(query[None], last.dim)[0], atol=2e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_equals_its_definition_on_devices(vectors, devices):
    stages, queries, corpus = FUNNELS["three"], vectors[:QUERIES], vectors[QUERIES:]
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:devices])
    first, *rest = funnel.prepare(corpus, stages)
    for some in ([first, *rest], [codes.place(first, mesh=mesh), *rest]):
        rows = funnel.funnel(queries, some, stages, K, mesh=mesh)[1]
        np.testing.assert_array_equal(rows, [defined(query, corpus, stages, K) for query in queries])


def test_lengths_that_count_are_left(vectors):
    scaled = vectors * np.linspace(1, 3, len(vectors), dtype=np.float32)[:, None]
    stages, corpus = (Stage(8, "float32", ROWS), Stage(WIDTH)), scaled[QUERIES:]
    documents = funnel.prepare(corpus, stages, prefix=funnel.cut)
    scores, rows = funnel.funnel(scaled[:QUERIES], documents, stages, K, prefix=funnel.cut)
    products = scaled[:QUERIES] @ corpus.T
    np.testing.assert_array_equal(rows, np.argsort(-products, axis=1, kind="stable")[:, :K])
    np.testing.assert_array_equal(documents[0][:], corpus[:, :8])


def test_whole_vectors_stay_in_their_file(vectors, tmp_path):
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    stages = (Stage(8, "int8", 50), Stage(WIDTH))
    given = ranges_of(vectors[:50, :8])
    small, whole = funnel.prepare(mapped, stages, ranges=[given, None])
    assert whole.codes is mapped and small.ranges is given
    np.testing.assert_array_equal(small.codes, quantize(funnel.unit_prefix(vectors, 8), "int8", given))


@pytest.mark.parametrize(
    ("stages", "k", "said"),
    [
        ((), 5, "at least one stage"),
        ((Stage(8, "float32", 50), Stage(64)), 5, "stage 64:float32 takes 64 numbers; the vectors have 40"),
        ((Stage(8, "float32", 50), Stage(40, "float32", 9)), 5, "the last stage's shortlist are the results"),
        ((Stage(16, "int8", 50), Stage(8)), 5, "stage 8:float32 must know more than 16:int8:50"),
        ((Stage(8, "int8", 50), Stage(8, "binary")), 5, "must know more"),
        ((Stage(8, "int8", 50), Stage(8, "int8")), 5, "must know more"),
        ((Stage(8, "int8", 4), Stage(40)), 5, "shortlist of stage 8:int8:4 must hold at least the 5 results"),
        ((Stage(8, "int8", 20), Stage(9, "int8", 30), Stage(40)), 5, "must hold at least the 30 of the next"),
        ((Stage(8, "int4"),), 5, "no precision 'int4'"),
        ((Stage(8),), 0, "0 results were asked for"),
    ],
)
def test_stages_that_do_not_go_together(stages, k, said):
    with pytest.raises(ConfigError, match=said):
        funnel.check(stages, WIDTH, k)


def test_codes_of_other_stages(vectors):
    documents = funnel.prepare(vectors, (Stage(8, "int8", 50), Stage(WIDTH)))
    with pytest.raises(ConfigError, match="not those of the stages 16:int8:50, 40:float32"):
        funnel.funnel(vectors[:2], documents, (Stage(16, "int8", 50), Stage(WIDTH)), 5)
