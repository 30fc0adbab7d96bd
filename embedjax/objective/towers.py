"""The towers as an objective sees them: plain ones, adapters added to their kernels and frozen layers cut from the gradient."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from embedjax.config import Model, Set
from embedjax.config.errors import ConfigError
from embedjax.models import lora
from embedjax.objective.kinds import Objective, combine


def plain(made: Objective, task: Set, model: Model) -> Objective:
    """The objective over the parameters of a run, from one over plain towers. Raises ConfigError for an adapter that is not
    there, or must be named."""
    adapters = {name: lora.chosen(tower.lora, task.adapter) for name, tower in model.towers.items()}
    if task.adapter and not any(adapters.values()):
        raise ConfigError(f"set {task.name!r} trains the adapter {task.adapter!r}; no tower has `lora`")
    altered = [name for name, tower in model.towers.items() if tower.lora or tower.freeze_layers]
    if not altered:
        return made

    def merged(name: str, params: Mapping) -> dict:
        """A frozen tower that is also trained, its adapter being elsewhere, is that without adapter."""
        adapter = adapters[name] if adapters[name] in params.get("lora", {}) else None
        return lora.merged(params, model.towers[name].lora, adapter)

    def frozen(constants: Mapping) -> dict:
        towers = constants.get("towers", {})
        return {**constants, "towers": {**towers, **{name: merged(name, towers[name]) for name in altered if name in towers}}}

    def encode(params, constants, columns, key):
        """A tower that is partly trained moves whole to what is trained; gradients go no further than they may."""
        trained, constant = dict(params.get("towers", {})), dict(frozen(constants)["towers"])
        for name in altered:
            if name in trained:
                trained[name] = merged(name, combine(trained[name], constants.get("towers", {}).get(name, {})))
                trained[name] = _still(trained[name], model.towers[name].freeze_layers)
                constant.pop(name, None)
        return made.encode({**params, "towers": trained}, {**constants, "towers": constant}, columns, key)

    return made._replace(encode=encode, targets=lambda constants, columns: made.targets(frozen(constants), columns))


def _still(params: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A tower without gradient for its first layers. Cut, not masked: XLA then leaves out their backward pass."""
    if not layers:
        return dict(params)
    cut = lambda x: jnp.concatenate([jax.lax.stop_gradient(x[:layers]), x[layers:]])
    encoder = params["encoder"]
    return {**params, "encoder": {**encoder, "blocks": jax.tree.map(cut, encoder["blocks"])}}
