"""Which tokens matched: by a loop over similarities, as a line, in colours, and on a page that takes no text for HTML."""

import html.parser
import re

import numpy as np
import pytest

from embedjax.data.text import Piece
from embedjax.evaluate import heat
from embedjax.evaluate.matches import Match

SPECIALS = [Piece("[CLS]", 0, 0, True), Piece("[unused0]", 0, 0, True)]
ODD = ["<script>alert(1)</script>", "\" onmouseover='x' \"", "a & b </pre></mark>", "</title><b>", "&lt;i&gt;"]


def placed(text, *words):
    """Pieces of words, in their order."""
    found, at = [], 0
    for word in words:
        at = text.index(word, at)
        found.append(Piece(word.lower(), at, at + len(word), True))
        at += len(word)
    return found


@pytest.fixture
def match():
    """`read csv` and two [MASK] against `Reads a CSV file, or not`, of which the last two words are beyond what is read."""
    text, query = "Reads a CSV\n\nfile, or not", "read csv"
    document = [Piece("[CLS]", 0, 0, True), *placed(text, "Reads", "a", "CSV", "file")]
    asked = [SPECIALS[0], *placed(query, "read", "csv"), *[Piece("[MASK]", 0, 0, True)] * 2]
    similarity = np.array(
        [
            [0.9, 0.1, 0.1, 0.1, 0.0],
            [0.1, 0.7, 0.2, 0.1, 0.0],
            [0.1, 0.2, 0.1, 0.5, 0.4],
            [0.0, 0.1, 0.0, 0.7, 0.6],
            [-0.2, -0.3, -0.2, -0.1, -0.4],
        ]
    )
    return Match(query, text, asked, document, similarity, np.arange(5), text.index(","))


def test_what_is_taken_and_how_strongly(match):
    assert match.score == pytest.approx(0.9 + 0.7 + 0.5 + 0.7 - 0.1)
    assert [match.taken(n).tolist() for n in range(5)] == [[0], [1], [3], [3], [3]]
    np.testing.assert_allclose(match.strength(), [0.9 / 1.2, 0.7 / 1.2, 0, 1, 0])
    np.testing.assert_allclose(heat.strengths(match)[8:11], 1)
    assert heat.line(match) == "read=Reads 0.70, csv=CSV 0.50, [CLS]=[CLS], 2 [MASK]=CSV x2"


def test_pooled_tokens_are_taken_together(match):
    group = np.array([0, 1, 2, 3, 3])
    similarity = match.similarity.copy()
    similarity[:, 4] = similarity[:, 3]
    pooled = Match(match.asked, match.text, match.query, match.document, similarity, group, match.seen)
    assert pooled.taken(2).tolist() == [3, 4] and pooled.score == match.score
    assert "csv=CSV+file 0.50" in heat.line(pooled)
    whole = Match(match.asked, match.text, match.query, match.document, np.full((5, 5), 0.5), np.zeros(5, int), match.seen)
    assert heat.line(whole).startswith("read=[CLS]+Reads+a+2 more 0.50, csv=[CLS]+Reads+a+2 more 0.50, ")


def test_a_document_without_tokens(match):
    empty = Match(match.asked, "", match.query, [], np.zeros((5, 0)), np.arange(0), 0)
    assert empty.score == 0 and empty.taken(0).size == 0 and "read=nothing 0.00" in heat.line(empty)
    assert list(heat.lines(empty, 4, 80)) == []
    assert "<pre></pre>" in heat.page("q", [heat.Shown("1", empty)])


def test_colours_of_the_first_lines(match):
    first, second = heat.lines(match, 4, 80)
    assert (first.plain, second.plain) == ("Reads a CSV", "file, or not")
    styles = {first.plain[span.start : span.end]: span.style for span in first.spans}
    assert styles == {"Reads": "yellow", "CSV": "bold red"} and not second.spans
    assert [line.plain for line in heat.lines("a\n \nb\nc", 2, 80)] == ["a", "b"]
    assert [line.plain for line in heat.lines("abcdef\n", 2, 4)] == ["abcd"], "the beginning, where nothing matched"


def test_of_a_long_line_the_part_that_matched_most(match):
    (first, second) = heat.lines(match, 4, 5)
    assert first.plain == "a CSV" and [(span.start, span.end, span.style) for span in first.spans] == [(2, 5, "bold red")]
    assert second.plain == "file,"
    for seed in range(5):
        values, width = np.random.default_rng(seed).random(20), 1 + 4 * seed
        at = heat.most(values, width)
        assert values[at : at + width].sum() == pytest.approx(max(values[k : k + width].sum() for k in range(21 - width)))
    assert heat.most(np.zeros(3), 4) == heat.most(np.zeros(9), 4) == 0


class Read(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each kind of element."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in self.open:
            self.text.setdefault(tag, []).append(data)

    def of(self, tag):
        return "".join(self.text.get(tag, []))


def test_the_page_shades_what_matched_and_tells_what_took_it(match):
    page = heat.page("read csv", [heat.Shown("1  2.700  a.txt:3", match)])
    read = Read(page)
    assert read.of("pre") == match.text and read.of("h2") == "1  2.700  a.txt:3"
    marks = [attrs for tag, attrs in read.tags if tag == "mark"]
    assert read.text["mark"] == ["Reads", "CSV"]
    assert [mark["title"] for mark in marks] == ["read 0.70", "csv 0.50, [MASK] 0.70, [MASK] -0.10"]
    assert [re.search(r"([\d.]+)\)$", mark["style"]).group(1) for mark in marks] == ["0.58", "1.00"]
    assert read.text["span"] == [", or not"], "what lies beyond is grey"
    assert read.text["th"] == ["[CLS]", "Reads", "CSV", "[CLS]", "read", "csv", "[MASK]", "[MASK]"]
    assert page.count("<tr>") == 6 and read.text["td"] == [f"{x:.2f}" for x in match.similarity[:, [0, 1, 3]].ravel()]
    kinds = [attrs.get("class") for tag, attrs in read.tags if tag == "td"]
    framed = [text for kind, text in zip(kinds, read.text["td"], strict=True) if kind == "best"]
    assert framed == ["0.90", "0.70", "0.50", "0.70", "-0.10"]
    assert not any("http" in str(attrs) or tag in ("script", "link", "img") for tag, attrs in read.tags)


@pytest.mark.parametrize("odd", ODD)
def test_texts_are_shown_as_they_are(odd):
    def page(word):
        text = f"{word} and more"
        pieces = [Piece(word, 0, len(word), True), Piece(word, 0, 0, True)]
        match = Match(word, text, pieces, pieces, np.eye(2), np.arange(2), len(text))
        return Read(heat.page(word, [heat.Shown(f"1 {word}", match)]))

    found, plain = page(odd), page("plain")
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [attrs.keys() for _, attrs in found.tags] == [attrs.keys() for _, attrs in plain.tags]
    assert found.of("pre") == f"{odd} and more" and found.of("h1") == odd and found.of("h2") == f"1 {odd}"
    (title,) = [attrs["title"] for tag, attrs in found.tags if tag == "mark"]
    assert title == f"{odd} 1.00" and found.text["th"].count(odd) == 4
