"""Lines for Qdrant and Vespa, against what their documentation shows."""

import json
import uuid

import numpy as np
import pytest

from embedjax.config.errors import ConfigError, DataError
from embedjax.data.sources import open_source, source_of
from embedjax.evaluate.engines import Feed, lines, qdrant_id, qdrant_point, vespa_put

THIRDS = (np.arange(1, 10, dtype=np.float32) / np.float32(9)).reshape(3, 3)


def source(tmp_path, rows):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(source_of(str(file)))


def test_a_point_of_qdrants():
    """A named vector that is a matrix: {"points": [{"id": 1, "vector": {NAME: [[...], ...]}, "payload": {...}}]}."""
    vectors = np.array([[0.6, -0.8], [1 / 3, 0.25]], np.float32)
    found = qdrant_point(Feed("qdrant", ids="key"), "17", {"text": "a text"}, vectors)
    assert found == {
        "id": 17,
        "vector": {"colbert": [[0.6, -0.8], [0.3333333, 0.25]]},
        "payload": {"key": "17", "text": "a text"},
    }


@pytest.mark.parametrize(
    ("id", "found"),
    [
        ("0", 0),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", str(uuid.uuid5(uuid.NAMESPACE_URL, "18446744073709551616"))),
        ("007", str(uuid.uuid5(uuid.NAMESPACE_URL, "007"))),
        ("936DA01F9ABD4d9d80C702AF85C822A8", "936da01f-9abd-4d9d-80c7-02af85c822a8"),
        ("550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-41d4-a716-446655440000"),
    ],
)
def test_qdrants_ids_are_whole_numbers_or_uuids(id, found):
    assert qdrant_id(id) == found


def test_a_put_of_vespas_has_floats_in_hexadecimal():
    """The example of Vespa's reference: tensor<float>(tag{},x[3]) with foo, bar and baz."""
    found = vespa_put(Feed("vespa", field="mixed", doctype="music"), "a:1", {"text": "a\x00b\ttext"}, THIRDS)
    assert found["put"] == "id:music:music::a:1" and found["fields"]["text"] == "a b\ttext"
    hexadecimal = ["3DE38E393E638E393EAAAAAB", "3EE38E393F0E38E43F2AAAAB", "3F471C723F638E393F800000"]
    assert found["fields"]["mixed"] == dict(zip("012", hexadecimal, strict=True))


def test_bits_are_vespas_int8():
    """Its pack_bits: bit by bit into bytes, the first number the highest: here -1, 1 and -128."""
    signs = np.array([[1] * 8, [-1] * 7 + [1], [1] + [-1] * 7], np.float32)
    found = vespa_put(Feed("vespa", bits=True), "7", {}, signs)["fields"]["colbert"]
    assert found == {"0": "FF", "1": "01", "2": "80"}
    cells = [np.frombuffer(bytes.fromhex(each), np.int8)[0] for each in found.values()]
    assert cells == [-1, 1, -128]


def test_lines_are_one_document_each(tmp_path):
    rows = source(tmp_path, [{"key": n + 5, "text": f"text\n{n} é"} for n in range(3)])
    made = list(lines(Feed("qdrant", ids="key"), rows, "text", 1, ["text\n1 é", "text\n2 é"], [THIRDS, THIRDS[:1]]))
    assert [json.loads(line)["id"] for line in made] == [6, 7] and all(line.count("\n") == 1 for line in made)
    assert json.loads(made[1])["payload"] == {"key": "7", "text": "text\n2 é"}
    made = list(lines(Feed("vespa"), rows, "text", 1, ["a"], [THIRDS]))
    assert json.loads(made[0])["put"] == "id:doc:doc::1"
    with pytest.raises(DataError, match=r"corpus.jsonl:3: no token of 'text"):
        list(lines(Feed("vespa"), rows, "text", 2, ["text"], [THIRDS[:0]]))


@pytest.mark.parametrize(
    ("feed", "told"),
    [
        (Feed("qdrant", bits=True), "--bits is for Vespa"),
        (Feed("vespa", bits=True), "multiple of 8 numbers; these have 12"),
        (Feed("vespa", field="col-bert"), "--field 'col-bert' is no name"),
        (Feed("vespa", doctype="my doc"), "--doctype 'my doc'"),
        (Feed("vespa", field="text"), "is the name of the texts' column"),
        (Feed("qdrant", ids="kay"), "did you mean 'key'"),
        (Feed("qdrant", ids="key"), r"corpus.jsonl:4: key 'b' is that of .*corpus.jsonl:2 too"),
        (Feed("vespa", ids="other"), "corpus.jsonl:2: column 'other' is missing"),
    ],
)
def test_what_an_engine_would_refuse_is_told_before_encoding(tmp_path, feed, told):
    rows = source(tmp_path, [{"key": key, "text": "t", **({"other": 1} if key == "a" else {})} for key in "abcb"])
    with pytest.raises((ConfigError, DataError), match=told):
        feed.check(rows, "text", 12)


def test_ids_that_become_one_are_told(tmp_path):
    same = ["550e8400-e29b-41d4-a716-446655440000", "550E8400E29B41D4A716446655440000"]
    rows = source(tmp_path, [{"key": key, "text": "t"} for key in same])
    Feed("vespa", ids="key").check(rows, "text", 8)
    with pytest.raises(DataError, match="is that of"):
        Feed("qdrant", ids="key").check(rows, "text", 8)
