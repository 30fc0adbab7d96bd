"""The look at an experiment's data: every kind of fault is found where it was put."""

import dataclasses
import json
import re

import pytest
from PIL import Image

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


def test_lengths_of_texts_that_are_filled_are_their_own(faulty):
    arch = c.SiglipText(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16, pad_id=0)
    tower = dataclasses.replace(faulty.model.towers["text"], arch=arch, max_length=16)
    data = dataclasses.replace(faulty.data, buckets=())
    config = dataclasses.replace(
        faulty, model=c.Model({"text": tower}), data=data, evaluate=c.Evaluate(), export=c.Export("none")
    )
    found = {what.strip(): (finding, well) for what, finding, well in survey(config) if what}
    assert re.search(r"^mean \d\.\d tokens", found["positive"][0]), found["positive"]


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


def test_pictures_are_measured_counted_and_compared(tiny_config, pictures, tmp_path):
    """Sizes for lengths; damaged and repeated pictures, and those that are evaluated on too, by their bytes."""
    paths = sorted(pictures.glob("[a-z]*/*.*"))
    rows = [{"file": str(path), "captions": [f"{path.parent.name} photo {n}", f"a photo {n}"]} for n, path in enumerate(paths)]
    (tmp_path / "same.png").write_bytes((pictures / "red" / "0.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((pictures / "red" / "0.png").read_bytes()[:99])
    rows += [{"file": "same.png", "captions": ["another"]}, {"file": "cut.png", "captions": ["cut"]}]
    rows.append({"file": "none.png", "captions": ["none"]})
    rows.append(rows[0])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"image": "same.png", "label": "red"}, {"image": "new.png", "label": "blue"}]
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "new.png")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    held.append({"image": "cut.png", "label": "red"})
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    image = c.ImageTower(c.Vit(image=24, patch=8, width=16, depth=1, heads=2, mlp=32), augment=c.Augment(area=(0.1, 1.0)))
    which = c.Set(c.File(str(tmp_path / "rows.jsonl")), {"anchor": "captions", "positive": "file"}, several=("anchor",))
    said = tmp_path / "said.jsonl"
    said.write_text('{"text": "A  photo 3", "image": "new.png"}\n')
    columns = {"query": "text", "document": "image"}
    config = dataclasses.replace(
        tiny_config,
        model=c.Model({"text": tiny_config.model.towers["text"], "image": image}, {"anchor": "text", "positive": "image"}),
        data=c.Data(batch_size=16, sets=(which,)),
        evaluate=c.Evaluate(
            tasks=(
                c.ZeroShot(c.File(str(tmp_path / "held.jsonl")), name="held"),
                c.ZeroShot(c.File(str(tmp_path / "bad.jsonl")), name="bad"),
                c.Retrieval(c.File(str(said)), columns, pictures=("document",), name="said"),
            )
        ),
        export=c.Export("none"),
    )
    lines = list(survey(config))
    found = {what.strip(): (finding, well) for what, finding, well in lines if what}
    assert found["set 'train'"] == ("32 rows", True)
    assert found["bad rows"] == ("2 (6.2%)", False)
    assert any("row 30: picture cannot be decoded" in finding for _, finding, _ in lines)
    assert any("row 31: picture" in finding and "No such file" in finding for _, finding, _ in lines)
    sides = [min(Image.open(path).size) for path in paths] + [min(Image.open(tmp_path / "same.png").size)]
    sides.append(sides[0])
    small = sum(side < 24 for side in sides) / len(sides)
    told = f"smallest {min(sides)}, largest {max(sides)}; {small:.1%} are below 24 and scaled up"
    assert found["positive"][0].endswith(told) and not found["positive"][1] and 0 < small < 1
    assert "tokens" in found["anchor"][0]
    assert found["repeated rows"][0] == "1 (3.1%) have the texts and pictures of a row before"
    assert found["repeated positive"][0].startswith("2 (6.7%)") and "anchor = positive" not in found
    assert found["task 'held' document"] == ("2 pictures; 1 (50.0%) in train positive of them trained on", False)
    assert "bad.jsonl:3: column 'image': picture cannot be decoded" in found["task 'bad'"][0]
    told = "1 texts; 1 (100.0%) in train anchor of them trained on"
    assert found["task 'said' query"] == (told, False), "each of several captions is known"
    assert found["task 'said' document"] == ("1 pictures; none of them trained on", True)
    assert any("in train positive: same.png" in finding for _, finding, _ in lines)
    part = {what.strip(): finding for what, finding, _ in survey(config, limit=5) if what}
    assert part["set 'train'"] == "32 rows; lengths and sizes are those of 5" and part["bad rows"] == "2 (6.2%)"
