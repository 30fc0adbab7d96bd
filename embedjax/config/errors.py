"""The errors a user may see, each with the process exit code of the README's table. One line says what, where and what else."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path


class EmbedjaxError(Exception):
    """Base of the errors that are told in one line, without a traceback."""

    code = 1


class ConfigError(EmbedjaxError):
    """A wrong command, config or input: exit 2."""

    code = 2


@contextlib.contextmanager
def said_by(file: Path) -> Iterator[None]:
    """Puts the file that wrong values come from before what a config's own check says of them."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


class DataError(EmbedjaxError):
    """Data that cannot be used: a missing file or column, too many bad rows: exit 3."""

    code = 3


class StorageError(EmbedjaxError):
    """Storage that cannot be read or written, or a run folder another process holds: exit 4."""

    code = 4


class NonFiniteError(EmbedjaxError):
    """Three steps in a row with a loss or gradient that is not finite: exit 5."""

    code = 5


class CheckFailed(EmbedjaxError):
    """A check of our own failed, such as the parity gate of an export: exit 6."""

    code = 6


class Lost(EmbedjaxError):
    """Another process of the run is gone, or did not come where all have to: exit 70."""

    code = 70


class Elsewhere(EmbedjaxError):
    """Another process of the run told of its error; this one ends with the same exit code and says nothing."""

    def __init__(self, code: int):
        super().__init__(f"another process ended with exit code {code}")
        self.code = code


class Saved(EmbedjaxError):
    """The run was asked to stop and saved itself; start it again to go on: exit 75."""

    code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest known name, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
