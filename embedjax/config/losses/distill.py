"""Distillation: vectors or scores of a teacher, stored in the set's columns or computed in the step by a frozen tower."""

import dataclasses
import math
from typing import Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses.pooled import Pooled
from embedjax.config.model import Similarity


@dataclasses.dataclass(frozen=True)
class Taught(Pooled):
    """What all distillation has."""

    teacher: str = ""
    """A frozen tower that teaches in the same step, with the tokenizer of the student; empty for the set's own columns."""


@dataclasses.dataclass(frozen=True)
class VectorDistillation(Taught):
    """The student's vectors are to be the teacher's (Reimers & Gurevych 2020, eq. 1): by a tower those of each text, or one
    stored `vector` for anchor and positive alike, such as a sentence and its translation. Only anchor is needed."""

    distance: Literal["mse", "l2", "cosine"] = "mse"
    """Mean squared difference, Euclidean distance, or 1 - cosine."""

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("anchor",) if self.teacher else ("anchor", "vector")

    @property
    def takes(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("positive", "negative") if self.teacher else ("positive",)


@dataclasses.dataclass(frozen=True)
class TaughtScores(Taught):
    """What is taught by scores of a row's own candidates. Those of a teacher tower are the cosines of its vectors, or products
    where its similarity is "dot"."""

    similarity: Similarity | None = None
    """How the student's vectors are scored, by cosine or product; None as its towers say. sentence-transformers' default is
    "dot", for vectors of length 1 the same."""

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("anchor", "positive", "negative", *(() if self.teacher else ("score",)))


@dataclasses.dataclass(frozen=True)
class MarginMse(TaughtScores):
    """Margin-MSE (Hofstätter et al. 2020, eq. 6): the student's score of the positive less that of each negative is to be the
    teacher's: `score` holds that difference (score_2 for negative_2, ...), or with one more column the scores themselves."""


@dataclasses.dataclass(frozen=True)
class KlDistillation(TaughtScores):
    """The student's softmax over positive and hard negatives is to be the teacher's (Lin et al. 2020, eq. 5): columns score,
    score_2, ... for positive, negative, ..."""

    temperature: float = 1.0
    """What the student's scores are divided by."""
    teacher_temperature: float = 1.0
    """What the teacher's scores are divided by."""
    min_max: bool = False
    """Scale each row's scores of the student to 0, its lowest, up to 1, before the temperature: PyLate's default."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("temperature", "teacher_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"KlDistillation.{name} is {getattr(self, name)}; it must be above 0 and finite")


Distillation = VectorDistillation | MarginMse | KlDistillation
