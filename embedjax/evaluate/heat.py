"""A heat map of late interaction: which tokens of a document a query took, as a line, in colours, and as an HTML page that
needs no other file."""

import collections
import html
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.text import Text

from embedjax.data.text import Piece
from embedjax.evaluate.matches import Match

MOST_TAKEN = 3
"""Tokens that are named: of those that were pooled, and of those that a query's [MASK] tokens took."""

COLOURS = ((2 / 3, "bold red"), (1 / 3, "yellow"), (0.0, "green"))
"""The colour of what gave more than such a share of the strongest."""

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
h2 { font-size: 15px; margin: 2em 0 .3em; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #fafafa; border: 1px solid #ddd; padding: 8px; margin: 0 }
mark { color: inherit; border-radius: 2px }
.cut { color: #999 }
.scroll { overflow-x: auto; margin-top: 8px }
table { border-collapse: collapse; font-size: 12px }
th, td { border: 1px solid #ddd; padding: 1px 5px; text-align: right; white-space: pre }
td.best { font-weight: bold; border-color: #222 }
"""


class Shown(NamedTuple):
    """A hit of a search: what stands over it, and how it matched."""

    title: str
    match: Match


def name(piece: Piece, text: str) -> str:
    """What a token is shown as: its characters, or its own name if it has none."""
    return text[piece.start : piece.end] if piece.placed else piece.name


def line(match: Match) -> str:
    """`read=read_csv 0.91, csv=csv 0.97, 20 [MASK]=csv x12, file x8`: the words of a query with what they took and how similar
    it is, and then what its other tokens took most."""
    taken = [_together(match, token) for token in range(len(match.query))]
    parts = [
        f"{_flat(name(piece, match.asked))}={what} {match.best(token):.2f}"
        for token, (piece, what) in enumerate(zip(match.query, taken, strict=True))
        if piece.placed
    ]
    others: dict[str, collections.Counter[str]] = {}
    for piece, what in zip(match.query, taken, strict=True):
        if not piece.placed:
            others.setdefault(piece.name, collections.Counter())[what] += 1
    for other, found in others.items():
        count = f"{found.total()} " if found.total() > 1 else ""
        told = (f"{what} x{n}" if n > 1 else what for what, n in found.most_common(MOST_TAKEN))
        parts.append(f"{count}{other}={', '.join(told)}")
    return ", ".join(parts)


def lines(found: Match | str, count: int, width: int) -> Iterator[Text]:
    """The first lines of a text that are not blank, where it matched in colours by strength; of a longer line the `width`
    characters that matched most."""
    text = found if isinstance(found, str) else found.text
    strength, start = np.zeros(len(text)) if isinstance(found, str) else strengths(found), 0
    for whole in text.splitlines(keepends=True):
        if count and whole.strip():
            shown = whole.rstrip()
            coloured = Text(shown)
            for at, end, value in runs(strength[start : start + len(shown)]):
                if style := next((style for least, style in COLOURS if value > least), ""):
                    coloured.stylize(style, at, end)
            at = most(strength[start : start + len(shown)], width)
            yield coloured[at : at + width]
            count -= 1
        start += len(whole)


def most(values: Float[np.ndarray, " C"], width: int) -> int:
    """Where the first of the parts of `width` numbers with the highest sum begins."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return int((sums[width:] - sums[:-width]).round(6).argmax()) if len(values) > width else 0


def strengths(match: Match) -> Float[np.ndarray, " C"]:
    """The strength of each character of the text: the highest of its tokens, which may overlap; 0 of what has none."""
    found = np.zeros(len(match.text))
    for piece, value in zip(match.document, match.strength(), strict=True):
        found[piece.start : piece.end] = np.maximum(found[piece.start : piece.end], value)
    return found


def runs(values: Float[np.ndarray, " C"]) -> Iterator[tuple[int, int, float]]:
    """(start, end, value) of each run of equal numbers."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)] if len(values) else []
    for start, end in zip(edges, edges[1:], strict=False):
        yield start, end, float(values[start])


def page(query: str, hits: Sequence[Shown]) -> str:
    """The page of a query and what it found, best first."""
    title = html.escape(query)
    parts = [f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>']
    parts += [
        f"<h1>{title}</h1>",
        "<p>Each token of the query takes the document's token that is most similar to it; the sum of their similarities is "
        "the score. The more of it a token gave, the darker it is. Under each text the query's tokens in rows, in columns the "
        "document's that any of them took, framed where one did. Tokens in brackets stand for no words: special ones, the "
        "markers of queries and of documents, and [MASK], which fills a query. Grey text lies beyond what the model reads.</p>",
    ]
    for hit in hits:
        parts += [f"<h2>{html.escape(hit.title)}</h2>", f"<pre>{_shaded(hit.match)}</pre>", _table(hit.match)]
    return "\n".join([*parts, "</html>", ""])


def _shaded(match: Match) -> str:
    """The whole text, with each token that was taken marked, and what took it for its title."""
    strength, titles = strengths(match), [""] * len(match.text)
    for token, piece in enumerate(match.query):
        said = f"{name(piece, match.asked)} {match.best(token):.2f}"
        for place in match.taken(token):
            for at in range(match.document[place].start, match.document[place].end):
                titles[at] += f", {said}" if titles[at] else said
    found, start = [], 0
    for at in range(1, len(match.text) + 1):
        ends = at == len(match.text) or titles[at] != titles[start] or strength[at] != strength[start] or at == match.seen
        if ends:
            part = html.escape(match.text[start:at])
            if titles[start]:
                style, title = f"background: rgba(255, 150, 0, {strength[start]:.2f})", html.escape(titles[start])
                part = f'<mark style="{style}" title="{title}">{part}</mark>'
            elif start >= match.seen:
                part = f'<span class="cut">{part}</span>'
            found.append(part)
            start = at
    return "".join(found)


def _table(match: Match) -> str:
    """The query's tokens in rows, the document's tokens that any of them took in columns."""
    taken = [set(match.taken(token).tolist()) for token in range(len(match.query))]
    columns = sorted(set().union(*taken))
    head = "".join(f"<th>{html.escape(_flat(name(match.document[place], match.text)))}</th>" for place in columns)
    rows = [f"<tr><th></th>{head}</tr>"]
    for token, piece in enumerate(match.query):
        cells = []
        for place in columns:
            value = float(match.similarity[token, place])
            kind = ' class="best"' if place in taken[token] else ""
            shade = f"background: rgba(255, 150, 0, {min(max(value, 0), 1):.2f})"
            cells.append(f'<td{kind} style="{shade}">{value:.2f}</td>')
        rows.append(f"<tr><th>{html.escape(_flat(name(piece, match.asked)))}</th>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _together(match: Match, token: int) -> str:
    """What a token of the query took; of those that were pooled the first ones joined, and how many more there are."""
    found = [_flat(name(match.document[place], match.text)) for place in match.taken(token)]
    more = [f"{len(found) - MOST_TAKEN} more"] if len(found) > MOST_TAKEN else []
    return "+".join(found[:MOST_TAKEN] + more) or "nothing"


def _flat(text: str) -> str:
    return " ".join(text.split()) or repr(text)
