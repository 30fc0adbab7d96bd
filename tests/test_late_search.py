"""`embedjax search` by late interaction: pooled, quantized and in stages, and what it shows of the tokens that matched."""

import io

import numpy as np
import pytest

from embedjax import commands, encode_texts, search
from embedjax.config.errors import ConfigError
from embedjax.evaluate.bm25 import bm25_rank
from embedjax.evaluate.late import encode_tokens, maxsim_topk
from embedjax.search import How, tokens

QUERY = "red cat, old river"


@pytest.fixture(scope="module")
def corpus(words):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(2, 16))) + "." for _ in range(40)]
    return search.Corpus(texts, [f"a.txt:{n}" for n in range(40)])


def rows_of(hits):
    return [int(hit.place.split(":")[1]) for hit in hits]


@pytest.fixture(scope="module")
def vectors(late_model, corpus):
    return encode_tokens(late_model, [QUERY], column="query"), encode_tokens(late_model, corpus.texts)


@pytest.mark.parametrize("fields", [{}, {"pool": 2}, {"precision": "int8"}, {"pool": 3, "precision": "binary"}])
def test_a_small_corpus_is_searched_as_it_is_kept(late_model, corpus, vectors, fields, tmp_path):
    asked, documents = vectors
    documents = documents.pooled(fields.get("pool", 1))
    documents = documents.quantized(fields["precision"]) if "precision" in fields else documents
    scores, places = maxsim_topk(asked, documents, 5)
    for cache in (None, tmp_path, tmp_path):
        hits = search.search(late_model, corpus, QUERY, 5, how=How(**fields), cache=cache)
        assert rows_of(hits) == places[0].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], scores[0], atol=1e-5)
        np.testing.assert_allclose([hit.match.score for hit in hits], scores[0], atol=1e-5)
        assert [hit.match.text for hit in hits] == [hit.text for hit in hits]
    kept = sorted(path.name.split(".", 1)[1] for path in tmp_path.iterdir())
    form = "pool{}.{}.".format(fields.get("pool", 1), fields.get("precision", "float32")) if fields else ""
    parts = ("ranges", "starts", "tokens") if fields.get("precision") == "int8" else ("starts", "tokens")
    assert kept == [f"{form}{part}.npy" for part in parts]
    if "precision" in fields:
        (file,) = tmp_path.glob("*.tokens.npy")
        assert np.load(file).nbytes == documents.nbytes


def test_whole_vectors_that_are_kept_are_not_made_again(late_model, corpus, tmp_path, monkeypatch):
    search.search(late_model, corpus, QUERY, 5, cache=tmp_path)
    encoded = []
    monkeypatch.setattr(search.kept, "encode_tokens", lambda *rest, **options: encoded.append(rest))
    search.search(late_model, corpus, QUERY, 5, how=How(pool=2, precision="uint8"), cache=tmp_path)
    assert not encoded and len(list(tmp_path.iterdir())) == 5


def test_stages_score_their_candidates_exactly(late_model, corpus, vectors, pair, tmp_path, monkeypatch):
    scores, places = maxsim_topk(*vectors, 40)
    exact = dict(zip(places[0].tolist(), scores[0].tolist(), strict=True))
    words = bm25_rank([QUERY], corpus.texts, 7)[0]
    similar = encode_texts(pair, [QUERY])[0] @ encode_texts(pair, corpus.texts).T
    stages = {
        "bm25": (How(first="bm25", candidates=7), words[words >= 0]),
        "model": (How(first=pair, candidates=7), np.argsort(-similar, kind="stable")[:7]),
    }
    encoded, encode = [], tokens.encode_tokens
    monkeypatch.setattr(tokens, "encode_tokens", lambda m, x, **rest: encoded.append(len(x)) or encode(m, x, **rest))
    for how, wanted in stages.values():
        encoded.clear()
        hits = search.search(late_model, corpus, QUERY, 40, how=how)
        assert rows_of(hits) == [row for row in exact if row in wanted] and len(hits) == len(wanted)
        np.testing.assert_allclose([hit.score for hit in hits], [exact[row] for row in rows_of(hits)], atol=1e-5)
        assert encoded == [1, len(wanted)], "the query, and the candidates alone"
    for k in (1, 1000):
        hits = search.search(late_model, corpus, QUERY, 40, how=How(first="tokens", candidates=k))
        assert rows_of(hits) == [row for row in exact if row in rows_of(hits)] and (len(hits) == 40) == (k == 1000)
        np.testing.assert_allclose([hit.score for hit in hits], [exact[row] for row in rows_of(hits)], atol=1e-5)
    assert search.search(late_model, corpus, "unheard", 3, how=How(first="bm25")) == []


def test_plain_output_tells_what_matched(late_model, corpus):
    out = io.StringIO()
    hits = search.search(late_model, corpus, QUERY, 2)
    search.show(hits, out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 6 and lines[0] == f"1  {hits[0].score:.3f}  {hits[0].place}" and lines[1] == f"    {hits[0].text}"
    assert lines[2].startswith("    ~ red=") and "[CLS]=" in lines[2] and "\x1b" not in out.getvalue()
    assert all(f"{word}=" in lines[2] for word in ("red", "cat", "old", ",", "river"))


def test_output_on_a_terminal_is_coloured(late_model, corpus, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    search.show(search.search(late_model, corpus, QUERY, 3), out)
    assert "\x1b[1;31m" in out.getvalue() and "~ red=" in out.getvalue()


def test_the_command_writes_a_page(late_model, corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(corpus.texts))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("embedjax.load.load", lambda name: late_model)
    page = tmp_path / "page.html"
    common = ["model", QUERY, "--corpus", str(tmp_path / "texts.txt"), "--k", "3"]
    commands.search([*common, "--html", str(page), "--pool", "2", "--precision", "int8", "--first", "tokens"])
    out = capsys.readouterr().out
    assert out.count("~ red=") == 3 and out.endswith(f"{page}: the same with what matched\n")
    text = page.read_text()
    assert text.count("<h2>") == 3 and QUERY in text and "<mark" in text and "[MASK]" in text
    commands.search([*common, "--first", "bm25", "--candidates", "2"])
    assert capsys.readouterr().out.count("~ red=") == 2


def test_what_does_not_fit_is_refused(late_model, corpus, pair, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="pool is 0"):
        How(pool=0)
    with pytest.raises(ConfigError, match="0 candidates"):
        How(first="bm25", candidates=0)
    with pytest.raises(ConfigError, match="about vectors that are kept"):
        How(first="bm25", precision="int8")
    with pytest.raises(ConfigError, match="first stage tiny has a vector a token"):
        How(first=late_model)
    with pytest.raises(ConfigError, match="are for late interaction; tiny has one vector a text"):
        search.search(pair, corpus, "red", how=How(pool=2))
    with pytest.raises(ConfigError, match="this model has one vector a text"):
        search.page("red", search.search(pair, corpus, "red", 1))
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ConfigError, match="no tower that takes pictures"):
        search.search(late_model, search.open_gallery(tmp_path / "rows.jsonl"), "red")
    monkeypatch.setattr("embedjax.load.load", lambda name: pair)
    (tmp_path / "texts.txt").write_text("red cat")
    with pytest.raises(ConfigError, match="--html shows which tokens matched"):
        commands.search(["model", "red", "--corpus", str(tmp_path / "texts.txt"), "--html", str(tmp_path / "a.html")])
