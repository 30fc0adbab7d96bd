"""A contact sheet of what a model finds: text queries, each with its best pictures, in one HTML file that needs no other."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from embedjax.data import image

SIDE = 96
"""Longer side of a picture on the sheet, in pixels."""

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
h2 { font-size: 15px; margin: 1.5em 0 .3em }
div { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0; width: 112px; padding: 4px; border: 3px solid #ddd; border-radius: 4px; text-align: center }
figure.right { border-color: #2a8a3a; background: #eef8ef }
img { max-width: 96px; max-height: 96px }
figcaption { font-size: 11px; overflow-wrap: anywhere }
"""


class Found(NamedTuple):
    """A picture that a query found: its bytes or its path, what is known of it, and whether it is right."""

    picture: bytes | str
    caption: str
    right: bool


def page(title: str, rows: Sequence[tuple[str, Sequence[Found]]]) -> str:
    """The sheet of (query, what it found, best first). Right pictures are framed in green and ticked."""
    title = html.escape(title)
    parts = [f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>']
    parts += [f"<h1>{title}</h1>", "<p>Queries, and the pictures found for them, best first; \u2713 is right.</p>"]
    for query, found in rows:
        parts += [f"<h2>{html.escape(query)}</h2>", "<div>", *map(_figure, found), "</div>"]
    return "\n".join([*parts, "</html>", ""])


def _figure(found: Found) -> str:
    caption = html.escape(found.caption)
    kind, mark = (' class="right"', "\u2713 ") if found.right else ("", "")
    picture = f'<img src="{data_uri(found.picture)}" alt="{caption}">'
    return f"<figure{kind}>{picture}<figcaption>{mark}{caption}</figcaption></figure>"


def data_uri(picture: bytes | str) -> str:
    """A small copy of a picture as a data URI; of one that cannot be read an empty one."""
    try:
        small = image.decode(image.read(picture), least=SIDE)
    except ValueError:
        return "data:,"
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
