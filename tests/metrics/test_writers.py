"""Metric files that survive kills and restarts."""

import csv
import json
import sys

import pytest

from embedjax.config.errors import ConfigError
from embedjax.metrics.writers import Writer, read_rows


def write(folder, start, stop, **options):
    writer = Writer(folder, start=start, **options)
    for step in range(start + 1, stop + 1):
        writer.write({"step": step, "loss": step / 2})


def test_a_restart_drops_rows_that_will_be_computed_again(tmp_path):
    write(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    write(tmp_path, 5, 9)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(n, n / 2) for n in range(1, 10)]


def test_values_come_back_exactly(tmp_path):
    Writer(tmp_path).write({"step": 1, "loss": 0.1 + 0.2})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.1 + 0.2


def test_tensorboard_files_are_written(tmp_path):
    writer = Writer(tmp_path, ("tensorboard",))
    writer.write({"step": 1, "loss": 2.0})
    writer.scalars(1, {"sts/spearman": 0.5})
    writer.close()
    (file,) = (tmp_path / "tensorboard").glob("events*")
    assert b"loss" in file.read_bytes() and b"sts/spearman" in file.read_bytes()


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_writer_says_what_to_install(tmp_path, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"embedjax\[{kind}\]"):
        Writer(tmp_path, (kind,))
