"""The length index: tokens of every row, made in one pass over a source, from which length buckets are chosen."""

import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from embedjax.config.errors import StorageError
from embedjax.data.bad import BadRecords, stand_ins
from embedjax.data.columns import Layout, read_rows, tower_column
from embedjax.data.sources import Source
from embedjax.data.text import Texts

CHUNK = 1024
"""Rows tokenized in one call."""

_log = logging.getLogger(__name__)


def length_index(
    name: str,
    source: Source,
    layout: Layout,
    *,
    texts: Mapping[str, Texts],
    prompts: Mapping[str, str | None],
    bad: BadRecords,
    folder: pathlib.Path | None,
    write: bool,
) -> Int32[np.ndarray, "N 2"]:
    """(anchor, longest document) in tokens of each row as it is trained on: a bad row has those of its stand-in.

    Read from `folder` when it was made there for the same rows, tokenizer and prompts; else made, and kept if `write`.
    """
    plain = re.sub(r"[^\w.-]", "_", name)
    file = f"{plain}-{_key(source, layout, texts, prompts)}.npy"
    path = folder / file if folder else None
    index = _load(path, len(source)) if path else None
    if index is None:
        index = _measure(name, source, layout, texts, prompts, bad)
        if path and write:
            _save(path, index)
    resolved = index.copy()
    for row in np.flatnonzero(index[:, 0] < 0):
        resolved[row] = next((index[other] for other in stand_ins(int(row), len(index)) if index[other, 0] >= 0), 0)
    return resolved


def _measure(name, source, layout, texts, prompts, bad) -> Int32[np.ndarray, "N 2"]:
    """One pass; -1 marks bad rows."""
    count, began = len(source), time.monotonic()
    told = began
    index = np.full((count, 2), -1, np.int32)
    _log.info("set %r: measuring the lengths of %d rows", name, count)
    for start in range(0, count, CHUNK):
        rows = range(start, min(start + CHUNK, count))
        good, wrong = read_rows(source, layout.without_pictures, rows)
        bad.read(name, rows, wrong)
        index[list(good)] = 0
        for column in layout.texts if good else ():
            tower = tower_column(column)
            lengths = _longest(texts[tower], [values[column] for values in good.values()], prompts.get(tower))
            side = index[:, 0 if column == "anchor" else 1]
            side[list(good)] = np.maximum(side[list(good)], lengths)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            _log.info("set %r: lengths of %d of %d rows, %.0f rows/s", name, rows.stop, count, rows.stop / (told - began))
    _log.info("set %r: lengths of %d rows in %.1f s", name, count, time.monotonic() - began)
    return index


def _longest(texts: Texts, values: Sequence[str | list[str]], prompt: str | None) -> Int32[np.ndarray, "N"]:
    """The length of each text, or of the longest of several."""
    lists = [[value] if isinstance(value, str) else value for value in values]
    lengths = texts.lengths([text for several in lists for text in several], prompt=prompt)
    ends = np.cumsum([len(several) for several in lists])
    return np.maximum.reduceat(lengths, np.concatenate([[0], ends[:-1]])).astype(np.int32)


def _key(source: Source, layout: Layout, texts: Mapping[str, Texts], prompts: Mapping[str, str | None]) -> str:
    """What the lengths depend on. Files by size and rows: their paths and dates differ between hosts and restarts."""
    towers = {
        tower: [
            hashlib.sha256(texts[tower].tokenizer.to_str().encode()).hexdigest(),
            [texts[tower].max_length, dict(texts[tower].prompts), texts[tower].default_prompt, prompts.get(tower)],
        ]
        for tower in map(tower_column, layout.texts)
    }
    files = [[file.size, file.rows] for file in source.files]
    facts = json.dumps([files, len(source), layout.texts, layout.numbers, towers], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def _load(path: pathlib.Path, count: int) -> Int32[np.ndarray, "N 2"] | None:
    if not path.exists():
        return None
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        _log.warning("%s: %s; the lengths are measured again", path, error)
        return None
    return index if index.shape == (count, 2) and index.dtype == np.int32 else None


def _save(path: pathlib.Path, index: Int32[np.ndarray, "N 2"]) -> None:
    """Whole or not at all: a temporary file of this process takes the name when it is complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            np.save(out, index, allow_pickle=False)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot keep the length index: {error.strerror}") from error
