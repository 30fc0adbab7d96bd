"""The embedded picture data set: glyphs of the fonts inside matplotlib as rows of a drawing and its Unicode name.

A name is a row of words, such as GREEK SMALL LETTER OMEGA WITH TONOS. Names are held out whose every word stands in others:
nothing but the way the words are put together is new. Which rows there are depends on matplotlib's version and the seed.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import io
import operator
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedjax.config.errors import DataError
from embedjax.config.sources import Glyphs
from embedjax.data.files import FileInfo, file_info

# Text fonts by the beginning of their files' names; the others of the folder hold pieces of formulas, or boxes.
FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")
TEST_SHARE = 0.12
SEEN = 3
"""A held-out name's words each stand in so many names that are not held out."""
SIZE = 64
"""Side of a drawing in pixels."""
FILL = 0.8
"""Share of the side that the longer side of the glyph takes."""


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A character as one font draws it."""

    code: int
    font: str


def open_glyphs(source: Glyphs) -> "GlyphRows":
    """The rows of one split. DataError without matplotlib, whose fonts they are."""
    split = _split(source.seed)[source.split]
    if source.font:
        split = [glyph for glyph in split if Path(glyph.font).stem == source.font]
        if not split:
            raise DataError(f"glyphs: no font {source.font!r}; found: {', '.join(sorted(Path(f).stem for f in _coverage()))}")
    if 0 < source.limit < len(split):
        chosen = np.random.default_rng(source.seed).permutation(len(split))[: source.limit]
        split = [split[i] for i in np.sort(chosen)]
    return GlyphRows(f"glyphs/{source.split}", tuple(split))


class GlyphRows:
    """Columns `image` (a drawing, black on white, as PNG), `name` (in small letters) and `font`."""

    columns = ("image", "name", "font")

    def __init__(self, name: str, glyphs: tuple[Glyph, ...]):
        self.name, self.glyphs = name, glyphs

    @property
    def files(self) -> Sequence[FileInfo]:
        counts = collections.Counter(glyph.font for glyph in self.glyphs)
        return tuple(file_info(font, counts[font]) for font in sorted(counts))

    def __len__(self) -> int:
        return len(self.glyphs)

    def __getitem__(self, index: SupportsIndex, /) -> dict[str, object]:
        glyph = self.glyphs[self._at(index)]
        return {"image": drawing(glyph), "name": name_of(glyph.code), "font": Path(glyph.font).stem}

    def where(self, index: SupportsIndex, /) -> tuple[str, int]:
        glyph = self.glyphs[self._at(index)]
        return glyph.font, glyph.code

    def _at(self, index: SupportsIndex) -> int:
        i = operator.index(index)
        if not 0 <= i < len(self.glyphs):
            raise IndexError(f"{self.name}: row {i} of {len(self.glyphs)}")
        return i


def name_of(code: int) -> str:
    """A character's Unicode name in small letters, its hyphens as spaces; "" for one without."""
    return unicodedata.name(chr(code), "").replace("-", " ").lower()


@functools.lru_cache(maxsize=1 << 15)  # some 30 MB: every epoch but the first reads them here
def drawing(glyph: Glyph) -> bytes:
    """A square PNG with the glyph in its middle, its longer side FILL of the square's."""
    found = _ink(glyph, SIZE)
    ink = _ink(glyph, round(float(np.clip(SIZE * SIZE * FILL / max(found.size), 8, 4 * SIZE))))
    square = Image.new("L", (SIZE, SIZE), 255)
    square.paste(0, ((SIZE - ink.width) // 2, (SIZE - ink.height) // 2), ink)
    out = io.BytesIO()
    square.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _ink(glyph: Glyph, size: int) -> Image.Image:
    """The glyph in white on black at a font size, cut to what is drawn: the font's own boxes hold its spacing too."""
    canvas = Image.new("L", (5 * size, 5 * size), 0)
    ImageDraw.Draw(canvas).text((2 * size, 3 * size), chr(glyph.code), fill=255, font=_font(glyph.font, size), anchor="ls")
    return canvas.crop(canvas.getbbox() or (0, 0, 1, 1))


@functools.lru_cache(maxsize=512)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _coverage() -> dict[str, list[int]]:
    """The named characters that each font draws."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise DataError("glyphs: the fonts are those of matplotlib, which is not installed: pip install matplotlib")
    from fontTools.ttLib import TTFont  # comes with matplotlib

    folder = Path(next(iter(found.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf"
    coverage = {}
    for path in sorted(folder.glob("*.ttf")):
        if path.stem.startswith(FONTS) and not path.stem.endswith("Display"):
            with TTFont(path, lazy=True) as font:
                codes = font.getBestCmap() or {}
                coverage[str(path)] = sorted(code for code in codes if _is_drawn(code, font["glyf"], codes[code]))
    if not coverage:
        raise DataError(f"glyphs: matplotlib has no fonts {', '.join(FONTS)} in {folder}")
    return coverage


def _is_drawn(code: int, outlines: Any, glyph: str) -> bool:
    """Whether a character has a name and leaves ink: spaces and marks of direction do not."""
    return bool(unicodedata.name(chr(code), "")) and outlines[glyph].numberOfContours != 0


@functools.cache
def _split(seed: int) -> dict[str, list[Glyph]]:
    coverage = _coverage()
    held = _held_out(sorted({code for codes in coverage.values() for code in codes}), seed)
    split: dict[str, list[Glyph]] = {"train": [], "test": []}
    for font, codes in coverage.items():
        for code in codes:
            split["test" if code in held else "train"].append(Glyph(code, font))
    return split


def _held_out(codes: Sequence[int], seed: int) -> set[int]:
    """About TEST_SHARE of the characters, in an order drawn by the seed, as long as what they leave knows their words."""
    words = {code: name_of(code).split() for code in codes}
    left = collections.Counter(word for code in codes for word in set(words[code]))
    order = sorted(codes, key=lambda code: hashlib.blake2b(f"{seed} {code}".encode(), digest_size=8).digest())
    held: set[int] = set()
    for code in order:
        if len(held) >= TEST_SHARE * len(codes):
            break
        if len(words[code]) > 1 and all(left[word] > SEEN for word in words[code]):
            held.add(code)
            left.subtract(set(words[code]))
    return held
