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


def test_a_part_of_the_rows(faulty):
    found = dict((what, finding) for what, finding, _ in survey(dataclasses.replace(faulty, evaluate=c.Evaluate()), limit=10))
    assert found["set 'train'"] == "40 rows, 10 of them looked at"


def test_keys_pass_over_case_and_spaces():
    keys = key_of(["A  b", " a B\n", "ab", "A b c"])
    assert keys[0] == keys[1] and len(set(keys.tolist())) == 3


def test_the_command(config_file, capsys):
    assert run(["doctor", "--data", str(config_file(3))]) == 0
    out = capsys.readouterr().out
    assert "ok    set 'train'" in out and "look    repeated rows" in out and "tokens: [CLS]" in out
