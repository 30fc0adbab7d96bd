"""Search: the nearest texts first, vectors kept between searches, functions of a folder as a corpus."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from embedjax import commands, config, encode_images, encode_texts, search
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.files import cache_folder
from embedjax.data.text import Texts
from embedjax.evaluate.encode import PictureEncoder
from embedjax.evaluate.funnel import Stage, cut, funnel, prepare, unit_prefix
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
    encoded, encode = [], encode_texts
    for module in (search.vectors, search.corpus):
        monkeypatch.setattr(module, "encode", lambda m, texts, **rest: encoded.append(len(texts)) or encode(m, texts, **rest))
    assert search.search(model, corpus, "red", 2, cache=cache) == first
    assert encoded == [1], "only the query"
    search.search(model, search.Corpus(TEXTS[:3], corpus.places[:3]), "red", 2, cache=cache)
    assert encoded == [1, 1, 3] and len(list(cache.iterdir())) == 2
    np.testing.assert_allclose(np.linalg.norm(np.load(kept), axis=1), 1, atol=1e-6)


STAGED = (
    search.Compared(4),
    search.Compared(4, "int8"),
    search.Compared(0, "binary"),
    search.Compared(funnel=(Stage(2, "float32", 5),)),
    search.Compared(8, "uint8", (Stage(2, "binary", 5), Stage(4, "float16", 4))),
)


@pytest.mark.parametrize("compared", STAGED, ids=lambda how: ",".join(map(str, how.stages(8))))
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_what_is_compared_is_kept(model, corpus, tmp_path, monkeypatch, compared, similarity):
    """Prefixes, codes and stages against the same over vectors that were encoded, with and without what was kept."""
    model = dataclasses.replace(model, config=dataclasses.replace(
        model.config, towers={"text": dataclasses.replace(model.config.towers["text"], similarity=similarity)}
    ))  # fmt: skip
    prefix = cut if similarity == "dot" else unit_prefix
    stages, vectors = compared.stages(8), prefix(encode_texts(model, TEXTS), 8)
    wanted = funnel(prefix(encode_texts(model, ["red"]), 8), prepare(vectors, stages, prefix=prefix), stages, 3, prefix=prefix)
    encoded, encode = [], encode_texts
    monkeypatch.setattr(search.corpus, "encode", lambda m, x, **rest: encoded.append(len(x)) or encode(m, x, **rest))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        hits = search.search(model, corpus, "red", 3, how=compared, cache=cache)
        assert [hit.text for hit in hits] == [TEXTS[row] for row in wanted[1][0]]
        np.testing.assert_allclose([hit.score for hit in hits], wanted[0][0], atol=1e-5)
    assert encoded == [6, 6], "once for the cache"
    endings = {path.name.partition(".")[2] for path in (tmp_path / "cache").iterdir()}
    codes = {f"dim{s.dim}.{s.precision}" for s in stages if s != Stage(8)}
    parts = {f"{code}.codes.npy" for code in codes} | {f"{code}.ranges.npy" for code in codes if "int8" in code}
    assert endings == parts | ({"npy"} if Stage(8) in stages else set())


def test_codes_are_made_of_vectors_that_are_kept(model, corpus, tmp_path, monkeypatch):
    search.search(model, corpus, "red", 3, cache=tmp_path / "cache")
    monkeypatch.setattr(search.corpus, "encode", None)
    assert len(search.search(model, corpus, "red", 3, how=search.Compared(4, "int8"), cache=tmp_path / "cache")) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_the_command_searches_in_stages(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("embedjax.load.load", lambda name: model)
    common = ["model", "red", "--corpus", str(tmp_path / "texts.txt"), "--k", "1"]
    commands.search([*common, "--funnel", "2:binary:5, 4:int8:3", "--precision", "float16"])
    assert capsys.readouterr().out.endswith("texts.txt:6\n    red\n")
    for options, said in {
        ("--dim", "9"): "stage 9:float32 takes 9 numbers; the vectors have 8",
        ("--dim", "-1"): "--dim is -1",
        ("--funnel", "4:int8"): "stage '4:int8'; it must be DIM:PRECISION:SHORTLIST",
        ("--funnel", "4:int7:3"): "no precision 'int7'.*int8",
        ("--funnel", "4:int8:3", "--dim", "2"): "must know more",
        ("--funnel", "4:int8:3", "--pool", "2"): "for late interaction, --funnel for one vector",
        ("--first", "bm25"): "are for late interaction; tiny has one vector a text",
    }.items():
        with pytest.raises(ConfigError, match=said):
            commands.search([*common, *options])


def test_where_vectors_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("search") == tmp_path / "embedjax" / "search"


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


# ---- pictures


def test_texts_and_pictures_find_pictures(pair, pictures, tmp_path, monkeypatch):
    """Against all products: paths in the order of their nearness, of words and of a picture, which finds itself first."""
    monkeypatch.chdir(pictures.parent)
    gallery = search.open_gallery(pictures.name)
    paths = sorted(path.relative_to(pictures.parent).as_posix() for path in pictures.glob("[a-z]*/*"))
    vectors = encode_images(pair, paths)
    text = encode_texts(pair, ["a red photo"])[0]
    picture = pictures / "red" / "3.png"
    for query, wanted in (("a red photo", text), (picture, vectors[paths.index(f"{pictures.name}/red/3.png")])):
        hits = search.search(pair, gallery, query, 6, cache=tmp_path)
        order = np.argsort(-vectors @ wanted, kind="stable")[:6]
        assert [hit.place for hit in hits] == [paths[n] for n in order]
        np.testing.assert_allclose([hit.score for hit in hits], (vectors @ wanted)[order], atol=1e-6)
        assert [hit.text for hit in hits] == [""] * 6 and [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert hits[0].place.endswith("red/3.png") and hits[0].score == pytest.approx(1, abs=1e-5)
    out = io.StringIO()
    search.show(hits[:1], out)
    assert out.getvalue() == f"1  1.000  {pictures.name}/red/3.png\n"


def test_a_picture_finds_texts(pair, pictures, tmp_path):
    lines = ["red cat", "a blue photo", "old stone house"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    hits = search.search(pair, search.open_corpus(tmp_path / "lines.txt"), pictures / "red" / "0.png", 3)
    found = encode_texts(pair, lines) @ encode_images(pair, [pictures / "red" / "0.png"])[0]
    assert [hit.text for hit in hits] == [lines[n] for n in np.argsort(-found)]


def test_vectors_of_pictures_are_kept_until_one_changes(pair, pictures, tmp_path, monkeypatch):
    folder, cache = tmp_path / "copy", tmp_path / "cache"
    shutil.copytree(pictures, folder)
    encoded, tokenize = [], PictureEncoder.tokenize
    monkeypatch.setattr(
        PictureEncoder, "tokenize", lambda self, items, *rest: encoded.append(len(items)) or tokenize(self, items, *rest)
    )
    find = lambda: search.search(pair, search.open_gallery(folder), "red", 40, cache=cache)
    first = find()
    assert find() == first and encoded == [28] and len(first) == 28
    shutil.copyfile(folder / "pink" / "0.png", folder / "red" / "0.png")
    changed = find()
    assert encoded == [28, 28] and [hit.place for hit in changed] != [hit.place for hit in first]
    shutil.copyfile(folder / "pink" / "0.png", folder / "red" / "new.jpg")
    assert len(find()) == 29 and encoded == [28, 28, 29]


def test_damaged_pictures_are_passed_over_and_told(pair, pictures, tmp_path, caplog):
    folder = tmp_path / "copy"
    shutil.copytree(pictures, folder)
    (folder / "red" / "0.png").write_bytes(b"no picture")
    (folder / "blue" / "3.jpg").unlink()
    (folder / "blue" / "3.jpg").write_bytes((pictures / "blue" / "3.jpg").read_bytes()[:200])
    find = lambda k: search.search(pair, search.open_gallery(folder), "red", k, cache=tmp_path / "cache")
    with caplog.at_level("WARNING"):
        hits = find(28)
    assert len(hits) == 26 and not {hit.place for hit in hits} & {f"{folder}/red/0.png", f"{folder}/blue/3.jpg"}
    assert "2 of 28 pictures cannot be decoded and are passed over; the first: " in caplog.text
    assert f"{folder}/blue/3.jpg:1: column 'image': picture cannot be decoded" in caplog.text
    assert find(3) == hits[:3], "those that are kept know which were damaged"
    for how in (search.Compared(0, "int8"), search.Compared(funnel=(Stage(4, "binary", 28),))) * 2:
        found = search.search(pair, search.open_gallery(folder), "red", 28, how=how, cache=tmp_path / "cache")
        assert {hit.place for hit in found} == {hit.place for hit in hits}
    for path in folder.glob("*/*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 28 pictures can be decoded"):
        find(3)


def test_pictures_of_a_table_and_what_cannot_be_searched(pair, model, pictures, tmp_path):
    rows = [{"file": str(pictures / "red" / "0.png"), "n": 1}, {"file": str(pictures / "red" / "1.jpg"), "n": 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hits = search.search(pair, search.open_gallery(tmp_path / "rows.jsonl", "file"), pictures / "red" / "1.jpg", 1)
    assert hits[0].place == rows[1]["file"]
    with pytest.raises(ConfigError, match="say which holds the pictures"):
        search.open_gallery(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no such folder|no such file"):
        search.open_gallery(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without pictures"):
        search.open_gallery(tmp_path / "empty")
    with pytest.raises(DataError, match="none.png.*No such file"):
        search.search(pair, search.open_gallery(pictures), tmp_path / "none.png")
    with pytest.raises(ConfigError, match="no tower that takes pictures"):
        search.search(model, search.open_gallery(pictures), "red")
