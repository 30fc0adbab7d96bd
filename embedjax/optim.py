"""config -> the optax transformation of a run: schedule, clipping, AdamW, decay by path, rates by path, and what is frozen.

Knows parameters by their paths alone: arrays and abstract shapes do equally well. Skipping updates is the step's business.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from embedjax.config import Group, Model, ModifiedResnet, Optim, Resnet, Set
from embedjax.config.errors import ConfigError
from embedjax.models.lora import chosen
from embedjax.sharding import path_of

# Whether a parameter decays; every path matches exactly one rule. As Hugging Face's trainer, which decays all but norms and
# whatever is called a bias, MPNet's table of relative positions included. Rank cannot tell: layers are stacked on axis 0.
DECAY: tuple[tuple[str, bool], ...] = (
    (r"/kernel$", True),
    (r"^towers/[^/]+/lora/.*/[ab]$", True),
    (r"(?<!relative)/embedding$", True),
    (r"relative/embedding$", False),
    (r"norm[^/]*/scale$", False),
    (r"^loss/scale$", False),
    (r"/bias$", False),
)

# What makes the input of the first layer: tables, the projection of patches, their norm. MPNet's table of relative positions is
# read by all layers.
UNDER_LAYERS = r"^towers/([^/]+)/encoder/(?:tokens|positions|types|norm|patches|class|registers)/"

# Running statistics of batch normalisation: neither trained nor constant, they follow the batches.
STATISTICS = r"^towers/[^/]+/encoder/.*norm/(?:mean|var)$"

# What a loss itself learns besides a head: with these alone no vector changes.
OF_THE_LOSS = ("loss/scale", "loss/bias")


def make(
    optim: Optim, steps: int, params: Mapping, still: Mapping[str, int] | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW (Loshchilov & Hutter 2019) for the trained parameters, and its learning rate by applied updates.

    The multipliers of groups and layers scale the decay with the rate. `still` says of towers how many first layers get no
    update; their gradient is 0 already. Raises ConfigError for a group that matches nothing.
    """
    rate = schedule(optim, steps)
    parts = [("clip", optax.clip_by_global_norm(optim.clip_norm))] if optim.clip_norm else []
    parts.append(("adam", optax.scale_by_adam(optim.b1, optim.b2, optim.eps)))
    if optim.weight_decay:
        parts.append(("decay", optax.add_decayed_weights(optim.weight_decay, mask=decays(params))))
    for name, factors in (
        ("groups", multipliers(params, optim.groups) if optim.groups else None),
        ("layers", layers(params, optim.layer_decay, still or {}) if still or optim.layer_decay < 1 else None),
    ):
        if factors is not None:
            parts.append((name, optax.stateless(functools.partial(_scaled, factors))))
    parts.append(("rate", optax.scale_by_learning_rate(rate)))
    return optax.named_chain(*parts), rate


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """The learning rate of the update after `count` applied ones.

    It rises to its peak at the last update of the warm-up and falls to 0 at `count == steps`, so no update of the run is
    lost to a rate of 0. Raises ConfigError when the warm-up is longer than the run.
    """
    warm = round(optim.warmup * steps) if optim.warmup < 1 else round(optim.warmup)
    if warm > steps:
        raise ConfigError(f"optim.warmup is {warm} steps, but the run has {steps}; make it shorter, or a share below 1")
    peak, warm = optim.learning_rate, max(warm, 1)
    falls: dict[str, Callable[[float, int], optax.Schedule]] = {
        "linear": lambda peak, left: optax.linear_schedule(peak, 0.0, left),
        "cosine": lambda peak, left: optax.cosine_decay_schedule(peak, left),
        "constant": lambda peak, left: optax.constant_schedule(peak),
    }
    rise = optax.linear_schedule(peak / warm, peak, warm - 1)
    return optax.join_schedules([rise, falls[optim.schedule](peak, steps - warm + 1)], [warm - 1])


def decays(params: Mapping) -> Any:
    """The same tree with whether each parameter decays. Raises ConfigError for a path that not exactly one rule matches."""

    def decay(key: tuple, _: Any) -> bool:
        path = path_of(key)
        found = [(rule, value) for rule, value in DECAY if re.search(rule, path)]
        if len(found) != 1:
            raise ConfigError(
                f"parameter {path!r} matches {[r for r, _ in found] or 'no rule'} of optim.DECAY; it must match one"
            )
        return found[0][1]

    return jax.tree_util.tree_map_with_path(decay, params)


def multipliers(params: Mapping, groups: Sequence[Group]) -> Any:
    """The same tree with the factor of the first group that matches, else 1. Raises ConfigError when one matches none."""
    patterns = [_pattern(group.path, "groups") for group in groups]
    _require_matches(patterns, params, "groups")

    def factor(key: tuple, _: Any) -> float:
        path = path_of(key)
        return next((g.multiplier for g, pattern in zip(groups, patterns, strict=True) if pattern.search(path)), 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def layers(params: Mapping, decay: float, still: Mapping[str, int]) -> Any:
    """The same tree with the factor of each layer of a tower of S, float32 [S 1 ...] where layers are stacked, else a number.

    Layer i, counted from 0, gets decay^(S - i), the tables and the norm under the layers decay^(S + 1), all else 1 (Howard &
    Ruder 2018, section 3.2, in the form of BEiT); the first `still[tower]` layers 0.
    """
    leaves = [(path_of(key), x) for key, x in jax.tree_util.tree_leaves_with_path(params)]
    depths = {tower: x.shape[0] for path, x in leaves if (tower := _tower_of_layers(path))}
    if decay < 1 and (found := next((path for path, _ in leaves if re.search(r"/encoder/stage\d+/", path)), "")):
        raise ConfigError(
            f"optim.layer_decay counts a transformer's layers, but {found} is a ResNet's; optim.groups sets rates of its stages"
        )

    def factor(key: tuple, x: Any) -> Any:
        path = path_of(key)
        if tower := _tower_of_layers(path):
            layer = np.arange(x.shape[0])
            by_layer = np.where(layer < still.get(tower, 0), 0, decay ** (x.shape[0] - layer))
            return by_layer.astype(np.float32).reshape(-1, *(1,) * (len(x.shape) - 1))
        under = re.match(UNDER_LAYERS, path)
        return decay ** (depths[under[1]] + 1) if under and under[1] in depths else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def _tower_of_layers(path: str) -> str | None:
    found = re.match(r"towers/([^/]+)/(?:encoder|lora/[^/]+)/blocks/", path)
    return found[1] if found else None


def _scaled(factors: Any, updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, f: u * f, updates, factors)


def constant(model: Model, sets: Sequence[Set]) -> tuple[str, ...]:
    """Regular expressions of what is not trained because of how the towers are made: encoders with adapters, adapters that no
    set trains, tables that frozen layers read. Raises ConfigError when more layers are to be frozen than there are."""
    found = []
    for name, tower in model.towers.items():
        if tower.freeze_layers > (depth := getattr(tower.arch, "depth", 0)):
            raise ConfigError(f"tower {name!r}: freeze_layers is {tower.freeze_layers}; it has {depth} layers")
        start = f"^towers/{re.escape(name)}"
        if 0 < tower.freeze_layers < depth and isinstance(tower.arch, ModifiedResnet | Resnet):
            raise ConfigError(
                f"tower {name!r}: freeze_layers counts a transformer's layers; of a ResNet name what is not trained, as in "
                f'optim.freeze=("{start}/encoder/(stem|stage1)/",)'
            )
        if getattr(tower, "freeze_statistics", False):
            found.append(f"{start}/encoder/.*norm/(?:mean|var)$")
        if tower.freeze_layers == depth > 0:  # no layer is left to train, nor to adapt
            found += [f"{start}/{part}/" for part in ("encoder", "lora") if part == "encoder" or tower.lora]
        elif tower.lora:
            trained = {chosen(tower.lora, task.adapter) for task in sets}
            found.append(f"{start}/encoder/")
            found += [f"{start}/lora/{re.escape(adapter)}/" for adapter in tower.lora if adapter not in trained]
        elif tower.freeze_layers:
            found.append(f"{start}/encoder/(?:tokens|positions|types|norm|relative|patches|class|registers)/")
    return tuple(found)


def partition(params: Mapping, freeze: Sequence[str]) -> tuple[dict, dict]:
    """Nested dicts of parameters as (trained, frozen), each without the other's branches; `objective.combine` undoes it.

    Frozen is what a regex of `freeze` finds in the path. Raises ConfigError when one finds nothing, or nothing is left that
    changes a vector or a head.
    """
    patterns = [_pattern(regex, "freeze") for regex in freeze]
    _require_matches(patterns, params, "freeze")
    trained, frozen = _split(params, "", patterns)
    paths = [path_of(key) for key, _ in jax.tree_util.tree_leaves_with_path(trained)]
    if all(path in OF_THE_LOSS or re.search(STATISTICS, path) for path in paths):
        raise ConfigError(
            f"{list(freeze)} (of optim.freeze, and by freeze_layers and lora of the towers) freezes every parameter; leave "
            "something to train"
        )
    return trained, frozen


def statistics(trained: Mapping) -> tuple[dict, dict]:
    """What `partition` gives as trained, as (parameters, running statistics); `objective.combine` undoes it."""
    return _split(trained, "", [re.compile(STATISTICS)])


def _split(params: Mapping, prefix: str, patterns: Sequence[re.Pattern]) -> tuple[dict, dict]:
    trained, frozen = {}, {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            left, right = _split(value, f"{path}/", patterns)
            if left or not value:  # an empty branch, such as no projections, stays where the model looks for it
                trained[name] = left
            if right:
                frozen[name] = right
        else:
            (frozen if any(pattern.search(path) for pattern in patterns) else trained)[name] = value
    return trained, frozen


def _pattern(regex: str, field: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise ConfigError(f"optim.{field} has {regex!r}, which is not a regular expression: {error}") from error


def _require_matches(patterns: Sequence[re.Pattern], params: Mapping, field: str) -> None:
    paths = [path_of(key) for key, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(map(pattern.search, paths)):
            known = sorted({"/".join(path.split("/")[:4]) for path in paths})
            raise ConfigError(f"optim.{field} {pattern.pattern!r} matches no parameter; paths begin with {', '.join(known)}")
