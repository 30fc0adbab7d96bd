"""config -> the Objective of each data set: what is encoded, what is compared with, and the loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from embedjax.config import Loss, Model, MultipleNegatives, Set
from embedjax.config.errors import ConfigError, nearest
from embedjax.losses import contrastive
from embedjax.models.embedder import Embedder

MAX_LOG_SCALE = math.log(100.0)


class Objective(NamedTuple):
    """Three pure functions, as an optax transformation is two. `params` are trained, `constants` are not; both hold trees of
    the same shape, `{"towers": ..., "loss": ...}`.

    `encode(params, constants, columns, key) -> outputs` works row by row, so that any chunk gives the same rows;
    `targets(constants, columns) -> tree` takes no gradient, row by row too;
    `loss(params, outputs, targets) -> (scalar, metrics)` sees the global batch.
    """

    encode: Callable[[Any, Any, dict, Any], dict[str, Any]]
    targets: Callable[[Any, dict], Any]
    loss: Callable[[Any, dict, Any], tuple[Any, dict]]


def combine(trained: Mapping, constant: Mapping) -> dict:
    """Two trees of parameters that share no leaf, as one."""
    both = {**trained, **constant}
    for key in trained.keys() & constant.keys():
        both[key] = combine(trained[key], constant[key])
    return both


def make(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> Objective:
    """The objective of one data set, by the type of its loss."""
    return OBJECTIVES[type(task.loss)](task, model, embedders)


def loss_params(task: Set) -> dict[str, jax.Array]:
    """Initial values of what the loss itself trains."""
    return {"scale": jnp.log(jnp.float32(task.loss.scale))} if task.loss.learn_scale else {}


def bound(params: dict) -> dict:
    """Parameters after an update, with a learned log-scale held in [0, ln 100] (Radford et al. 2021, section 2.5)."""
    if "scale" not in params.get("loss", {}):
        return params
    return {**params, "loss": {**params["loss"], "scale": jnp.clip(params["loss"]["scale"], 0, MAX_LOG_SCALE)}}


def _multiple_negatives(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> Objective:
    loss = task.loss
    _require(task, {"anchor", "positive"}, {"negative"})
    encoder = _encoder(model, embedders)

    def encode(params, constants, columns, key):
        towers = combine(params.get("towers", {}), constants.get("towers", {}))
        return encoder(towers, candidates(columns), columns["row"], key)

    def targets(constants, columns):
        if not loss.mask_duplicates:
            return None
        hashes = columns["hash"]
        parts = [hashes["positive"][:, None]] + ([hashes["negative"]] if "negative" in hashes else [])
        return contrastive.Hashes(hashes["anchor"], jnp.concatenate(parts, 1))

    def value(params, outputs, hashes):
        scale = jnp.exp(params["loss"]["scale"]) if loss.learn_scale else loss.scale
        masked = None if hashes is None else contrastive.false_negatives(hashes)
        found, metrics = contrastive.multiple_negatives(outputs["anchor"], outputs["positive"], scale, masked)
        return found, metrics | ({"scale": scale} if loss.learn_scale else {})

    return Objective(encode, targets, value)


def candidates(columns: dict) -> dict[str, dict]:
    """The text columns with positives and hard negatives as one: {"anchor": [B L], "positive": [B 1+K L]}."""
    positive = {name: x[:, None] for name, x in columns["positive"].items()}
    if "negative" in columns:
        positive = {name: jnp.concatenate([x, columns["negative"][name]], 1) for name, x in positive.items()}
    return {"anchor": columns["anchor"], "positive": positive}


def _encoder(model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    """Encodes columns `{name: {"ids": [B L] | [B C L], ...}}`; those of one tower and length go through it in one call."""

    def encode(towers, columns, row, key):
        groups: dict[tuple, list[str]] = {}
        for name, column in columns.items():
            groups.setdefault((model.tower_of(name), column["ids"].shape[-1], frozenset(column)), []).append(name)
        outputs = {}
        for place, ((tower, length, _), names) in enumerate(groups.items()):
            stacked = [{k: x.reshape(x.shape[0], -1, length) for k, x in columns[name].items()} for name in names]
            widths = [part["ids"].shape[1] for part in stacked]
            whole = {k: jnp.concatenate([part[k] for part in stacked], 1) for k in stacked[0]}
            # Groups share row numbers, so each has its own key: equal masks for a row's texts would correlate them.
            salted = None if key is None else key + jnp.uint32((place * 0x9E3779B9) & 0xFFFFFFFF)
            pooled = embedders[tower].apply(towers[tower], whole, row=row, key=salted).pooled
            assert pooled is not None
            start = 0
            for name, width in zip(names, widths, strict=True):
                shape = columns[name]["ids"].shape[:-1]
                outputs[name] = pooled[:, start : start + width].reshape(*shape, -1)
                start += width
        return outputs

    return encode


def _require(task: Set, needed: set[str], optional: set[str]) -> None:
    kinds = {name.rstrip("0123456789").rstrip("_") for name in task.columns}
    loss = type(task.loss).__name__
    for name in sorted(needed - kinds):
        raise ConfigError(f"set {task.name!r}: {loss} needs column {name!r}; columns are {sorted(task.columns)}")
    for name in sorted(kinds - needed - optional):
        raise ConfigError(f"set {task.name!r}: {loss} knows no column {name!r}; {nearest(name, needed | optional)}")


OBJECTIVES: dict[type[Loss], Callable[[Set, Model, Mapping[str, Embedder]], Objective]] = {
    MultipleNegatives: _multiple_negatives,
}
