"""The whole experiment: model, data, optimiser, checkpoints, evaluation, export, mesh."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Literal

from embedjax.config.data import Data, Source
from embedjax.config.errors import ConfigError, nearest
from embedjax.config.tasks import Task
from embedjax.config.towers import Model


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters by path that learn at another rate."""

    path: str = ""
    """Regular expression searched in the parameter's path, such as "towers/text/tokens"."""
    multiplier: float = 1.0
    """Factor on the learning rate; 0 holds them still but keeps optimiser state: use `freeze` instead."""


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and decay."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after warm-up, to 0 at the last step."""
    warmup: float = 0.1
    """Warm-up: a share of the steps if below 1, else a number of steps."""
    weight_decay: float = 0.01
    """Decoupled decay; never of norms, biases or the logit scale."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.999
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 for none."""
    groups: tuple[Group, ...] = ()
    """Other rates by path; the first match wins."""
    freeze: tuple[str, ...] = ()
    """Regular expressions of parameter paths that are not trained: no gradient, no optimiser state."""
    layer_decay: float = 1.0
    """Factor on the learning rate from one layer to the next below: a tower's top layer learns at the rate times this, its
    lowest at the power `depth` of it, the tables under that at `depth` + 1; heads learn at the full rate."""
    ema: float = 0.0
    """Keep a moving average of the parameters with this decay, such as 0.999, and evaluate, export and load that; 0 for none.
    It begins as the first parameters, so it is not corrected for its start."""
    accumulate: int = 1
    """Parts the batch is split into, one gradient each, averaged. In-batch negatives then come from a part only."""
    cached: int = 1
    """GradCache: chunks the batch is embedded in. The whole batch's loss and gradient, in the memory of one chunk, for one
    forward pass more."""

    def __post_init__(self):
        for name in ("accumulate", "cached"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}; it must be at least 1")
        if self.accumulate > 1 and self.cached > 1:
            raise ConfigError(
                f"optim.accumulate is {self.accumulate} and cached {self.cached}; one of them is 1: both split the batch, and "
                "cached alone keeps its loss"
            )
        for name in ("learning_rate", "warmup", "weight_decay", "clip_norm", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}; it must be at least 0 and finite")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay is {self.layer_decay}; it must be in (0, 1]")
        for name in ("b1", "b2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the run is saved."""

    every: int = 1000
    """Steps between saves; every evaluation and the last step are saved too."""
    keep: int = 2
    """Latest saves kept, besides the best by `evaluate.best`."""

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ConfigError(f"checkpoint.every is {self.every} and keep {self.keep}; both must be at least 1")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """When and on what the model is evaluated during training."""

    every: int = 0
    """Steps between evaluations; 0 for the end only."""
    tasks: tuple[Task, ...] = ()
    """What to evaluate on."""
    baseline: bool = False
    """Score the untrained model and BM25 too, and end with a table and three examples."""
    beside: tuple[str, ...] = ()
    """Run folders whose last scores of the same tasks stand in that table too; those without a run are left out."""
    best: str = ""
    """Metric that chooses the best save, such as "sts/spearman"; empty for the first task's main metric."""

    def __post_init__(self):
        if self.every < 0:
            raise ConfigError(f"evaluate.every is {self.every}; it must be at least 0")
        known = [key for task in self.tasks for key in task.keys]
        if self.best and self.best not in known:
            raise ConfigError(f"evaluate.best is {self.best!r}, which no task finds; {nearest(self.best, known)}")


@dataclasses.dataclass(frozen=True)
class Export:
    """What is written at the end of the run."""

    format: Literal["sentence-transformers", "hf", "open-clip", "pylate", "classifier", "none"] = "sentence-transformers"
    """Folder format; open-clip is of a tower of pictures beside one of texts, pylate of late interaction, which
    sentence-transformers holds too; classifier is a model with its class head, of transformers' ...ForSequenceClassification;
    none writes none."""
    adapter: str = ""
    """Name of the adapter that is merged into the kernels, where a tower has several."""
    head: str = ""
    """Name of the set whose class head the classifier format has, where there are several."""
    calibrate: Source | None = None
    """Rows like those that will be stored, 10,000 or more, that the ranges of int8 and uint8 are taken from and saved with the
    model; and what is kept of the tasks' scores at each precision is measured. None takes none."""
    calibrate_column: str = ""
    """Their column of texts or pictures, where it is neither called text or image nor the only one."""
    dims: tuple[int, ...] = ()
    """Prefixes of the vectors that have ranges of their own, besides the whole vectors."""

    def __post_init__(self):
        if self.head and self.format != "classifier":
            raise ConfigError(f'export.head is of the format "classifier"; export.format is {self.format!r}')
        if self.calibrate is None and (self.calibrate_column or self.dims):
            raise ConfigError("export.dims and calibrate_column are of export.calibrate, which names no rows")
        if self.calibrate is not None and self.format == "none":
            raise ConfigError('export.calibrate saves ranges with the exported model, and export.format is "none"')
        if any(dim < 1 for dim in self.dims):
            raise ConfigError(f"export.dims are {self.dims}; each must be at least 1")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices: the batch is split over data x fsdp, parameters over fsdp x tensor."""

    data: int = -1
    """Data-parallel devices; -1 for all that are left."""
    fsdp: int = 1
    """Devices the parameters are split over, gathered layer by layer."""
    tensor: int = 1
    """Devices each layer's heads and hidden units are split over, never gathered; it divides the heads."""
    slices: int = 1
    """Slices of the hardware, joined by a slower network than within them: `data` alone reaches over it."""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """How long the processes of one run wait for each other, in seconds."""

    start: int = 1800
    """Until all processes have started."""
    heartbeat: int = 100
    """Without a sign of life of a process until it counts as lost, which ends the others."""
    meet: int = 1800
    """At a point all processes pass together: the first one's set-up, an export."""
    step: int = 600
    """A step that was run before may take ten times the median step, and at least so long; then the process ends itself."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ConfigError(f"distributed.{field.name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = "run"
    """Name of the experiment; the default run folder is runs/NAME."""
    seed: int = 0
    """Seed of the initial weights, the order of rows and dropout."""
    steps: int = 1000
    """Batches to train on."""
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    export: Export = dataclasses.field(default_factory=Export)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Metric writers besides metrics.jsonl and metrics.csv."""
    log_every: int = 10
    """Steps between lines of metrics."""

    def __post_init__(self):
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        if not self.name:
            raise ConfigError("name is empty; it names the run folder")


def run_folder(path: str | os.PathLike) -> Path:
    """A run folder by its name. Raises ConfigError for a URL, of which a path would silently make a local folder."""
    if re.search(r"(^|/)[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):  # a Path has lost the second slash
        raise ConfigError(
            f"the run folder is {os.fspath(path)!r}; it is locked, renamed and appended to, so it must be on a file system: "
            "mount the bucket and name the folder there (launch/README.md tells how)"
        )
    return Path(path)
