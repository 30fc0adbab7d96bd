"""A file of texts or pictures -> the ranges of a model's numbers, of the whole vectors and of prefixes, in bounded memory."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh as DeviceMesh

from embedjax import quantize
from embedjax.calibration import Calibrated
from embedjax.config import Source
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.sources import open_source, source_of
from embedjax.evaluate.encode import encoder_of
from embedjax.evaluate.files import Input
from embedjax.evaluate.kept import Kept
from embedjax.load import Model

MOST = 100_000
"""Rows that are encoded; of a longer file evenly spaced ones."""


def calibrate(
    model: Model,
    source: str | Path | Source,
    dims: Sequence[int | None] = (None,),
    *,
    column: str | None = None,
    as_column: str | None = None,
    task: str | None = None,
    most: int = MOST,
    mesh: DeviceMesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, Calibrated]:
    """(tower, its ranges) of the vectors of a calibration set: of their first `dims` numbers, None for all of them.

    The set is 10,000 rows or more like those that will be stored, and not those themselves. They are encoded as documents
    where the model's one tower tells these from queries, else as `files.encode_file` would. Raises ConfigError for late
    interaction, whose ranges are those of all tokens that are stored; DataError for a set without rows.
    """
    if model.config.late:
        raise ConfigError(f"{model.origin} gives a vector a token, whose ranges are taken from the tokens that are stored")
    told = source_of(str(source)) if isinstance(source, str | Path) else source
    rows = Input.of(model, open_source(told), column, as_column)
    if rows.side == "text" and as_column is None:
        rows = dataclasses.replace(rows, side="document")
    if not len(rows.source):
        raise DataError(f"{rows.source.name} has no rows to take ranges from")
    encoder = encoder_of(model, column=rows.side, task=task, mesh=mesh)
    kept = {form.dim: form for form in (Kept.of(model, rows.side, dim) for dim in dims)}
    chosen = np.unique(np.linspace(0, len(rows.source) - 1, min(most, len(rows.source))).round().astype(np.int64))
    found: dict[int, quantize.Ranges] = {}
    for vectors in encoder.stream(
        map(encoder.tokenize, _blocks(rows, chosen, encoder.block)), progress=lambda done: progress(done, len(chosen))
    ):
        for dim, form in kept.items():
            here = quantize.ranges_of(form.prefix(vectors))
            known = found.get(dim, here)
            found[dim] = np.stack([np.minimum(known[0], here[0]), np.maximum(known[1], here[1])])
    files = [{"name": Path(info.path).name, "sha256": info.sha256} for info in rows.source.files]
    tower = model.config.tower_of(rows.side)
    return tower, Calibrated(found, len(chosen), files, rows.column, rows.side, kept[next(iter(kept))].normalize)


def _blocks(rows: Input, chosen: np.ndarray, block: int) -> Iterator[list]:
    for at in range(0, len(chosen), block):
        yield [item for row in chosen[at : at + block].tolist() for item in rows.part(row, row + 1)]


def ranges_from(
    model: Model, calibration: str | Path, encoded: str | Path, dim: int | None = None, **options: Any
) -> quantize.Ranges:
    """The ranges of a calibration set, for another file that is encoded for once; options as `calibrate` has them. Raises
    ConfigError where both are the same file, whose own ranges would differ from those of the next one."""
    read = lambda path: [info.sha256 for info in open_source(source_of(str(path))).files]
    if read(calibration) == read(encoded):
        raise ConfigError(f"{calibration} is what is encoded; ranges are taken from other rows, and serve for all that follows")
    _, found = calibrate(model, calibration, (dim,), **options)
    return next(iter(found.ranges.values()))
