"""config -> the Objective of each data set: what is encoded, what is compared with, and the loss."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from embedjax.config import InBatch, Loss, Model, MultipleNegatives, Set, Siglip
from embedjax.config.errors import ConfigError, nearest
from embedjax.losses import contrastive, streaming
from embedjax.losses.compose import matryoshka
from embedjax.losses.contrastive import Guide, Hashes, Pairs, Rule
from embedjax.models.embedder import Embedder
from embedjax.sharding import BATCH_AXES

MAX_SCALE = 100.0

# Scores a device may hold at once: 16 MB of them a matrix. Below, one block is all there is and tiles save nothing; above,
# each of the dense form's matrices leaves the cache, then the memory.
DENSE_SCORES = 2**22


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


def make(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """The objective of one data set, by the type of its loss. Raises ConfigError for columns, prefixes or a guide that do not
    fit."""
    return OBJECTIVES[type(task.loss)](task, model, embedders, mesh)


def loss_params(task: Set) -> dict[str, jax.Array]:
    """Initial values of what the loss itself trains."""
    found = {"scale": jnp.log(jnp.float32(task.loss.scale))} if task.loss.learn_scale else {}
    if isinstance(task.loss, Siglip) and task.loss.learn_bias:
        found["bias"] = jnp.float32(task.loss.bias)
    return found


def bound(params: dict) -> dict:
    """Parameters after an update, with a learned log-scale held in [0, ln 100] (Radford et al. 2021, section 2.5)."""
    if "scale" not in params.get("loss", {}):
        return params
    scale = jnp.clip(params["loss"]["scale"], 0, math.log(MAX_SCALE))
    return {**params, "loss": {**params["loss"], "scale": scale}}


def _in_batch(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    loss = task.loss
    _require(task, {"anchor", "positive"}, {"negative"})
    _require_prefixes(loss, model, embedders)
    encoder = _encoder(model, embedders)
    guide = _guide(loss, model, embedders)
    compare = _comparison(loss, mesh)

    def encode(params, constants, columns, key):
        towers = combine(params.get("towers", {}), constants.get("towers", {}))
        return encoder(towers, candidates(columns), columns["row"], key)

    def targets(constants, columns):
        hashes = None
        if loss.mask_duplicates:
            found = columns["hash"]
            parts = [found["positive"][:, None]] + ([found["negative"]] if "negative" in found else [])
            hashes = Hashes(found["anchor"], jnp.concatenate(parts, 1))
        return hashes, guide(constants, columns)

    def value(params, outputs, targets):
        learned = params.get("loss", {})
        scale = jnp.exp(learned["scale"]) if loss.learn_scale else loss.scale
        bias = 0.0
        if isinstance(loss, Siglip):
            bias = learned["bias"] if loss.learn_bias else loss.bias
        found, metrics = compare(Pairs(outputs["anchor"], outputs["positive"], *targets), scale, bias)
        metrics |= {"scale": scale} if loss.learn_scale else {}
        return found, metrics | ({"bias": bias} if isinstance(loss, Siglip) and loss.learn_bias else {})

    return Objective(encode, targets, value)


def _comparison(loss: InBatch, mesh: Mesh) -> Callable[..., contrastive.Loss]:
    """`(pairs, scale, bias) -> (loss, metrics)` of the global batch, in the form the config or the size asks for."""
    rule = _rule(loss)
    dense = functools.partial(contrastive.loss, rule=rule)
    if loss.matryoshka:
        dense = matryoshka(dense, loss.matryoshka, loss.matryoshka_weights)
    options = {
        "bound": MAX_SCALE if loss.learn_scale else loss.scale,
        "dims": loss.matryoshka,
        "weights": loss.matryoshka_weights,
        "tile": loss.tile,
    }
    forms = {
        "dense": lambda pairs, scale, bias: dense(pairs, scale=scale, bias=bias),
        "tiled": lambda pairs, scale, bias: streaming.loss(pairs, rule, scale, bias, **options),
        "ring": lambda pairs, scale, bias: _ring(pairs, rule, scale, bias, mesh, options),
    }

    def compare(pairs: Pairs, scale, bias) -> contrastive.Loss:
        form = loss.form if loss.form != "auto" else _form(pairs, mesh)
        return forms[form](pairs, scale, bias)

    return compare


def _form(pairs: Pairs, mesh: Mesh) -> str:
    """The form for a batch of this size: dense while a device's share of the scores is small."""
    rows, count, _ = pairs.candidates.shape
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows * rows * count // devices <= DENSE_SCORES:
        return "dense"
    return "ring" if devices > 1 else "tiled"


def _ring(pairs: Pairs, rule: Rule, scale, bias, mesh: Mesh, options: dict) -> contrastive.Loss:
    """The tiled loss with every device's own rows, documents travelling round the batch axes."""

    def local(pairs, scale, bias):
        first = jax.lax.axis_index(BATCH_AXES) * pairs.anchor.shape[0]
        return streaming.per_row(pairs, rule, scale, bias, axis=BATCH_AXES, first=first, **options)

    # The bodies of the loops begin with plain zeros, which the check of varying axes refuses; nothing else would differ.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(BATCH_AXES), P(), P()), out_specs=P(BATCH_AXES), check_vma=False)
    value_B, cosine_B = sharded(pairs, *(jnp.asarray(x, jnp.result_type(x, jnp.float32)) for x in (scale, bias)))
    return value_B.mean(), {"positive": cosine_B.mean()}


def _rule(loss: InBatch) -> Rule:
    criterion, hardness, strength = "sigmoid", "none", 0.0
    if isinstance(loss, MultipleNegatives):
        criterion, hardness, strength = loss.criterion, loss.hardness, loss.hardness_strength
    return Rule(criterion, hardness, strength, loss.guide_margin, loss.guide_margin_kind)


def _guide(loss: InBatch, model: Model, embedders: Mapping[str, Embedder]) -> Callable[[Any, dict], Guide | None]:
    """`(constants, columns) -> Guide`: the guide tower's vectors of the same texts, which it must tokenize the same way."""
    name = loss.guide
    if not name:
        return lambda constants, columns: None
    if name not in model.towers:
        raise ConfigError(f"the loss's guide {name!r} is no tower; {nearest(name, model.towers)}")
    tower = model.towers[name]
    for column in ("anchor", "positive"):
        other = model.towers[model.tower_of(column)]
        pieces = lambda t: (t.tokenizer or t.init, t.arch and t.arch.vocab_size, t.lowercase)
        if pieces(other) != pieces(tower):
            raise ConfigError(
                f"guide {name!r} must share the tokenizer of tower {model.tower_of(column)!r}, whose columns it reads: "
                f"they have {tower.tokenizer or tower.init!r} and {other.tokenizer or other.init!r}"
            )
    encoder = _encoder(dataclasses.replace(model, columns=dict.fromkeys(("anchor", "positive"), name)), embedders)

    def encode(constants, columns):
        if name not in constants.get("towers", {}):
            raise ConfigError(f'guide {name!r} is trained; add "^towers/{name}/" to optim.freeze')
        outputs = encoder(constants["towers"], candidates(columns), columns["row"], None)
        return jax.lax.stop_gradient(Guide(outputs["anchor"], outputs["positive"]))

    return encode


def _require_prefixes(loss: InBatch, model: Model, embedders: Mapping[str, Embedder]) -> None:
    for column in ("anchor", "positive"):
        width = embedders[model.tower_of(column)].width
        for length in loss.matryoshka:
            if length > width:
                raise ConfigError(f"matryoshka has prefix {length}; embeddings of column {column!r} have {width} numbers")


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


OBJECTIVES: dict[type[Loss], Callable[[Set, Model, Mapping[str, Embedder], Mesh], Objective]] = {
    MultipleNegatives: _in_batch,
    Siglip: _in_batch,
}
