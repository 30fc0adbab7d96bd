"""Codes of texts: shortened, scaled, quantized in ranges of other texts; files of them, and lines for engines."""

import csv
import json
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedjax import quantize
from embedjax.config.errors import ConfigError, DataError
from embedjax.evaluate.calibrate import calibrate, ranges_from
from embedjax.evaluate.conventions import from_bit_string, from_literal, packed_of
from embedjax.evaluate.encode import encode
from embedjax.evaluate.engines import Feed
from embedjax.evaluate.files import Partial, encode_file
from embedjax.evaluate.kept import Kept, encode_codes


@pytest.fixture(scope="module")
def vectors(model, sentences):
    return encode(model, sentences)


@pytest.fixture(scope="module")
def source(sentences, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(sentences) + "\n")
    return path


@pytest.fixture(scope="module")
def others(sentences, tmp_path_factory):
    """The calibration set: other texts."""
    path = tmp_path_factory.mktemp("texts") / "others.txt"
    path.write_text("\n".join(f"w5 {text}" for text in sentences[:90]) + "\n")
    return path


@pytest.fixture(scope="module")
def ranges(model, others):
    return calibrate(model, others, (8,))[1].ranges[8]


def shortened(vectors, dim=8):
    part = vectors[:, :dim]
    return part / np.linalg.norm(part, axis=1, keepdims=True)


def test_ranges_are_those_of_the_calibration_set(model, others):
    texts = others.read_text().splitlines()
    whole = encode(model, texts, column="document")
    tower, found = calibrate(model, others, (None, 8))
    assert tower == "text" and found.rows == 90 and found.kind == "document" and found.normalized
    assert list(found.ranges) == [16, 8] and found.files[0]["name"] == "others.txt" and len(found.files[0]["sha256"]) == 64
    np.testing.assert_allclose(found.ranges[16], quantize.ranges_of(whole), atol=2e-6)
    np.testing.assert_allclose(found.ranges[8], quantize.ranges_of(shortened(whole)), atol=2e-6)
    assert calibrate(model, others, most=10)[1].rows == 10
    with pytest.raises(ConfigError, match="17 dimensions are asked for; the model's vectors have 16 numbers"):
        calibrate(model, others, (17,))


def test_the_set_that_is_encoded_is_no_calibration_set(model, source, others, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match="copy.txt is what is encoded; ranges are taken from other rows"):
        ranges_from(model, copy, source, 8)
    assert ranges_from(model, others, source, 8).shape == (2, 8)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="none.jsonl"):
        calibrate(model, tmp_path / "none.jsonl")


def test_each_tower_has_its_own_ranges(two_towers, others):
    (query, asked), (document, found) = (calibrate(two_towers, others, as_column=side) for side in ("query", "document"))
    assert (query, document) == ("query", "document") and calibrate(two_towers, others)[0] == "document"
    assert np.abs(asked.ranges[16] - found.ranges[16]).max() > 0.01


@pytest.mark.parametrize("precision", quantize.PRECISIONS)
def test_a_file_of_codes(model, source, sentences, vectors, ranges, tmp_path, precision):
    given = ranges if quantize.in_ranges(precision) else None
    output = tmp_path / "codes.npy"
    encode_file(model, source, output, dim=8, precision=precision, ranges=given, block=64)
    found = np.load(output)
    assert found.dtype == quantize.TYPES[precision] and len(found) == 150
    wanted = quantize.dequantize(quantize.quantize(shortened(vectors), precision, given), precision, 8, given)
    # Batches differ by rounding, which may move a number to the next code.
    step = {"float32": 0, "float16": 1e-3, "bfloat16": 8e-3, "binary": 0, "ubinary": 0}.get(precision, 0.009)
    np.testing.assert_allclose(quantize.dequantize(found, precision, 8, given), wanted, atol=step + 3e-6)
    assert output.with_suffix(".ranges.npy").exists() == (given is not None)
    if given is not None:
        np.testing.assert_array_equal(np.load(output.with_suffix(".ranges.npy")), given)
    codes = encode_codes(model, sentences, precision=precision, dim=8, ranges=given, column="text")
    assert codes.dtype == found.dtype and (codes == found).mean() > 0.99


def test_a_table_of_codes_says_what_they_are(model, source, sentences, ranges, tmp_path):
    encode_file(model, source, tmp_path / "a.npy", dim=8, precision="int8", ranges=ranges, block=64)
    encode_file(model, source, tmp_path / "a.parquet", dim=8, precision="int8", ranges=ranges, block=64)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("text").to_pylist() == sentences
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: int8>[8]"
    assert table.schema.metadata == {b"embedjax.precision": b"int8", b"embedjax.dim": b"8"}
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist(), np.int8), np.load(tmp_path / "a.npy"))


def test_ranges_have_to_come_from_somewhere(model, source, ranges, tmp_path):
    with pytest.raises(ConfigError, match="int8 needs the ranges .* which tiny has not: .*--calibrate FILE"):
        encode_file(model, source, tmp_path / "a.npy", precision="int8")
    with pytest.raises(ConfigError, match="ranges are .2, 8.; vectors of 16 numbers need"):
        encode_file(model, source, tmp_path / "a.npy", precision="int8", ranges=ranges)


def test_goes_on_with_the_same_ranges_alone(model, source, ranges, tmp_path, monkeypatch):
    output, count = tmp_path / "a.npy", Partial.count

    def die_at_64(self, rows, **more):
        count(self, rows, **more)
        if self.done == 64:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Partial, "count", die_at_64)
        encode_file(model, source, output, dim=8, precision="int8", ranges=ranges, block=32)
    for changed, other in (("ranges", {"ranges": ranges * 2}), ("precision, ranges", {"precision": "ubinary", "ranges": None})):
        with pytest.raises(ConfigError, match=rf"other {changed}\)"):
            encode_file(model, source, output, **{"dim": 8, "precision": "int8", "ranges": ranges, "block": 32} | other)
    encode_file(model, source, output, dim=8, precision="int8", ranges=ranges, block=32)
    encode_file(model, source, tmp_path / "whole.npy", dim=8, precision="int8", ranges=ranges, block=32)
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "a.ranges.npy", "whole.npy", "whole.ranges.npy"}


def test_lines_for_engines(model, source, sentences, vectors, tmp_path):
    short, bits = shortened(vectors), quantize.quantize(shortened(vectors), "ubinary")
    kept = {"dim": 8, "block": 64}
    encode_file(model, source, tmp_path / "q.jsonl", feed=Feed("qdrant", field="embedding"), **kept)
    points = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [point["id"] for point in points] == list(range(150)) and points[7]["payload"] == {"text": sentences[7]}
    np.testing.assert_allclose([point["vector"]["embedding"] for point in points], short, atol=3e-6)

    for precision, form, size in (("float32", ">8f", 4), ("bfloat16", "", 2), ("ubinary", ">1b", 1)):
        encode_file(model, source, tmp_path / "v.jsonl", precision=precision, feed=Feed("vespa", field="embedding"), **kept)
        put = json.loads((tmp_path / "v.jsonl").read_text().splitlines()[3])
        cells = bytes.fromhex(put["fields"]["embedding"]["values"])
        assert put["put"] == "id:doc:doc::3" and put["fields"]["text"] == sentences[3]
        assert len(cells) == (1 if precision == "ubinary" else 8 * size)
        if precision == "bfloat16":
            cells = b"".join(cells[at : at + 2] + b"\0\0" for at in range(0, 16, 2))
        found = struct.unpack(form or ">8f", cells)
        wanted = bits[3].view(np.int8) if precision == "ubinary" else short[3]
        np.testing.assert_allclose(found, wanted, atol=4e-3 if precision == "bfloat16" else 3e-6)

    for precision in ("float32", "float16", "binary"):
        encode_file(model, source, tmp_path / "p.csv", precision=precision, feed=Feed("pgvector", field="embedding"), **kept)
        with (tmp_path / "p.csv").open(newline="") as file:
            head, *rows = csv.reader(file)
        assert head == ["id", "text", "embedding"] and [row[:2] for row in rows] == [
            [str(n), t] for n, t in enumerate(sentences)
        ]
        if precision == "binary":
            np.testing.assert_array_equal([from_bit_string(row[2]) for row in rows], bits)
        else:
            np.testing.assert_allclose([from_literal(row[2]) for row in rows], short, atol=3e-6 if "32" in precision else 5e-4)


@pytest.mark.parametrize(
    ("output", "options", "told"),
    [
        ("a.jsonl", {}, "--for qdrant, vespa, pgvector"),
        ("a.npy", {"feed": Feed("qdrant")}, "a.npy: .jsonl and .csv are for an engine"),
        ("a.csv", {"feed": Feed("qdrant")}, "--for qdrant writes .jsonl, not .csv"),
        ("a.jsonl", {"feed": Feed("pgvector")}, "--for pgvector writes .csv, not .jsonl"),
        ("a.jsonl", {"feed": Feed("qdrant"), "precision": "float16"}, "--for qdrant takes float32, not float16"),
        ("a.csv", {"feed": Feed("pgvector"), "precision": "bfloat16"}, "takes float32 or float16 or binary or ubinary"),
        ("a.faiss", {"precision": "binary", "dim": 12}, "an index of bits holds a multiple of 8 dimensions; 12 are asked for"),
        ("a.usearch", {"precision": "uint8", "ranges": np.zeros((2, 16), np.float32)}, "usearch has no uint8"),
        ("a.npy", {"dim": 0}, "0 dimensions are asked for"),
        ("a.txt", {}, "told by its ending"),
    ],
)  # fmt: skip
def test_what_an_output_does_not_hold(model, source, tmp_path, output, options, told):
    with pytest.raises(ConfigError, match=told):
        encode_file(model, source, tmp_path / output, **options)
    assert not list(tmp_path.iterdir())


def test_a_prefix_of_vectors_that_are_not_scaled_stays_as_it_is(model):
    kept = Kept(4, False, "binary")
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    np.testing.assert_array_equal(kept.prefix(vectors), vectors[:, :4])
    np.testing.assert_array_equal(packed_of(kept.codes(vectors), "binary"), np.packbits(vectors[:, :4] > 0, axis=1))
    assert kept.count == 1 and kept.vectors(kept.codes(vectors)).shape == (5, 4)
