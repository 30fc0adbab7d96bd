"""The format "classifier": which models it holds, and the one class head that is written of a model."""

import dataclasses
from collections.abc import Mapping

from embedjax import config as configs
from embedjax.config import Tower
from embedjax.config.errors import ConfigError, nearest
from embedjax.load import Model
from embedjax.models import sequence_classification
from embedjax.models.classifier import Head

FORMAT = "classifier"


def check(model: configs.Model) -> None:
    """Raises ConfigError for resolved towers that the format does not hold."""
    towers = {name: model.towers[name] for name in model.routes.values()}
    (name, tower), *others = towers.items()
    if others or not isinstance(tower, Tower):
        kinds = {name: "texts" if isinstance(tower, Tower) else "pictures" for name, tower in towers.items()}
        raise ConfigError(f"the classifier format is of one tower of texts; the model has {kinds}")
    sequence_classification.check_tower(name, tower)


def head_of(heads: Mapping[str, Head], name: str = "") -> str:
    """The name of the head that is written. Raises ConfigError for a model without, or with several and none named, for an
    unknown name and for a head of pairs."""
    if not heads:
        raise ConfigError("the classifier format writes a class head, and the model has none; train one with the loss Classify")
    if name and name not in heads:
        raise ConfigError(f"the model has no class head {name!r}; {nearest(name, heads)}")
    if not name and len(heads) > 1:
        raise ConfigError(f"the model has the class heads {sorted(heads)}; name one: --head NAME, or Export(head=...)")
    chosen = name or next(iter(heads))
    if heads[chosen].pair:
        raise ConfigError(
            f"the class head {chosen!r} reads pairs of texts, each a vector; the classifier format has none of pairs"
        )
    return chosen


def with_head(model: Model, name: str = "") -> Model:
    """The model with the one head that is written. Raises ConfigError as `head_of` does."""
    chosen = head_of(model.heads, name)
    return dataclasses.replace(model, heads={chosen: model.heads[chosen]})
