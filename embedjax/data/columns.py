"""The columns of a training set: which of the source's become ours, and what a good value of each is. Tokenizes nothing."""

import dataclasses
import hashlib
import math
import numbers
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt32

from embedjax.config import Set
from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.data.sources import BadRow, Source, select

NUMBERS = {"score": "scores", "label": "labels"}
"""Our column of numbers -> its name in a batch."""


Values = dict[str, str | float | int]
"""One row: our column -> its value."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Our columns of one set, each with the source's column it is read from."""

    texts: dict[str, str]
    """anchor, positive, negative, negative_2, ... in this order, as far as the set has them."""
    numbers: dict[str, str]
    """score and label, as far as the set has them."""

    @property
    def documents(self) -> tuple[str, ...]:
        """The text columns that share the document length."""
        return tuple(name for name in self.texts if name != "anchor")

    @property
    def negatives(self) -> tuple[str, ...]:
        """The hard negatives, K of them."""
        return tuple(name for name in self.texts if name.startswith("negative"))


def make_layout(which: Set, source: Source) -> Layout:
    """The layout of a set. Raises ConfigError for a column that is not one of ours, DataError for one the source lacks."""
    names = list(which.columns)
    for name in names:
        if name not in ("anchor", "positive", "negative", *NUMBERS) and not re.fullmatch(r"negative_([2-9]|[1-9]\d+)", name):
            known = nearest(name, ("anchor", "positive", "negative", "negative_2", *NUMBERS))
            raise ConfigError(f"set {which.name!r} has a column {name!r} that is not one of ours; {known}")
    if "anchor" not in names:
        raise ConfigError(f"set {which.name!r} has no column anchor; its columns are {names}")
    count = sum(name.startswith("negative") for name in names)
    negatives = ["negative", *(f"negative_{k}" for k in range(2, count + 1))][:count]
    if gap := [name for name in negatives if name not in names]:
        raise ConfigError(f"set {which.name!r} has {count} hard negatives but no column {gap[0]!r}; number them without a gap")
    select(source, which.columns, f"set {which.name!r}")
    texts = [name for name in ("anchor", "positive", *negatives) if name in names]
    return Layout({n: which.columns[n] for n in texts}, {n: which.columns[n] for n in NUMBERS if n in names})


def read_row(source: Source, layout: Layout, row: int) -> Values:
    """Our columns of one row. Raises BadRow when a value is missing or of the wrong kind, DataError for lists."""
    values = source[row]
    result: Values = {}
    try:
        for name, column in layout.texts.items():
            result[name] = _text(column, values.get(column))
        for name, column in layout.numbers.items():
            result[name] = _number(column, values.get(column), whole=name == "label")
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


def _text(column: str, value: object) -> str:
    if isinstance(value, (list, tuple, dict, np.ndarray)):
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


def _number(column: str, value: object, *, whole: bool) -> float | int:
    if isinstance(value, (list, tuple, dict, np.ndarray)):
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


def tower_column(name: str) -> str:
    """The column whose tower and prompt encode this one: negative_2 follows negative."""
    return "negative" if name.startswith("negative") else name


def hash_texts(texts: Sequence[str]) -> UInt32[np.ndarray, "N 2"]:
    """blake2b-64 of each raw text, low word first; two words, since jax cuts 64-bit integers silently."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u4").reshape(-1, 2).astype(np.uint32)
