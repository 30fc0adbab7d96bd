"""`embedjax doctor --data CONFIG`: what the data of an experiment are like, before anything is trained on them."""

import dataclasses
import functools
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from embedjax import build
from embedjax.config import Classification, Config, KnnClassification
from embedjax.config.errors import DataError
from embedjax.data.batches import Batches
from embedjax.data.columns import read_rows, tower_column
from embedjax.data.corpus import hash_of
from embedjax.data.order import make_table
from embedjax.data.sources import BadRow
from embedjax.evaluate import tasks

Finding = tuple[str, str, bool | None]
"""(what, finding, whether it is well; None for a line that belongs to the one before)."""

CHUNK = 1024
EDGES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDTH = 40
"""Characters of the histogram's longest bar."""

MANY_CUT, MANY_TWICE = 0.05, 0.01
"""Shares of cut texts, and of repeated rows, from which they are pointed at."""

EXAMPLES = 3

MULTIPLE = np.uint64(0x9E3779B97F4A7C15)

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Column:
    """The texts of one column: the whole lengths in tokens of those that are measured, and what each is known by."""

    limit: int
    lengths: Int[np.ndarray, "m"]
    keys: UInt64[np.ndarray, "n"]


class Read(NamedTuple):
    """A set, read: its columns, the number of its rows and of the bad ones, some of these, and how many were to be measured."""

    columns: dict[str, Column]
    rows: int
    bad: int
    examples: list[BadRow]
    measured: int


def survey(config: Config, *, limit: int = 100_000) -> Iterator[Finding]:
    """What is found in each training set, between these and the evaluation texts, and three rows as the model meets them. Every
    row is read, and known by 8 bytes a text; lengths are those of at most `limit` rows, evenly spaced. Writes no run folder."""
    # Nothing is left out for being bad or measured twice: that is told here. Texts are cut where those of the last bucket are.
    buckets = make_table(config.data.buckets)[-1:] if config.data.buckets else ()
    data = dataclasses.replace(config.data, buckets=buckets, bad_share=1.0)
    with tempfile.TemporaryDirectory(prefix="embedjax-") as name:
        run = build.build(build.resolve(dataclasses.replace(config, data=data)), Path(name))
        trained: dict[str, np.ndarray] = {}
        for at, which in enumerate(config.data.sets):
            found = _read(run.batches, at, limit)
            yield from _set(f"set {which.name!r}", found, config.data.bad_share)
            trained |= {f"{which.name} {name}": column.keys for name, column in found.columns.items()}
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
    plain = lambda texts: dataclasses.replace(texts, max_length=1 << 20, late=None)
    whole = {name: plain(batches.texts[tower_column(name)]) for name in layout.texts}
    lengths, keys = ({name: [np.zeros(0, kind)] for name in layout.texts} for kind in (np.int32, np.uint64))
    count, examples, told = 0, [], time.monotonic()
    for start in range(0, total, CHUNK):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            _log.info("set %r: %d of %d rows are read", batches.data.sets[at].name, start, total)
        good, bad = read_rows(source, layout, range(start, min(start + CHUNK, total)))
        count, examples = count + len(bad), [*examples, *bad.values()][:EXAMPLES]
        sampled = [row for row in good if measured[row]]
        for name in layout.texts:
            keys[name].append(key_of([values[name] for values in good.values()]))
            if sampled:
                texts, prompt = [good[row][name] for row in sampled], batches.prompts[at].get(tower_column(name))
                lengths[name].append(whole[name].lengths(texts, prompt))
    anchor, document = batches.table[-1]
    columns = {
        name: Column(anchor if name == "anchor" else document, np.concatenate(lengths[name]), np.concatenate(keys[name]))
        for name in layout.texts
    }
    return Read(columns, total, count, examples, int(measured.sum()))


def _set(what: str, found: Read, share: float) -> Iterator[Finding]:
    part = "" if found.measured == found.rows else f"; lengths are those of {found.measured}"
    yield what, f"{found.rows} rows{part}", True
    yield "  bad rows", f"{found.bad} ({found.bad / found.rows:.1%})", found.bad <= share * found.rows
    for error in found.examples:
        yield "", f"{error.file}, row {error.row}: {error.reason}", None
    if found.bad == found.rows:
        return
    for name, column in found.columns.items():
        if len(column.lengths):
            yield from _lengths(name, column.lengths, column.limit)
    keys = {name: column.keys for name, column in found.columns.items()}
    # The keys of a row as one: they are random, so that sums of their odd multiples are.
    twice = _repeated(functools.reduce(lambda row, key: row * MULTIPLE + key, keys.values()))
    yield (
        "  repeated rows",
        f"{twice} ({twice / found.rows:.1%}) have the texts of a row before",
        twice <= MANY_TWICE * found.rows,
    )
    for name, known in keys.items() if len(keys) > 1 else ():
        again = _repeated(known)
        yield f"  repeated {name}", f"{again} ({again / len(known):.1%}) were there before", None
    if {"anchor", "positive"} <= keys.keys():
        same = int((keys["anchor"] == keys["positive"]).sum())
        yield "  anchor = positive", f"{same} rows", same == 0


def _lengths(name: str, lengths: Int[np.ndarray, "n"], limit: int) -> Iterator[Finding]:
    cut = (lengths > limit).mean()
    median, most = np.percentile(lengths, [50, 95])
    told = f"mean {lengths.mean():.1f} tokens, median {median:.0f}, 95% within {most:.0f}, longest {lengths.max()}"
    yield f"  {name}", f"{told}; {cut:.1%} are cut to {limit}", bool(cut <= MANY_CUT)
    edges = [0, *(edge for edge in EDGES if edge < lengths.max()), int(lengths.max())]
    counts = np.histogram(lengths, np.array(edges) + 0.5)[0]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "#" * round(WIDTH * count / counts.max())
        yield "", f"{low + 1:>5} to {high:<5} {count / len(lengths):6.1%} {bar}", None


def _repeated(keys: UInt64[np.ndarray, "n"]) -> int:
    return len(keys) - len(np.unique(keys))


def _overlaps(config: Config, trained: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """Evaluation texts that are trained on, but for case and spaces. Those that a task's own classifier learns from may be."""
    for task in config.evaluate.tasks:
        try:
            sides = tasks.read(task).sides
        except DataError as error:
            yield f"task {task.name!r}", str(error), False
            continue
        for side in sides[1:] if isinstance(task, Classification | KnnClassification) else sides:
            keys = key_of(side.texts)
            found = {name: int(np.isin(keys, known).sum()) for name, known in trained.items()}
            told = ", ".join(f"{count} ({count / len(keys):.1%}) in {name}" for name, count in found.items() if count)
            what = f"task {task.name!r} {side.column}"
            yield what, f"{len(keys)} texts; {told or 'none'} of them trained on", not told
            for name, known in trained.items() if told else ():
                seen = np.flatnonzero(np.isin(keys, known))[:1]
                yield from (("", f"in {name}: {_line(side.texts[at])}", None) for at in seen)


def _line(text: str) -> str:
    """A text's first characters, as one line."""
    return f"{' '.join(text.split()):.160}"
