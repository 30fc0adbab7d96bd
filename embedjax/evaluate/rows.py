"""Rows of a source as checked values: what an evaluation or an encoding may not pass over is told with its file and row."""

import math
from collections.abc import Iterator, Sequence

from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.data.sources import BadRow, Source


def column_of(source: Source, column: str | None, usual: Sequence[str] = ("text",)) -> str:
    """The column to encode: the one asked for, else the first of the usual ones that is there, else the only one. Raises
    ConfigError, DataError."""
    if column is not None:
        if column not in source.columns:
            hint = nearest(column, source.columns)
            raise DataError(f"{source.name} has no column {column!r}; found: {', '.join(source.columns)} ({hint})")
        return column
    found = [name for name in usual if name in source.columns] or list(source.columns)
    if len(source.columns) > 1 and found[0] not in usual:
        held = "pictures" if usual[0] == "image" else "texts"
        raise ConfigError(f"{source.name} has the columns {', '.join(source.columns)}; say which holds the {held} (--column)")
    return found[0]


def text_at(source: Source, row: int, column: str) -> str:
    """A text that is not empty. Raises BadRow, a DataError."""
    if not (text := string_at(source, row, column)).strip():
        raise BadRow(*source.where(row), f"column {column!r} is empty")
    return text


def string_at(source: Source, row: int, column: str) -> str:
    """A text, which may be empty. Raises BadRow."""
    value = source[row].get(column)
    if not isinstance(value, str):
        found = "missing" if value is None else f"{type(value).__name__}, not text"
        raise BadRow(*source.where(row), f"column {column!r} is {found}")
    return value


def key_at(source: Source, row: int, column: str) -> str:
    """An identifier, text or whole number, as text. Raises BadRow."""
    value = source[row].get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "missing or empty" if value is None or value == "" else f"{type(value).__name__}, not an identifier"
        raise BadRow(*source.where(row), f"column {column!r} is {found}")
    return str(value)


def label_at(source: Source, row: int, column: str) -> str:
    """A class label as text; whole numbers and truth values as numbers are written: 3, 1. Raises BadRow."""
    return str(_label(source, row, column, source[row].get(column)))


def several_labels_at(source: Source, row: int, column: str) -> tuple[str | int, ...]:
    """The labels of a list, or the one label; numbers that are no text stay numbers. Raises BadRow."""
    value = source[row].get(column)
    return tuple(_label(source, row, column, item) for item in (value if isinstance(value, list) else [value]))


def _label(source: Source, row: int, column: str, value: object) -> str | int:
    if isinstance(value, float) and value.is_integer() or isinstance(value, bool):
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        found = "missing or empty" if value is None or value == "" else f"{value!r:.40}, not a label"
        raise BadRow(*source.where(row), f"column {column!r} is {found}")
    return value.strip() if isinstance(value, str) else value


def texts_at(source: Source, row: int, column: str) -> list[str]:
    """A text, or a list of texts, none of them empty. Raises BadRow."""
    value = source[row].get(column)
    if not isinstance(value, list):
        return [text_at(source, row, column)]
    if odd := [item for item in value if not isinstance(item, str) or not item.strip()]:
        raise BadRow(*source.where(row), f"column {column!r} holds {odd[0]!r:.40}, which is no text or empty")
    return value


def number_at(source: Source, row: int, column: str) -> float:
    """A finite number. Raises BadRow."""
    value = source[row].get(column)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BadRow(*source.where(row), f"column {column!r} is {value!r:.40}, not a number") from None
    if not math.isfinite(number):
        raise BadRow(*source.where(row), f"column {column!r} is {value!r:.40}; it must be finite")
    return number


def texts_of(source: Source, column: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The texts of some rows, none empty. Raises BadRow."""
    return (text_at(source, row, column) for row in range(start, len(source) if stop is None else stop))
