"""Mining to a file: against every score computed at once, resumed anywhere, in both formats, with scores of three kinds."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from embedjax.config import File, Mesh, Negatives
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.sources import open_source
from embedjax.evaluate.encode import encode
from embedjax.evaluate.files import Partial
from embedjax.mine import mine_file, teacher
from embedjax.mine import nearest as nearest_file
from embedjax.sharding import make_mesh


@pytest.fixture(scope="module")
def files(tmp_path_factory, sentences):
    """A corpus of 100 texts, twice, and 40 pairs with some positives that are not in it, some of equal anchors, one bad."""
    folder = tmp_path_factory.mktemp("mine")
    corpus, pairs = folder / "corpus.jsonl", folder / "pairs.jsonl"
    texts = [*sentences[:100], *sentences[:50]]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [(sentences[110 + k % 30], sentences[(k * 7) % 105]) for k in range(40)]
    rows += [rows[3], (sentences[2], sentences[9]), (sentences[3], "")]
    pairs.write_text("".join(json.dumps({"q": a, "a": b}) + "\n" for a, b in rows))
    return corpus, pairs, list(dict.fromkeys(rows[:-1])), list(dict.fromkeys(texts + [b for _, b in rows[:-1]]))


def similarities(model, anchors, texts):
    vectors = [encode(model, list(part), column=column) for part, column in ((anchors, "query"), (texts, "document"))]
    unit = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in vectors]
    return unit[0] @ unit[1].T


def read(path):
    source = open_source(File(str(path)))
    return [source[k] for k in range(len(source))]


HOW = Negatives(num_negatives=3, range_min=1, range_max=70, margin=0.02)


def expected(model, rows, texts, how=HOW):
    found, matrix = [], similarities(model, [anchor for anchor, _ in rows], texts)
    for (anchor, positive), similar in zip(rows, matrix, strict=True):
        scores = dict(zip(texts, similar, strict=True))
        own = {b for a, b in rows if a == anchor}
        limit = min(scores[b] for b in own) - how.margin
        ranked = sorted((t for t in texts if t not in own and t != anchor), key=lambda t: -scores[t])
        left = [t for t in ranked[how.range_min : how.range_max] if scores[t] <= limit][: how.num_negatives]
        found.append((anchor, positive, *left)) if len(left) == how.num_negatives else None
    return found


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_are_those_of_every_score_at_once(two_towers, files, tmp_path, ending):
    corpus, pairs, rows, texts = files
    out, told = tmp_path / f"out.{ending}", []
    mesh = make_mesh(Mesh(data=2), jax.devices()[:2])
    result = mine_file(
        two_towers, corpus, pairs, out, HOW, pair_columns=("q", "a"), scorer=("itself", None), mesh=mesh,
        progress=lambda *at: told.append(at),
    )  # fmt: skip
    found, wanted = read(out), expected(two_towers, rows, texts)
    names = ["anchor", "positive", "negative", "negative_2", "negative_3"]
    assert 10 < len(wanted) < len(rows) and [tuple(row[name] for name in names) for row in found] == wanted
    assert (result.rows, result.left_out) == (len(wanted), len(rows) - len(wanted))
    scores = np.array([[row[name] for name in ("score", "score_2", "score_3", "score_4")] for row in found])
    matrix = similarities(two_towers, [row[0] for row in wanted], texts)
    exact = np.array([[similar[texts.index(t)] for t in row[1:]] for similar, row in zip(matrix, wanted, strict=True)])
    np.testing.assert_allclose(scores, exact, atol=1e-5)
    assert result.positive == pytest.approx(exact[:, 0].mean(), abs=1e-5) and result.negative < result.positive
    assert list(tmp_path.iterdir()) == [out] and {what for what, *_ in told} == {
        "read the corpus", "encode anchors", "encode the corpus", "search"
    }  # fmt: skip
    assert ending == "jsonl" or pq.ParquetFile(out).schema_arrow.names == list(found[0])


@pytest.mark.parametrize("stage", ["query", "document", "negatives", "scores", "write"])
def test_a_call_after_a_kill_goes_on(two_towers, files, tmp_path, monkeypatch, stage):
    corpus, pairs, _, _ = files
    out, made = tmp_path / "out.jsonl", {"count": 0}
    monkeypatch.setattr(nearest_file, "ANCHORS", 8)

    def scores(anchors, documents):
        made["count"] += len(anchors)
        return np.array([[len(anchor) + len(text) for text in row] for anchor, row in zip(anchors, documents, strict=True)])

    options = {"pair_columns": ("q", "a"), "scorer": ("lengths", scores), "seed": 3}
    how = Negatives(num_negatives=2, sampling="random", range_max=20)
    mine_file(two_towers, corpus, pairs, tmp_path / "whole.jsonl", how, **options)
    scored, append = made["count"], Partial.append

    def stopped(self, block):
        append(self, block)
        if self.path.name.startswith(stage):
            raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Partial, "append", stopped)
        if stage == "write":
            killed.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt) if b == out else a.rename(b))
        mine_file(two_towers, corpus, pairs, out, how, **options)
    assert not out.exists() and (tmp_path / "out.jsonl.work").is_dir()
    with pytest.raises(ConfigError, match="belongs to another") if stage != "query" else pytest.raises(ConfigError):
        mine_file(two_towers, corpus, pairs, out, how, **{**options, "pair_columns": ("a", "q")})
    mine_file(two_towers, corpus, pairs, out, how, **options)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and made["count"] == 2 * scored
    assert not (tmp_path / "out.jsonl.work").exists()


def test_scores_of_a_teacher(two_towers, files, tmp_path):
    corpus, pairs, _, _ = files
    out = tmp_path / "out.jsonl"
    towers = dict(zip(("query", "document"), reversed(two_towers.params["towers"].values()), strict=True))
    other = type(two_towers)(**{**vars(two_towers), "params": {"towers": towers}})
    mine_file(two_towers, corpus, pairs, out, Negatives(), pair_columns=("q", "a"), scorer=("other", teacher(other)))
    rows = read(out)[:5]
    exact = similarities(
        other, [row["anchor"] for row in rows], [row[name] for row in rows for name in ("positive", "negative")]
    )
    for k, row in enumerate(rows):
        assert [row["score"], row["score_2"]] == pytest.approx(exact[k, 2 * k : 2 * k + 2], abs=1e-5)


def test_what_cannot_be_mined(two_towers, files, tmp_path):
    corpus, pairs, _, _ = files
    call = lambda *, out="out.jsonl", how=HOW, **options: mine_file(
        two_towers, corpus, pairs, tmp_path / out, how, **{"pair_columns": ("q", "a"), **options}
    )
    with pytest.raises(ConfigError, match=".jsonl or .parquet"):
        call(out="out.csv")
    with pytest.raises(DataError, match="no column 'x'"):
        call(pair_columns=("x", "a"))
    with pytest.raises(DataError, match="no column 'title'"):
        call(corpus_columns=("title", "text"))
    with pytest.raises(DataError, match="no anchor has enough negatives"):
        call(how=Negatives(max_score=-0.999))
