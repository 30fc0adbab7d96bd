"""Retrieval by late interaction: documents pooled and quantized, candidates of first stages, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from embedjax import config as c
from embedjax.config.errors import ConfigError
from embedjax.evaluate.bm25 import bm25_rank
from embedjax.evaluate.encode import encode
from embedjax.evaluate.late import encode_tokens, maxsim_topk
from embedjax.evaluate.matches import matches, pieces
from embedjax.evaluate.pool import groups, pooled
from embedjax.evaluate.tasks import evaluate, first, prepare
from embedjax.evaluate.tasks.side import unit


@pytest.fixture(scope="module")
def texts(words):
    rng = np.random.default_rng(0)
    of = lambda count: [" ".join(rng.choice(words, rng.integers(3, 14))) + "." for _ in range(count)]
    return of(12), of(30)


@pytest.fixture(scope="module")
def task(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    queries, documents = texts
    rows = [{"anchor": queries[n % 12], "positive": documents[n]} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return c.Retrieval(c.File(str(file)), name="pairs")


def ranked(late_model, texts, change):
    """The ranking of whole vectors, changed; of a prefix that of its 4 numbers."""
    queries, documents = (encode_tokens(late_model, some, column=side) for some, side in zip(texts, c.ROLES, strict=True))
    return maxsim_topk(*change(queries, documents), 100)[1]


CHANGES = {
    "pooled": ({"pool": 2}, lambda q, d: (q, d.pooled(2))),
    "bytes": ({"precision": "int8"}, lambda q, d: (q, d.quantized("int8"))),
    "both": ({"pool": 3, "precision": "binary"}, lambda q, d: (q, d.pooled(3).quantized("binary"))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_documents_are_pooled_and_quantized_at_every_prefix(late_model, texts, task, name):
    """In this order: prefix, length 1, pooled, quantized."""
    fields, change = CHANGES[name]
    (data,) = prepare([dataclasses.replace(task, dims=(4,), **fields)])
    found = evaluate(late_model, [data])
    short = lambda t: dataclasses.replace(t, vectors=unit(t.vectors[:, :4]))
    for label, made in (("pairs", change), ("pairs@4", lambda q, d: change(short(q), short(d)))):
        wanted = data.measure(ranked(late_model, texts, made))
        assert {key: found[f"{label}/{key}"] for key in wanted} == pytest.approx(wanted)
    plain = evaluate(late_model, [dataclasses.replace(task, dims=(4,))])
    assert any(plain[key] != found[key] for key in plain)
    np.testing.assert_array_equal(data.rank(late_model, k=5), ranked(late_model, texts, change)[:, :5])
    few = data.some(np.array([3, 7])).rank(late_model, k=5)
    np.testing.assert_array_equal(few, ranked(late_model, texts, change)[[3, 7], :5])


def test_encoding_pools_documents_only(late_model, texts):
    whole, found = encode_tokens(late_model, texts[1]), encode_tokens(late_model, texts[1], pool=2, protected=2)
    for n in range(30):
        np.testing.assert_allclose(found.of(n), pooled(whole.of(n), 2, 2), atol=1e-6)
    with pytest.raises(ConfigError, match="pool is for documents"):
        encode_tokens(late_model, texts[0], column="query", pool=2)
    with pytest.raises(ConfigError, match="pool is 0"):
        encode_tokens(late_model, texts[0], pool=0)


@pytest.mark.parametrize("late", [True, False])
def test_the_best_words_first(late_model, model, texts, sentences, task, late, tmp_path):
    """BM25's candidates, in the order of the model, whether of late interaction or not; the others are not found at all."""
    reranker, file = late_model, tmp_path / "pairs.jsonl"
    queries, documents = texts if late else (sentences[:12], sentences[12:42])
    if not late:
        reranker = model
        rows = [{"anchor": queries[n % 12], "positive": documents[n]} for n in range(30)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = c.Retrieval(c.File(str(file)), name="pairs")
    (whole,), (data,) = prepare([task]), prepare([dataclasses.replace(task, first="bm25", candidates=6)])
    found, every = data.rank(reranker), whole.rank(reranker)
    wanted = bm25_rank(queries, documents, 6)
    for n in range(12):
        order = [row for row in every[n].tolist() if row in wanted[n]]
        assert found[n][: len(order)].tolist() == order and (found[n][len(order) :] == -1).all()
    assert evaluate(reranker, [data]) == pytest.approx({f"pairs/{k}": v for k, v in data.measure(found).items()})
    np.testing.assert_array_equal(data.some(np.array([4, 1])).rank(reranker), found[[4, 1]])


def test_a_models_nearest_first_found_once(late_model, model, texts, task, monkeypatch):
    loaded = []
    monkeypatch.setattr(first, "load", lambda name: loaded.append(name) or model)
    (data,) = prepare([dataclasses.replace(task, first="some/model", candidates=4)])
    found = data.rank(late_model)
    queries, documents = (unit(encode(model, some, column=side)) for some, side in zip(texts, c.ROLES, strict=True))
    near = np.argsort(-queries @ documents.T, axis=1, kind="stable")[:, :4]
    (whole,) = prepare([task])
    every = whole.rank(late_model)
    for n in range(12):
        assert found[n, :4].tolist() == [row for row in every[n].tolist() if row in near[n]] and (found[n, 4:] == -1).all()
    monkeypatch.setattr(first, "topk", None)
    np.testing.assert_array_equal(data.rank(late_model), found)
    assert loaded == ["some/model"]
    monkeypatch.setattr(first, "load", lambda name: late_model)
    with pytest.raises(ConfigError, match="the first stage tiny has a vector a token"):
        prepare([dataclasses.replace(task, first="some/model")])


def test_the_nearest_tokens_first(late_model, task):
    (whole,), (data,) = prepare([task]), prepare([dataclasses.replace(task, first="tokens", candidates=1000)])
    np.testing.assert_array_equal(data.rank(late_model)[:, :30], whole.rank(late_model), err_msg="all tokens, all documents")
    (few,) = prepare([dataclasses.replace(task, first="tokens", candidates=2)])
    found, every = few.rank(late_model), whole.rank(late_model)
    counts = (found >= 0).sum(1)
    assert (counts < 30).all() and (counts > 0).all()
    for n in range(12):
        some = found[n][: counts[n]].tolist()
        assert some == [row for row in every[n].tolist() if row in some], "the order is that of exact scores"


def test_what_does_not_fit_is_refused(model, task):
    for fields, reason in (
        ({"pool": 2}, "has pool 2, for late interaction alone"),
        ({"precision": "int8"}, "has precision 'int8', for late interaction alone"),
        ({"first": "tokens"}, "has first 'tokens', for late interaction alone"),
    ):
        with pytest.raises(ConfigError, match=reason):
            evaluate(model, [dataclasses.replace(task, **fields)])
    for fields, reason in (
        ({"pool": 0}, "pool 0 and candidates 100; they must be at least 1"),
        ({"candidates": 0}, "candidates 0"),
        ({"first": "bm25", "pictures": ("document",)}, "bm25 as its first stage, which finds texts"),
    ):
        with pytest.raises(ConfigError, match=reason):
            dataclasses.replace(task, **fields)


def test_matches_are_the_similarities_of_the_tokens_that_are_named(late_model):
    query, documents = "red, cat", ["old red cat, new dog. " * 3, "river"]
    asked, found = encode_tokens(late_model, [query], column="query"), encode_tokens(late_model, documents)
    told = matches(late_model, query, asked, documents, found)
    for n, match in enumerate(told):
        assert len(match.query) == 8 and len(match.document) == found.lengths[n]
        assert [p.name for p in match.query] == ["[CLS]", "[unused0]", "red", ",", "cat", "[SEP]", "[MASK]", "[MASK]"]
        np.testing.assert_allclose(match.similarity, asked.of(0) @ found.of(n).T, atol=1e-6)
        assert match.score == pytest.approx(maxsim_topk(asked, found.take([n]), 1)[0][0, 0], abs=1e-5)
    names = [p.name for p in told[0].document]
    assert names == ["[CLS]", "[unused1]", "old", "red", "cat", "new", "dog", "old", "red", "[SEP]"]
    assert told[0].seen == documents[0].index("red", 10) + 3, "what 12 tokens leave of it"
    assert [p.compared for p in pieces(late_model, "document", documents[0])].count(False) == 2
    grouped = [groups(found.of(n), 2) for n in range(2)]
    small = matches(late_model, query, asked, documents, found.pooled(2), groups=grouped)
    assert small[0].score == pytest.approx(maxsim_topk(asked, found.pooled(2).take([0]), 1)[0][0, 0], abs=1e-5)
    assert {len(small[0].taken(token)) for token in range(8)} != {1}
