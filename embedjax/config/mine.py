"""Hard negatives that a model finds: which of the nearest documents are taken, and when they are mined anew."""

import dataclasses
import math
from typing import Literal

from embedjax.config.errors import ConfigError
from embedjax.config.sources import File


@dataclasses.dataclass(frozen=True)
class Negatives:
    """Which documents near an anchor become its hard negatives. Ranks and scores are those of the documents that are neither
    its known positives nor the anchor's own text."""

    num_negatives: int = 1
    """Negatives of a pair."""
    range_min: int = 0
    """Nearest documents that are passed over, since many are positives that nobody labelled."""
    range_max: int = 100
    """Rank before which negatives are looked for."""
    min_score: float | None = None
    """Lowest score of a negative."""
    max_score: float | None = None
    """Highest score of a negative."""
    margin: float | None = None
    """How far below the lowest score of the anchor's positives a negative must be; None for anywhere."""
    margin_kind: Literal["absolute", "relative", "percentage"] = "absolute"
    """The margin is a difference of scores; a share of the size of the positive's score, 0.05; or what percentage of that score
    a negative may reach, 95 (de Souza P. Moreira et al. 2024), which is the share of 0.05."""
    sampling: Literal["top", "random"] = "top"
    """Of those that are left, the nearest, or any."""

    def __post_init__(self):
        name = type(self).__name__
        if self.num_negatives < 1:
            raise ConfigError(f"{name}.num_negatives is {self.num_negatives}; it must be at least 1")
        if not 0 <= self.range_min < self.range_max or self.range_max - self.range_min < self.num_negatives:
            raise ConfigError(
                f"{name}: ranks {self.range_min} to {self.range_max} have no room for {self.num_negatives} negatives; set "
                "range_min, range_max and num_negatives"
            )
        for field in ("min_score", "max_score", "margin"):
            if (value := getattr(self, field)) is not None and not math.isfinite(value):
                raise ConfigError(f"{name}.{field} is {value}; it must be finite")
        if self.margin is None and self.margin_kind != "absolute":
            raise ConfigError(f'{name}.margin_kind is "{self.margin_kind}" but no margin is set; set margin too')
        if self.margin is not None and self.margin_kind == "percentage" and not 0 < self.margin <= 100:
            raise ConfigError(f"{name}.margin is {self.margin}; as a percentage it must be above 0 and at most 100")
        if self.margin is not None and self.margin_kind == "relative" and not 0 <= self.margin < 1:
            raise ConfigError(f"{name}.margin is {self.margin}; as a share it must be at least 0 and below 1, such as 0.05")

    def check(self, similarity: str) -> None:
        """Raises ConfigError for a margin that no two scores of this similarity are apart."""
        if similarity == "cosine" and self.margin is not None and self.margin_kind == "absolute" and self.margin > 2:
            raise ConfigError(
                f"{type(self).__name__}.margin is {self.margin}, but no two cosines differ by more than 2; a percentage of the "
                'positive\'s score has margin_kind "percentage"'
            )


@dataclasses.dataclass(frozen=True)
class Mine(Negatives):
    """Hard negatives of a set, mined by the model in training: before the first step, and again every so many."""

    every: int = 1000
    """Steps between minings."""
    corpus: File | None = None
    """Documents to mine from, besides the positives of the set; None for these alone."""
    corpus_columns: tuple[str, ...] = ("text",)
    """Columns of the corpus that make a text, joined by a space, such as title, text."""

    def __post_init__(self):
        super().__post_init__()
        if self.every < 1:
            raise ConfigError(f"Mine.every is {self.every}; it must be at least 1")
        if not self.corpus_columns:
            raise ConfigError("Mine.corpus_columns is empty; name the column of the texts")
