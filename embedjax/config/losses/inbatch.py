"""In-batch losses: every anchor against all documents of the global batch."""

import dataclasses
import math
from typing import ClassVar, Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses.pooled import Pooled, require_numbers


@dataclasses.dataclass(frozen=True)
class InBatch(Pooled):
    """What every in-batch loss has: each anchor is scored against all positives and hard negatives of the global batch."""

    takes: ClassVar[tuple[str, ...]] = ("negative",)

    scale: float | None = None
    """Factor on the similarity, at most 100: 1 / temperature. None is 20 on cosines and XTR's means of them, 1 on dot products
    and MaxSim's sums."""
    learn_scale: bool = False
    """Train the logarithm of the scale, held in [0, ln 100]; one scale, shared by all sets that learn it."""
    mask_duplicates: bool = True
    """Do not count a text equal to the positive or the anchor, or the positive of an equal anchor, as a negative."""
    guide: str = ""
    """A frozen tower whose own scores mask false negatives: what it finds closer to the anchor than the positive."""
    guide_margin: float = 0.0
    """How far below the guide's score of the positive a negative must stay."""
    guide_margin_kind: Literal["absolute", "relative"] = "absolute"
    """Whether the margin is a cosine or a share of the positive's."""
    form: Literal["auto", "dense", "tiled", "ring"] = "auto"
    """How it is computed, with the same result: all scores at once, in tiles, or in tiles with documents travelling round the
    devices; auto goes by what a device would have to hold."""
    tile: int = 0
    """Candidates in a tile; 0 for a good number."""
    xtr: int = 0
    """With k, late interaction is scored as XTR trains it (Lee et al. 2023, section 3.1, k from 128 to 320): a document's token
    counts for an anchor's only among the k most similar of the whole batch, and the score is the mean over the anchor's tokens
    that have one there. k above the number of tokens means all of them. 0 is MaxSim."""

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.scale is not None and not 0 < self.scale <= 100:
            raise ConfigError(f"{name}.scale is {self.scale}; it must be above 0 and at most 100")
        if self.learn_scale and self.scale is not None and self.scale < 1:
            raise ConfigError(f"{name}.scale is {self.scale}; one that is learned must be at least 1")
        for field in ("tile", "xtr"):
            if (value := getattr(self, field)) < 0:
                raise ConfigError(f"{name}.{field} is {value}; it must be at least 0")
        require_numbers(self, "guide_margin")


@dataclasses.dataclass(frozen=True)
class MultipleNegatives(InBatch):
    """Multiple negatives ranking (InfoNCE): softmax of each anchor over all positives and hard negatives of the global batch,
    and whatever else `directions` name. Some are known by names of their own:

    CLIP: `directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True`;
    GTE: `directions=("q2d", "d2q", "q2q", "d2d")`;
    GISTEmbed: `directions=("q2d", "q2q", "p2p"), scale=100, guide="TOWER"`, and a guide with any others works too.
    """

    directions: tuple[Literal["q2d", "d2q", "q2q", "d2d", "p2p"], ...] = ("q2d",)
    """What is compared: anchors with documents (always), positives with anchors, anchors with other anchors, positives with the
    documents of other rows, or with their positives alone."""
    partition: Literal["joint", "per_direction"] = "joint"
    """One softmax over all directions, or the mean of one for each of q2d and d2q."""
    hardness: Literal["none", "in_batch", "hard", "all"] = "none"
    """Negatives whose score is raised the more, the closer they are: those of other rows, the row's own hard ones, or both."""
    hardness_strength: float = 0.0
    """Factor on the cosine that is added, without gradient: 9 for in-batch negatives (Lan et al. 2025), 5 for hard ones."""

    def __post_init__(self):
        super().__post_init__()
        if "q2d" not in self.directions or len(set(self.directions)) < len(self.directions):
            raise ConfigError(f"MultipleNegatives.directions is {self.directions}; they differ, and q2d is one of them")
        if {"d2d", "p2p"} <= set(self.directions):
            raise ConfigError(f"MultipleNegatives.directions is {self.directions}; d2d holds p2p: name one of them")
        if self.partition == "per_direction" and (other := set(self.directions) - {"q2d", "d2q"}):
            raise ConfigError(
                f'MultipleNegatives.partition is "per_direction", but {sorted(other)} never hold the positive; use "joint"'
            )
        if not 0 <= self.hardness_strength <= 10:
            raise ConfigError(f"MultipleNegatives.hardness_strength is {self.hardness_strength}; it must be in [0, 10]")
        if (self.hardness == "none") != (self.hardness_strength == 0):
            raise ConfigError(
                f"MultipleNegatives.hardness is {self.hardness!r} with hardness_strength {self.hardness_strength}; set both"
            )


@dataclasses.dataclass(frozen=True)
class Siglip(InBatch):
    """Sigmoid loss (Zhai et al. 2023): every pair of the global batch is a yes or a no of its own."""

    scale: float | None = None
    """Factor on the similarity, at most 100; None for 10 on cosines, and 1 on dot products and MaxSim's sums; the `bias`
    of sums is to be about minus that of a pair that does not belong together."""
    learn_scale: bool = True
    """Train the logarithm of the scale, held in [0, ln 100]; one scale, shared by all sets that learn it."""
    bias: float = -10.0
    """Added to every score: at first nearly all pairs are negatives."""
    learn_bias: bool = True
    """Train the bias; one bias, shared by all sets that learn it."""

    def __post_init__(self):
        super().__post_init__()
        if not math.isfinite(self.bias):
            raise ConfigError(f"Siglip.bias is {self.bias}; it must be finite")
