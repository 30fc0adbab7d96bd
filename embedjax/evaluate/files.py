"""Files of texts or pictures -> a file of vectors, in bounded memory, a block of rows at a time, resumable after any kill."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh as DeviceMesh

from embedjax import quantize
from embedjax.config import ImageTower, Precision, Similarity
from embedjax.config.errors import ConfigError, StorageError
from embedjax.data.pictures import Pictures
from embedjax.data.sources import Source, open_source, source_of
from embedjax.evaluate import indexes, vector_lines
from embedjax.evaluate.encode import encoder_of, fingerprint, side_of
from embedjax.evaluate.engines import Feed
from embedjax.evaluate.kept import Kept
from embedjax.evaluate.pictures import Stored, files_key, holds_pictures
from embedjax.evaluate.rows import column_of, texts_of
from embedjax.load import Model


def encode_file(
    model: Model,
    input: str | Path,
    output: str | Path,
    *,
    column: str | None = None,
    as_column: str | None = None,
    task: str | None = None,
    dim: int | None = None,
    precision: Precision = "float32",
    ranges: quantize.Ranges | None = None,
    feed: Feed | None = None,
    mesh: DeviceMesh | None = None,
    tokens_per_batch: int | None = None,
    block: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes one vector a row of `input` to `output`, by its ending. `token_files.py` does the same for late interaction.

    * .npy: `[N E]` float32, or the codes of `quantize` at another `precision`.
    * .parquet: the texts (of pictures the paths, or names) and `embedding`, a list of E numbers or of codes.
    * .faiss, .usearch: an index of row numbers, as `indexes.py` has it.
    * .jsonl, .csv: a line a row for the engine that `feed` names.

    Kept are the first `dim` numbers, at length 1 again where the model scales to it, then quantized. int8 and uint8 are places
    in the ranges given, else in those saved with the model; OUTPUT.ranges.npy [2 E] has them too, beside .npy and .parquet.

    `input` is a table, a folder of pictures (its rows in the order of their paths) or tar archives. `column` is its column of
    texts or pictures, `as_column` what they are to the model, as `encode` has it: by default what `Input.of` finds. `task`
    names a prompt, an adapter or both. Finished blocks of rows wait in OUTPUT.partial, described by OUTPUT.partial.json: the
    same call after a kill or an error goes on from there. Returns the number of rows. Raises DataError for the first row that
    is no text, or no whole picture (finished blocks stay), StorageError for a file that cannot be written, ConfigError for
    wrong arguments, a precision that the output does not hold, ranges that are nowhere, or the partial output of another call.
    """
    output = Path(output)
    if output.suffix not in FINISH:
        raise ConfigError(f"{output}: the output is told by its ending, {', '.join(FINISH)}")
    if (feed is None) != (output.suffix not in vector_lines.ENDINGS.values()):
        raise ConfigError(
            f"{output}: .jsonl and .csv are for an engine, which reads nothing else: --for qdrant, vespa, pgvector"
        )
    if jax.process_count() > 1:
        raise ConfigError(f"encoding to a file runs in one process; {jax.process_count()} are running")
    rows = Input.of(model, open_source(source_of(str(input))), column, as_column)
    encoder = encoder_of(model, column=rows.side, task=task, mesh=mesh, tokens_per_batch=tokens_per_batch)
    # usearch makes int8 of floats, without ranges.
    linear = output.suffix == ".usearch" and precision == "int8"
    kept = Kept.of(model, rows.side, dim, "float32" if linear else precision, ranges)
    written = Written(rows, kept, precision, model.config.similarity, feed)
    written.check(output.suffix)
    # A block is lost with a kill, so it is small where encoding is slow.
    block = block or min(encoder.block, 2 * encoder.tokens)
    stamp = stamp_of(model, rows, task=task, width=kept.dim, **said_of(kept))
    count = len(rows.source)
    partial = Partial(output, stamp, (count, kept.count), np.dtype(quantize.TYPES[kept.precision]).newbyteorder("<").str)
    try:
        start = partial.open()
        progress(start, count)
        blocks = (encoder.tokenize(rows.part(at, min(at + block, count))) for at in range(start, count, block))
        for vectors in encoder.stream(blocks, progress=lambda done: progress(start + done, count)):
            partial.append(kept.codes(vectors))
        partial.close()
        FINISH[output.suffix](partial.path, output, written, block)
        partial.remove()
    except OSError as error:
        raise StorageError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        partial.close()
    return count


@dataclasses.dataclass(frozen=True)
class Input:
    """The column of a source that is encoded, whether it holds pictures, and what it is to the model."""

    source: Source
    column: str
    pictures: bool
    side: str

    @classmethod
    def of(cls, model: Model, source: Source, column: str | None, side: str | None) -> "Input":
        """The column asked for, else `text` or `image`, whichever is there first, or the only one.

        Of a model of pictures and texts its image tower takes a column of bytes, or of names of picture files, and its text
        tower any other, unless `side` says "image", "text", "query" or "document". Of two towers of texts, and of late
        interaction, a column called query or anchor is the query's, else the document's. Raises ConfigError for what the model
        has no tower for.
        """
        towers = [isinstance(model.config.towers[name], ImageTower) for name in model.config.encoders]
        pictures: bool | None = {"image": True, "text": False}.get(side or "", True if all(towers) else None)
        if side not in (None, "image", "text"):
            pictures = isinstance(model.config.towers[model.config.tower_of(side)], ImageTower)
        column = column_of(source, column, ("image",) if pictures else ("text", "image"))
        if pictures is None:
            pictures = isinstance(source, Pictures) or (any(towers) and holds_pictures(source, column))
        if model.config.late and side in ("text", "image"):
            raise ConfigError(f"{model.origin} compares queries with documents: say --as query or --as document, not {side}")
        if side is None and not any(towers) and not pictures and (len(towers) > 1 or model.config.late):
            side = "query" if column in ("query", "anchor") else "document"
        if side in (None, "image", "text"):
            side = side_of(model.config, "image" if pictures else "text", pictures)
        return cls(source, column, pictures, side)

    def part(self, start: int, stop: int) -> list[Any]:
        """The texts or pictures of some rows. Raises BadRow for what is no text; pictures are read later."""
        if self.pictures:
            return [Stored(self.source, row, self.column) for row in range(start, stop)]
        return list(texts_of(self.source, self.column, start, stop))

    def names(self, start: int, stop: int) -> list[str]:
        """What stands beside the vectors of some rows: the texts, or what the pictures are called."""
        return [item.name if isinstance(item, Stored) else item for item in self.part(start, stop)]


@dataclasses.dataclass(frozen=True)
class Written:
    """What finishes the file of an output: the rows, how their vectors were kept, and for whom."""

    rows: Input
    kept: Kept
    precision: Precision
    similarity: Similarity
    feed: Feed | None

    def check(self, ending: str) -> None:
        """Raises ConfigError for what the output, or an engine, does not hold."""
        if ending in (".faiss", ".usearch"):
            indexes.check(ending, self.precision, self.kept.dim, self.similarity, self.kept.normalize)
        if self.feed:
            vector_lines.check(self.feed, ending, self.precision)
            self.feed.check(self.rows.source, self.rows.column, self.kept.dim)


class Partial:
    """Rows finished so far: an .npy file that is not full yet, and a JSON file that says how many rows of it count."""

    def __init__(self, output: Path, stamp: dict[str, Any], shape: tuple[int, int], dtype: str = "<f4"):
        self.path, self.state = Path(f"{output}.partial"), Path(f"{output}.partial.json")
        self.stamp, self.shape, self.dtype, self.done = stamp, shape, np.dtype(dtype), 0
        self.file: BinaryIO | None = None

    def open(self) -> int:
        """The rows that are there already. Raises ConfigError when they belong to another stamp."""
        self.done = self.counted().get("rows", 0)
        self.file = self.opened(self.done)
        return self.done

    def counted(self) -> dict[str, Any]:
        """What the state says is there, {} without one. Raises ConfigError when it belongs to another stamp."""
        if not (self.state.exists() and self.path.exists()):
            return {}
        found = _read_json(self.state)
        if differing := [key for key in self.stamp if found.get("of", {}).get(key) != self.stamp[key]]:
            raise ConfigError(
                f"{self.path} belongs to another encoding (other {', '.join(differing)}); "
                f"delete it with {self.state.name}, or choose another output"
            )
        return found

    def opened(self, vectors: int) -> BinaryIO:
        """The file of vectors behind the first ones, which count."""
        file = self.path.open("r+b" if vectors else "wb")
        self.write_header(file)
        file.truncate(file.tell() + vectors * self.shape[1] * self.dtype.itemsize)
        file.seek(0, os.SEEK_END)
        return file

    def write_header(self, file: BinaryIO) -> None:
        """Says the shape at the file's beginning; the header is as long for any number of rows."""
        np.lib.format.write_array_header_1_0(file, {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape})

    def append(self, vectors: np.ndarray) -> None:
        """The block is on the disk before the count says so."""
        assert self.file is not None
        put(self.file, vectors.astype(self.dtype, copy=False))
        self.count(len(vectors))

    def count(self, rows: int, **more: int) -> None:
        """So many rows more are on the disk."""
        self.done += rows
        new = Path(f"{self.state}.new")
        new.write_text(json.dumps({"rows": self.done, **more, "of": self.stamp}, indent=1))
        os.replace(new, self.state)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def put(file: BinaryIO, array: np.ndarray) -> None:
    """Appends the numbers, and waits until they are on the disk."""
    file.write(np.ascontiguousarray(array).data)
    file.flush()
    os.fsync(file.fileno())


def stamp_of(model: Model, rows: Input, **said: Any) -> dict[str, Any]:
    source = rows.source
    files = [{"bytes": info.size, "sha256": info.sha256} for info in source.files]
    told = {"model": fingerprint(model, rows.side), "input": files, "rows": len(source)}
    if rows.pictures:
        told["pictures"] = files_key(source, rows.part(0, len(source)))
    return {**told, "column": rows.column, "as_column": rows.side, **said}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        assert isinstance(found["rows"], int)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise StorageError(f"{path}: not the state of an encoding; delete it to start anew") from error
    return found


def said_of(kept: Kept) -> dict[str, str]:
    """What decides codes besides the vectors; nothing for float32, whose partial outputs of before are gone on with."""
    if kept.precision == "float32":
        return {}
    ranges = "" if kept.ranges is None else hashlib.sha256(np.ascontiguousarray(kept.ranges, "<f4").tobytes()).hexdigest()
    return {"precision": kept.precision, "ranges": ranges}


def ranges_of(output: Path) -> Path:
    """Where the ranges of the codes of NAME.npy or NAME.parquet lie."""
    return output.with_suffix(".ranges.npy")


def _put_ranges(partial: Path, output: Path, written: Written) -> None:
    if written.kept.ranges is not None:
        new = Path(f"{partial}.new")
        with new.open("wb") as file:
            np.save(file, written.kept.ranges)
        os.replace(new, ranges_of(output))


def _finish_npy(partial: Path, output: Path, written: Written, block: int) -> None:
    _put_ranges(partial, output, written)
    os.replace(partial, output)


def _finish_parquet(partial: Path, output: Path, written: Written, block: int) -> None:
    """Copies the vectors, beside the texts or the names of the pictures, into row groups of one block each."""
    _put_ranges(partial, output, written)
    vectors, rows = np.load(partial, mmap_mode="r"), written.rows
    width = vectors.shape[1]
    fields = [(rows.column, pa.string()), ("embedding", pa.list_(pa.from_numpy_dtype(vectors.dtype), width))]
    schema = pa.schema(fields)
    if written.precision != "float32":
        schema = schema.with_metadata({"embedjax.precision": written.precision, "embedjax.dim": str(written.kept.dim)})
    new = Path(f"{partial}.new")
    with pq.ParquetWriter(new, schema) as writer:
        for at in range(0, len(vectors), block):
            part = np.ascontiguousarray(vectors[at : at + block])
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
            texts = pa.array(rows.names(at, at + len(part)), pa.string())
            writer.write_table(pa.Table.from_arrays([texts, embedding], schema=schema), row_group_size=block)
    os.replace(new, output)


def _finish_lines(partial: Path, output: Path, written: Written, block: int) -> None:
    assert written.feed is not None
    codes, rows, new = np.load(partial, mmap_mode="r"), written.rows, Path(f"{partial}.new")
    with new.open("w", encoding="utf-8", newline="\n") as file:
        for at in range(0, len(codes), block):
            part = np.asarray(codes[at : at + block])
            texts = rows.names(at, at + len(part))
            file.writelines(vector_lines.lines(written.feed, written.kept, rows.source, rows.column, at, texts, part))
    os.replace(new, output)


def _finish_faiss(partial: Path, output: Path, written: Written, block: int) -> None:
    indexes.write_faiss(np.load(partial, mmap_mode="r"), written.kept, output, block)


def _finish_usearch(partial: Path, output: Path, written: Written, block: int) -> None:
    codes = np.load(partial, mmap_mode="r")
    indexes.write_usearch(codes, written.kept, written.precision, written.similarity, output, block)


FINISH: dict[str, Callable[[Path, Path, Written, int], None]] = {
    ".npy": _finish_npy,
    ".parquet": _finish_parquet,
    ".faiss": _finish_faiss,
    ".usearch": _finish_usearch,
    ".jsonl": _finish_lines,
    ".csv": _finish_lines,
}
