"""Losses of labelled pairs: how alike anchor and positive are told to be."""

import dataclasses
import math
from typing import ClassVar, Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses.pooled import Pooled, require_numbers

Distance = Literal["cosine", "euclidean", "manhattan"]


@dataclasses.dataclass(frozen=True)
class Contrastive(Pooled):
    """Contrastive (Hadsell et al. 2006): pairs of label 1 are drawn together, those of label 0 pushed apart to a margin.

    Its distance is its own, cosine unless said otherwise, also for towers whose similarity is "dot".
    """

    needs: ClassVar[tuple[str, ...]] = ("anchor", "positive", "label")
    classes: ClassVar[int] = 2  # other labels make bad rows

    distance: Distance = "cosine"
    """1 - cosine, or the Euclidean or Manhattan distance."""
    margin: float = 0.5
    """Distance beyond which a pair of label 0 costs nothing."""

    def __post_init__(self):
        super().__post_init__()
        require_numbers(self, "margin")


@dataclasses.dataclass(frozen=True)
class OnlineContrastive(Contrastive):
    """Contrastive over the hard pairs of the global batch alone: those of label 1 that are further apart than the closest of
    label 0, and those of label 0 that are closer than the furthest of label 1. A sum, not a mean."""


@dataclasses.dataclass(frozen=True)
class CosineRegression(Pooled):
    """Mean squared error of the similarity against the score (Reimers & Gurevych 2019, section 3)."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "positive", "score")


@dataclasses.dataclass(frozen=True)
class CoSent(Pooled):
    """CoSENT (Huang et al. 2024): of any two pairs of the global batch, that with the higher score is to be more similar."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "positive", "score")

    scale: float = 20.0
    """Factor on the similarity: 1 / temperature."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"{type(self).__name__}.scale is {self.scale}; it must be above 0 and finite")


@dataclasses.dataclass(frozen=True)
class AnglE(CoSent):
    """AnglE (Li & Li 2024): CoSENT over the angle in complex space, whose gradient does not vanish where the cosine's does.
    Angles are of vectors of length 1, also for towers whose similarity is "dot"."""


Pairwise = Contrastive | OnlineContrastive | CosineRegression | CoSent | AnglE
