"""What wraps a loss of vectors, whichever it is: Matryoshka prefixes, stored vectors, earlier layers, and weighted sums.

A loss that is wrapped takes outputs {"anchor": [B E], "positive": [B C E]}, by `encoding.texts`, with any number of E.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from embedjax.config import (
    ClassHead,
    InBatch,
    Layers,
    Model,
    ModifiedResnet,
    Pooled,
    Quantized,
    Resnet,
    Set,
    Static,
    Sum,
    VectorDistillation,
)
from embedjax.config.errors import ConfigError
from embedjax.losses import compose, quantized
from embedjax.models.embedder import Embedder
from embedjax.objective.encoding import LAYERS, PREFIXES, drawn, texts
from embedjax.objective.kinds import Objective

Value = Callable[[Any, dict, Any, Any], tuple[Any, dict]]


def wrapped(made: Objective, task: Set, model: Model, embedders: Mapping[str, Embedder]) -> Objective:
    """The objective of a loss with its prefixes, precisions and layers. In-batch losses of vectors see to prefixes themselves
    where all are floats; prefixes and precisions of a sum are those of its losses. Raises ConfigError for prefixes, columns or
    layers that are not there."""
    loss, value = task.loss, made.loss
    if not isinstance(loss, Pooled):
        return made
    normalized = normalized_prefixes(task, model, embedders)
    if loss.quantized and not isinstance(loss, Sum):
        value = _quantized(value, loss.quantized, task, model, normalized)
    if loss.matryoshka:
        require_prefixes(task, model, embedders)
        if not isinstance(loss, Sum) and (model.late or loss.quantized or not isinstance(loss, InBatch)):
            value = _prefixes(value, loss, normalized)
    if loss.layers and model.late:
        raise ConfigError(f"set {task.name!r} trains earlier layers, which late interaction does not")
    if loss.layers:
        value = _layers(value, loss.layers, _depth(task, model, embedders))
    return made._replace(loss=value)


def chosen_prefixes(loss: Pooled, key: UInt32[Array, ""] | None) -> Bool[Array, "P"] | None:
    """Which of the prefixes a step trains; None for all."""
    count = len(loss.matryoshka)
    if not 0 < loss.dims_per_step < count:
        return None
    return (drawn(key, PREFIXES, count, loss.dims_per_step)[:, None] == jnp.arange(count)[None]).any(0)


def require_prefixes(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> None:
    assert isinstance(task.loss, Pooled)
    for column in _columns(task):
        width = embedders[model.tower_of(column)].width
        for length in task.loss.matryoshka:
            if length > width:
                raise ConfigError(f"matryoshka has prefix {length}; embeddings of column {column!r} have {width} numbers")


def normalized_prefixes(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> set[str]:
    """The columns whose prefixes have length 1 again. Vectors that are compared with each other do where cosines are compared,
    as sentence-transformers cuts them. A class head and a teacher's vector meet them as they will be used: evaluation and the
    exported head normalise what the tower normalises."""
    if isinstance(task.loss, ClassHead | VectorDistillation):
        return {column for column in _columns(task) if embedders[model.tower_of(column)].normalize}
    return _columns(task) if model.similarity == "cosine" else set()


def _columns(task: Set) -> set[str]:
    """What a loss is given vectors of: hard negatives are with the positives."""
    return {"anchor", *(("positive",) if {"positive", "negative"} & set(task.names) else ())}


def _prefixes(value: Value, loss: Pooled, normalized: Collection[str]) -> Value:
    prefix = lambda outputs, length: compose.vectors_prefix(outputs, length, normalized)
    total = compose.matryoshka(
        lambda outputs, params, targets, key: value(params, outputs, targets, key),
        loss.matryoshka,
        loss.matryoshka_weights,
        prefix,
    )
    return lambda params, outputs, targets, key: total(outputs, params, targets, key, chosen=chosen_prefixes(loss, key))


def _quantized(value: Value, how: Quantized, task: Set, model: Model, normalized: Collection[str]) -> Value:
    if not set(how.columns) & _columns(task):
        raise ConfigError(f"set {task.name!r}: Quantized.columns is {how.columns}; the set has {sorted(_columns(task))}")

    def total(params, outputs, targets, key):
        # Losses of late interaction begin their targets with which tokens count.
        counted = targets[0] if model.late else None
        store = lambda outputs, precision: quantized.stored(outputs, precision, how.columns, normalized, counted)
        at = lambda outputs: value(params, outputs, targets, key)
        return quantized.quantized(at, how.precisions, how.weights, store)(outputs)

    return total


def _layers(value: Value, layers: Layers, depth: int) -> Value:
    """The loss at the last layer and at those the step drew, and the divergence between them (Li et al. 2024, eq. 6 to 9)."""

    def total(params, outputs, targets, key):
        each = outputs["layers"]
        last = {name: x for name, x in outputs.items() if name != "layers"}
        drawn_n = drawn(key, LAYERS, depth, layers.per_step)
        share_n = compose.layer_weight(drawn_n, layers.weighting) * (layers.prior_weight / len(drawn_n))
        weights = jnp.append(jnp.float32(layers.last_weight), share_n)
        # The last layer first; each draws prefixes of its own.
        stacked = {name: jnp.moveaxis(jnp.concatenate([x[..., None, :], each[name]], -2), -2, 0) for name, x in last.items()}
        keys = None if key is None else key + jnp.arange(len(weights), dtype=jnp.uint32)

        of_layer = lambda one: value(params, one[0], targets, one[1])
        found, metrics = jax.lax.map(of_layer, (stacked, keys))
        found = (weights * found).sum()
        if layers.kl_temperature:
            found = found + layers.kl_weight * compose.layer_divergence(each, last, layers.kl_temperature)
        return found, {name: x[0] for name, x in metrics.items()}

    return total


def _depth(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> int:
    towers = {model.tower_of(column) for column in ("anchor", "positive") if column in task.columns}
    depths = {embedders[name].arch.depth for name in towers}
    if any(isinstance(embedders[name].arch, Static) for name in towers):
        raise ConfigError(f"set {task.name!r} trains earlier layers of a static tower, which has none")
    if any(isinstance(embedders[name].arch, ModifiedResnet | Resnet) for name in towers):
        raise ConfigError(f"set {task.name!r} trains earlier layers of a ResNet, whose maps are of other sizes than the last")
    if len(depths) > 1:
        raise ConfigError(f"set {task.name!r} trains earlier layers of towers of {sorted(depths)} layers; they must agree")
    return depths.pop()


def members(task: Set) -> list[Set]:
    """The set with each loss of its sum, whose prefixes and precisions are each loss's own: losses differ in how they take
    them."""
    loss = task.loss
    assert isinstance(loss, Sum)
    shared = {name: getattr(loss, name) for name in ("matryoshka", "matryoshka_weights", "dims_per_step") if loss.matryoshka}
    shared |= {"quantized": loss.quantized} if loss.quantized else {}
    return [dataclasses.replace(task, loss=dataclasses.replace(each, **shared)) for each in loss.losses]


def summed(task: Set, model: Model, embedders: Mapping[str, Embedder], parts: Sequence[Objective]) -> Objective:
    """The weighted sum of objectives over texts that are encoded once. Metrics: each loss by name, and theirs."""
    loss = task.loss
    assert isinstance(loss, Sum)
    weights = loss.weights or (1.0,) * len(parts)
    names = [type(each).__name__ for each in loss.losses]
    names = [f"{name}_{i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]

    def targets(constants, columns):
        return tuple(part.targets(constants, columns) for part in parts)

    def value(params, outputs, targets, key):
        total, metrics = jnp.float32(0), {}
        for name, weight, part, known in zip(names, weights, parts, targets, strict=True):
            found, told = part.loss(params, outputs, known, key)
            total, metrics = total + weight * found, {**told, **metrics, name: found}
        # Its parts may be means over something other than rows, the sum is not.
        return total, {name: x for name, x in metrics.items() if name != "weight"}

    return Objective(texts(task, model, embedders), targets, value)
