"""Losses of labelled texts: a class head over one text or a pair, and supervised contrastive."""

import dataclasses
import math
from typing import ClassVar, Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses.pooled import Pooled


@dataclasses.dataclass(frozen=True)
class ClassHead(Pooled):
    """What losses with a class head have: a linear layer from the embedding to one score a class, trained with the tower, or
    alone when `optim.freeze` holds "^towers/". It is exported with the model. Of a prefix, the first rows of the layer count
    (Kusupati et al. 2022, "MRL-E")."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "label")

    classes: int = 0
    """How many classes; 0 for as many as the set's `labels` names."""
    criterion: Literal["softmax", "sigmoid"] = "softmax"
    """One class a row by cross-entropy, or each class a yes or no of its own (several labels a row)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class; empty for 1."""

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.classes < 0 or self.classes == 1 and self.criterion == "softmax":
            raise ConfigError(f"{name}.classes is {self.classes}; it must be at least 2, or 0 to count the set's labels")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"{name}.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.class_weights and self.classes and len(self.class_weights) != self.classes:
            raise ConfigError(f"{name}.class_weights has {len(self.class_weights)} numbers for {self.classes} classes")
        if not all(0 < weight < math.inf for weight in self.class_weights):
            raise ConfigError(f"{name}.class_weights is {self.class_weights}; weights are above 0 and finite")

    @property
    def several_labels(self) -> bool:
        """Whether rows have lists of labels."""
        return self.criterion == "sigmoid"


@dataclasses.dataclass(frozen=True)
class Classify(ClassHead):
    """The class of a text, from its embedding. Columns: anchor and label."""


@dataclasses.dataclass(frozen=True)
class ClassifyPair(ClassHead):
    """The class of a pair of texts, from (u, v, |u - v|): SBERT's objective for inference data (Reimers & Gurevych 2019,
    section 3). Columns: anchor, positive (the other text) and label."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "positive", "label")


@dataclasses.dataclass(frozen=True)
class SupCon(Pooled):
    """Supervised contrastive (Khosla et al. 2020, eq. 2): texts of one label are each other's positives, all others of the
    batch negatives. Columns: anchor and label; with `positive`, a second text of the row, both count."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "label")
    takes: ClassVar[tuple[str, ...]] = ("positive",)

    scale: float = 10.0
    """Factor on the cosine similarity, at most 100: 1 / temperature."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.scale <= 100:
            raise ConfigError(f"SupCon.scale is {self.scale}; it must be above 0 and at most 100")
