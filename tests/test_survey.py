"""The look at an experiment's data: every kind of fault is found where it was put."""

import dataclasses
import json

import pytest

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.survey import key_of, survey


@pytest.fixture
def faulty(tmp_path, tiny_config):
    """Forty pairs: two bad rows, four repeated, one its own positive, three long ones; and a task with two of their texts."""
    rows = [{"q": f"red cat {k}", "a": f"blue fish {k}"} for k in range(30)]
    rows += [{"q": "long " * 20 + str(k), "a": f"tree {k}"} for k in range(3)] + [{"q": "same", "a": "Same "}]
    rows += [{"q": f" Red  cat {k}", "a": f"blue fish {k}"} for k in range(4)] + [{"q": "", "a": "x"}, {"q": "x"}]
    file, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [("new 0", "blue fish 2"), ("red CAT 1", "new 1"), ("new 2", "new 3")]
    test.write_text("".join(json.dumps({"query": a, "document": b}) + "\n" for a, b in texts))
    columns = {"query": "query", "document": "document"}
    return dataclasses.replace(
        tiny_config,
        data=c.Data(
            batch_size=16, buckets=((4, 4), (8, 8)), sets=(c.Set(c.File(str(file)), {"anchor": "q", "positive": "a"}),)
        ),
        evaluate=c.Evaluate(
            tasks=(
                c.Retrieval(c.File(str(test)), columns, name="held out"),
                c.Retrieval(c.File(str(file)), {"query": "q", "document": "a"}, name="broken"),
            )
        ),
    )


def test_everything_is_found(faulty):
    lines = list(survey(faulty))
    found = {what.strip(): (finding, well) for what, finding, well in lines if what}
    assert found["set 'train'"] == ("40 rows", True)
    assert found["bad rows"] == ("2 (5.0%)", False)
    assert any("rows.jsonl, row 39: column 'q' is empty" in finding for _, finding, _ in lines)
    finding, well = found["anchor"]
    assert "longest 23; 7.9% are cut to 8" in finding and not well and "0.0% are cut to 8" in found["positive"][0]
    bars = [finding for what, finding, well in lines if not what and "#" in finding]
    assert bars[0].split()[:4] == ["1", "to", "8", "92.1%"] and bars[0].count("#") == 40
    assert found["repeated rows"] == ("4 (10.0%) have the texts of a row before", False)
    assert found["repeated anchor"][0].startswith("4 (10.5%)") and found["anchor = positive"] == ("1 rows", False)
    assert found["task 'held out' query"] == ("3 texts; 1 (33.3%) in train anchor of them trained on", False)
    assert found["task 'held out' document"] == ("3 texts; 1 (33.3%) in train positive of them trained on", False)
    assert found["task 'broken'"][0].endswith("column 'q' is empty") and not found["task 'broken'"][1]
    assert sum(what.startswith("row ") and what.endswith(" anchor") for what, *_ in lines) == 3
    assert any(finding.startswith("tokens: [CLS]") for _, finding, _ in lines)


def test_lengths_of_a_part_and_all_else_of_every_row(faulty):
    whole, part = ({what.strip(): told for what, *told in survey(faulty, limit=limit) if what} for limit in (100, 10))
    assert part.pop("set 'train'") == ["40 rows; lengths are those of 10", True]
    for name in ("bad rows", "repeated rows", "repeated anchor", "anchor = positive", "task 'held out' query"):
        assert part[name] == whole[name] and not part[name][1]
    assert part["anchor"] != whole["anchor"]


def test_texts_are_cut_where_the_last_bucket_ends(faulty):
    buckets = dataclasses.replace(faulty.data, buckets=((4, 8), (3, 3)))
    lines = list(survey(dataclasses.replace(faulty, data=buckets, evaluate=c.Evaluate())))
    found = {what.strip(): finding for what, finding, _ in lines if what}
    assert "; 97.4% are cut to 4" in found["anchor"] and "; 0.0% are cut to 8" in found["positive"]
    tokens = [finding.removeprefix("tokens: ").split() for _, finding, _ in lines if finding.startswith("tokens: ")]
    assert len(tokens) == 6 and all(len(shown) == 4 for shown in tokens[::2]) and max(map(len, tokens)) > 4


@pytest.mark.parametrize("kind", [c.Classification, c.KnnClassification])
def test_what_a_probe_learns_from_may_be_trained_on(faulty, tmp_path, kind):
    train, test = tmp_path / "train.jsonl", tmp_path / "labelled.jsonl"
    train.write_text("".join(json.dumps({"text": f"red cat {k}", "label": k % 2}) + "\n" for k in range(8)))
    test.write_text("".join(json.dumps({"text": f"new {k}", "label": k % 2}) + "\n" for k in range(3)))
    task = kind(c.File(str(test)), train=c.File(str(train)), name="probe")
    found = [line for line in survey(dataclasses.replace(faulty, evaluate=c.Evaluate(tasks=(task,)))) if "probe" in line[0]]
    assert found == [("task 'probe' anchor", "3 texts; none of them trained on", True)]


def test_keys_pass_over_case_and_spaces():
    keys = key_of(["A  b", " a B\n", "ab", "A b c"])
    assert keys[0] == keys[1] and len(set(keys.tolist())) == 3


def test_the_command(config_file, capsys):
    assert run(["doctor", "--data", str(config_file(3))]) == 0
    out = capsys.readouterr().out
    assert "ok    set 'train'" in out and "look    repeated rows" in out and "tokens: [CLS]" in out
