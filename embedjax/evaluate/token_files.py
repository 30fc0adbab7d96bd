"""Files of texts -> files of the vectors of their tokens, by late interaction: in bounded memory, a block of texts at a time,
resumable after any kill, as `files.py` does for one vector a text.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh as DeviceMesh

from embedjax import quantize
from embedjax.config import Precision
from embedjax.config.errors import ConfigError, StorageError
from embedjax.config.model import side_of
from embedjax.data.sources import open_source, source_of
from embedjax.evaluate.encode import Columns, ahead
from embedjax.evaluate.engines import Feed, lines
from embedjax.evaluate.files import Input, Partial, put, stamp_of
from embedjax.evaluate.late import TokenEncoder
from embedjax.evaluate.pool import check_factor, pooled
from embedjax.evaluate.token_vectors import QUANTIZED_ROWS, TokenVectors
from embedjax.load import Model

BLOCK = 1 << 24
"""Numbers of a block of vectors, on the host: 64 MB."""


def encode_tokens_file(
    model: Model,
    input: str | Path,
    output: str | Path,
    *,
    column: str | None = None,
    as_column: str | None = None,
    task: str | None = None,
    pool: int = 1,
    precision: Precision = "float32",
    feed: Feed | None = None,
    mesh: DeviceMesh | None = None,
    tokens_per_batch: int | None = None,
    block: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the vectors of the tokens of each row of `input` that are compared to `output`:

    * NAME.npy: all of them `[T E]` float32, one text after the other, and NAME.starts.npy `[N + 1]` int64: text n has the rows
      starts[n] to starts[n + 1]. Both can be mapped into memory; `TokenVectors(vectors, starts)` searches them.
    * .parquet: the texts and `embedding`, a list of lists of E numbers.
    * .jsonl: a line a text for the engine that `feed` names.

    `pool` leaves about one vector of so many of a document, as `pool.pooled` does. With another `precision` NAME.npy holds the
    codes of `quantize`, and NAME.ranges.npy [2 E] the ranges of int8 and uint8, those of all these vectors:
    `TokenVectors(codes, starts, precision, ranges, E)`.
    Otherwise as `files.encode_file`: a column called query or anchor holds queries, any other documents, unless `as_column`
    says "query" or "document". Raises ConfigError too for a model of one vector a text, and for a feed that its engine would
    refuse, BadRow for an id that is there twice and for a text of which nothing is compared.
    """
    output = Path(output)
    if output.suffix not in FINISH:
        raise ConfigError(f"{output}: the output is told by its ending, {', '.join(FINISH)}")
    if (feed is None) != (output.suffix != ".jsonl"):
        raise ConfigError(f"{output}: a .jsonl file is for an engine, and an engine reads .jsonl: --for qdrant or --for vespa")
    if feed and feed.engine == "pgvector":
        raise ConfigError(f"{output}: pgvector holds one vector a row, late interaction has one a token: --for qdrant or vespa")
    if precision != "float32" and output.suffix != ".npy":
        raise ConfigError(f"{output}: codes of {precision} are written to .npy alone; engines make codes of floats themselves")
    if jax.process_count() > 1:
        raise ConfigError(f"encoding to a file runs in one process; {jax.process_count()} are running")
    rows = Input.of(model, open_source(source_of(str(input))), column, as_column)
    encoder = TokenEncoder(model, column=rows.side, task=task, mesh=mesh, tokens_per_batch=tokens_per_batch)
    check_factor(pool)
    if pool > 1 and side_of(rows.side) == "query":
        raise ConfigError("--pool is for documents; each token of a query is compared")
    if feed:
        feed.check(rows.source, rows.column, encoder.width)
    longest = encoder.width * encoder.texts.max_length
    block = block or max(1, min(encoder.block, 2 * encoder.tokens, BLOCK // longest))
    count = len(rows.source)
    partial = TokenPartial(output, stamp_of(model, rows, task=task, width=encoder.width, pool=pool), encoder.width)
    try:
        start = partial.open()
        progress(start, count)
        blocks = (encoder.tokenize(rows.part(at, min(at + block, count))) for at in range(start, count, block))
        for vectors in _stream(encoder, blocks, lambda done: progress(start + done, count)):
            partial.append_texts([pooled(each, pool) for each in vectors])
        found = partial.finish()
        if precision != "float32":
            found = _quantized(found, partial.codes, precision)
        FINISH[output.suffix](found, output, rows, feed, block)
        partial.remove()
    except OSError as error:
        raise StorageError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        partial.close()
    return count


def starts_of(output: Path) -> Path:
    """Where the places lie at which the texts of NAME.npy begin."""
    return output.with_suffix(".starts.npy")


def ranges_of(output: Path) -> Path:
    """Where the ranges of the codes of NAME.npy lie."""
    return output.with_suffix(".ranges.npy")


def _stream(encoder: TokenEncoder, blocks: Iterable[Columns], progress: Callable[[int], None]) -> Iterator[list[np.ndarray]]:
    """The vectors of each text of each block; the next block is tokenized while the device works on this one."""
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done)

    for columns in ahead(blocks):
        yield encoder.token_vectors(columns, advance)


class TokenPartial(Partial):
    """Texts finished so far: the vectors of their tokens in an .npy file that grows, how many each text has in a file beside
    it, and a JSON file that says how much of both counts."""

    def __init__(self, output: Path, stamp: dict[str, Any], width: int):
        super().__init__(output, stamp, (0, width))
        self.lengths, self.tokens = Path(f"{output}.partial.lengths"), 0
        self.codes = Path(f"{output}.partial.codes")
        self.counts: BinaryIO | None = None

    def open(self) -> int:
        """The texts that are there already. Raises ConfigError when they belong to another stamp."""
        found = self.counted() if self.lengths.exists() else {}
        self.done, self.tokens = found.get("rows", 0), found.get("tokens", 0)
        self.file = self.opened(self.tokens)
        self.counts = self.lengths.open("r+b" if self.done else "wb")
        self.counts.truncate(self.done * 4)
        self.counts.seek(0, os.SEEK_END)
        return self.done

    def append_texts(self, texts: list[np.ndarray]) -> None:
        """The block is on the disk before the count says so."""
        assert self.file is not None and self.counts is not None
        lengths = np.array([len(vectors) for vectors in texts], "<i4")
        put(self.counts, lengths)
        for vectors in texts:
            self.file.write(np.ascontiguousarray(vectors, self.dtype).data)
        put(self.file, np.zeros(0, self.dtype))
        self.tokens += int(lengths.sum())
        self.count(len(texts), tokens=self.tokens)

    def finish(self) -> TokenVectors:
        """All vectors, mapped into memory from the file, which now says how many they are."""
        assert self.file is not None
        self.file.seek(0)
        self.shape = (self.tokens, self.shape[1])
        self.write_header(self.file)
        self.close()
        starts = np.concatenate([[0], np.cumsum(np.fromfile(self.lengths, "<i4"), dtype=np.int64)]).astype("<i8")
        return TokenVectors(np.load(self.path, mmap_mode="r" if self.tokens else None), starts)

    def close(self) -> None:
        super().close()
        if self.counts is not None:
            self.counts.close()

    def remove(self) -> None:
        super().remove()
        self.lengths.unlink(missing_ok=True)
        self.codes.unlink(missing_ok=True)


def _blocks(found: TokenVectors, block: int) -> Iterator[tuple[int, int]]:
    for at in range(0, len(found), block):
        yield at, min(at + block, len(found))


def _quantized(found: TokenVectors, file: Path, precision: Precision) -> TokenVectors:
    """The same as codes in a file of their own."""
    spans = [slice(at, at + QUANTIZED_ROWS) for at in range(0, len(found.vectors), QUANTIZED_ROWS)]
    ranges = None
    if quantize.in_ranges(precision):
        lowest, highest = zip(*(quantize.ranges_of(found.vectors[span]) for span in spans), strict=True)
        ranges = np.stack([np.min(lowest, 0), np.max(highest, 0)])
    shape = (len(found.vectors), quantize.count_of(precision, found.width))
    codes = np.lib.format.open_memmap(file, "w+", np.dtype(quantize.TYPES[precision]), shape)
    for span in spans:
        codes[span] = quantize.quantize(found.vectors[span], precision, ranges)
    codes.flush()
    return TokenVectors(codes, found.starts, precision, ranges, found.width)


def _finish_npy(found: TokenVectors, output: Path, rows: Input, feed: Feed | None, block: int) -> None:
    new = Path(f"{output}.partial.new")
    for place, array in ((starts_of(output), found.starts), (ranges_of(output), found.ranges)):
        place.unlink(missing_ok=True)
        if array is not None:
            with new.open("wb") as file:
                np.save(file, array)
            os.replace(new, place)
    os.replace(f"{output}.partial" if found.precision == "float32" else f"{output}.partial.codes", output)


def _finish_parquet(found: TokenVectors, output: Path, rows: Input, feed: Feed | None, block: int) -> None:
    """Copies the vectors, beside the texts, into row groups of one block each."""
    width = found.vectors.shape[1]
    tokens = pa.list_(pa.float32(), width)
    schema = pa.schema([(rows.column, pa.string()), ("embedding", pa.list_(tokens))])
    new = Path(f"{output}.partial.new")
    with pq.ParquetWriter(new, schema) as writer:
        for at, end in _blocks(found, block):
            starts = found.starts[at : end + 1]
            part = np.ascontiguousarray(found.vectors[starts[0] : starts[-1]])
            each = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
            embedding = pa.ListArray.from_arrays(pa.array((starts - starts[0]).astype(np.int32)), each)
            texts = pa.array(rows.names(at, end), pa.string())
            writer.write_table(pa.Table.from_arrays([texts, embedding], schema=schema), row_group_size=block)
    os.replace(new, output)


def _finish_jsonl(found: TokenVectors, output: Path, rows: Input, feed: Feed | None, block: int) -> None:
    assert feed is not None
    new = Path(f"{output}.partial.new")
    with new.open("w", encoding="utf-8") as file:
        for at, end in _blocks(found, block):
            vectors = (np.asarray(found.of(row)) for row in range(at, end))
            file.writelines(lines(feed, rows.source, rows.column, at, rows.names(at, end), vectors))
    os.replace(new, output)


FINISH: dict[str, Callable[[TokenVectors, Path, Input, Feed | None, int], None]] = {
    ".npy": _finish_npy,
    ".parquet": _finish_parquet,
    ".jsonl": _finish_jsonl,
}
