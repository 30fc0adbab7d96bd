"""Texts of late interaction: markers, lengths, queries filled with [MASK], documents without punctuation."""

import dataclasses

import numpy as np
import pytest

from embedjax.config import Late
from embedjax.config.errors import ConfigError
from embedjax.data.text import Texts
from embedjax.data.tokenizer import add_tokens, train_wordpiece

LATE = Late(query_length=8, document_length=10)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_wordpiece(["red green, blue. cat dog!"], 100)
    add_tokens(made, ("[unused0]", "[unused1]"), 110)
    return made


def decoded(tokenizer, columns, which):
    return [
        tokenizer.decode(ids[keep].tolist(), skip_special_tokens=False) for ids, keep in zip(columns["ids"], which, strict=True)
    ]


def test_queries_are_marked_filled_and_scored_whole(tokenizer):
    texts = Texts(tokenizer, 4, late=LATE).of("anchor")
    found = texts.encode(["red, green", "cat dog red blue green cat dog"])
    everything = np.ones_like(found["mask"])
    assert decoded(tokenizer, found, everything) == [
        "[CLS] [unused0] red, green [SEP] [MASK] [MASK]",
        "[CLS] [unused0] cat dog red blue green [SEP]",
    ]
    np.testing.assert_array_equal(found["mask"].sum(1), [6, 8])
    assert found["score"].all() and texts.max_length == 8
    np.testing.assert_array_equal(texts.lengths(["red"]), [8])
    attended = dataclasses.replace(texts, late=dataclasses.replace(LATE, attend=True)).encode(["red"])
    assert attended["mask"].all() and attended["score"].all()
    # In a longer batch what is beyond the query's length is padding that nobody sees or scores.
    wide = texts.encode(["red"], length=12)
    assert wide["score"].sum() == 8 and not wide["mask"][:, 8:].any() and not wide["ids"][:, 8:].any()


def test_queries_without_expansion_are_as_long_as_they_are(tokenizer):
    texts = Texts(tokenizer, 4, late=dataclasses.replace(LATE, expand=False)).of("query")
    found = texts.encode(["red, green", "cat"])
    assert decoded(tokenizer, found, found["score"]) == ["[CLS] [unused0] red, green [SEP]", "[CLS] [unused0] cat [SEP]"]
    np.testing.assert_array_equal(found["score"], found["mask"])
    np.testing.assert_array_equal(texts.lengths(["red, green", "cat"]), [6, 4])


@pytest.mark.parametrize("column", ["positive", "negative", "document", "text"])
def test_documents_are_marked_and_their_punctuation_is_not_scored(tokenizer, column):
    texts = Texts(tokenizer, 4, late=LATE).of("query").of(column)
    found = texts.encode(["red, green. blue!", "cat"])
    assert decoded(tokenizer, found, found["mask"]) == ["[CLS] [unused1] red, green. blue! [SEP]", "[CLS] [unused1] cat [SEP]"]
    assert decoded(tokenizer, found, found["score"]) == ["[CLS] [unused1] red green blue [SEP]", "[CLS] [unused1] cat [SEP]"]
    assert texts.encode(["cat " * 30])["mask"].sum() == 10 and texts.lengths(["cat " * 30])[0] == 10
    skipping = dataclasses.replace(texts, late=dataclasses.replace(LATE, skip=("red",))).encode(["red, cat"])
    assert decoded(tokenizer, skipping, skipping["score"]) == ["[CLS] [unused1], cat [SEP]"]


def test_a_marker_may_be_left_out(tokenizer):
    texts = Texts(tokenizer, 4, late=dataclasses.replace(LATE, document_marker=""))
    found = texts.encode(["cat " * 30])
    assert decoded(tokenizer, found, found["mask"]) == ["[CLS] " + "cat " * 8 + "[SEP]"]


def test_what_does_not_fit_is_told(tokenizer):
    with pytest.raises(ConfigError, match="no token '@q'"):
        Texts(tokenizer, 4, late=dataclasses.replace(LATE, query_marker="@q")).of("query")
    with pytest.raises(ConfigError, match="has no room"):
        add_tokens(train_wordpiece(["red"], 100), ("@q", "@d"), 10)
    with pytest.raises(ConfigError, match="Late.query_length"):
        Texts(tokenizer, 4, late=LATE).of("query").encode(["red"], length=6)
    with pytest.raises(ConfigError, match="attend"):
        Late(expand=False, attend=True)
    with pytest.raises(ConfigError, match="query_length is 3"):
        Late(query_length=3)


# ---- for a person


def shown(texts, text, **options):
    return [(p.name, text[p.start : p.end], p.compared) for p in texts.pieces(text, **options)]


def test_pieces_name_markers_and_masks_and_stand_where_their_characters_are(tokenizer):
    queries = Texts(tokenizer, 4, late=LATE).of("query")
    assert shown(queries, "Red,  cat") == [
        ("[CLS]", "", True),
        ("[unused0]", "", True),
        ("red", "Red", True),
        (",", ",", True),
        ("cat", "cat", True),
        ("[SEP]", "", True),
        ("[MASK]", "", True),
        ("[MASK]", "", True),
    ]
    documents = Texts(tokenizer, 4, late=LATE)
    text = "red green, blue. cat dog!\nred blue"
    found = shown(documents, text)
    assert [name for name, *_ in found] == ["[CLS]", "[unused1]", "red", "green", ",", "blue", ".", "cat", "dog", "[SEP]"]
    assert [where for _, where, _ in found][2:9] == ["red", "green", ",", "blue", ".", "cat", "dog"], "cut at 10 tokens"
    assert [name for name, _, compared in found if not compared] == [",", "."]


def test_pieces_are_the_tokens_that_are_encoded(tokenizer):
    for text in ("red green, blue. cat dog!" * 30, "", "cat", "  dog\n\nred,,,"):
        for side in ("query", "document"):
            texts = Texts(tokenizer, 4, late=LATE).of(side)
            columns, pieces = texts.encode([text]), texts.pieces(text)
            assert [tokenizer.token_to_id(piece.name) for piece in pieces] == columns["ids"][0].tolist()
            assert [piece.compared for piece in pieces] == columns["score"][0].tolist()
            assert all(text[piece.start : piece.end].lower() == piece.name for piece in pieces if piece.placed)


def test_pieces_of_a_prompt_have_no_characters_of_the_text(tokenizer):
    texts = Texts(tokenizer, 4, late=LATE, prompts={"ask": "cat dog "}).of("query")
    found = shown(texts, "red cat", prompt="ask")
    assert [(name, where) for name, where, _ in found][2:6] == [("cat", ""), ("dog", ""), ("red", "red"), ("cat", "cat")]
