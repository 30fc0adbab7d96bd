"""Corpora and pairs: each text once, found by its content; what is known of an anchor."""

import json

import numpy as np
import pytest

from embedjax.config import File
from embedjax.config.errors import DataError
from embedjax.data.corpus import Corpus, Lists, Pairs
from embedjax.data.sources import open_source


@pytest.fixture
def written(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return open_source(File(str(path)))

    return write


def test_each_text_is_there_once_in_the_order_of_the_sources(written, caplog):
    rows = [{"title": "A", "text": "one"}, {"text": "two"}, {"title": "A", "text": "one"}, {"text": " "}, "broken", {"text": 3}]
    first, more = written("corpus.jsonl", rows), written("more.jsonl", [{"x": "two"}, {"x": "three"}, {"x": "A one"}])
    told = []
    corpus = Corpus([(first, ("title", "text")), (more, ["x"])], progress=lambda *at: told.append(at))
    assert corpus.take(range(len(corpus))) == ["A one", "two", "three"] and corpus[2] == "three"
    assert corpus.find(["three", "A one", "?", "two"]).tolist() == [2, 0, -1, 1] and len(corpus.find([])) == 0
    assert told == [(6, 9), (9, 9)]
    (warned,) = caplog.messages
    assert warned == f"{first.name}: 3 of 6 rows have no text in title, text and are passed over"
    with pytest.raises(DataError, match="more.jsonl has no column 'y'"):
        Corpus([(more, ["y"])])
    with pytest.raises(DataError, match="no texts in text"):
        Corpus([(written("empty.jsonl", [{"text": ""}]), ["text"])])


def test_many_texts_keep_their_numbers(written):
    texts = [f"text {k * 7919 % 5000}" for k in range(10_000)]
    corpus = Corpus([(written("many.jsonl", [{"t": text} for text in texts]), ["t"])])
    assert len(corpus) == 5000 and corpus.take(range(5000)) == texts[:5000]
    assert corpus.find(texts).tolist() == [k % 5000 for k in range(10_000)]


def test_pairs_know_their_positives_and_themselves(written):
    rows = [("q", "a"), ("r", "b"), ("q", "c"), ("", "a"), ("b", None), ("b", "a"), ("q", "a")]
    source = written("pairs.jsonl", [dict(zip(("anchor", "positive"), row, strict=True)) for row in rows])
    corpus = Corpus([(written("corpus.jsonl", [{"text": "c"}, {"text": "d"}]), ["text"]), (source, ["positive"])])
    pairs = Pairs(source, "anchor", "positive", corpus)
    assert corpus.take(range(len(corpus))) == ["c", "d", "a", "b"] and pairs.anchors.take(range(3)) == ["q", "r", "b"]
    assert pairs.anchor.tolist() == [0, 1, 0, -1, -1, 2, 0] and pairs.positive.tolist() == [2, 3, 0, -1, -1, 2, 2]
    assert pairs.rows.tolist() == [0, 1, 2, 5, 6] and pairs[4] == ("b", "")
    known = pairs.known(corpus)
    assert known.sizes.tolist() == [2, 1, 2] and known.padded(range(3)).tolist() == [[0, 2], [3, -1], [2, 3]]
    assert known.padded(range(1, 2)).tolist() == [[3]]
    with pytest.raises(DataError, match="no row has texts in both"):
        Pairs(written("none.jsonl", [{"anchor": "a", "positive": ""}]), "anchor", "positive", corpus)


def test_lists_of_keys_without_values():
    lists = Lists(np.array([3, 1, 1, 1]), np.array([5, 9, 2, 2]), 5)
    assert lists.padded(range(5)).tolist() == [[-1, -1], [2, 9], [-1, -1], [5, -1], [-1, -1]]
