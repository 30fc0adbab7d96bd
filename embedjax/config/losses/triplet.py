"""Losses of triplets, given or found in the global batch. Their distances are their own, also for towers whose similarity is
"dot"."""

import dataclasses
from typing import ClassVar, Literal

from embedjax.config.losses.pairwise import Distance
from embedjax.config.losses.pooled import Pooled, require_numbers


@dataclasses.dataclass(frozen=True)
class Triplet(Pooled):
    """The anchor is to be closer to the positive than to each hard negative, by a margin (Schroff et al. 2015, eq. 3)."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "positive", "negative")

    distance: Distance = "euclidean"
    """1 - cosine, or the Euclidean or Manhattan distance."""
    margin: float = 5.0
    """How much closer. Vectors of length 1 are at most 2 apart: with sentence-transformers' 5 their hinge never closes."""

    def __post_init__(self):
        super().__post_init__()
        require_numbers(self, "margin")


@dataclasses.dataclass(frozen=True)
class Mined(Pooled):
    """What losses have that find triplets among the labelled texts of the global batch (Hermans et al. 2017)."""

    needs: ClassVar[tuple[str, ...]] = ("anchor", "label")

    distance: Literal["cosine", "euclidean"] = "euclidean"
    """1 - cosine, or the Euclidean distance."""


@dataclasses.dataclass(frozen=True)
class WithMargin(Mined):
    """And those of them that have a margin."""

    margin: float = 5.0
    """How much closer texts of one label are to be than others. Vectors of length 1 are at most 2 apart: with
    sentence-transformers' 5 their hinge never closes."""

    def __post_init__(self):
        super().__post_init__()
        require_numbers(self, "margin")


@dataclasses.dataclass(frozen=True)
class BatchAll(WithMargin):
    """Every triplet of the batch; the mean over those that cost something."""


@dataclasses.dataclass(frozen=True)
class BatchHard(WithMargin):
    """For each text the furthest of its label and the closest of another."""


@dataclasses.dataclass(frozen=True)
class BatchHardSoftMargin(Mined):
    """As BatchHard, with softplus for the margin: texts of one label are drawn together without end."""


@dataclasses.dataclass(frozen=True)
class BatchSemiHard(WithMargin):
    """For each two texts of one label the closest of another that is further away, or the furthest if none is (Schroff et al.
    2015, section 3.2)."""


@dataclasses.dataclass(frozen=True)
class MegaBatchMargin(Pooled):
    """The cosine of each anchor and positive above one margin, that of the anchor and the closest positive of another row
    below another (Wieting & Gimpel 2018, section 3.2)."""

    positive_margin: float = 0.8
    """Cosine above which a positive costs nothing."""
    negative_margin: float = 0.3
    """Cosine below which a negative costs nothing."""

    def __post_init__(self):
        super().__post_init__()
        require_numbers(self, "positive_margin", "negative_margin")


Triplets = Triplet | BatchAll | BatchHard | BatchHardSoftMargin | BatchSemiHard | MegaBatchMargin
