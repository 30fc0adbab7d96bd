"""Distillation: vectors or scores of a teacher, stored in the set's columns or computed in the step by a frozen tower."""

import dataclasses
from typing import ClassVar, Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses.pooled import Pooled


@dataclasses.dataclass(frozen=True)
class Taught(Pooled):
    """What all distillation has. The teacher's scores are the cosines of its vectors, or products where its tower has
    similarity "dot"."""

    teacher: str = ""
    """A frozen tower that teaches in the same step, with the tokenizer of the student; empty for the set's own columns."""


@dataclasses.dataclass(frozen=True)
class VectorDistillation(Taught):
    """The student's vectors are to be the teacher's (Reimers & Gurevych 2020, eq. 1): one stored `vector` for all texts of a
    row, or by a tower one for each. Only anchor is needed."""

    takes: ClassVar[tuple[str, ...]] = ("positive", "negative")

    distance: Literal["mse", "l2", "cosine"] = "mse"
    """Mean squared difference, Euclidean distance, or 1 - cosine."""

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("anchor",) if self.teacher else ("anchor", "vector")


@dataclasses.dataclass(frozen=True)
class MarginMse(Taught):
    """Margin-MSE (Hofstätter et al. 2020, eq. 6): the student's score of the positive less that of each negative is to be the
    teacher's: `score` holds that difference (score_2 for negative_2, ...), or with one more column the scores themselves."""

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("anchor", "positive", "negative", *(() if self.teacher else ("score",)))


@dataclasses.dataclass(frozen=True)
class KlDistillation(Taught):
    """The student's softmax over positive and hard negatives is to be the teacher's (Lin et al. 2020, eq. 5): columns score,
    score_2, ... for positive, negative, ..."""

    temperature: float = 1.0
    """What the student's scores are divided by."""
    teacher_temperature: float = 1.0
    """What the teacher's scores are divided by."""

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("anchor", "positive", "negative", *(() if self.teacher else ("score",)))

    def __post_init__(self):
        super().__post_init__()
        for name in ("temperature", "teacher_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"KlDistillation.{name} is {getattr(self, name)}; it must be above 0")


Distillation = VectorDistillation | MarginMse | KlDistillation
