"""The columns of a training set: which of the source's become ours, and what a good value of each is. Tokenizes nothing."""

import dataclasses
import hashlib
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import UInt32
from PIL import Image

from embedjax.config import Set
from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.data import image
from embedjax.data.sources import BadRow, Source, select

TEXT = re.compile(r"anchor|positive|negative(_([2-9]|[1-9]\d+))?")
SCORE = re.compile(r"score(_([2-9]|[1-9]\d+))?")

# Rows looked at to learn what one row cannot hide: whether labels are lists, and how wide vectors are.
PEEK = 100

Values = dict[str, Any]
"""One row: our column -> its value: a text or several, a Picture, a number, a list of class numbers, a float32 vector."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Our columns of one set, each with the source's column it is read from."""

    texts: dict[str, str]
    """anchor, positive, negative, negative_2, ... in this order, as far as the source has them."""
    numbers: dict[str, str]
    """score, score_2, ... and label, as far as the set has them."""
    vector: str = ""
    """The source's column of vectors, "" for none."""
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    """Class name -> number."""
    lists: bool = False
    """Whether labels are lists, which become rows of 0 and 1."""
    width: int = 0
    """Numbers of a vector."""
    mined: tuple[str, ...] = ()
    """negative, negative_2, ... where the model finds them."""
    pictures: dict[str, str] = dataclasses.field(default_factory=dict)
    """Those of anchor, positive, negative, ... that hold pictures."""
    least: int = 0
    """What the shorter side of a picture must keep when it is decoded."""
    root: str = ""
    """Folder that paths of pictures are relative to; empty for that of their file."""
    several: frozenset[str] = frozenset()
    """Columns of texts that hold a list, of which each step draws one."""

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that towers encode, mined ones included: anchor, positive, negative, ... in this order."""
        given = {**self.texts, **self.pictures}
        return (*sorted(given, key=_place), *self.mined)

    @property
    def without_pictures(self) -> "Layout":
        """The same rows as far as they can be read without decoding a picture."""
        return dataclasses.replace(self, pictures={})

    @property
    def negatives(self) -> tuple[str, ...]:
        """The hard negatives, K of them."""
        return tuple(name for name in self.names if name.startswith("negative"))

    @property
    def scores(self) -> tuple[str, ...]:
        """score, score_2, ..., S of them."""
        return tuple(name for name in self.numbers if name != "label")

    def arrays(self, rows: Sequence[Values]) -> dict[str, np.ndarray]:
        """What is no text, as arrays: "scores" [B], or [B S] where there are several; "labels" [B], or [B C] of 0 and 1 where
        they are lists; "vectors" [B V]."""
        result: dict[str, np.ndarray] = {}
        if self.scores:
            scores = np.array([[row[name] for name in self.scores] for row in rows], np.float32)
            result["scores"] = scores if len(self.scores) > 1 else scores[:, 0]
        if "label" in self.numbers:
            several = np.zeros((len(rows), len(self.labels)), np.float32)
            for row, values in zip(several, rows, strict=True):
                row[values["label"] if self.lists else []] = 1
            result["labels"] = several if self.lists else np.array([row["label"] for row in rows], np.int32)
        if self.vector:
            result["vectors"] = np.stack([row["vector"] for row in rows])
        return result

    def blank(self) -> Values:
        """A row of no meaning, in the shape of the set's."""
        label: Values = {"label": []} if self.lists else {}
        vector: Values = {"vector": np.zeros(self.width, np.float32)} if self.vector else {}
        picture = dict.fromkeys(self.pictures, Picture(Image.new("RGB", (self.least or 1, self.least or 1)), b""))
        return {**dict.fromkeys(self.names, "a"), **picture, **dict.fromkeys(self.numbers, 0), **label, **vector}


class Picture(NamedTuple):
    """A decoded picture and the bytes it was decoded from, by which equal ones are told."""

    decoded: Image.Image
    encoded: bytes


def make_layout(which: Set, source: Source, pictures: Mapping[str, int] | None = None) -> Layout:
    """The layout of a set; `pictures` are the columns (anchor, positive, negative) that hold pictures, each with the length its
    shorter side must have. Raises ConfigError for a column that is not one of ours, DataError for one the source lacks."""
    pictures = pictures or {}
    what, names = f"set {which.name!r}", list(which.columns)
    for name in names:
        if not (TEXT.fullmatch(name) or SCORE.fullmatch(name) or name in ("label", "vector")):
            known = nearest(name, ("anchor", "positive", "negative", "negative_2", "score", "score_2", "label", "vector"))
            raise ConfigError(f"{what} has a column {name!r} that is not one of ours; {known}")
    if "anchor" not in names:
        raise ConfigError(f"{what} has no column anchor; its columns are {names}")
    negatives, scores = _numbered(what, names, "negative", "hard negatives"), _numbered(what, names, "score", "scores")
    select(source, which.columns, what)
    encoded = [name for name in ("anchor", "positive", *negatives) if name in names]
    seen = [name for name in encoded if tower_column(name) in pictures]
    texts = [name for name in encoded if name not in seen]
    if odd := [name for name in which.several if name not in texts]:
        raise ConfigError(f"{what}: several names {odd[0]!r}; its columns of texts are {texts}")
    found = [*scores, *(["label"] if "label" in names else [])]
    layout = Layout(
        {name: which.columns[name] for name in texts},
        {name: which.columns[name] for name in found},
        which.columns.get("vector", ""),
        {name: number for number, name in enumerate(_classes(which))},
        mined=which.names[len(which.columns) :],
        pictures={name: which.columns[name] for name in seen},
        least=max(pictures.values(), default=0),
        root=getattr(which.source, "root", ""),
        several=frozenset(which.several),
    )
    lists, width = _peek(source, which.columns)
    if lists and not which.labels:
        raise ConfigError(f"{what}: column {which.columns['label']!r} holds lists; name the classes in Set.labels")
    return dataclasses.replace(layout, lists=lists, width=width)


def _classes(which: Set) -> Sequence[str]:
    """The names of the classes; their numbers where the loss says how many there are and no name is given."""
    return which.labels or tuple(map(str, range(getattr(which.loss, "classes", 0))))


def _numbered(what: str, names: Sequence[str], first: str, plural: str) -> list[str]:
    """first, first_2, ..., as far as `names` has them. Raises ConfigError for a gap."""
    count = sum(name == first or name.startswith(f"{first}_") for name in names)
    wanted = [first, *(f"{first}_{k}" for k in range(2, count + 1))][:count]
    if gap := [name for name in wanted if name not in names]:
        raise ConfigError(f"{what} has {count} {plural} but no column {gap[0]!r}; number them without a gap")
    return wanted


def _peek(source: Source, columns: dict[str, str]) -> tuple[bool, int]:
    """(whether labels are lists, the width of vectors), by the first good row that has them."""
    lists, width = None, 0
    for row in range(min(PEEK, len(source)) if {"label", "vector"} & columns.keys() else 0):
        try:
            values = source[row]
        except BadRow:
            continue
        label, vector = values.get(columns.get("label", "")), values.get(columns.get("vector", ""))
        lists = _is_list(label) if lists is None and label is not None else lists
        width = len(vector) if not width and _is_list(vector) else width
        if ("label" not in columns or lists is not None) and ("vector" not in columns or width):
            break
    return bool(lists), width


def read_row(source: Source, layout: Layout, row: int) -> Values:
    """Our columns of one row. Raises BadRow when a value is missing or of the wrong kind, DataError for lists."""
    values = source[row]
    result: Values = {}
    try:
        for name, column in layout.texts.items():
            result[name] = (_texts if name in layout.several else _text)(column, values.get(column))
        for name, column in layout.numbers.items():
            value = values.get(column)
            result[name] = _label(column, value, layout) if name == "label" else _number(column, value)
        if layout.vector:
            result["vector"] = _vector(layout.vector, values.get(layout.vector), layout.width)
        for name, column in layout.pictures.items():
            data = image.read(values.get(column), layout.root or os.path.dirname(source.where(row)[0]))
            result[name] = Picture(image.decode(data, least=layout.least), data)
    except ValueError as error:
        file, number = source.where(row)
        raise BadRow(file, number, str(error)) from None
    except DataError as error:
        file, number = source.where(row)
        raise DataError(f"{file}, row {number}: {error}") from None
    return result


def read_rows(source: Source, layout: Layout, rows: Iterable[int]) -> tuple[dict[int, Values], dict[int, BadRow]]:
    """The good rows and the bad ones, read in the order given."""
    good, bad = {}, {}
    for row in rows:
        try:
            good[row] = read_row(source, layout, row)
        except BadRow as error:
            bad[row] = error
    return good, bad


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple, np.ndarray))


def _text(column: str, value: object) -> str:
    if _is_list(value) or isinstance(value, dict):
        raise DataError(
            f"column {column!r} holds {type(value).__name__} values; one text a column is expected (negative, negative_2, ...)"
        )
    if value is None:
        raise ValueError(f"column {column!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"column {column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column {column!r} is not valid Unicode (a lone surrogate)") from None
    return value


def _texts(column: str, value: object) -> list[str]:
    """A list of texts, at least one; a single text is a list of it."""
    found = [_text(column, item) for item in (value if _is_list(value) else [value])]
    if not found:
        raise ValueError(f"column {column!r} is an empty list")
    return found


def _number(column: str, value: object, *, whole: bool = False) -> float | int:
    if _is_list(value) or isinstance(value, dict):
        raise DataError(f"column {column!r} holds {type(value).__name__} values; one number a row is expected")
    if value is None:
        raise ValueError(f"column {column!r} is missing")
    if not isinstance(value, (str, numbers.Real)):
        raise ValueError(f"column {column!r} is {type(value).__name__}, not a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"column {column!r} is {value!r:.40}, not a number") from None
    limit = 2**31 - 1 if whole else float(np.finfo(np.float32).max)
    if not math.isfinite(number) or abs(number) > limit or (whole and number != int(number)):
        raise ValueError(f"column {column!r} is {value!r:.40}, not a {'32-bit whole' if whole else 'finite 32-bit'} number")
    return int(number) if whole else number


def _label(column: str, value: object, layout: Layout) -> int | list[int]:
    """The number of a class, or of each in a list; those of named classes are below their count."""
    if layout.lists:
        if not _is_list(value):
            raise ValueError(f"column {column!r} is {value!r:.40}, not a list of labels")
        return [_class(column, item, layout.labels) for item in value]
    return _class(column, value, layout.labels)


def _class(column: str, value: object, names: dict[str, int]) -> int:
    if names and isinstance(value, str):
        if value not in names:
            hint = nearest(value, names)
            close = "" if hint.startswith("known") else f"; {hint}"
            raise ValueError(f"column {column!r} is {value!r:.40}, none of the {len(names)} labels{close}")
        return names[value]
    number = int(_number(column, value, whole=True))
    if names and not 0 <= number < len(names):
        raise ValueError(f"column {column!r} is {number}; the {len(names)} labels have the numbers 0 to {len(names) - 1}")
    return number


def _vector(column: str, value: object, width: int) -> np.ndarray:
    if not _is_list(value):
        raise ValueError(f"column {column!r} is {'missing' if value is None else type(value).__name__}, not a list of numbers")
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"column {column!r} holds what is no number") from None
    if vector.shape != (width,) or not np.isfinite(vector).all():
        raise ValueError(f"column {column!r} is of shape {vector.shape}, or not finite; {width} finite numbers were expected")
    return vector


def tower_column(name: str) -> str:
    """The column whose tower and prompt encode this one: negative_2 follows negative."""
    return "negative" if name.startswith("negative") else name


def _place(name: str) -> tuple[int, int]:
    """Sorts anchor, positive, negative, negative_2, ..."""
    kind, _, number = name.partition("_")
    return ("anchor", "positive", "negative").index(kind), int(number or 1)


def is_text(name: str) -> bool:
    """Whether one of our columns holds texts."""
    return TEXT.fullmatch(name) is not None


def hash_texts(texts: Sequence[str]) -> UInt32[np.ndarray, "N 2"]:
    """blake2b-64 of each raw text, low word first; two words, since jax cuts 64-bit integers silently."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u4").reshape(-1, 2).astype(np.uint32)
