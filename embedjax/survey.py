"""`embedjax doctor --data CONFIG`: what the data of an experiment are like, before anything is trained on them."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from embedjax import build
from embedjax.config import Config
from embedjax.config.errors import DataError
from embedjax.data.batches import Batches
from embedjax.data.columns import read_rows, tower_column
from embedjax.data.corpus import hash_of
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


@dataclasses.dataclass
class Column:
    """The texts of one column: their whole lengths in tokens, and what they are known by."""

    limit: int
    lengths: list[np.ndarray] = dataclasses.field(default_factory=list)
    keys: list[np.ndarray] = dataclasses.field(default_factory=list)


def survey(config: Config, *, limit: int = 100_000) -> Iterator[Finding]:
    """What is found in each training set (at most `limit` rows of it, evenly spaced), between these and the evaluation texts,
    and three rows as the model meets them. Writes no run folder."""
    # Nothing is left out for being bad or measured twice: that is told here.
    data = dataclasses.replace(config.data, buckets=(), bad_share=1.0)
    with tempfile.TemporaryDirectory(prefix="embedjax-") as name:
        run = build.build(build.resolve(dataclasses.replace(config, data=data)), Path(name))
        trained: dict[str, np.ndarray] = {}
        for at, which in enumerate(config.data.sets):
            columns, bad, rows = _read(run.batches, at, limit)
            yield from _set(f"set {which.name!r}", columns, bad, rows, len(run.batches.sources[at]), config.data.bad_share)
            trained |= {f"{which.name} {column}": np.concatenate(found.keys) for column, found in columns.items() if found.keys}
        yield from _overlaps(config, trained)
        for number, row in enumerate(run.batches.decoded(0, EXAMPLES)):
            for column, (text, tokens) in row.items():
                yield f"row {number} {column}", _line(text), None
                yield "", f"tokens: {_line(tokens)}", None


def key_of(texts: Sequence[str]) -> np.ndarray:
    """What texts that differ in case and spaces alone have in common."""
    return hash_of([" ".join(text.split()).casefold() for text in texts])


def _read(batches: Batches, at: int, limit: int) -> tuple[dict[str, Column], list, Int[np.ndarray, "n"]]:
    """(columns, bad rows, numbers of the rows looked at) of a set."""
    source, layout = batches.sources[at], batches.layouts[at]
    rows = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int))
    columns = {name: Column(batches.texts[tower_column(name)].max_length) for name in layout.texts}
    whole = {name: dataclasses.replace(batches.texts[tower_column(name)], max_length=1 << 20) for name in layout.texts}
    wrong = []
    for start in range(0, len(rows), CHUNK):
        good, bad = read_rows(source, layout, rows[start : start + CHUNK].tolist())
        wrong += bad.values()
        for name, column in columns.items() if good else ():
            texts = [values[name] for values in good.values()]
            column.lengths.append(whole[name].lengths(texts, batches.prompts.get(tower_column(name))))
            column.keys.append(key_of(texts))
    return columns, wrong, rows


def _set(what: str, columns: Mapping[str, Column], bad: list, rows: np.ndarray, total: int, share: float) -> Iterator[Finding]:
    looked = "" if len(rows) == total else f", {len(rows)} of them looked at"
    yield what, f"{total} rows{looked}", True
    yield "  bad rows", f"{len(bad)} ({len(bad) / len(rows):.1%})", len(bad) <= share * len(rows)
    for error in bad[:EXAMPLES]:
        yield "", f"{error.file}, row {error.row}: {error.reason}", None
    if len(bad) == len(rows):
        return
    for name, column in columns.items():
        yield from _lengths(name, np.concatenate(column.lengths), column.limit)
    keys = {name: np.concatenate(column.keys) for name, column in columns.items()}
    twice = _repeated(np.stack(list(keys.values()), 1))
    yield (
        "  repeated rows",
        f"{twice} ({twice / len(rows):.1%}) have the texts of a row before",
        twice <= MANY_TWICE * len(rows),
    )
    for name, found in keys.items() if len(keys) > 1 else ():
        again = _repeated(found[:, None])
        yield f"  repeated {name}", f"{again} ({again / len(found):.1%}) were there before", None
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


def _repeated(keys: np.ndarray) -> int:
    return len(keys) - len(np.unique(keys, axis=0))


def _overlaps(config: Config, trained: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """Evaluation texts that are trained on, but for case and spaces."""
    for task in config.evaluate.tasks:
        try:
            sides = tasks.read(task).sides
        except DataError as error:
            yield f"task {task.name!r}", str(error), False
            continue
        for side in sides:
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
