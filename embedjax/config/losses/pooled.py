"""What every loss of one vector a text has: Matryoshka prefixes, and losses at the outputs of earlier layers."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from embedjax.config.errors import ConfigError


def require_numbers(config: Any, *names: str) -> None:
    """Raises ConfigError for a field, a number or several, that is below 0 or not finite."""
    for name in names:
        value = getattr(config, name)
        if not all(0 <= each < math.inf for each in (value if isinstance(value, tuple) else (value,))):
            raise ConfigError(f"{type(config).__name__}.{name} is {value}; it must be finite and at least 0")


@dataclasses.dataclass(frozen=True)
class Layers:
    """The loss at earlier layers too, and their vectors drawn to the last layer's (Li et al. 2024, sections 3.2 and 3.3), so
    that a model may be cut to its first layers. Each step draws some; the token embeddings count as the first."""

    per_step: int = 1
    """Layers a step draws; 0 for all."""
    last_weight: float = 1.0
    """Weight of the loss at the last layer."""
    prior_weight: float = 1.0
    """Weight of the mean loss at the drawn layers."""
    weighting: Literal["uniform", "log", "linear"] = "uniform"
    """How layer i, counted from 0, weighs among them: 1, 1 / (1 + ln(1 + i)) or 1 / (1 + i)."""
    kl_weight: float = 1.0
    """Weight of the divergence from the last layer's vectors."""
    kl_temperature: float = 0.3
    """Temperature of the softmax over a vector's numbers; 0 leaves the divergence out."""

    def __post_init__(self):
        require_numbers(self, *(field.name for field in dataclasses.fields(self) if field.name != "weighting"))


@dataclasses.dataclass(frozen=True)
class Pooled:
    """What wraps any loss of one vector a text. With both prefixes and layers it is 2D Matryoshka (Li et al. 2024)."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "positive")  # columns of a batch
    takes: ClassVar[tuple[str, ...]] = ()  # further columns that it uses where they are

    matryoshka: tuple[int, ...] = ()
    """Prefix lengths of the embedding that are trained at once, losses summed; empty for the whole embedding alone. Prefixes
    that are compared get length 1 again unless similarity is "dot"; class heads and vectors of a teacher meet them as the
    tower's `normalize` says, as in evaluation."""
    matryoshka_weights: tuple[float, ...] = ()
    """Weight of each prefix; empty for 1."""
    dims_per_step: int = 0
    """How many of the prefixes each step draws; 0 for all."""
    layers: Layers | None = None
    """Train earlier layers too; None for the last alone."""

    def __post_init__(self):
        name = type(self).__name__
        if any(d < 1 for d in self.matryoshka) or len(set(self.matryoshka)) < len(self.matryoshka):
            raise ConfigError(f"{name}.matryoshka is {self.matryoshka}; prefix lengths are at least 1 and differ")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka):
            raise ConfigError(
                f"{name}.matryoshka_weights has {len(self.matryoshka_weights)} numbers for {len(self.matryoshka)} prefixes"
            )
        require_numbers(self, "matryoshka_weights")
        if not 0 <= self.dims_per_step <= len(self.matryoshka):
            raise ConfigError(f"{name}.dims_per_step is {self.dims_per_step} of {len(self.matryoshka)} prefixes")
