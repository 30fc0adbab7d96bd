"""Which loss a data set is trained with: a union of dataclasses, one a loss."""

import dataclasses

from embedjax.config.errors import ConfigError
from embedjax.config.losses.classify import ClassHead, Classify, ClassifyPair, SupCon
from embedjax.config.losses.compose import GlobalOrthogonal
from embedjax.config.losses.distill import (
    ContrastiveDistillation,
    Distillation,
    KlDistillation,
    MarginMse,
    Taught,
    VectorDistillation,
)
from embedjax.config.losses.inbatch import InBatch, MultipleNegatives, Siglip
from embedjax.config.losses.pairwise import AnglE, Contrastive, CoSent, CosineRegression, OnlineContrastive, Pairwise
from embedjax.config.losses.pooled import Layers, Pooled, Quantized, require_numbers
from embedjax.config.losses.tokens import DenoisingAutoEncoder, MaskedLanguage
from embedjax.config.losses.triplet import (
    BatchAll,
    BatchHard,
    BatchHardSoftMargin,
    BatchSemiHard,
    MegaBatchMargin,
    Mined,
    Triplet,
    Triplets,
)

__all__ = [
    "AnglE",
    "BatchAll",
    "BatchHard",
    "BatchHardSoftMargin",
    "BatchSemiHard",
    "ClassHead",
    "Classify",
    "ClassifyPair",
    "CoSent",
    "Contrastive",
    "ContrastiveDistillation",
    "CosineRegression",
    "DenoisingAutoEncoder",
    "GlobalOrthogonal",
    "InBatch",
    "KlDistillation",
    "Layers",
    "Loss",
    "MarginMse",
    "MaskedLanguage",
    "MegaBatchMargin",
    "Mined",
    "MultipleNegatives",
    "OnlineContrastive",
    "Pooled",
    "Quantized",
    "Siglip",
    "Single",
    "Sum",
    "SupCon",
    "Taught",
    "Triplet",
    "VectorDistillation",
]

Single = MultipleNegatives | Siglip | Pairwise | Triplets | Distillation | GlobalOrthogonal | Classify | ClassifyPair | SupCon


@dataclasses.dataclass(frozen=True)
class Sum(Pooled):
    """A weighted sum of losses over the same texts, which are encoded once. Prefixes and `quantized` may be those of the sum or
    of its losses; layers are those of the sum."""

    losses: tuple[Single, ...] = ()
    """The losses; the columns of the set are those of all of them."""
    weights: tuple[float, ...] = ()
    """Weight of each; empty for 1."""

    def __post_init__(self):
        super().__post_init__()
        if not self.losses:
            raise ConfigError("Sum.losses is empty; name at least one loss")
        if self.weights and len(self.weights) != len(self.losses):
            raise ConfigError(f"Sum.weights has {len(self.weights)} numbers for {len(self.losses)} losses")
        require_numbers(self, "weights")
        for loss in self.losses:
            if loss.layers:
                raise ConfigError(f"Sum.losses: {type(loss).__name__} has layers of its own; set them on the Sum")
            for field in ("matryoshka", "quantized"):
                if getattr(self, field) and getattr(loss, field):
                    raise ConfigError(f"Sum.{field} is set, and that of its {type(loss).__name__} too; set one of them")
        if sum(isinstance(loss, ClassHead) for loss in self.losses) > 1:
            raise ConfigError("Sum.losses: one loss with a class head at most; give the others sets of their own")
        counts = {type(loss).__name__: count for loss in self.losses if (count := getattr(loss, "classes", 0))}
        if len(set(counts.values())) > 1:
            raise ConfigError(f"Sum.losses read one label, but tell different numbers of classes apart: {counts}")

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.needs))

    @property
    def takes(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.takes))

    @property
    def classes(self) -> int:
        """How many classes a label is one of; 0 where no loss says."""
        return max(getattr(loss, "classes", 0) for loss in self.losses)

    @property
    def several_labels(self) -> bool:
        """Whether rows have lists of labels."""
        return any(getattr(loss, "several_labels", False) for loss in self.losses)


Loss = Single | Sum | MaskedLanguage | DenoisingAutoEncoder
