"""Vectors -> the codes they are kept as: the first numbers, at length 1 again, quantized in ranges that are the model's own.

Ranges come from the model's folder (`embedjax.calibration`), never from the vectors that are kept.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from embedjax import calibration, quantize
from embedjax.config import Precision
from embedjax.config.errors import ConfigError
from embedjax.evaluate.encode import encode, side_of
from embedjax.evaluate.tasks.side import unit
from embedjax.load import Model, run_of
from embedjax.models import folders


@dataclasses.dataclass(frozen=True)
class Kept:
    """How vectors of one tower are kept."""

    dim: int
    """So many of their first numbers."""
    normalize: bool
    """Whether these are scaled to length 1, as the tower's vectors are."""
    precision: Precision = "float32"
    ranges: quantize.Ranges | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        side: str,
        dim: int | None = None,
        precision: Precision = "float32",
        ranges: quantize.Ranges | None = None,
    ) -> "Kept":
        """`side` is what the texts or pictures are to the model, such as "document". int8 and uint8 need ranges: those given,
        else those saved with the model. Raises ConfigError for a prefix longer than the vectors, and without ranges."""
        tower = model.config.tower_of(side)
        width = model.embedders[tower].width
        dim = width if dim is None else dim
        if not 1 <= dim <= width:
            raise ConfigError(f"{dim} dimensions are asked for; the model's vectors have {width} numbers")
        if quantize.in_ranges(precision) and ranges is None:
            ranges = saved_ranges(model, tower, dim, precision)
        return cls(dim, model.config.towers[tower].normalize is not False, precision, ranges)

    def prefix(self, vectors: Float[np.ndarray, "N W"]) -> Float[np.ndarray, "N E"]:
        """The numbers that are kept, before they are quantized."""
        short = vectors[:, : self.dim]
        return unit(short) if self.normalize and self.dim < vectors.shape[1] else short

    def codes(self, vectors: Float[np.ndarray, "N W"]) -> quantize.Codes:
        """Whole vectors as they are kept."""
        return quantize.quantize(self.prefix(vectors), self.precision, self.ranges)

    def vectors(self, codes: quantize.Codes) -> Float[np.ndarray, "N E"]:
        """What the codes stand for, float32."""
        return quantize.dequantize(codes, self.precision, self.dim, self.ranges)

    @property
    def count(self) -> int:
        """Codes of a vector."""
        return quantize.count_of(self.precision, self.dim)


def encode_codes(
    model: Model,
    texts: Sequence[Any],
    *,
    precision: Precision,
    dim: int | None = None,
    ranges: quantize.Ranges | None = None,
    column: str = "document",
    **options: Any,
) -> quantize.Codes:
    """The codes [N, count] of texts or pictures: `encode`, then their first `dim` numbers at a precision. The other options are
    `encode`'s. Raises ConfigError for int8 and uint8 of a model without saved ranges, where none are given."""
    side = side_of(model.config, column, column == "image") if column in ("text", "image") else column
    kept = Kept.of(model, side, dim, precision, ranges)
    return kept.codes(encode(model, texts, column=column, **options))


def saved_ranges(model: Model, tower: str, dim: int, precision: Precision = "int8") -> quantize.Ranges:
    """The ranges saved with a model, of one tower and so many dimensions. Raises ConfigError where there are none."""
    how = f"{precision} needs the ranges of each dimension, which {model.origin} "
    made = "embedjax export MODEL FOLDER --calibrate FILE saves them with a model, encode --calibrate FILE takes them for once"
    try:
        folder = None if run_of(model.origin) else folders.resolve(model.origin)
    except ConfigError:  # made in Python
        folder = None
    found = calibration.read(folder) if folder else {}
    if tower not in found:
        raise ConfigError(f"{how}has not{f' for its tower {tower!r}' if found else ''}: {made}")
    return found[tower].of(dim, str(Path(model.origin) / calibration.FOLDER))
