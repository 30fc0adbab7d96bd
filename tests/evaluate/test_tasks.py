"""Tasks against slow definitions in numpy, and evaluation data with faults."""

import dataclasses
import io
import json

import ir_measures
import numpy as np
import pytest
import scipy.stats
from ir_measures import AP, RR, R, nDCG

from embedjax.config import File, Retrieval, Sts
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.text import Texts
from embedjax.evaluate.encode import encode
from embedjax.evaluate.progress import Stages
from embedjax.evaluate.tasks import evaluate, prepare, reading, side


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return File(path=str(path))


@pytest.fixture
def sts(tmp_path, sentences):
    scores = np.random.default_rng(0).integers(0, 6, 40) / 2
    rows = [{"sentence1": sentences[n], "sentence2": sentences[n + 40], "score": scores[n]} for n in range(40)]
    return Sts(source=write(tmp_path / "sts.jsonl", rows), name="tiny"), rows


def test_sts(two_towers, sts):
    task, rows = sts
    a, b = (
        encode(two_towers, [row[key] for row in rows], column=c)
        for key, c in (("sentence1", "anchor"), ("sentence2", "positive"))
    )
    cosines, wanted = (a * b).sum(1), [row["score"] for row in rows]
    found = evaluate(two_towers, [task])
    assert found == {
        "tiny/spearman": pytest.approx(scipy.stats.spearmanr(cosines, wanted).statistic, abs=1e-6),
        "tiny/pearson": pytest.approx(scipy.stats.pearsonr(cosines, wanted).statistic, abs=1e-6),
    }
    assert evaluate(two_towers, [dataclasses.replace(task, limit=10)])["tiny/pearson"] != found["tiny/pearson"]
    assert task.main_metric == "tiny/spearman"


def test_a_model_of_equal_cosines_has_no_correlation(model, sts):
    task, _ = sts
    constant = dataclasses.replace(model, params={"towers": {"text": _zeros(model.params["towers"]["text"])}})
    assert evaluate(constant, [task]) == {"tiny/spearman": 0.0, "tiny/pearson": 0.0}


def _zeros(tree):
    return {key: _zeros(value) if isinstance(value, dict) else np.zeros_like(value) for key, value in tree.items()}


def test_retrieval_from_pairs(two_towers, sentences, tmp_path):
    """Query 0 has two documents, document 1 answers two queries; the texts are encoded by their towers, with the prompt."""
    pairs = [(0, 50), (0, 51), (1, 51), (2, 52), *((n, n + 50) for n in range(3, 30))]
    rows = [{"anchor": sentences[q], "positive": sentences[d]} for q, d in pairs]
    task = Retrieval(source=write(tmp_path / "pairs.jsonl", rows), name="pairs")
    (data,) = prepare([task])
    assert data.queries.texts == sentences[:30] and data.documents.texts == [*sentences[50:53], *sentences[53:80]]
    assert data.judgements[0] == {0: 1.0, 1: 1.0} and data.judgements[1] == {1: 1.0}
    queries = encode(two_towers, sentences[:30], column="anchor", prompt="query")
    order = np.argsort(-queries @ encode(two_towers, sentences[50:80], column="positive").T, axis=1)
    np.testing.assert_array_equal(data.rank(two_towers), order)
    hits = [[document in judged for document in row[:10]] for row, judged in zip(order, data.judgements, strict=True)]
    found = evaluate(two_towers, [data])
    assert found["pairs/mrr@10"] == pytest.approx(np.mean([1 / (row.index(True) + 1) if True in row else 0 for row in hits]))
    assert found["pairs/recall@100"] == 1.0
    assert set(found) == {f"pairs/{m}" for m in ("ndcg@10", "mrr@10", "map@100", "recall@1", "recall@10", "recall@100")}
    assert task.main_metric == "pairs/ndcg@10"


def beir(tmp_path, sentences, **changes):
    corpus = [{"_id": f"d{n}", "title": "w1" if n % 2 else "", "text": sentences[n]} for n in range(20)]
    corpus.append({"_id": "empty", "title": "", "text": ""})
    queries = [{"_id": n, "text": sentences[n + 30]} for n in range(5)]
    qrels = [{"query-id": str(n), "corpus-id": f"d{n + k}", "score": k} for n in range(4) for k in range(3)]
    parts = {"corpus": corpus, "queries": queries, "qrels": qrels} | changes
    columns = {"query_id": "query-id", "document_id": "corpus-id", "relevance": "score"}
    opened = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()}
    return Retrieval(opened["qrels"], columns, opened["queries"], opened["corpus"], name="beir")


def test_retrieval_from_judgements(model, sentences, tmp_path):
    (data,) = prepare([beir(tmp_path, sentences)])
    assert data.queries.texts == sentences[30:34], "queries without judgements are not asked"
    assert data.documents.texts[:2] == [sentences[0], f"w1 {sentences[1]}"] and data.documents.texts[20] == ""
    assert data.judgements[1] == {1: 0.0, 2: 1.0, 3: 2.0}
    found = evaluate(model, [data])
    perfect = data.measure(np.array([[n + 2, n + 1] for n in range(4)]))
    assert perfect["ndcg@10"] == perfect["mrr@10"] == perfect["recall@10"] == 1.0
    assert perfect["recall@1"] == 0.5 and found["beir/ndcg@10"] < 1


def test_a_corpus_without_titles(sentences, tmp_path):
    """Where the titles' column is called title it may be missing, in the file or a row; a named one may not."""
    corpus = [{"_id": f"d{n}", "text": sentences[n]} for n in range(20)]
    (data,) = prepare([beir(tmp_path, sentences, corpus=corpus)])
    assert data.documents.texts == sentences[:20]
    mixed = [*corpus[:10], {**corpus[10], "title": "w1"}, {**corpus[11], "title": None}, *corpus[12:]]
    (data,) = prepare([beir(tmp_path, sentences, corpus=mixed)])
    assert data.documents.texts == [*sentences[:10], f"w1 {sentences[10]}", *sentences[11:20]]
    task = beir(tmp_path, sentences, corpus=corpus)
    named = dataclasses.replace(task, corpus_columns={"id": "_id", "title": "headline", "text": "text"})
    with pytest.raises(DataError, match="no column 'headline'"):
        prepare([named])
    with pytest.raises(ConfigError, match="'titel', which it does not have; did you mean 'title'"):
        prepare([dataclasses.replace(task, corpus_columns={"id": "_id", "titel": "text", "text": "text"})])


def test_queries_of_the_corpus_do_not_find_themselves(model, sentences, tmp_path):
    """As BEIR's ignore_identical_ids: the metrics are trec_eval's of the ranking without them."""
    queries = [{"_id": f"d{n}", "text": sentences[n]} for n in range(10)] + [{"_id": "q", "text": sentences[40]}]
    judged = [(f"d{n}", f"d{n + 10 * k}", k) for n in range(10) for k in (1, 2)] + [("q", "d3", 1)]
    alike = [f"w{k} {text}" for k in (7, 8) for text in sentences[:10]]
    corpus = [{"_id": f"d{n}", "text": text} for n, text in enumerate([*sentences[:10], *alike, *sentences[50:140]])]
    qrels = [{"query-id": query, "corpus-id": document, "score": gain} for query, document, gain in judged]
    task = beir(tmp_path, sentences, corpus=corpus, queries=queries, qrels=qrels)
    (data,) = prepare([dataclasses.replace(task, skip_same_id=True, dims=(8,))])
    found = evaluate(model, [data])
    vectors = [encode(model, part.texts, column=part.column) for part in data.sides]
    measures = {nDCG @ 10: "ndcg@10", RR @ 10: "mrr@10", AP @ 100: "map@100", R @ 1: "recall@1", R @ 100: "recall@100"}
    said = [ir_measures.Qrel(*row) for row in judged]
    for label, dim in (("beir", None), ("beir@8", 8)):
        a, b = (part[:, :dim] / np.linalg.norm(part[:, :dim], axis=1, keepdims=True) for part in vectors)
        run = [
            ir_measures.ScoredDoc(query["_id"], f"d{n}", float(score))
            for query, row in zip(queries, a @ b.T, strict=True)
            for n, score in enumerate(row)
            if query["_id"] != f"d{n}"
        ]
        for measure, value in ir_measures.calc_aggregate(list(measures), said, run).items():
            assert found[f"{label}/{measures[measure]}"] == pytest.approx(value, abs=1e-6), measure
    ranked = data.rank(model)
    assert ranked.shape == (11, 100) and not (ranked == np.append(np.arange(10), -2)[:, None]).any()
    everywhere = evaluate(model, [task])
    assert everywhere["beir/mrr@10"] < found["beir/mrr@10"]
    few = dataclasses.replace(data, documents=side.Side(sentences[:2], "document"))
    assert few.rank(model).tolist()[:2] == [[1, -1], [0, -1]] and -1 not in few.rank(model)[2:]
    some = data.some(np.array([4, 10]))
    assert some.queries.texts == [sentences[4], sentences[40]] and some.judgements[1] == {3: 1.0}
    np.testing.assert_array_equal(some.rank(model, k=3), ranked[[4, 10], :3])


def test_a_large_side_is_tokenized_each_time(model, sts, monkeypatch):
    """Beyond the limit nothing is kept, and no more than the tokens of the moment is held; the scores are the same."""
    task, _ = sts
    small, large = prepare([task]), prepare([task])
    wanted = evaluate(model, small)
    assert all(part.tokens for part in small[0].sides)
    monkeypatch.setattr(side, "KEPT", 100)
    assert evaluate(model, large) == evaluate(model, large) == wanted
    assert not any(part.tokens for part in large[0].sides)


def test_progress_of_an_evaluation(model, sts):
    task, _ = sts
    told = []
    evaluate(model, prepare([task]), progress=lambda *said: told.append(said))
    assert {what for what, _, _ in told} == {"encode tiny"} and {total for _, _, total in told} == {80}
    done = [rows for _, rows, _ in told]
    assert done == sorted(done) and done[-1] == 80 and 40 in done
    out = io.StringIO()
    with Stages(out) as progress:
        evaluate(model, prepare([task]), progress=progress)
    assert out.getvalue().startswith("encode tiny: 80 of 80 (100%), ") and out.getvalue().count("\n") == 1


def test_a_run_reads_and_tokenizes_once(model, sts, monkeypatch):
    task, _ = sts
    prepared = prepare([task])
    first = evaluate(model, prepared)
    monkeypatch.setattr(reading, "open_source", lambda *_: pytest.fail("read again"))
    with monkeypatch.context() as patch:
        patch.setattr(Texts, "encode", lambda *_, **__: pytest.fail("tokenized again"))
        texts = {"text": dataclasses.replace(model.texts["text"])}
        assert evaluate(dataclasses.replace(model, texts=texts), prepared) == first
    shorter = dataclasses.replace(model, texts={"text": dataclasses.replace(model.texts["text"], max_length=5)})
    assert evaluate(shorter, prepared) != first


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"sentence1": "w1", "sentence2": "w2", "score": "NaN"}, "sts.jsonl:41: column 'score' is 'NaN'; it must be finite"),
        ({"sentence1": "w1", "sentence2": "w2", "score": "high"}, "sts.jsonl:41: column 'score' is 'high', not a number"),
        ({"sentence1": "w1", "sentence2": "w2"}, "sts.jsonl:41: column 'score' is None"),
        ({"sentence1": " ", "sentence2": "w2", "score": 1}, "sts.jsonl:41: column 'sentence1' is empty"),
        ({"sentence1": 3, "sentence2": "w2", "score": 1}, "sts.jsonl:41: column 'sentence1' is int, not text"),
    ],
)
def test_bad_rows_stop_an_evaluation(sts, tmp_path, row, reason):
    task, rows = sts
    write(tmp_path / "sts.jsonl", [*rows, row])
    with pytest.raises(DataError) as error:
        prepare([task])
    assert reason in str(error.value)


def test_faults_of_judgements_and_columns(sts, sentences, tmp_path):
    task, rows = sts
    with pytest.raises(DataError, match="query '9' is not in the query file"):
        prepare([beir(tmp_path, sentences, qrels=[{"query-id": "9", "corpus-id": "d1", "score": 1}])])
    with pytest.raises(DataError, match="document 'x' is not in the document file"):
        prepare([beir(tmp_path, sentences, qrels=[{"query-id": "1", "corpus-id": "x", "score": 1}])])
    with pytest.raises(DataError, match="'7' appears twice"):
        prepare([beir(tmp_path, sentences, queries=[{"_id": "7", "text": "w1"}] * 2)])
    with pytest.raises(ConfigError, match="no column for score"):
        prepare([dataclasses.replace(task, columns={"a": "sentence1", "b": "sentence2"})])
    with pytest.raises(DataError, match="'sentence3'.*'b'"):
        prepare([dataclasses.replace(task, columns={**task.columns, "b": "sentence3"})])
    with pytest.raises(DataError, match="scores are 1"):
        write(tmp_path / "sts.jsonl", [{**row, "score": 1} for row in rows])
        prepare([task])
    with pytest.raises(ConfigError, match="share the name"):
        prepare([task, task])
