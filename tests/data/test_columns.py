"""Columns of a set: named, found, and of the right kind row by row."""

import hashlib

import numpy as np
import pytest

from embedjax.config import Set
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.columns import hash_texts, make_layout, read_row, read_rows
from embedjax.data.sources import BadRow


class Rows(tuple):
    """A source in memory."""

    name, files = "pairs.jsonl", ()
    columns = property(lambda self: tuple(self[0]))

    def where(self, row):
        return self.name, row + 1


def source(*rows):
    return Rows(rows)


def test_the_layout_orders_columns():
    which = Set(columns={"label": "l", "negative_2": "n2", "anchor": "a", "negative": "n", "positive": "p"})
    layout = make_layout(which, source({"a": "", "p": "", "n": "", "n2": "", "l": 0}))
    assert list(layout.texts.items()) == [("anchor", "a"), ("positive", "p"), ("negative", "n"), ("negative_2", "n2")]
    assert layout.negatives == ("negative", "negative_2") and layout.numbers == {"label": "l"}


@pytest.mark.parametrize(
    "columns, error, message",
    [
        ({"anchr": "a"}, ConfigError, "'anchr'.*did you mean 'anchor'"),
        ({"positive": "a"}, ConfigError, "no column anchor"),
        ({"anchor": "a", "negative_2": "b"}, ConfigError, "no column 'negative'"),
        ({"anchor": "a", "negative": "b", "negative_3": "b"}, ConfigError, "no column 'negative_2'"),
        ({"anchor": "a", "negative_1": "b"}, ConfigError, "'negative_1'"),
        ({"anchor": "missing"}, DataError, "'train'.*'missing'.*a, b"),
        ({"anchor": "a", "score_2": "b"}, ConfigError, "no column 'score'"),
        ({"anchor": "a", "score": "b", "score_3": "b"}, ConfigError, "2 scores but no column 'score_2'"),
        ({"anchor": "a", "vectors": "b"}, ConfigError, "did you mean 'vector'"),
    ],
)
def test_columns_that_cannot_be(columns, error, message):
    with pytest.raises(error, match=message):
        make_layout(Set(columns=columns), source({"a": "", "b": ""}))


LAYOUT = make_layout(Set(columns={"anchor": "a", "score": "s", "label": "l"}), source({"a": "", "s": 0, "l": 0}))
GOOD = {"a": "text", "s": 0.5, "l": 3}


@pytest.mark.parametrize(
    "change", [{}, {"s": "0.5", "l": "3"}, {"s": np.float64(0.5), "l": 3.0}, {"l": np.int64(3), "more": []}]
)
def test_good_rows(change):
    values = read_row(source({**GOOD, **change}), LAYOUT, 0)
    assert values == {"anchor": "text", "score": 0.5, "label": 3} and isinstance(values["label"], int)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"a": None}, "'a' is missing"),
        ({"a": ""}, "'a' is empty"),
        ({"a": " \t\n\u2003"}, "'a' is empty"),
        ({"a": 3.0}, "'a' is float, not text"),
        ({"a": b"bytes"}, "'a' is bytes, not text"),
        ({"a": "half \ud83d"}, "Unicode"),
        ({"s": None}, "'s' is missing"),
        ({"s": float("nan")}, "'s' is nan"),
        ({"s": "nan"}, "'s' is 'nan'"),
        ({"s": float("inf")}, "finite"),
        ({"s": 1e39}, "finite"),
        ({"s": "high"}, "'s' is 'high', not a number"),
        ({"l": 2.5}, "'l' is 2.5"),
        ({"l": 2**31}, "32-bit"),
        ({"l": float("nan")}, "'l' is nan"),
        ({"l": object()}, "'l' is object"),
    ],
)
def test_bad_rows(change, reason):
    rows = source(GOOD, {**GOOD, **change})
    with pytest.raises(BadRow, match=reason) as caught:
        read_row(rows, LAYOUT, 1)
    assert (caught.value.file, caught.value.row) == ("pairs.jsonl", 2)
    good, bad = read_rows(rows, LAYOUT, [1, 0])
    assert list(good) == [0] and list(bad) == [1]


@pytest.mark.parametrize("value", [["x"], ("x",), np.array(["x"]), {"x": 1}])
def test_lists_are_an_error_not_a_bad_row(value):
    with pytest.raises(DataError, match="pairs.jsonl, row 1: column 'a' holds .*one text") as caught:
        read_row(source({**GOOD, "a": value}), LAYOUT, 0)
    assert not isinstance(caught.value, BadRow)


def test_several_scores_stay_in_order():
    columns = {"anchor": "a", "score_2": "t", "score": "s"}
    layout = make_layout(Set(columns=columns), source({"a": "x", "s": 1, "t": "2.5"}))
    row = read_row(source({"a": "x", "s": 1, "t": "2.5"}), layout, 0)
    scores = layout.arrays([row, row])["scores"]
    assert scores.dtype == np.float32 and scores.tolist() == [[1, 2.5], [1, 2.5]]


NAMED = Set(columns={"anchor": "a", "label": "l"}, labels=("good", "bad", "ugly"))


def test_labels_by_name_or_number():
    rows = source(*({"a": "x", "l": value} for value in ("bad", "good", 2, "ugly")))
    layout = make_layout(NAMED, rows)
    labels = layout.arrays([read_row(rows, layout, k) for k in range(4)])["labels"]
    assert labels.dtype == np.int32 and labels.tolist() == [1, 0, 2, 2]


@pytest.mark.parametrize(
    "value, reason",
    [("godo", "'godo', none of the 3 labels; did you mean 'good'"), ("?", "none of the 3 labels$"), (3, "numbers 0 to 2"),
     (-1, "numbers 0 to 2"), (None, "missing")],
)  # fmt: skip
def test_labels_that_are_none(value, reason):
    rows = source({"a": "x", "l": "good"}, {"a": "x", "l": value})
    with pytest.raises(BadRow, match=reason):
        read_row(rows, make_layout(NAMED, rows), 1)


def test_lists_of_labels_become_zeros_and_ones():
    rows = source(*({"a": "x", "l": value} for value in (None, [], ["ugly", "good"], (1,), np.array(["bad"]), "bad", ["x"])))
    layout = make_layout(NAMED, rows)
    good, bad = read_rows(rows, layout, range(7))
    labels = layout.arrays(list(good.values()))["labels"]
    assert labels.dtype == np.float32 and labels.tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert list(bad) == [0, 5, 6] and "not a list" in bad[5].reason and "'x', none of" in bad[6].reason
    with pytest.raises(ConfigError, match="'l' holds lists; name the classes"):
        make_layout(Set(columns=NAMED.columns), rows)


def test_vectors():
    values = (None, [0.5, 1], np.array([2.0, 3]), [1], [1, None], ["a", "b"], [1, float("inf")], "1 2")
    rows = source(*({"a": "x", "v": value} for value in values))
    layout = make_layout(Set(columns={"anchor": "a", "vector": "v"}), rows)
    good, bad = read_rows(rows, layout, range(len(rows)))
    vectors = layout.arrays(list(good.values()))["vectors"]
    assert vectors.dtype == np.float32 and vectors.tolist() == [[0.5, 1], [2, 3]] and len(bad) == 6
    assert layout.arrays([layout.blank()])["vectors"].shape == (1, 2)


@pytest.mark.parametrize("change", [{"labels": ("a", "a")}, {"labels": ("",)}, {"weight": 0.0}, {"weight": float("nan")}])
def test_sets_that_cannot_be(change):
    with pytest.raises(ConfigError, match="set 'train'"):
        Set(**change)


def test_hashes_are_two_words_of_blake2b():
    hashes = hash_texts(["a", "b", "a"])
    assert hashes.dtype == np.uint32 and hashes.shape == (3, 2)
    assert int(hashes[1, 0]) + (int(hashes[1, 1]) << 32) == int.from_bytes(
        hashlib.blake2b(b"b", digest_size=8).digest(), "little"
    )
    assert (hashes[0] == hashes[2]).all() and (hashes[0] != hashes[1]).any()
