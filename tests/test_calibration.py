"""Ranges that travel with a model: what is written is read, of these weights alone, and damage is told in one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedjax import calibration
from embedjax.calibration import Calibrated
from embedjax.config.errors import ConfigError, StorageError
from embedjax.quantize import ranges_of


def ranges(dim, seed=0):
    return ranges_of(np.random.default_rng(seed).normal(size=(50, dim)).astype(np.float32))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "1_Dense").mkdir()
    for n, place in enumerate((tmp_path, tmp_path / "1_Dense")):
        save_file({"w": np.full(3, n, np.float32)}, place / "model.safetensors")
    return tmp_path


DOCUMENTS = Calibrated({12: ranges(12), 8: ranges(8, 1)}, 50, [{"name": "a.txt", "sha256": "0" * 64}], "text", "document")


def test_what_is_written_is_read(folder):
    assert calibration.read(folder) == {}
    place = calibration.write(folder, {"document": DOCUMENTS})
    found = calibration.read(folder)["document"]
    assert (found.rows, found.files, found.column, found.kind, found.normalized) == (
        50,
        DOCUMENTS.files,
        "text",
        "document",
        True,
    )
    for dim in (12, 8):
        np.testing.assert_array_equal(found.of(dim, "here"), DOCUMENTS.ranges[dim])
        np.testing.assert_array_equal(load_file(place.with_suffix(".safetensors"))[f"document/{dim}"], DOCUMENTS.ranges[dim])
    told = json.loads(place.read_text())
    assert told["format"] == 1 and "floor" in told["conventions"]["int8"]
    assert told["sides"]["document"]["dims"] == [12, 8] and "at least 10000" in told["sides"]["document"]["note"]
    assert not list(folder.glob("quantization.safetensors")), "servers take what lies at the top for weights"
    with pytest.raises(ConfigError, match="here: has ranges for 12, 8 dimensions, not for 4; .*--dims 12,8,4"):
        found.of(4, "here")


def test_another_side_is_added_and_its_own_replaced(folder):
    calibration.write(folder, {"document": DOCUMENTS})
    calibration.write(folder, {"query": Calibrated({12: ranges(12, 5)}, 20_000, kind="query", normalized=False)})
    calibration.write(folder, {"document": Calibrated({6: ranges(6)}, 9)})
    found = calibration.read(folder)
    assert {side: list(each.ranges) for side, each in found.items()} == {"document": [6], "query": [12]}
    assert "note" not in json.loads((folder / "quantization" / "quantization.json").read_text())["sides"]["query"]


def test_ranges_of_other_weights_are_refused_and_replaced(folder):
    calibration.write(folder, {"query": DOCUMENTS})
    save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"quantization.json: the ranges are those of other weights; calibrate anew"):
        calibration.read(folder)
    calibration.write(folder, {"document": DOCUMENTS})
    assert list(calibration.read(folder)) == ["document"]


def test_other_safetensors_are_no_weights(folder):
    calibration.write(folder, {"document": DOCUMENTS})
    save_file({"x": np.zeros(2, np.float32)}, folder / "parity.safetensors")
    assert list(calibration.read(folder)) == ["document"]


def rewrite(place, **changes):
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


def as_if_whole(place, tensors):
    """Other tensors, with their own hash."""
    import hashlib

    save_file(tensors, place.with_suffix(".safetensors"))
    rewrite(place, sha256=hashlib.sha256(place.with_suffix(".safetensors").read_bytes()).hexdigest())


DAMAGES = {
    "cut": (lambda place: place.with_suffix(".safetensors").write_bytes(b"\x00" * 40), StorageError, "damaged"),
    "gone": (lambda place: place.with_suffix(".safetensors").unlink(), StorageError, "not the ranges that"),
    "no json": (lambda place: place.write_text("{"), StorageError, "cannot be read"),
    "no object": (lambda place: place.write_text("[]"), StorageError, "cannot be read"),
    "later": (lambda place: rewrite(place, format=2), ConfigError, "is of format 2; this embedjax reads 1"),
    "no sides": (lambda place: rewrite(place, sides=3), StorageError, "not the ranges"),
    "no tensor": (lambda place: as_if_whole(place, {"a": np.zeros(1, np.float32)}), StorageError, "document/12"),
    "narrow": (
        lambda place: as_if_whole(place, {"document/12": np.zeros((2, 8), np.float32), "document/8": ranges(8)}),
        StorageError, r"document/12 is \[2, 8\] of float32; expected finite",
    ),
    "turned": (
        lambda place: as_if_whole(place, {"document/12": ranges(12)[::-1].copy(), "document/8": ranges(8)}),
        StorageError, "document/12 is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told(folder, damage):
    harm, error, words = DAMAGES[damage]
    harm(calibration.write(folder, {"document": DOCUMENTS}))
    with pytest.raises(error, match=words) as raised:
        calibration.read(folder)
    assert "quantization" in str(raised.value) and "\n" not in str(raised.value)
