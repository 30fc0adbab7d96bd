"""A file of pairs and a corpus -> a file of training rows with hard negatives, in stages that each go on where they stopped."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float, Int

from embedjax.config import File, Negatives
from embedjax.config.errors import ConfigError, DataError, StorageError
from embedjax.data.corpus import Corpus, Pairs
from embedjax.data.sources import Source, open_source, select
from embedjax.evaluate.encode import fingerprint
from embedjax.evaluate.files import Partial
from embedjax.load import Model
from embedjax.mine.nearest import negatives, score, stream
from embedjax.mine.scorers import Scorer

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

ROWS = 1024
"""Rows that are scored, or written, at once."""


class Mining(NamedTuple):
    """What came of it: rows written, rows left out for too few negatives, and the mean scores the mining model gave."""

    rows: int
    left_out: int
    positive: float
    negative: float


@dataclasses.dataclass
class _Work:
    """The folder of what is done so far, and what it was done from."""

    model: Model
    corpus: Corpus
    pairs: Pairs
    task: str | None
    folder: Path
    stamp: dict[str, Any]
    mesh: DeviceMesh | None
    progress: Progress


def mine_file(
    model: Model,
    corpus: str | Path | File,
    pairs: str | Path | File,
    output: str | Path,
    how: Negatives,
    *,
    corpus_columns: Sequence[str] = (),
    pair_columns: tuple[str, str] = ("anchor", "positive"),
    task: str | None = None,
    scorer: tuple[str, Scorer | None] | None = None,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
    progress: Progress = lambda *_: None,
) -> Mining:
    """Writes a row (anchor, positive, negative, negative_2, ...) to `output`, .jsonl or .parquet, for each different pair of
    `pairs` that has enough negatives in `corpus` or among the positives of other anchors.

    `corpus_columns` make one text together; by default the column "text", or the only one. `task` names one of the model's
    prompts, adapters, or both. With `scorer`, (its name, None for the mining model itself), score, score_2, ... are those of
    the positive and the negatives; scores kept under a name are taken for that scorer's.
    Finished stages wait in OUTPUT.work: the same call after a kill goes on there, and one for other negatives of the same model
    and files takes their vectors. Raises ConfigError for wrong arguments or the work of another model or other files, DataError
    for files without usable rows, StorageError for what cannot be written.
    """
    output = Path(output)
    if output.suffix not in WRITERS:
        raise ConfigError(f"{output}: the output is told by its ending, {' or '.join(WRITERS)}")
    if jax.process_count() > 1:
        raise ConfigError(f"mining to a file runs in one process; {jax.process_count()} are running")
    how.check(model.config.similarity)
    files = [file if isinstance(file, File) else File(str(file)) for file in (pairs, corpus)]
    sources = [open_source(file) for file in files]
    select(sources[0], dict(zip(("anchor", "positive"), pair_columns, strict=True)), "the pairs (--columns)")
    corpus_columns = corpus_columns or _text_column(sources[1])
    select(sources[1], {name: name for name in corpus_columns}, "the corpus (--corpus-columns)")
    told = lambda done, total: progress("read the corpus", done, total)
    documents = Corpus([(sources[1], corpus_columns), (sources[0], [pair_columns[1]])], told)
    found = Pairs(sources[0], *pair_columns, documents)
    said = {"corpus columns": list(corpus_columns), "pair columns": list(pair_columns), "task": task}
    stamp = {"model": _prints(model), **dict(zip(("pairs", "corpus"), map(_facts, files, sources), strict=True)), **said}
    work = _Work(model, documents, found, task, Path(f"{output}.work"), stamp, mesh, progress)
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        mined = _mine(work, how, seed, scorer)
        result = _write(work, output, *mined)
        shutil.rmtree(work.folder)
    except OSError as error:
        raise StorageError(f"{error.filename or output}: {error.strerror or error}") from error
    return result


def _mine(work: _Work, how: Negatives, seed: int, scorer: tuple[str, Scorer | None] | None):
    """(rows, negatives of each, scores to be written, scores of the mining model), stage by stage."""
    queries = _encoded(work, "query", work.pairs.anchors)
    documents = _encoded(work, "document", work.corpus)
    numbers = _chosen(work, how, seed, queries, documents)
    rows = _different(work.pairs)
    taken = numbers[work.pairs.anchor[rows]]
    rows, taken = rows[enough := (taken >= 0).all(1)], taken[enough]
    if not len(rows):
        raise DataError("no anchor has enough negatives; widen the ranks, scores or margin, or ask for fewer")
    candidates = np.concatenate([work.pairs.positive[rows][:, None], taken], 1)
    own = np.empty(candidates.shape, np.float32)
    for at in range(0, len(rows), ROWS):
        anchors = queries[work.pairs.anchor[rows[at : at + ROWS]]]
        own[at : at + ROWS] = np.stack([score(anchors, documents[each]) for each in candidates[at : at + ROWS].T], 1)
    written = None if scorer is None else own if scorer[1] is None else _scored(work, *scorer, how, seed, rows, candidates)
    return rows, candidates, written, own, int((~enough).sum())


def _encoded(work: _Work, column: str, texts: Corpus) -> Float[np.ndarray, "N E"]:
    """The vectors of all texts, a memory-mapped file."""
    width = work.model.embedders[work.model.config.tower_of(column)].width
    told = lambda done, total: work.progress(f"encode {'the corpus' if column == 'document' else 'anchors'}", done, total)
    return _kept(work, column, (len(texts), width), "<f4", lambda start: stream(
        work.model, texts, column, task=work.task, mesh=work.mesh, start=start, progress=told
    ))  # fmt: skip


def _chosen(work: _Work, how: Negatives, seed: int, queries: np.ndarray, documents: np.ndarray) -> Int[np.ndarray, "U K"]:
    """The negatives of each anchor."""
    known = work.pairs.known(work.corpus)

    def blocks(start: int) -> Iterator[np.ndarray]:
        options = {"mesh": work.mesh, "seed": seed, "start": start}
        for block, found in negatives(how, work.pairs, known, queries, documents, **options):
            yield found.numbers
            work.progress("search", block.stop, len(queries))

    asked = {"how": dataclasses.asdict(how), "seed": seed}
    return _kept(work, "negatives", (len(queries), how.num_negatives), "<i4", blocks, **asked)


def _scored(work: _Work, name: str, scorer: Scorer | None, how: Negatives, seed: int, rows, candidates) -> np.ndarray:
    """The scores another model gives the rows that are written."""
    assert scorer is not None

    def blocks(start: int) -> Iterator[np.ndarray]:
        for at in range(start, len(rows), ROWS):
            part = slice(at, at + ROWS)
            yield scorer([work.pairs[row][0] for row in rows[part]], [work.corpus.take(row) for row in candidates[part]])
            work.progress(f"score with {name}", min(at + ROWS, len(rows)), len(rows))

    asked = {"how": dataclasses.asdict(how), "seed": seed, "scorer": name}
    return _kept(work, "scores", candidates.shape, "<f4", blocks, **asked)


def _kept(
    work: _Work, name: str, shape: tuple[int, int], dtype: str, blocks: Callable[[int], Iterator[np.ndarray]], **asked: Any
) -> np.ndarray:
    """An array that `blocks(start)` makes from row `start` on, finished blocks of which are kept in the work folder: those of
    the same model and files for which something else was `asked` are made anew."""
    partial = Partial(work.folder / name, {**work.stamp, **asked}, shape, dtype)
    if _asked_before(partial, asked) != asked:
        partial.remove()
    try:
        for block in blocks(start) if (start := partial.open()) < shape[0] else ():
            partial.append(block)
    finally:
        partial.close()
    return np.load(partial.path, mmap_mode="r")


def _asked_before(partial: Partial, asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked for when the finished blocks were made; of blocks that are not there, the same as now."""
    try:
        return {key: json.loads(partial.state.read_text())["of"][key] for key in asked}
    except (OSError, ValueError, KeyError, TypeError):  # what is no state of ours is for `Partial` to tell
        return asked


def _different(pairs: Pairs) -> Int[np.ndarray, "R"]:
    """The first row of each pair of texts, in the order of the file."""
    rows = pairs.rows
    _, first = np.unique(np.stack([pairs.anchor[rows], pairs.positive[rows]], 1), axis=0, return_index=True)
    return rows[np.sort(first)]


def _write(work: _Work, output: Path, rows, candidates, written, own, left_out: int) -> Mining:
    """The rows as a file, whole or not at all."""
    count = candidates.shape[1]
    texts = ["positive", "negative", *(f"negative_{k}" for k in range(2, count))]
    scores = ["score", *(f"score_{k}" for k in range(2, count + 1))] if written is not None else []

    def lines() -> Iterator[dict[str, Any]]:
        for at, row in enumerate(rows):
            told = dict(zip(scores, written[at].tolist(), strict=True)) if written is not None else {}
            yield {"anchor": work.pairs[row][0], **dict(zip(texts, work.corpus.take(candidates[at]), strict=True)), **told}

    new = output.with_name(f"{output.name}.new")
    schema = pa.schema([(name, pa.string()) for name in ["anchor", *texts]] + [(name, pa.float32()) for name in scores])
    WRITERS[output.suffix](new, lines(), schema)
    os.replace(new, output)
    return Mining(len(rows), left_out, float(own[:, 0].mean()), float(own[:, 1:].mean()))


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


WRITERS = {".jsonl": _write_jsonl, ".parquet": _write_parquet}


def _text_column(source: Source) -> tuple[str, ...]:
    """The column of the documents where none is named. Raises ConfigError."""
    if "text" in source.columns:
        return ("text",)
    if len(source.columns) > 1:
        found = ", ".join(source.columns)
        raise ConfigError(f"{source.name} has the columns {found}; say which hold the documents (--corpus-columns)")
    return source.columns


def _facts(file: File, source: Source) -> list[dict[str, Any]]:
    """What a file holds, and how it is read."""
    how = {"format": file.format, "names": list(file.names), "quotes": file.quotes}
    return [{"bytes": info.size, "sha256": info.sha256, **how} for info in source.files]


def _prints(model: Model) -> list[str]:
    return [fingerprint(model, column) for column in ("query", "document")]
