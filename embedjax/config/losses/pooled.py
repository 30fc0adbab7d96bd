"""What every loss of vectors has: Matryoshka prefixes, vectors as they will be stored, and losses at the outputs of earlier
layers."""

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
class Quantized:
    """The loss on vectors as they will be stored, too: every prefix goes to its code and back, and the gradient passes as if it
    had not (straight-through: Bengio et al. 2013). Ranges are those of the global batch; by late interaction those of the
    tokens that count."""

    precisions: tuple[Literal["float32", "int8", "binary"], ...] = ("float32", "binary")
    """What vectors are stored as, losses summed; uint8 is as int8 here, and ubinary as binary. int8 is left out at first, as it
    loses next to nothing untrained."""
    weights: tuple[float, ...] = ()
    """Weight of each; empty for 1."""
    columns: tuple[Literal["anchor", "positive"], ...] = ("anchor", "positive")
    """Whose vectors are: "positive" has the hard negatives with it. Both, as a search by Hamming distance compares them;
    `("positive",)` where queries stay floats, as in rescoring, which gains less."""

    def __post_init__(self):
        for field, known in (("precisions", ("float32", "int8", "binary")), ("columns", ("anchor", "positive"))):
            found = getattr(self, field)
            if not found or len(set(found)) < len(found) or not set(found) <= set(known):
                raise ConfigError(f"Quantized.{field} is {found}; they differ, and are some of {', '.join(known)}")
        if self.precisions == ("float32",):
            raise ConfigError('Quantized.precisions is float32 alone, which is the loss as it is; add "int8" or "binary"')
        if self.weights and len(self.weights) != len(self.precisions):
            raise ConfigError(f"Quantized.weights has {len(self.weights)} numbers for {len(self.precisions)} precisions")
        require_numbers(self, "weights")


@dataclasses.dataclass(frozen=True)
class Pooled:
    """What wraps any loss of vectors. With both prefixes and layers it is 2D Matryoshka (Li et al. 2024)."""

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
    quantized: Quantized | None = None
    """Train for vectors that are stored as int8 or bits too, at every prefix; None for floats alone."""
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
