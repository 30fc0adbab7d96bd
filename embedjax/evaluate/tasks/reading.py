"""A task's sources -> checked columns. What cannot be used is an error that names its row: an evaluation passes over none."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from embedjax.config import Source as SourceConfig
from embedjax.config import Task
from embedjax.config.errors import ConfigError, nearest
from embedjax.data.sources import Source, open_source, select
from embedjax.evaluate.pictures import Stored
from embedjax.evaluate.rows import label_at, text_at


def opened(task: Task, needed: Sequence[str], source: SourceConfig | None = None, *, optional: Sequence[str] = ()) -> Source:
    """A task's source (or another of its sources), which has all columns that the task names: those needed, and of the optional
    ones any. Raises ConfigError, DataError."""
    require(task, task.columns, needed, optional)
    found = open_source(source or task.source)
    select(found, task.columns, f"task {task.name!r}")
    return found


def require(task: Task, columns: Mapping[str, str], needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises ConfigError for a column that a task names and has no use for, or needs and does not name."""
    known = [*needed, *optional]
    if odd := [name for name in columns if name not in known]:
        raise ConfigError(f"task {task.name!r} names a column for {odd[0]!r}, which it does not have; {nearest(odd[0], known)}")
    if missing := [name for name in needed if name not in columns]:
        raise ConfigError(f"task {task.name!r} names no column for {missing[0]}; its columns are {dict(columns)}")


def rows_of(task: Task, source: Source) -> range:
    """The numbers of the rows that `limit` leaves."""
    return range(min(len(source), task.limit or len(source)))


def texts_in(task: Task, source: Source, column: str) -> list[str]:
    """The texts of one of our columns, none empty."""
    return [text_at(source, row, task.columns[column]) for row in rows_of(task, source)]


def subject(task: Task) -> str:
    """Our column of what a task is about: `image` where it names one, else `text`."""
    return "image" if "image" in task.columns else "text"


def items_in(task: Task, source: Source, column: str, rows: Iterable[int] | None = None) -> list[str] | list[Stored]:
    """What one of our columns holds in some rows, or those that `limit` leaves: pictures in `image`, else texts, none empty."""
    rows, theirs = rows_of(task, source) if rows is None else rows, task.columns[column]
    if column != "image":
        return [text_at(source, row, theirs) for row in rows]
    return [picture_at(source, row, theirs) for row in rows]


def picture_at(source: Source, row: int, column: str) -> Stored:
    """The picture of a row. Raises BadRow for neither a path nor bytes; whether it is whole shows when it is encoded."""
    found = Stored(source, row, column)
    _ = found.path
    return found


def labels_in(task: Task, source: Source, rows: range) -> list[str]:
    """The labels of some rows, whole numbers as text."""
    return [label_at(source, row, task.columns["label"]) for row in rows]


def numbered(values: Sequence[str]) -> tuple[list[str], Int[np.ndarray, " N"]]:
    """The different values in the order they come in, and the number of each row's value among them."""
    places: dict[str, int] = {}
    rows = np.array([places.setdefault(value, len(places)) for value in values], np.int32)
    return list(places), rows
