"""Search: the nearest texts first, vectors kept between searches, functions of a folder as a corpus."""

import io

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from embedjax import config, search
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.text import Texts
from embedjax.load import Model
from embedjax.models.embedder import build_embedder

TEXTS = ["red green", "green green blue", "blue yellow", "one two three", "three two", "red"]


@pytest.fixture(scope="module")
def model():
    """A random tower; a text is nearest to itself."""
    words = ["[PAD]", "[UNK]", *sorted(set(" ".join(TEXTS).split()))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    arch = config.Bert(vocab_size=16, width=8, depth=1, heads=2, mlp=16, positions=8, init_std=0.5)
    tower = config.Tower(arch=arch, pooling="mean", include_prompt=True, dense=(), normalize=False)
    embedder = build_embedder(tower)
    return Model(
        config=config.Model({"text": tower}),
        embedders={"text": embedder},
        params={"towers": {"text": jax.jit(embedder.init)(jax.random.key(0))}},
        texts={"text": Texts(tokenizer, max_length=8)},
        tokenizers={},
        origin="tiny",
    )


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return search.open_corpus(tmp_path / "texts.txt")


def test_a_text_finds_itself(model, corpus):
    for text in TEXTS:
        hits = search.search(model, corpus, text, 3)
        assert [hit.rank for hit in hits] == [1, 2, 3]
        assert hits[0].text == text and hits[0].score == pytest.approx(1, abs=1e-5)
        assert hits[0].place.endswith(f"texts.txt:{TEXTS.index(text) + 1}")
        assert hits[0].score >= hits[1].score >= hits[2].score
    assert len(search.search(model, corpus, "red", 100)) == len(TEXTS)


def test_vectors_are_kept(model, corpus, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = search.search(model, corpus, "red", 2, cache=cache)
    (kept,) = cache.iterdir()
    encoded, encode = [], search.encode
    monkeypatch.setattr(search, "encode", lambda m, texts, **rest: encoded.append(len(texts)) or encode(m, texts, **rest))
    assert search.search(model, corpus, "red", 2, cache=cache) == first
    assert encoded == [1], "only the query"
    search.search(model, search.Corpus(TEXTS[:3], corpus.places[:3]), "red", 2, cache=cache)
    assert encoded == [1, 3, 1] and len(list(cache.iterdir())) == 2
    np.testing.assert_allclose(np.linalg.norm(np.load(kept), axis=1), 1, atol=1e-6)


def test_where_vectors_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert search.cache_folder() == tmp_path / "embedjax" / "search"


def test_plain_output(capsys):
    hits = [search.Hit(1, 0.91234, "def f():\n\n    return 1\n" + "    #\n" * 9, "a.py:3"), search.Hit(2, -0.1, "b", "b.py:1")]
    search.show(hits)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["1  0.912  a.py:3", "    def f():", "        return 1"]
    assert lines[-2:] == ["2  -0.100  b.py:1", "    b"] and len(lines) == 1 + search.LINES_SHOWN + 2


def test_output_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    search.show([search.Hit(1, 0.5, "[red]" + "x" * 100, "a" * 80)], out)
    assert "[red]xxx" in out.getvalue() and all(len(line) <= 60 for line in out.getvalue().splitlines())


SOURCE = '''import os

class A:
    @property
    def documented(self):
        """What it does."""
        value = os.getcwd()
        return value

    async def plain(self): return 1

def only_docstring():
    """Nothing else."""

def outer():
    def inner():
        pass
    return inner
'''


def test_functions_of_a_folder(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "package" / "module.py").write_text(SOURCE)
    (tmp_path / "package" / "broken.py").write_text("def (")
    (tmp_path / ".hidden" / "other.py").write_text(SOURCE)
    corpus = search.open_corpus(tmp_path)
    found = {place.rsplit(":", 1)[1]: text for text, place in zip(corpus.texts, corpus.places, strict=True)}
    assert found == {
        "5": "def documented(self):\n    value = os.getcwd()\n    return value",
        "10": "async def plain(self): return 1",
        "12": 'def only_docstring():\n    """Nothing else."""',
        "15": "def outer():\n    def inner():\n        pass\n    return inner",
    }
    assert all(place.startswith(str(tmp_path / "package" / "module.py")) for place in corpus.places)


def test_faults(model, corpus, tmp_path):
    with pytest.raises(ConfigError, match="query is empty"):
        search.search(model, corpus, "  ")
    with pytest.raises(ConfigError, match="at least 1"):
        search.search(model, corpus, "red", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Python functions"):
        search.open_corpus(tmp_path / "empty")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no texts"):
        search.open_corpus(tmp_path / "blank.txt")
    (tmp_path / "bytes.txt").write_bytes(b"red\n\xff\n")
    with pytest.raises(DataError, match=r"bytes.txt:2: not UTF-8"):
        search.open_corpus(tmp_path / "bytes.txt")


def test_empty_lines_are_no_texts(tmp_path):
    (tmp_path / "gap.txt").write_text("red\n\nblue\n")
    corpus = search.open_corpus(tmp_path / "gap.txt")
    assert corpus == search.Corpus(["red", "blue"], [f"{tmp_path / 'gap.txt'}:{line}" for line in (1, 3)])
