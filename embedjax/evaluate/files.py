"""A file of texts -> a file of vectors, in bounded memory, a block of rows at a time, resumable after any interruption."""

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

from embedjax.config import File
from embedjax.config.errors import ConfigError, StorageError
from embedjax.data.sources import Source, open_source
from embedjax.evaluate.encode import Encoder, fingerprint
from embedjax.evaluate.rows import text_column, texts_of
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
    """Writes one vector a row of `input` to `output`: .npy `[N E]` float32, or .parquet with the texts and `embedding`.

    `column` is the input's column of texts, `as_column` what they are to the model, as `encode` has it: by default
    "text", or of two towers "query" for a column called so or "anchor", else "document". `task` names a prompt, an adapter or
    both. Finished blocks of rows wait in OUTPUT.partial, described by OUTPUT.partial.json: the same call after a kill or an
    error goes on from there. Returns the number of rows. Raises DataError for the first row that is no text (finished blocks
    stay), StorageError for a file that cannot be written, ConfigError for wrong arguments or the partial output of another
    call.
    """
    output = Path(output)
    if output.suffix not in FINISH:
        raise ConfigError(f"{output}: the output is told by its ending, {' or '.join(FINISH)}")
    if jax.process_count() > 1:
        raise ConfigError(f"encoding to a file runs in one process; {jax.process_count()} are running")
    source = open_source(File(path=str(input)))
    column = text_column(source, column)
    as_column = as_column or _kind(model, column)
    encoder = Encoder(model, column=as_column, task=task, mesh=mesh, tokens_per_batch=tokens_per_batch)
    # A block is lost with a kill, so it is small where encoding is slow.
    block = block or min(encoder.block, 2 * encoder.tokens)
    stamp = _stamp(model, source, column=column, as_column=as_column, task=task, width=encoder.width)
    partial = Partial(output, stamp, (len(source), encoder.width))
    try:
        start = partial.open()
        progress(start, len(source))
        starts = range(start, len(source), block)
        blocks = (encoder.tokenize(list(texts_of(source, column, at, min(at + block, len(source))))) for at in starts)
        for vectors in encoder.stream(blocks, progress=lambda done: progress(start + done, len(source))):
            partial.append(vectors)
        partial.close()
        FINISH[output.suffix](partial.path, output, source, column, block)
        partial.remove()
    except OSError as error:
        raise StorageError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        partial.close()
    return len(source)


def _kind(model: Model, column: str) -> str:
    if len(model.config.encoders) == 1:
        return "text"
    return "query" if column in ("query", "anchor") else "document"


class Partial:
    """Rows finished so far: an .npy file that is not full yet, and a JSON file that says how many rows of it count."""

    def __init__(self, output: Path, stamp: dict[str, Any], shape: tuple[int, int], dtype: str = "<f4"):
        self.path, self.state = Path(f"{output}.partial"), Path(f"{output}.partial.json")
        self.stamp, self.shape, self.dtype, self.done = stamp, shape, np.dtype(dtype), 0
        self.file: BinaryIO | None = None

    def open(self) -> int:
        """The rows that are there already. Raises ConfigError when they belong to another stamp."""
        if self.state.exists() and self.path.exists():
            found = _read_json(self.state)
            if differing := [key for key in self.stamp if found.get("of", {}).get(key) != self.stamp[key]]:
                raise ConfigError(
                    f"{self.path} belongs to another encoding (other {', '.join(differing)}); "
                    f"delete it with {self.state.name}, or choose another output"
                )
            self.done = found["rows"]
        self.file = self.path.open("r+b" if self.done else "wb")
        np.lib.format.write_array_header_1_0(self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape})
        self.file.truncate(self.file.tell() + self.done * self.shape[1] * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)
        return self.done

    def append(self, vectors: np.ndarray) -> None:
        """The block is on the disk before the count says so."""
        assert self.file is not None
        self.file.write(vectors.astype(self.dtype, copy=False).data)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.done += len(vectors)
        new = Path(f"{self.state}.new")
        new.write_text(json.dumps({"rows": self.done, "of": self.stamp}, indent=1))
        os.replace(new, self.state)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def _stamp(model: Model, source: Source, **said: Any) -> dict[str, Any]:
    files = [{"bytes": info.size, "sha256": info.sha256} for info in source.files]
    return {"model": fingerprint(model, said["as_column"]), "input": files, "rows": len(source), **said}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        assert isinstance(found["rows"], int)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise StorageError(f"{path}: not the state of an encoding; delete it to start anew") from error
    return found


def _finish_npy(partial: Path, output: Path, source: Source, column: str, block: int) -> None:
    os.replace(partial, output)


def _finish_parquet(partial: Path, output: Path, source: Source, column: str, block: int) -> None:
    """Copies the vectors, beside the texts, into row groups of one block each."""
    vectors = np.load(partial, mmap_mode="r")
    width = vectors.shape[1]
    schema = pa.schema([(column, pa.string()), ("embedding", pa.list_(pa.float32(), width))])
    new = Path(f"{partial}.new")
    with pq.ParquetWriter(new, schema) as writer:
        for at in range(0, len(source), block):
            part = np.ascontiguousarray(vectors[at : at + block])
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
            texts = pa.array(list(texts_of(source, column, at, at + len(part))), pa.string())
            writer.write_table(pa.Table.from_arrays([texts, embedding], schema=schema), row_group_size=block)
    os.replace(new, output)


FINISH = {".npy": _finish_npy, ".parquet": _finish_parquet}
