"""`embedjax doctor --data CONFIG`: what the data of an experiment are like, before anything is trained on them."""

import dataclasses
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from embedjax import build
from embedjax.config import Classification, Config, KnnClassification, ZeroShot
from embedjax.config.errors import DataError
from embedjax.data.batches import Batches
from embedjax.data.columns import Layout, Picture, Values, read_rows, tower_column
from embedjax.data.corpus import hash_of
from embedjax.data.image import hash_pictures, size_of
from embedjax.data.order import make_table
from embedjax.data.sources import BadRow, Source
from embedjax.evaluate import tasks
from embedjax.evaluate.encode import DECODERS
from embedjax.evaluate.pictures import Stored, decoded
from embedjax.evaluate.tasks.side import Side

Finding = tuple[str, str, bool | None]
"""(what, finding, whether it is well; None for a line that belongs to the one before)."""

CHUNK = 1024
EDGES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDTH = 40
"""Characters of the histogram's longest bar."""

MANY_CUT, MANY_TWICE = 0.05, 0.01
"""Shares of cut texts or too small pictures, and of repeated rows, from which they are pointed at."""

EXAMPLES = 3

MULTIPLE = np.uint64(0x9E3779B97F4A7C15)

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Column:
    """One column: of texts the whole lengths in tokens of those that are measured, of pictures their shorter sides in pixels;
    and what each row is known by."""

    limit: int
    """Tokens that a text is cut to, or pixels that the shorter side of a picture should have."""
    lengths: Int[np.ndarray, "m"]
    keys: UInt64[np.ndarray, "n"]
    each: UInt64[np.ndarray, "k"]
    """What each of its texts or pictures is known by: of several captions a row more than `keys`."""
    pictures: bool = False


class Read(NamedTuple):
    """A set, read: its columns, the number of its rows and of the bad ones, some of these, and how many were to be measured."""

    columns: dict[str, Column]
    rows: int
    bad: int
    examples: list[BadRow]
    measured: int


def survey(config: Config, *, limit: int = 100_000) -> Iterator[Finding]:
    """What is found in each training set, between these and what is evaluated on, and three rows as the model meets them. Every
    row is read, every picture decoded, and known by 8 bytes; lengths and sizes are those of at most `limit` rows, evenly
    spaced. Writes no run folder."""
    # Nothing is left out for being bad or measured twice: that is told here. Texts are cut where those of the last bucket are.
    buckets = make_table(config.data.buckets)[-1:] if config.data.buckets else ()
    data = dataclasses.replace(config.data, buckets=buckets, bad_share=1.0)
    with tempfile.TemporaryDirectory(prefix="embedjax-") as name:
        run = build.build(build.resolve(dataclasses.replace(config, data=data)), Path(name))
        trained: dict[str, np.ndarray] = {}
        for at, which in enumerate(config.data.sets):
            found = _read(run.batches, at, limit)
            yield from _set(f"set {which.name!r}", found, config.data.bad_share)
            trained |= {f"{which.name} {name}": column.each for name, column in found.columns.items()}
        yield from _overlaps(config, trained)
        for number, row in enumerate(run.batches.decoded(0, EXAMPLES)):
            for column, (text, tokens) in row.items():
                yield f"row {number} {column}", _line(text), None
                yield "", f"tokens: {_line(tokens)}", None


def key_of(texts: Sequence[str]) -> np.ndarray:
    """What texts that differ in case and spaces alone have in common."""
    return hash_of([" ".join(text.split()).casefold() for text in texts])


def _read(batches: Batches, at: int, limit: int) -> Read:
    source, layout = batches.sources[at], batches.layouts[at]
    measured = np.zeros(total := len(source), bool)
    measured[np.linspace(0, total - 1, min(limit, total)).astype(int)] = True
    plain = lambda texts: dataclasses.replace(texts, max_length=1 << 20, late=None, fills=False)
    whole = {name: plain(batches.texts[tower_column(name)]) for name in layout.texts}
    found = {name: Tally() for name in layout.names if name not in layout.mined}
    count, examples, told = 0, [], time.monotonic()
    for start in range(0, total, CHUNK):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            _log.info("set %r: %d of %d rows are read", batches.data.sets[at].name, start, total)
        good, bad = _rows(source, layout, range(start, min(start + CHUNK, total)))
        count, examples = count + len(bad), [*examples, *bad.values()][:EXAMPLES]
        sampled = [row for row in good if measured[row]]
        for name, tally in found.items():
            values, some = [row[name] for row in good.values()], [good[row][name] for row in sampled]
            if name in layout.pictures:
                tally.pictures(values, some)
            else:
                prompt = batches.prompts[at].get(tower_column(name))
                tally.texts(values, some, functools.partial(whole[name].lengths, prompt=prompt))
    anchor, document = batches.table[-1]
    limits = {name: anchor if name == "anchor" else document for name in found}
    for name in layout.pictures:
        images = batches.images[tower_column(name)]
        limits[name] = images.pixels.shorter or images.size
    columns = {name: tally.column(limits[name], name in layout.pictures) for name, tally in found.items()}
    return Read(columns, total, count, examples, int(measured.sum()))


class Tally:
    """What is gathered of one column."""

    def __init__(self):
        self.lengths = [np.zeros(0, np.int32)]
        self.keys, self.each = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]

    def texts(self, values: Sequence[str | list[str]], some: Sequence[str | list[str]], measure: Callable) -> None:
        """Of all rows the keys, of some the lengths; of a row with a list that of each text in it."""
        self.keys.append(key_of(["\n".join(_listed(value)) for value in values]))
        several = any(isinstance(value, list) for value in values)
        self.each.append(key_of([text for value in values for text in _listed(value)]) if several else self.keys[-1])
        if some:
            self.lengths.append(measure([text for value in some for text in _listed(value)]))

    def pictures(self, values: Sequence["Seen"], some: Sequence["Seen"]) -> None:
        """Of all rows the keys, of some the sides."""
        self.keys.append(np.array([value.key for value in values], np.uint64))
        self.each.append(self.keys[-1])
        self.lengths.append(np.array([value.side for value in some], np.int32))

    def column(self, limit: int, pictures: bool) -> Column:
        """All of it."""
        lengths, keys, each = map(np.concatenate, (self.lengths, self.keys, self.each))
        return Column(limit, lengths, keys, each, pictures)


class Seen(NamedTuple):
    """What is kept of a picture: its shorter side in pixels, and what equal files have in common."""

    side: int
    key: int


def _rows(source: Source, layout: Layout, rows: range) -> tuple[dict[int, Values], dict[int, BadRow]]:
    """As `read_rows`, with a Seen for each picture: they are decoded in threads, each of which holds one row's."""
    if not layout.pictures:
        return read_rows(source, layout, rows)

    def one(row: int) -> tuple[dict[int, Values], dict[int, BadRow]]:
        good, bad = read_rows(source, layout, [row])
        for values in good.values():
            values.update({name: _seen(values[name]) for name in layout.pictures})
        return good, bad

    good, bad = {}, {}
    with ThreadPoolExecutor(DECODERS) as pool:
        for found, wrong in pool.map(one, rows):
            good |= found
            bad |= wrong
    return good, bad


def _seen(picture: Picture) -> Seen:
    return Seen(min(size_of(picture.encoded)), int(_picture_keys([picture.encoded])[0]))


def _picture_keys(encoded: Iterable[bytes]) -> UInt64[np.ndarray, "n"]:
    return np.ascontiguousarray(hash_pictures(encoded)).view("<u8")[:, 0]


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _set(what: str, found: Read, share: float) -> Iterator[Finding]:
    measured = " and sizes" if any(column.pictures for column in found.columns.values()) else ""
    part = "" if found.measured == found.rows else f"; lengths{measured} are those of {found.measured}"
    yield what, f"{found.rows} rows{part}", True
    yield "  bad rows", f"{found.bad} ({found.bad / found.rows:.1%})", found.bad <= share * found.rows
    for error in found.examples:
        yield "", f"{error.file}, row {error.row}: {error.reason}", None
    if found.bad == found.rows:
        return
    for name, column in found.columns.items():
        if len(column.lengths):
            yield from (_sizes if column.pictures else _lengths)(name, column.lengths, column.limit)
    keys = {name: column.keys for name, column in found.columns.items()}
    # The keys of a row as one: they are random, so that sums of their odd multiples are.
    twice = _repeated(functools.reduce(lambda row, key: row * MULTIPLE + key, keys.values()))
    yield (
        "  repeated rows",
        f"{twice} ({twice / found.rows:.1%}) have the {_held(found.columns)} of a row before",
        twice <= MANY_TWICE * found.rows,
    )
    for name, known in keys.items() if len(keys) > 1 else ():
        again = _repeated(known)
        yield f"  repeated {name}", f"{again} ({again / len(known):.1%}) were there before", None
    if {"anchor", "positive"} <= {name for name, column in found.columns.items() if not column.pictures}:
        same = int((keys["anchor"] == keys["positive"]).sum())
        yield "  anchor = positive", f"{same} rows", same == 0


def _lengths(name: str, lengths: Int[np.ndarray, "n"], limit: int) -> Iterator[Finding]:
    cut = (lengths > limit).mean()
    median, most = np.percentile(lengths, [50, 95])
    told = f"mean {lengths.mean():.1f} tokens, median {median:.0f}, 95% within {most:.0f}, longest {lengths.max()}"
    yield f"  {name}", f"{told}; {cut:.1%} are cut to {limit}", bool(cut <= MANY_CUT)
    yield from _histogram(lengths)


def _sizes(name: str, sides: Int[np.ndarray, "n"], limit: int) -> Iterator[Finding]:
    small = (sides < limit).mean()
    least, median = np.percentile(sides, [5, 50])
    told = f"shorter side: median {median:.0f} pixels, 95% above {least:.0f}, smallest {sides.min()}, largest {sides.max()}"
    yield f"  {name}", f"{told}; {small:.1%} are below {limit} and scaled up", bool(small <= MANY_CUT)
    yield from _histogram(sides)


def _histogram(lengths: Int[np.ndarray, "n"]) -> Iterator[Finding]:
    edges = [0, *(edge for edge in EDGES if edge < lengths.max()), int(lengths.max())]
    counts = np.histogram(lengths, np.array(edges) + 0.5)[0]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "#" * round(WIDTH * count / counts.max())
        yield "", f"{low + 1:>5} to {high:<5} {count / len(lengths):6.1%} {bar}", None


def _repeated(keys: UInt64[np.ndarray, "n"]) -> int:
    return len(keys) - len(np.unique(keys))


def _overlaps(config: Config, trained: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """Evaluation texts that are trained on, but for case and spaces, and pictures of the same bytes. Those that a task's own
    classifier learns from may be, and so may the names of classes."""
    for task in config.evaluate.tasks:
        first = 1 if isinstance(task, Classification | KnnClassification | ZeroShot) else 0
        try:
            sides = tasks.read(task).sides[first:]
            known_by = [_picture_keys(_whole(side)) if side.pictures else key_of(side.texts) for side in sides]
        except DataError as error:
            yield f"task {task.name!r}", str(error), False
            continue
        for side, keys in zip(sides, known_by, strict=True):
            found = {name: int(np.isin(keys, known).sum()) for name, known in trained.items()}
            told = ", ".join(f"{count} ({count / len(keys):.1%}) in {name}" for name, count in found.items() if count)
            what = f"task {task.name!r} {side.column}"
            yield what, f"{len(keys)} {'pictures' if side.pictures else 'texts'}; {told or 'none'} of them trained on", not told
            for name, known in trained.items() if told else ():
                seen = np.flatnonzero(np.isin(keys, known))[:1]
                yield from (("", f"in {name}: {_line(str(side.texts[at]))}", None) for at in seen)


def _whole(side: Side) -> Iterator[bytes]:
    """The encoded pictures of a side. Raises BadRow for the first that cannot be decoded: its evaluation would stop there."""
    for picture in side.texts:
        assert isinstance(picture, Stored)
        decoded(picture)
        yield picture.read()


def _held(columns: Mapping[str, Column]) -> str:
    kinds = {"pictures" if column.pictures else "texts" for column in columns.values()}
    return " and ".join(sorted(kinds, reverse=True))


def _line(text: str) -> str:
    """A text's first characters, as one line."""
    return f"{' '.join(text.split()):.160}"
