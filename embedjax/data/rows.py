"""What one row is: a dict of plain Python values, or a BadRow that says where it stands and what is wrong with it."""

import json
from typing import Protocol, runtime_checkable

from embedjax.config.errors import DataError


class BadRow(DataError):
    """A row that cannot be decoded. Its source stays usable: whoever reads may count it and take another row."""

    def __init__(self, file: str, row: int, reason: str):
        super().__init__(f"{file}:{row}: {reason}")
        self.file, self.row, self.reason = file, row, reason


@runtime_checkable
class Part(Protocol):
    """The rows of one file, read in any order from any thread; `part[i]` raises BadRow for a row that cannot be decoded."""

    @property
    def path(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, object]: ...

    def place(self, i: int) -> int:
        """The 1-based number of row i in its file: the line it begins on in a text file, else the record."""
        ...


def utf8(raw: bytes) -> str:
    """Strict UTF-8; ValueError says which byte is wrong."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: byte 0x{raw[e.start]:02x} at byte {e.start + 1} of the row") from None


def json_object(raw: bytes) -> dict[str, object]:
    """One JSON object in UTF-8; ValueError says what it is instead."""
    text = utf8(raw)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"malformed JSON: {e.msg} at character {e.pos + 1}") from None
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, brackets thousands deep
        raise ValueError(f"JSON that cannot be read: {e}") from None
    if not isinstance(row, dict):
        raise ValueError(f"JSON is {'null' if row is None else type(row).__name__}, expected an object")
    if (
        "\\ud" in text or "\\uD" in text
    ):  # an escaped half of a surrogate pair is legal JSON, but no text: tokenizers fail on it
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("malformed JSON: half of a surrogate pair") from None
    return row
