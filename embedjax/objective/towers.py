"""The towers as an objective sees them: plain ones, adapters added to their kernels, frozen layers without a backward pass."""

import dataclasses
from collections.abc import Mapping

from embedjax.config import Model, Set
from embedjax.config.errors import ConfigError
from embedjax.models import lora
from embedjax.models.embedder import Embedder
from embedjax.objective.kinds import Objective, combine


def held(embedders: Mapping[str, Embedder], model: Model) -> dict[str, Embedder]:
    """The embedders of a training step, without gradient for the layers that are frozen."""
    still = {name: tower.freeze_layers for name, tower in model.towers.items() if tower.freeze_layers}
    return {**embedders, **{name: dataclasses.replace(embedders[name], still=count) for name, count in still.items()}}


def plain(made: Objective, task: Set, model: Model) -> Objective:
    """The objective over the parameters of a run, from one over plain towers. Raises ConfigError for an adapter that is not
    there, or must be named."""
    adapters = {name: lora.chosen(tower.lora, task.adapter) for name, tower in model.towers.items()}
    if task.adapter and not any(adapters.values()):
        raise ConfigError(f"set {task.name!r} trains the adapter {task.adapter!r}; no tower has `lora`")
    altered = [name for name, tower in model.towers.items() if tower.lora]
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
        """A tower that is partly trained moves whole to what is trained."""
        trained, constant = dict(params.get("towers", {})), dict(frozen(constants)["towers"])
        for name in altered:
            if name in trained:
                trained[name] = merged(name, combine(trained[name], constants.get("towers", {}).get(name, {})))
                constant.pop(name, None)
        return made.encode({**params, "towers": trained}, {**constants, "towers": constant}, columns, key)

    return made._replace(encode=encode, targets=lambda constants, columns: made.targets(frozen(constants), columns))
