"""Which loss a data set is trained with: a union of dataclasses, one a loss."""

import dataclasses
from typing import Literal

from embedjax.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class InBatch:
    """What every in-batch loss has: each anchor is scored against all positives and hard negatives of the global batch."""

    scale: float = 20.0
    """Factor on the cosine similarity, at most 100: 1 / temperature."""
    learn_scale: bool = False
    """Train the logarithm of the scale, held in [0, ln 100]."""
    mask_duplicates: bool = True
    """Do not count a text equal to the positive or the anchor, or the positive of an equal anchor, as a negative."""
    guide: str = ""
    """A frozen tower whose own scores mask false negatives: what it finds closer to the anchor than the positive."""
    guide_margin: float = 0.0
    """How far below the guide's score of the positive a negative must stay."""
    guide_margin_kind: Literal["absolute", "relative"] = "absolute"
    """Whether the margin is a cosine or a share of the positive's."""
    matryoshka: tuple[int, ...] = ()
    """Prefix lengths of the embedding that are trained at once, losses summed; empty for the whole embedding alone."""
    matryoshka_weights: tuple[float, ...] = ()
    """Weight of each prefix; empty for 1."""
    form: Literal["auto", "dense", "tiled", "ring"] = "auto"
    """How it is computed, with the same result: all scores at once, in tiles, or in tiles with documents travelling round the
    devices; auto goes by what a device would have to hold."""
    tile: int = 0
    """Candidates in a tile; 0 for a good number."""

    def __post_init__(self):
        name = type(self).__name__
        if not 0 < self.scale <= 100:
            raise ConfigError(f"{name}.scale is {self.scale}; it must be above 0 and at most 100")
        if self.tile < 0:
            raise ConfigError(f"{name}.tile is {self.tile}; it must be at least 0")
        if self.guide_margin < 0:
            raise ConfigError(f"{name}.guide_margin is {self.guide_margin}; it must be at least 0")
        if any(d < 1 for d in self.matryoshka) or len(set(self.matryoshka)) < len(self.matryoshka):
            raise ConfigError(f"{name}.matryoshka is {self.matryoshka}; prefix lengths are at least 1 and differ")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka):
            raise ConfigError(
                f"{name}.matryoshka_weights has {len(self.matryoshka_weights)} numbers for {len(self.matryoshka)} prefixes"
            )


@dataclasses.dataclass(frozen=True)
class MultipleNegatives(InBatch):
    """Multiple negatives ranking (InfoNCE): softmax of each anchor over all positives and hard negatives of the global batch.
    CLIP's loss is `criterion="symmetric", scale=1 / 0.07, learn_scale=True`."""

    criterion: Literal["softmax", "symmetric", "joint"] = "softmax"
    """Anchors choose among documents; the mean of that and of documents choosing among anchors; or one softmax over both and
    over anchors among anchors and documents among documents (GTE)."""
    hardness: Literal["none", "in_batch", "hard", "all"] = "none"
    """Negatives whose score is raised the more, the closer they are: those of other rows, the row's own hard ones, or both."""
    hardness_strength: float = 0.0
    """Factor on the cosine that is added, without gradient: 9 for in-batch negatives (Lan et al. 2025), 5 for hard ones."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.hardness_strength <= 10:
            raise ConfigError(f"MultipleNegatives.hardness_strength is {self.hardness_strength}; it must be in [0, 10]")
        if (self.hardness == "none") != (self.hardness_strength == 0):
            raise ConfigError(
                f"MultipleNegatives.hardness is {self.hardness!r} with hardness_strength {self.hardness_strength}; set both"
            )


@dataclasses.dataclass(frozen=True)
class Siglip(InBatch):
    """Sigmoid loss (Zhai et al. 2023): every pair of the global batch is a yes or a no of its own."""

    scale: float = 10.0
    """Factor on the cosine similarity, at most 100."""
    learn_scale: bool = True
    """Train the logarithm of the scale, held in [0, ln 100]."""
    bias: float = -10.0
    """Added to every score: at first nearly all pairs are negatives."""
    learn_bias: bool = True
    """Train the bias."""


Loss = MultipleNegatives | Siglip
