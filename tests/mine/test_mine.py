"""Mining to a file: against every score computed at once, resumed anywhere, in both formats, with scores of three kinds."""

import dataclasses
import json
import tracemalloc
import types

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from embedjax.config import File, Lora, Mesh, Negatives
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.sources import open_source
from embedjax.evaluate.encode import encode
from embedjax.evaluate.files import Partial
from embedjax.mine import files as mining
from embedjax.mine import mine_file, teacher
from embedjax.mine import nearest as nearest_file
from embedjax.models import lora
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


def similarities(model, anchors, texts, task=None):
    sides = {"query": anchors, "document": texts}
    vectors = [encode(model, list(part), column=column, task=task) for column, part in sides.items()]
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


@pytest.mark.parametrize("change", [{"how": Negatives(num_negatives=3)}, {"seed": 4}, {"scorer": ("more", None)}])
def test_a_call_for_other_negatives_takes_the_vectors(two_towers, files, tmp_path, monkeypatch, change):
    corpus, pairs, _, _ = files
    call = lambda out, **options: mine_file(two_towers, corpus, pairs, tmp_path / out, pair_columns=("q", "a"), **options)
    scorer = "all the same", lambda anchors, documents: np.full((len(anchors), len(documents[0])), 0.5)
    options = {"how": Negatives(num_negatives=2, sampling="random"), "seed": 3, "scorer": scorer}
    if "scorer" in change:
        change = {"scorer": ("more", lambda *texts: scorer[1](*texts) + 1)}
    call("whole.jsonl", **{**options, **change})
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("embedjax.mine.files._write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call("out.jsonl", **options)
    monkeypatch.setattr("embedjax.mine.files.stream", lambda *_, **__: pytest.fail("encoded again"))
    call("out.jsonl", **{**options, **change})
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_an_error_advises_is_not_refused(two_towers, files, tmp_path):
    corpus, pairs, _, _ = files
    call = lambda how: mine_file(two_towers, corpus, pairs, tmp_path / "out.jsonl", how, pair_columns=("q", "a"))
    with pytest.raises(DataError, match="no anchor has enough negatives; widen the ranks, scores or margin, or ask for fewer"):
        call(Negatives(max_score=-0.999))
    assert call(Negatives()).rows > 30


def test_scores_are_made_in_parts(tmp_path, monkeypatch):
    rows, width = 20_000, 128
    vectors = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    every = np.arange(rows)
    pairs = types.SimpleNamespace(anchors=every, anchor=every, positive=every[::-1], rows=every)
    work = types.SimpleNamespace(pairs=pairs, corpus=None)
    monkeypatch.setattr(mining, "_encoded", lambda *_: mapped)
    monkeypatch.setattr(mining, "_chosen", lambda *_: np.stack([(every + k) % rows for k in (1, 2)], 1))
    tracemalloc.start()
    own = mining._mine(work, Negatives(num_negatives=2), 0, None)[3]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < vectors.nbytes / 2  # two copies of them before
    wanted = [(vectors * vectors[::-1]).sum(1), (vectors * np.roll(vectors, -1, 0)).sum(1)]
    np.testing.assert_allclose(own[:, :2], np.stack(wanted, 1), rtol=1e-4, atol=1e-4)


def test_files_without_a_header(two_towers, files, tmp_path):
    corpus, pairs, rows, texts = files
    (tmp_path / "pairs.csv").write_text("".join(f"1,{a},{b}\n" for a, b in rows))
    (tmp_path / "corpus.tsv").write_text("".join(f"x\t{text}\n" for text in texts))
    bare = File(str(tmp_path / "corpus.tsv"), names=("id", "t")), File(str(tmp_path / "pairs.csv"), names=("id", "q", "a"))
    options = {"pair_columns": ("q", "a")}
    mine_file(two_towers, *bare, tmp_path / "bare.jsonl", HOW, corpus_columns=("t",), **options)
    mine_file(two_towers, corpus, pairs, tmp_path / "out.jsonl", HOW, **options)
    assert read(tmp_path / "bare.jsonl") == read(tmp_path / "out.jsonl")


@pytest.fixture(scope="module")
def adapters(two_towers):
    """The two towers with two adapters each, and a prompt of the second's name."""
    loras = {"other": Lora(2), "sts": Lora(2, paths="blocks/")}
    prompts = {"query": "w1 w2 ", "sts": "w9 "}
    params = {}
    for k, (name, tower) in enumerate(two_towers.params["towers"].items()):
        drawn = lora.init(loras, tower["encoder"], jax.random.key(k))
        params[name] = {**tower, "lora": jax.tree.map(lambda x: x + 0.3, drawn)}
    towers = {name: dataclasses.replace(tower, lora=loras, prompts=prompts) for name, tower in two_towers.config.towers.items()}
    texts = {name: dataclasses.replace(each, prompts=prompts) for name, each in two_towers.texts.items()}
    config = dataclasses.replace(two_towers.config, towers=towers)
    return dataclasses.replace(two_towers, config=config, params={"towers": params}, texts=texts)


def test_a_task_is_an_adapter_and_a_prompt(two_towers, adapters, files, tmp_path):
    corpus, pairs, rows, texts = files
    call = lambda model, out, **options: mine_file(
        model, corpus, pairs, tmp_path / out, HOW, pair_columns=("q", "a"), **options
    )  # fmt: skip
    with pytest.raises(ConfigError, match="other.*sts"):
        call(adapters, "none.jsonl")
    call(adapters, "out.jsonl", task="sts", scorer=("itself", None))
    found = read(tmp_path / "out.jsonl")
    matrix = similarities(adapters, [row["anchor"] for row in found], texts, "sts")
    for row, similar in zip(found, matrix, strict=True):
        exact = [similar[texts.index(row[name])] for name in ("positive", "negative", "negative_2", "negative_3")]
        assert [row[name] for name in ("score", "score_2", "score_3", "score_4")] == pytest.approx(exact, abs=1e-5)
    scorer = teacher(adapters, task="other")
    assert len({scorer[0], teacher(adapters, task="sts")[0], teacher(two_towers)[0]}) == 3  # kept scores are known by it
    call(two_towers, "taught.jsonl", scorer=scorer)
    row = read(tmp_path / "taught.jsonl")[0]
    exact = similarities(adapters, [row["anchor"]], [row["positive"], row["negative"]], "other")[0]
    assert [row["score"], row["score_2"]] == pytest.approx(exact, abs=1e-5)


def test_scores_of_a_teacher(two_towers, files, tmp_path):
    corpus, pairs, _, _ = files
    out = tmp_path / "out.jsonl"
    towers = dict(zip(("query", "document"), reversed(two_towers.params["towers"].values()), strict=True))
    other = type(two_towers)(**{**vars(two_towers), "params": {"towers": towers}})
    mine_file(two_towers, corpus, pairs, out, Negatives(), pair_columns=("q", "a"), scorer=teacher(other))
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
    for columns in (("x", "a"), ("q", "x")):
        with pytest.raises(DataError, match=r"the pairs \(--columns\): .*pairs.jsonl has no column 'x'"):
            call(pair_columns=columns)
    with pytest.raises(DataError, match=r"the corpus \(--corpus-columns\): .*corpus.jsonl has no column 'title'"):
        call(corpus_columns=("title", "text"))
    with pytest.raises(ConfigError, match="has the columns q, a; say which hold the documents .--corpus-columns"):
        mine_file(two_towers, pairs, pairs, tmp_path / "out.jsonl", HOW, pair_columns=("q", "a"))
    with pytest.raises(ConfigError, match='no two cosines.*margin_kind "percentage"'):
        call(how=Negatives(margin=95))
    with pytest.raises(DataError, match="no anchor has enough negatives"):
        call(how=Negatives(max_score=-0.999))
