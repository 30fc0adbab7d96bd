"""A model of late interaction -> the same model giving the first numbers of its tokens' vectors, as Matryoshka trains them."""

import dataclasses
from typing import Any

import numpy as np

from embedjax.config import Dense, Tower
from embedjax.config.errors import ConfigError
from embedjax.load import Model, assemble


def first_numbers(model: Model, dim: int) -> Model:
    """The model whose tokens' vectors are the first `dim` numbers, at length 1 again where its tower scales them: by columns of
    the last projection left out, so that whatever encodes, searches or is exported has the short ones.

    Raises ConfigError for a model of one vector a text, and for a `dim` that is below 1 or above its width.
    """
    if not model.config.late:
        raise ConfigError(f"{model.origin} has one vector a text; its first numbers are taken where vectors are written")
    towers, params = dict(model.config.towers), dict(model.params["towers"])
    for name in model.config.encoders:
        tower, width = towers[name], model.embedders[name].width
        assert isinstance(tower, Tower)
        if not 1 <= dim <= width:
            raise ConfigError(f"{dim} numbers of a token's vector were asked for; those of {model.origin} have {width}")
        towers[name], params[name] = _cut(tower, params[name], width, dim)
    config = dataclasses.replace(model.config, towers=towers)
    return assemble(config, {"towers": params}, model.texts, model.tokenizers, model.origin, model.details, model.heads)


def _cut(tower: Tower, params: dict[str, Any], width: int, dim: int) -> tuple[Tower, dict[str, Any]]:
    dense, weights = tower.dense or (), dict(params.get("dense", {}))
    if dense and not dense[-1].residual:
        last = str(len(dense) - 1)
        weights[last] = {part: np.asarray(array)[..., :dim] for part, array in weights[last].items()}
        dense = (*dense[:-1], dataclasses.replace(dense[-1], features=dim))
    else:  # nothing that could lose its last columns
        weights[str(len(dense))] = {"kernel": np.eye(width, dim, dtype=np.float32)}
        dense = (*dense, Dense(dim, bias=False, activation="identity"))
    return dataclasses.replace(tower, dense=dense), {**params, "dense": weights}
