"""Glyphs: drawings and names from fonts; held-out names are new, their words are not."""

import collections
import importlib.util
import io
import unicodedata

import numpy as np
import pytest
from PIL import Image

from embedjax import config
from embedjax.config.errors import DataError
from embedjax.data import glyphs
from embedjax.data.sources import manifest, open_source


@pytest.fixture(scope="module")
def splits():
    return {split: open_source(config.Glyphs(split)) for split in ("train", "test")}


def names(source):
    return [glyphs.name_of(glyph.code) for glyph in source.glyphs]


def test_held_out_names_are_new_and_their_words_are_known(splits):
    train, test = (set(names(source)) for source in splits.values())
    assert len(test) > 400 and 0.1 < len(test) / (len(test) + len(train)) < 0.14
    assert not train & test
    words = collections.Counter(word for name in train for word in set(name.split()))
    assert min(words[word] for name in test for word in name.split()) >= glyphs.SEEN
    assert all(len(name.split()) > 1 for name in test)


def test_a_drawing_fills_its_square(splits):
    rows = [splits["train"][i] for i in range(0, len(splits["train"]), 997)]
    for row in rows:
        ink = np.asarray(Image.open(io.BytesIO(row["image"]))) < 128
        assert ink.shape == (64, 64) and ink.any(), row["name"]
        places = np.argwhere(ink)
        longer = (np.ptp(places, axis=0) + 1).max()
        assert 40 <= longer <= 60, row["name"]
        middle = (places.min(0) + places.max(0)) / 2
        assert np.abs(middle - 31.5).max() < 4, row["name"]


def test_rows_are_the_same_again_and_differ_by_seed(splits):
    again = open_source(config.Glyphs("test"))
    assert again.glyphs == splits["test"].glyphs and again[5] == splits["test"][5]
    assert set(names(open_source(config.Glyphs("test", seed=1)))) != set(names(again))
    code = again.glyphs[5].code
    assert again[5]["name"] == unicodedata.name(chr(code)).lower().replace("-", " ") and again.where(5)[1] == code
    assert sum(file["rows"] for file in manifest(again)) == len(again)


def test_one_font_has_every_name_once():
    one = open_source(config.Glyphs("test", font="DejaVuSans"))
    assert len(set(names(one))) == len(one) > 400
    assert len(open_source(config.Glyphs("train", limit=50))) == 50
    with pytest.raises(DataError, match=r"no font 'Dejavu'; found: DejaVuSans, "):
        open_source(config.Glyphs("test", font="Dejavu"))
    with pytest.raises(IndexError):
        one[len(one)]


def test_without_matplotlib(monkeypatch):
    glyphs._coverage.cache_clear()
    glyphs._split.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install matplotlib"):
        open_source(config.Glyphs())
