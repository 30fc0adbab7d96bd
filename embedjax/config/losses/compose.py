"""Regularisation that is added to a loss. (`Sum`, which adds them, knows all losses and is in `__init__`.)"""

import dataclasses
from typing import ClassVar, Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses.pooled import Pooled, require_numbers


@dataclasses.dataclass(frozen=True)
class GlobalOrthogonal(Pooled):
    """Global orthogonal regularisation (Zhang et al. 2017, eq. 6): the similarities of different texts are to have mean 0 and a
    second moment of at most 1 / width, as on a sphere that is used evenly. Belongs in a `Sum` with what teaches something."""

    needs: ClassVar[tuple[str, ...]] = ("anchor",)
    takes: ClassVar[tuple[str, ...]] = ("positive", "negative")

    mean_weight: float = 1.0
    """Weight of the squared mean."""
    second_moment_weight: float = 1.0
    """Weight of what the second moment exceeds 1 / width by."""
    aggregation: Literal["mean", "sum"] = "mean"
    """Over the columns of texts."""

    def __post_init__(self):
        super().__post_init__()
        require_numbers(self, "mean_weight", "second_moment_weight")
        if not self.mean_weight + self.second_moment_weight:
            raise ConfigError("GlobalOrthogonal.mean_weight is 0 and second_moment_weight too; they may not both be 0")
