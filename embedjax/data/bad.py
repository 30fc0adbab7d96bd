"""Bad rows: which row stands in for one, how many there were, where they are listed, when they are too many to go on."""

import json
import logging
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embedjax.config.errors import DataError, StorageError
from embedjax.data.sources import BadRow

JUDGED_FROM = 200
"""Distinct rows read before a share is judged by sample."""

TRIES = 64
"""Stand-ins tried for one bad row."""

_log = logging.getLogger(__name__)


def stand_ins(row: int, count: int) -> Iterator[int]:
    """The rows tried in place of a bad one, of `count`: a function of the row alone, so that hosts and restarts agree."""
    stride = 7919 if count % 7919 else 1  # a prime, so that it meets every row; far, since bad rows come in runs
    for k in range(1, min(TRIES, count - 1) + 1):
        yield (row + k * stride) % count


class BadRecords:
    """Counts the bad rows of all sets, and lists each (file, row) once in a JSONL file, over restarts too. Thread-safe.

    A run stops when a set's bad rows exceed `share` of the whole set, or of the rows read (at least `JUDGED_FROM`)
    by more than chance explains: three standard deviations, as a sample of a good set holds more than its share at times.
    """

    def __init__(self, path: pathlib.Path | None, *, share: float, counts: Mapping[str, int]):
        self.path, self.share = path, share
        self.bad: dict[str, dict[int, BadRow]] = {name: {} for name in counts}
        self._seen = {name: np.zeros(count, bool) for name, count in counts.items()}
        self._listed = _listed(path) if path else set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Bad rows met since the start of this process."""
        return sum(map(len, self.bad.values()))

    def read(self, name: str, rows: Sequence[int], bad: Mapping[int, BadRow]) -> None:
        """Takes note of rows of a set that were read, and of the bad ones among them. Raises DataError when too many."""
        with self._lock:
            self._seen[name][list(rows)] = True
            new = {row: record for row, record in bad.items() if row not in self.bad[name]}
            if new and not self.bad[name]:
                _log.warning("set %r has bad rows; each is replaced by another row and listed in %s", name, self.path)
            self.bad[name].update(new)
            self._list(new.values())
            if self.bad[name]:
                self._judge(name)

    def _list(self, records) -> None:
        unlisted = {(str(record.file), record.row): record for record in records}
        unlisted = {key: record for key, record in unlisted.items() if key not in self._listed}
        self._listed.update(unlisted)
        if not self.path or not unlisted:
            return
        lines = [json.dumps({"file": f, "row": row, "reason": record.reason}) for (f, row), record in unlisted.items()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as out:
                out.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise StorageError(f"{self.path}: cannot list bad rows: {error.strerror}") from error

    def _judge(self, name: str) -> None:
        bad, seen, total = self.bad[name], np.count_nonzero(self._seen[name]), len(self._seen[name])
        allowed = self.share * seen
        if len(bad) > self.share * total or (seen >= JUDGED_FROM and len(bad) > allowed + 3 * math.sqrt(allowed)):
            last = list(bad.values())[-1]
            raise DataError(
                f"{len(bad)} of {seen} rows read of set {name!r} are bad ({len(bad) / seen:.1%}), more than data.bad_share "
                f"{self.share:.1%}; for example {last.file}, row {last.row}: {last.reason}"
            )


def _listed(path: pathlib.Path) -> set[tuple[str, int]]:
    """What the file lists already. A line cut short by a crash is ended, so that the next one stands alone."""
    listed = set()
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as out:
                out.write("\n")
    except OSError as error:
        raise StorageError(f"{path}: cannot read the list of bad rows: {error.strerror}") from error
    for line in text.splitlines():
        try:
            record = json.loads(line)
            listed.add((record["file"], record["row"]))
        except (ValueError, KeyError, TypeError):
            _log.warning("%s: a line that is not a bad row is passed over: %.80s", path, line)
    return listed
