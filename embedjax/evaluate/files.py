"""Files of texts or pictures -> a file of vectors, in bounded memory, a block of rows at a time, resumable after any kill."""

import dataclasses
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

from embedjax.config import ImageTower
from embedjax.config.errors import ConfigError, StorageError
from embedjax.data.pictures import Pictures
from embedjax.data.sources import Source, open_source, source_of
from embedjax.evaluate.encode import encoder_of, fingerprint, side_of
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
    mesh: DeviceMesh | None = None,
    tokens_per_batch: int | None = None,
    block: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes one vector a row of `input` to `output`: .npy `[N E]` float32, or .parquet with the texts (of pictures the paths,
    or names) and `embedding`. `token_files.py` does the same for late interaction.

    `input` is a table, a folder of pictures (its rows in the order of their paths) or tar archives. `column` is its column of
    texts or pictures, `as_column` what they are to the model, as `encode` has it: by default what `Input.of` finds. `task`
    names a prompt, an adapter or both. Finished blocks of rows wait in OUTPUT.partial, described by OUTPUT.partial.json: the
    same call after a kill or an error goes on from there. Returns the number of rows. Raises DataError for the first row that
    is no text, or no whole picture (finished blocks stay), StorageError for a file that cannot be written, ConfigError for
    wrong arguments or the partial output of another call.
    """
    output = Path(output)
    if output.suffix not in FINISH:
        raise ConfigError(f"{output}: the output is told by its ending, {' or '.join(FINISH)}")
    if jax.process_count() > 1:
        raise ConfigError(f"encoding to a file runs in one process; {jax.process_count()} are running")
    rows = Input.of(model, open_source(source_of(str(input))), column, as_column)
    encoder = encoder_of(model, column=rows.side, task=task, mesh=mesh, tokens_per_batch=tokens_per_batch)
    # A block is lost with a kill, so it is small where encoding is slow.
    block = block or min(encoder.block, 2 * encoder.tokens)
    stamp = stamp_of(model, rows, task=task, width=encoder.width)
    count = len(rows.source)
    partial = Partial(output, stamp, (count, encoder.width))
    try:
        start = partial.open()
        progress(start, count)
        blocks = (encoder.tokenize(rows.part(at, min(at + block, count))) for at in range(start, count, block))
        for vectors in encoder.stream(blocks, progress=lambda done: progress(start + done, count)):
            partial.append(vectors)
        partial.close()
        FINISH[output.suffix](partial.path, output, rows, block)
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


def _finish_npy(partial: Path, output: Path, rows: Input, block: int) -> None:
    os.replace(partial, output)


def _finish_parquet(partial: Path, output: Path, rows: Input, block: int) -> None:
    """Copies the vectors, beside the texts or the names of the pictures, into row groups of one block each."""
    vectors = np.load(partial, mmap_mode="r")
    width = vectors.shape[1]
    schema = pa.schema([(rows.column, pa.string()), ("embedding", pa.list_(pa.float32(), width))])
    new = Path(f"{partial}.new")
    with pq.ParquetWriter(new, schema) as writer:
        for at in range(0, len(vectors), block):
            part = np.ascontiguousarray(vectors[at : at + block])
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
            texts = pa.array(rows.names(at, at + len(part)), pa.string())
            writer.write_table(pa.Table.from_arrays([texts, embedding], schema=schema), row_group_size=block)
    os.replace(new, output)


FINISH = {".npy": _finish_npy, ".parquet": _finish_parquet}
