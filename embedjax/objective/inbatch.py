"""In-batch losses: which scores, in which form (dense, tiled or in a ring), what masks them, and what of them is trained."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from embedjax.config import ContrastiveDistillation, InBatch, Model, MultipleNegatives, Set, Siglip, Sum
from embedjax.config.errors import ConfigError
from embedjax.config.model import Similarity
from embedjax.losses import contrastive, streaming
from embedjax.losses.compose import matryoshka
from embedjax.losses.contrastive import Guide, Hashes, Pairs, Rule
from embedjax.models.embedder import Embedder
from embedjax.objective.encoding import frozen_towers, texts
from embedjax.objective.kinds import MAX_SCALE, Objective
from embedjax.objective.wrapped import chosen_prefixes
from embedjax.sharding import BATCH_AXES

# Scores a device may hold at once: 16 MB of them a matrix. Below, one block is all there is and tiles save nothing; above,
# each of the dense form's matrices leaves the cache, then the memory.
DENSE_SCORES = 2**22


def in_batch(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Raises ConfigError for a guide that does not fit, and for XTR's scores, which vectors of tokens have."""
    loss = task.loss
    assert isinstance(loss, InBatch)
    if loss.xtr:
        raise ConfigError(
            f"set {task.name!r}: {type(loss).__name__}.xtr is {loss.xtr}, which is of late interaction; its towers have one "
            "vector a text"
        )
    if loss.quantized:  # a prefix has ranges of its own, so it is no partial sum: `wrapped` cuts it
        loss = dataclasses.replace(loss, matryoshka=(), matryoshka_weights=(), dims_per_step=0)
    guide = _guide(task, loss, model, embedders)
    compare = _comparison(loss, mesh, model.similarity, first_scale(loss, model))

    def targets(constants, columns):
        return hashes_of(columns) if loss.mask_duplicates else None, guide(constants, columns)

    def value(params, outputs, targets, key):
        scale, bias, told = learned(params, loss, model)
        pairs, chosen = Pairs(outputs["anchor"], outputs["positive"], *targets), chosen_prefixes(loss, key)
        found, metrics = compare(pairs, scale, bias, chosen)
        return found, metrics | told

    return Objective(texts(task, model, embedders), targets, value)


def hashes_of(columns: dict) -> Hashes:
    """Those of a batch's texts."""
    found = columns["hash"]
    parts = [found["positive"][:, None]] + ([found["negative"]] if "negative" in found else [])
    return Hashes(found["anchor"], jnp.concatenate(parts, 1))


def learned(params: Mapping, loss: InBatch, model: Model) -> tuple[Any, Any, dict[str, Any]]:
    """The scale and the bias of the scores, trained or not, and the metrics that tell of those that are."""
    found = params.get("loss", {})
    scale, bias = jnp.exp(found["scale"]) if loss.learn_scale else first_scale(loss, model), 0.0
    if isinstance(loss, Siglip):
        bias = found["bias"] if loss.learn_bias else loss.bias
    told = {"scale": scale} if loss.learn_scale else {}
    return scale, bias, told | ({"bias": bias} if isinstance(loss, Siglip) and loss.learn_bias else {})


def first_values(tasks: Sequence[Set], model: Model) -> dict[str, float]:
    """Which of "scale" and "bias" are learned, and the values they begin with. A run has one of each: raises ConfigError where
    losses begin with different ones."""
    found: dict[str, tuple[float, str]] = {}
    for task in tasks:
        for loss in task.loss.losses if isinstance(task.loss, Sum) else (task.loss,):
            mine: dict[str, float] = {}
            if isinstance(loss, InBatch | ContrastiveDistillation) and loss.learn_scale:
                mine["scale"] = first_scale(loss, model)
            if isinstance(loss, Siglip) and loss.learn_bias:
                mine["bias"] = loss.bias
            for name, value in mine.items():
                other, of = found.setdefault(name, (value, task.name))
                if other != value:
                    raise ConfigError(
                        f"sets {of!r} and {task.name!r} learn one {name}, but from {other:g} and {value:g}; let their losses "
                        f"begin with the same, or set learn_{name} to False in one"
                    )
    return {name: value for name, (value, _) in found.items()}


def first_scale(loss: InBatch | ContrastiveDistillation, model: Model) -> float:
    """The factor on the scores, at first if it is learned."""
    if loss.scale is not None:
        return loss.scale
    sums = model.late and not (isinstance(loss, InBatch) and loss.xtr)
    on_cosines = 10.0 if isinstance(loss, Siglip) else 20.0
    return on_cosines if model.similarity == "cosine" and not sums else 1.0


def _comparison(loss: InBatch, mesh: Mesh, similarity: Similarity, scale: float) -> Callable[..., contrastive.Loss]:
    """`(pairs, scale, bias, chosen) -> (loss, metrics)` of the global batch, in the form the config or the size asks for."""
    rule = rule_of(loss, similarity)
    dense = functools.partial(contrastive.loss, rule=rule)
    whole = lambda pairs, scale, bias, chosen: dense(pairs, scale=scale, bias=bias)
    if loss.matryoshka:
        prefixed = matryoshka(dense, loss.matryoshka, loss.matryoshka_weights)
        whole = lambda pairs, scale, bias, chosen: prefixed(pairs, chosen=chosen, scale=scale, bias=bias)
    options = {
        "bound": MAX_SCALE if loss.learn_scale else scale,
        "dims": loss.matryoshka,
        "weights": loss.matryoshka_weights,
        "tile": loss.tile,
    }
    forms = {
        "dense": whole,
        "tiled": lambda pairs, scale, bias, chosen: streaming.loss(pairs, rule, scale, bias, chosen=chosen, **options),
        "ring": lambda pairs, scale, bias, chosen: _ring(pairs, rule, scale, bias, chosen, mesh, options),
    }

    def compare(pairs: Pairs, scale, bias, chosen) -> contrastive.Loss:
        return forms[_form(pairs, mesh) if loss.form == "auto" else loss.form](pairs, scale, bias, chosen)

    return compare


def _form(pairs: Pairs, mesh: Mesh) -> str:
    """The form for a batch of this size: dense while a device's share of the scores is small."""
    rows, count, _ = pairs.candidates.shape
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows * rows * count // devices <= DENSE_SCORES:
        return "dense"
    return "ring" if devices > 1 else "tiled"


def _ring(pairs: Pairs, rule: Rule, scale, bias, chosen, mesh: Mesh, options: dict) -> contrastive.Loss:
    """The tiled loss with every device's own rows, documents travelling round the batch axes."""

    def local(pairs, scale, bias, chosen):
        first = jax.lax.axis_index(BATCH_AXES) * pairs.anchor.shape[0]
        return streaming.per_row(pairs, rule, scale, bias, axis=BATCH_AXES, first=first, chosen=chosen, **options)

    # The bodies of the loops begin with plain zeros, which the check of varying axes refuses; nothing else would differ.
    specs = (P(BATCH_AXES), P(), P(), P())
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(BATCH_AXES), check_vma=False)
    scale, bias = (jnp.asarray(x, jnp.result_type(x, jnp.float32)) for x in (scale, bias))
    value_B, cosine_B = sharded(pairs, scale, bias, chosen)
    return value_B.mean(), {"positive": cosine_B.mean()}


def rule_of(loss: InBatch, similarity: Similarity) -> Rule:
    """What the losses of arrays are told of a config."""
    rule = Rule("sigmoid", margin=loss.guide_margin, margin_kind=loss.guide_margin_kind, similarity=similarity)
    if not isinstance(loss, MultipleNegatives):
        return rule
    return dataclasses.replace(
        rule,
        criterion="softmax",
        directions=loss.directions,
        partition=loss.partition,
        hardness=loss.hardness,
        strength=loss.hardness_strength,
    )


def _guide(task: Set, loss: InBatch, model: Model, embedders: Mapping[str, Embedder]) -> Callable[[Any, dict], Guide | None]:
    """`(constants, columns) -> Guide`: the guide tower's vectors of the same texts, which it must tokenize the same way."""
    if not loss.guide:
        return lambda constants, columns: None
    encode = frozen_towers("guide", dict.fromkeys(("anchor", "positive"), loss.guide), task, model, embedders)

    def guide(constants, columns):
        outputs = encode(constants, columns)
        return Guide(outputs["anchor"], outputs["positive"])

    return guide
