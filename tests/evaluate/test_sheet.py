"""The contact sheet: pictures inline, the right ones marked, and no word of the data taken for HTML."""

import base64
import html.parser
import io

import numpy as np
import pytest
from PIL import Image

from embedjax import config
from embedjax.evaluate import report, scores, sheet
from embedjax.evaluate.tasks import prepare


def png(seed=0, size=(200, 100)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


class Read(html.parser.HTMLParser):
    """Tags with their attributes, and the text between."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_needs_no_other_file_and_marks_what_is_right(tmp_path):
    path = tmp_path / "b.jpg"
    Image.new("RGB", (40, 40), (255, 0, 0)).save(path)
    rows = [("a cat", [sheet.Found(png(), "a cat", True), sheet.Found(str(path), "a dog", False)])]
    read = Read(sheet.page("cats", rows))
    figures = [attrs.get("class") for tag, attrs in read.tags if tag == "figure"]
    sources = [attrs["src"] for tag, attrs in read.tags if tag == "img"]
    assert figures == ["right", None] and all(source.startswith("data:image/png;base64,") for source in sources)
    shown = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    assert [picture.size for picture in shown] == [(96, 48), (40, 40)]
    assert not any("http" in str(attrs) for _, attrs in read.tags)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\" onerror='x' \"", "a & b </h2>", "</title><b>"])
def test_texts_are_shown_as_they_are(text):
    read = Read(sheet.page(text, [(text, [sheet.Found(png(), text, True)])]))
    plain = Read(sheet.page("t", [("t", [sheet.Found(png(), "t", True)])]))
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in plain.tags]
    assert sum(text in part for part in read.text) >= 3
    assert all(attrs.keys() == {"src", "alt"} and attrs["alt"] == text for tag, attrs in read.tags if tag == "img")


def test_a_picture_that_cannot_be_read_leaves_an_empty_place(tmp_path):
    for picture in (b"no picture", str(tmp_path / "none.png"), png()[:50]):
        assert sheet.data_uri(picture) == "data:,"


# ---- in the report


@pytest.fixture
def tasks(tmp_path):
    """Three names of four pictures, of which two are alike, found both ways."""
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    rows = [("red", "0"), ("red", "1"), ("green", "1"), ("blue", "2")]
    (tmp_path / "t.tsv").write_text("name\tfile\n" + "".join(f"{name}\t{file}.png\n" for name, file in rows))
    source = config.File(str(tmp_path / "t.tsv"))
    return prepare(
        (
            config.Retrieval(source, {"query": "name", "document": "file"}, pictures=("document",), name="to pictures"),
            config.Retrieval(source, {"query": "file", "document": "name"}, pictures=("query",), name="to names"),
        )
    )


def test_a_table_of_pictures_has_chance_and_no_bm25(tasks):
    evaluations = [{"step": n, **{f"to pictures/{metric}": n / 10 for metric in report.OF_PICTURES}} for n in (0, 5)]
    head, columns, *rows = report.table(tasks[0], evaluations, {})
    assert head == "\nto pictures: 3 held-out queries, 3 documents" and columns.split() == ["R@1", "R@5", "R@10", "mrr@10"]
    assert [row.split()[0] for row in rows] == ["trained", "untrained", "chance"]
    # Of three pictures two are right for "red", one for each of the others.
    assert rows[2].split()[1:] == ["0.444", "1.000", "1.000", f"{(5 / 6 + 2 * 11 / 18) / 3:.3f}"]


def test_what_a_picture_is_known_as_and_what_is_told(tasks, tmp_path):
    task = tasks[0]
    assert [report.caption(task, n) for n in range(3)] == ["red", "red", "blue"]
    found = report.Example(1, np.array([0, 1, 2]))
    assert list(report.told(task, found)) == ["\n? green", "  1  red", "  2* red", "  3  blue"]
    file = report.write_sheet(task, [found], tmp_path)
    assert file.name == "sheet-to-pictures.html" and file.read_text().count('class="right"') == 1


@pytest.mark.parametrize("count", [1, 7, 40])
def test_chance_is_the_mean_over_random_orders(count):
    rng = np.random.default_rng(count)
    judgements = [{int(d): 1.0 for d in rng.choice(count, min(count, n), replace=False)} for n in (1, 2, 5)]
    ranked = np.stack([[rng.permutation(count)[:10] for _ in judgements] for _ in range(4000)])
    gains = [scores.gains_of(each, judgements) for each in ranked]
    wanted = {f"success@{k}": np.mean([scores.success_at(each, k) for each in gains]) for k in (1, 5, 10)}
    wanted["mrr@10"] = np.mean([scores.mrr_at(each, 10) for each in gains])
    found = scores.by_chance(judgements, count)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[key] for key in wanted], list(wanted.values()), atol=0.02)
