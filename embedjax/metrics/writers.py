"""Metric files of a run folder, and the TensorBoard and wandb writers of the extras."""

import csv
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from embedjax.config.errors import ConfigError


class Writer:
    """Appends rows of metrics to metrics.jsonl and metrics.csv, and to TensorBoard or wandb when asked.

    A resumed run passes its `start` step: rows of later steps, which will be computed again, are dropped first.
    """

    def __init__(self, folder: Path, extra: Iterable[str] = (), start: int = 0, name: str = ""):
        self.jsonl, self.csv = folder / "metrics.jsonl", folder / "metrics.csv"
        rows = [row for row in read_rows(self.jsonl) if row["step"] <= start]
        part = self.jsonl.with_suffix(".partial")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        part.replace(self.jsonl)
        self.fields = list(rows[0]) if rows else []
        self.csv.unlink(missing_ok=True)
        self._csv_rows(rows)
        self.others = [OTHERS[kind](folder, name) for kind in extra]

    def write(self, row: Mapping[str, float]) -> None:
        with self.jsonl.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")
        self.fields = self.fields or list(row)
        self._csv_rows([row])
        self.scalars(int(row["step"]), {key: value for key, value in row.items() if key != "step"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends values to the extra writers only; the files keep evaluations elsewhere."""
        for other in self.others:
            other.write(step, values)

    def close(self) -> None:
        """Ends the extra writers, which write in threads of their own."""
        for other in self.others:
            other.close()

    def _csv_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        if not rows:
            return
        new = not self.csv.exists()
        with self.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerows(dict(row) for row in rows)


def read_rows(path: Path) -> list[dict]:
    """The whole rows of a JSONL file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


class Other(NamedTuple):
    """A writer of an extra."""

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def _tensorboard(folder: Path, name: str) -> Other:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("writers has 'tensorboard': install it with pip install 'embedjax[tensorboard]'") from error
    writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def write(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Other(write, writer.close)


def _wandb(folder: Path, name: str) -> Other:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("writers has 'wandb': install it with pip install 'embedjax[wandb]'") from error
    file = folder / "wandb_id"  # a run that goes on is the same run there; another folder is another run
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    run = wandb.init(project="embedjax", name=name, dir=str(folder), id=file.read_text(), resume="allow")
    return Other(lambda step, values: run.log(dict(values), step=step), run.finish)


OTHERS = {"tensorboard": _tensorboard, "wandb": _wandb}
