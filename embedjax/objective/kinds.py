"""What an objective is: three pure functions over trees of parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from embedjax.config import Model, Set
from embedjax.models.embedder import Embedder

MAX_SCALE = 100.0


class Objective(NamedTuple):
    """Three pure functions, as an optax transformation is two. `params` are trained, `constants` are not; both hold trees of
    the same shape, `{"towers": ..., "loss": ...}`.

    `encode(params, constants, columns, key) -> outputs` works row by row, so that any chunk gives the same rows; but where it
    is not given a tower's running statistics, rows are normalised by those of all it is given, which are in `outputs["stats"]`
    and not meant for `loss`;
    `targets(constants, columns) -> tree` takes no gradient, row by row too;
    `loss(params, outputs, targets, key) -> (scalar, metrics)` sees the global batch. `key`, the step's, draws the dropout of
    `encode` and whatever else is random; None draws nothing.
    """

    encode: Callable[[Any, Any, dict, Any], dict[str, Any]]
    targets: Callable[[Any, dict], Any]
    loss: Callable[[Any, dict, Any, Any], tuple[Any, dict]]


Builder = Callable[[Set, Model, Mapping[str, Embedder], Mesh], Objective]


def combine(trained: Mapping, constant: Mapping) -> dict:
    """Two trees of parameters that share no leaf, as one."""
    both = {**trained, **constant}
    for key in trained.keys() & constant.keys():
        both[key] = combine(trained[key], constant[key])
    return both


def bound(params: dict) -> dict:
    """Parameters after an update, with a learned log-scale held in [0, ln 100] (Radford et al. 2021, section 2.5)."""
    if "scale" not in params.get("loss", {}):
        return params
    scale = jnp.clip(params["loss"]["scale"], 0, math.log(MAX_SCALE))
    return {**params, "loss": {**params["loss"], "scale": scale}}
