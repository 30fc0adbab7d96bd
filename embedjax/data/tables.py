"""Text files as rows: TSV and CSV, JSON lines, plain lines. One pass at open finds where rows begin; content stays on disk."""

import csv
import mmap
from array import array
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from embedjax.config.errors import ConfigError, DataError
from embedjax.data.files import content
from embedjax.data.rows import BadRow, json_object, utf8

FIELD_LIMIT = 1 << 26  # csv's own limit, 128 KiB, is shorter than long documents
UTF8_MARK = b"\xef\xbb\xbf"


class TextFile:
    """Rows of a mapped text file. Costs 16 bytes of memory a row: where it begins and on which line."""

    columns: tuple[str, ...]

    def __init__(self, path: str, data: mmap.mmap, starts: Int64[np.ndarray, "N_1"], lines: Int64[np.ndarray, "N"]):
        self.path, self.data = path, data
        self.starts, self.lines = starts.data, lines.data  # memoryviews index to int faster than numpy does

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, i: int) -> int:
        return self.lines[i]

    def raw(self, i: int) -> bytes:
        return self.data[self.starts[i] : self.starts[i + 1]]

    def bad(self, i: int, reason: object) -> BadRow:
        return BadRow(self.path, self.place(i), str(reason))


class PlainText(TextFile):
    """A text a line, in the column `text`; empty lines are rows, so that row and line numbers agree."""

    columns = ("text",)

    def __init__(self, path: str):
        data = content(path)
        begin = _begin(path, data)
        ends = _line_ends(data, begin)
        super().__init__(path, data, np.append(begin, ends), np.arange(1, len(ends) + 1))
        if not len(self):
            raise DataError(f"{path}: no rows")

    def __getitem__(self, i: int) -> dict[str, object]:
        try:
            return {"text": utf8(self.raw(i)).rstrip("\r\n")}
        except ValueError as e:
            raise self.bad(i, e) from None


class JsonLines(TextFile):
    """A JSON object a line; the columns are the keys of the first good row. Empty lines are passed over."""

    def __init__(self, path: str):
        data = content(path)
        super().__init__(path, data, *_filled_lines(data, _begin(path, data)))
        self.columns = self._first_keys()

    def _first_keys(self) -> tuple[str, ...]:
        first = None
        for i in range(len(self)):
            try:
                return tuple(self[i])
            except BadRow as e:
                first = first or e
        raise DataError(
            f"{self.path}: no row is a JSON object; line {first.row}: {first.reason}" if first else f"{self.path}: no rows"
        )

    def __getitem__(self, i: int) -> dict[str, object]:
        try:
            return json_object(self.raw(i))
        except ValueError as e:
            raise self.bad(i, e) from None


class Table(TextFile):
    """A header row, unless names are given, and fields between delimiters. With `quotes` as RFC 4180 has it: quotes may hold
    delimiters and newlines. Without, a line is a row and a quote a character."""

    def __init__(self, path: str, *, delimiter: str, quotes: bool, names: tuple[str, ...] = ()):
        csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
        self.delimiter, self.quotes = delimiter, quotes
        data = content(path)
        begin = _begin(path, data)
        quoted = quotes and data.find(b'"', begin) >= 0
        starts, lines = _quoted_records(path, data, begin, delimiter) if quoted else _filled_lines(data, begin)
        super().__init__(path, data, starts, lines)
        if names:
            self.columns = _distinct(path, names)
            self._check_width()
        elif len(self):
            self.columns = _distinct(path, tuple(self._header()))
            self.starts, self.lines = self.starts[1:], self.lines[1:]
        if not len(self):
            raise DataError(f"{path}: no rows" + ("" if names else " after the header"))

    def _header(self) -> list[str]:
        try:
            return self._fields(0)
        except BadRow as e:
            raise DataError(f"{self.path}: the header row cannot be read: {e.reason}") from None

    def _check_width(self) -> None:
        """A wrong `names` is told at open; one odd row among the first ten is a bad row of its own."""
        found = []
        for i in range(min(10, len(self))):
            try:
                found.append(len(self._fields(i)))
            except BadRow:
                continue
        if found and len(self.columns) not in found:
            raise ConfigError(
                f"{self.path}: rows have {found[0]} fields, but names gives {len(self.columns)}: {', '.join(self.columns)}"
            )

    def _fields(self, i: int) -> list[str]:
        quoting = csv.QUOTE_MINIMAL if self.quotes else csv.QUOTE_NONE
        try:
            return next(csv.reader([utf8(self.raw(i))], delimiter=self.delimiter, quoting=quoting))
        except (ValueError, csv.Error) as e:
            raise self.bad(i, e) from None

    def __getitem__(self, i: int) -> dict[str, object]:
        fields = self._fields(i)
        if len(fields) != len(self.columns):
            stray = not self.quotes and any(field.count('"') % 2 for field in fields)
            hint = "; where quotes hold tabs or newlines, set File.quotes" if stray else ""
            raise self.bad(i, f"{len(fields)} fields, expected {len(self.columns)} ({', '.join(self.columns)}){hint}")
        return dict(zip(self.columns, fields, strict=True))


def _distinct(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: column names appear twice: {', '.join(map(repr, twice))}")
    return names


def _begin(path: str, data: mmap.mmap) -> int:
    """Where the text begins, after a byte order mark."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: the text is UTF-16; expected UTF-8")
    return len(UTF8_MARK) if data[:3] == UTF8_MARK else 0


def _line_ends(data: mmap.mmap, begin: int) -> Int64[np.ndarray, "N"]:
    """The offset after each line."""
    step = 1 << 24
    blocks = [np.frombuffer(data, np.uint8, min(step, len(data) - at), at) for at in range(begin, len(data), step)]
    ends = [np.flatnonzero(block == ord("\n")) + (begin + n * step + 1) for n, block in enumerate(blocks)]
    if begin < len(data) and data[-1:] != b"\n":
        ends.append(np.array([len(data)]))
    return np.concatenate(ends, dtype=np.int64) if ends else np.zeros(0, np.int64)


def _filled_lines(data: mmap.mmap, begin: int) -> tuple[Int64[np.ndarray, "N_1"], Int64[np.ndarray, "N"]]:
    """Starts and numbers of the lines that are not empty; a row's bytes reach to the next row, over empty lines between."""
    ends = _line_ends(data, begin)
    starts = np.append(begin, ends)[:-1]
    first = np.frombuffer(data, np.uint8)[starts]
    kept = np.flatnonzero((first != ord("\n")) & ~((first == ord("\r")) & (ends - starts <= 2)))
    return np.append(starts[kept], len(data)), kept + 1


def _quoted_records(
    path: str, data: mmap.mmap, begin: int, delimiter: str
) -> tuple[Int64[np.ndarray, "N_1"], Int64[np.ndarray, "N"]]:
    """Starts and first lines of CSV records; csv itself decides whether a newline is inside quotes.

    Lines are given to it as Latin-1: in UTF-8 the ASCII bytes stand for themselves, so the structure is the same and no
    line fails to decode.
    """
    starts, lines = array("q"), array("q")
    data.seek(begin)
    at, number, fresh = begin, 0, True  # fresh: the next line begins a record, for csv has seen the last one's end

    def feed() -> Iterator[str]:
        nonlocal at, number, fresh
        while line := data.readline():
            start, at, number = at, at + len(line), number + 1
            if fresh and line.strip(b"\r\n"):
                starts.append(start)
                lines.append(number)
                fresh = b'"' not in line
            if not fresh:
                yield line.decode("latin-1")
        if not fresh:  # csv asked for more than there is
            raise DataError(f"{path}: line {lines[-1]} opens a quote that is never closed")

    reader = csv.reader(feed(), delimiter=delimiter)
    while True:
        try:
            if next(reader, None) is None:
                break
        except csv.Error:  # a bad row, unless its end was not found
            if at - starts[-1] > FIELD_LIMIT:
                raise DataError(f"{path}: line {lines[-1]} opens a quote not closed within {FIELD_LIMIT >> 20} MiB") from None
        fresh = True
    starts.append(len(data))
    return np.array(starts, np.int64), np.array(lines, np.int64)
