"""The ranges of a model's numbers, saved with the model: FOLDER/quantization/quantization.safetensors and .json.

int8 and uint8 are places in ranges, one of each dimension, of each prefix and of each tower. Whoever stores such codes, or
reads them, needs the same ranges, so they travel with the model and say which weights they are of. They lie in a folder of
their own because servers take every .safetensors at the top for weights. Makes no ranges: `evaluate/calibrate.py` does.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from embedjax.config.errors import ConfigError, StorageError
from embedjax.quantize import Ranges

FOLDER = "quantization"
FORMAT = 1
ENOUGH = 10_000
"""Rows that ranges should be of."""
WEIGHTS = re.compile(r"(\w+_)?model(-\d+-of-\d+)?\.safetensors")
STEP = "step = (highest - lowest) / 255, or 1 where these are equal"
CONVENTIONS = {
    "order": "the first dim numbers, scaled to length 1 where the side is normalized, then quantized",
    "ranges": "tensor SIDE/DIM, float32 [2, dim]: the lowest and the highest number of each dimension",
    "int8": f"clip(floor((x - lowest) / step), 0, 255) - 128; {STEP}; back: lowest + (code + 128.5) * step",
    "uint8": f"clip(floor((x - lowest) / step), 0, 255); {STEP}; back: lowest + (code + 0.5) * step",
    "binary": "int8: the bits x > 0, eight a byte, the first one highest, less 128",
    "ubinary": "uint8: the bits x > 0, eight a byte, the first one highest",
    "float16": "IEEE half, rounded to the nearest",
    "bfloat16": "the upper half of float32, rounded to the nearest; its bits as uint16",
}


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """The ranges of one tower's vectors, and what they were taken from."""

    ranges: Mapping[int, Ranges]
    """By the number of dimensions."""
    rows: int
    files: Sequence[Mapping[str, str]] = ()
    """Name and SHA-256 of the files of the calibration set."""
    column: str = ""
    kind: str = "document"
    """What its texts or pictures were to the model."""
    normalized: bool = True

    def of(self, dim: int, place: str) -> Ranges:
        """The ranges of prefixes of `dim` numbers. Raises ConfigError where there are none."""
        if dim not in self.ranges:
            dims = ",".join(map(str, sorted({*self.ranges, dim}, reverse=True)))
            raise ConfigError(
                f"{place}: has ranges for {', '.join(map(str, self.ranges))} dimensions, not for {dim}; embedjax export "
                f"FOLDER --calibrate FILE --dims {dims} makes them"
            )
        return self.ranges[dim]


def weights_of(folder: Path) -> str:
    """SHA-256 over the weights of a model folder: model.safetensors and its shards, in all modules."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.safetensors") if WEIGHTS.fullmatch(path.name)):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {found}\n".encode())
    return digest.hexdigest()


def write(folder: Path, sides: Mapping[str, Calibrated]) -> Path:
    """Saves the ranges of some towers in a model folder, over those of the same towers; returns where."""
    weights = weights_of(folder)
    place, tensors = _json(folder), {}
    known = read(folder) if place.exists() and _record(place).get("weights") == weights else {}
    sides = {**known, **sides}
    for side, found in sides.items():
        tensors |= {f"{side}/{dim}": np.ascontiguousarray(ranges, np.float32) for dim, ranges in found.ranges.items()}
    data = save(tensors)
    record = {
        "format": FORMAT,
        "weights": weights,
        "sha256": hashlib.sha256(data).hexdigest(),
        "conventions": CONVENTIONS,
        "sides": {side: _described(found) for side, found in sides.items()},
    }
    place.parent.mkdir(exist_ok=True)
    place.with_suffix(".safetensors").write_bytes(data)
    place.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return place


def read(folder: Path) -> dict[str, Calibrated]:
    """The ranges of each tower of a model folder; {} where none were saved. Raises StorageError for damaged files, ConfigError
    for those of other weights, or of a later format."""
    place = _json(folder)
    if not place.exists():
        return {}
    record, tensors = _record(place), place.with_suffix(".safetensors")
    try:
        data = tensors.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != record["sha256"]:
            raise StorageError(f"{tensors}: SHA-256 is {found[:12]}..., {place.name} says {record['sha256'][:12]}...: damaged")
        ranges = load(data)
        sides = {side: _calibrated(side, told, ranges) for side, told in record["sides"].items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{tensors}: not the ranges that {place.name} tells of ({error!r}); calibrate anew") from error
    if record["weights"] != weights_of(folder):
        raise ConfigError(f"{place}: the ranges are those of other weights; calibrate anew: embedjax export FOLDER --calibrate")
    return sides


def _json(folder: Path) -> Path:
    return folder / FOLDER / "quantization.json"


def _record(place: Path) -> dict[str, Any]:
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
        form = record["format"]
        assert isinstance(record["weights"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise StorageError(f"{place}: cannot be read ({error!r}); calibrate anew") from error
    if form != FORMAT:
        raise ConfigError(f"{place}: is of format {form!r}; this embedjax reads {FORMAT}")
    return record


def _described(found: Calibrated) -> dict[str, Any]:
    note = f"of {found.rows} rows; at least {ENOUGH} are advised" if found.rows < ENOUGH else ""
    told = {"dims": list(found.ranges), "rows": found.rows, "files": list(found.files), "column": found.column}
    return {**told, "as": found.kind, "normalized": found.normalized, **({"note": note} if note else {})}


def _calibrated(side: str, told: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Calibrated:
    ranges = {dim: tensors[f"{side}/{dim}"] for dim in told["dims"]}
    for dim, found in ranges.items():
        if (
            found.shape != (2, dim)
            or found.dtype != np.float32
            or not (np.isfinite(found).all() and (found[0] <= found[1]).all())
        ):
            raise ValueError(
                f"{side}/{dim} is {list(found.shape)} of {found.dtype}; expected finite [lowest; highest] of {dim}"
            )
    return Calibrated(ranges, told["rows"], told["files"], told["column"], told["as"], told["normalized"])
