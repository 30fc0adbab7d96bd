"""RUN@WHICH -> the parameters a run's saves hold: those of one save, or the mean of several.

Where the run keeps a moving average (optim.ema) that is what is meant, unless WHICH begins with "raw".
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from embedjax.checkpoint import Checkpoints
from embedjax.config.errors import ConfigError

KNOWN = "a step, 'best', 'soup:100,200' or 'soup:last3' (the mean of saves), each with or without 'raw:' before it, or 'raw'"


def read(run: Path, which: str, metric: str | None) -> tuple[dict, int]:
    """The parameters on the host and their step, the last of several. `which` is "" for the newest save, else as `KNOWN` says;
    `metric` chooses the best one. Each save is verified.

    Raises ConfigError for what means nothing, StorageError for a save that is not there or damaged.
    """
    kind, _, rest = which.partition(":")
    trained = ("params", "extra/stats")  # an average holds running statistics too
    wanted, parts = (rest, (trained,)) if kind == "raw" else (which, (("extra/ema",), trained))
    soup = re.fullmatch(r"soup:(?:last(\d+)|(\d+(?:,\d+)+))", wanted)
    if not (soup or wanted in ("", "best") or wanted.isdecimal()):
        raise ConfigError(f"{run}@{which}: after @ comes {KNOWN}")
    with Checkpoints(run / "checkpoints", best=metric if wanted == "best" else None) as checkpoints:
        if wanted == "best" and checkpoints.best() is None:
            raise ConfigError(f"{run}@{which}: no save has the metric {metric!r}")
        if not soup:
            return checkpoints.params_only(int(wanted) if wanted.isdecimal() else None, parts)
        steps = _last(checkpoints, run, int(soup[1])) if soup[1] else sorted(map(int, soup[2].split(",")))
        if len(set(steps)) < max(2, len(steps)):
            raise ConfigError(f"{run}@{which}: a mean needs two or more different saves")
        return _mean(checkpoints.params_only(step, parts)[0] for step in steps), steps[-1]


def _last(checkpoints: Checkpoints, run: Path, count: int) -> list[int]:
    saved = checkpoints.steps()
    if count > len(saved):
        raise ConfigError(f"{run} holds {len(saved)} saves, not {count}; checkpoint.keep says how many stay: {saved}")
    return saved[-count:] if count else []


def _mean(trees: Iterable[Any]) -> Any:
    """The uniform mean, summed in float64 one tree at a time (model soups: Wortsman et al. 2022, section 2)."""
    total, count = None, 0
    for tree in trees:
        wide = jax.tree.map(lambda x: x.astype(np.float64), tree)
        total, count = wide if total is None else jax.tree.map(np.add, total, wide), count + 1
    return jax.tree.map(lambda x: (x / count).astype(np.float32), total)
