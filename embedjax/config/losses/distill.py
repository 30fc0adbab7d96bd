"""Distillation: vectors or scores of a teacher, stored in the set's columns or computed in the step by a frozen tower."""

import dataclasses
import math
from typing import ClassVar, Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses.pooled import Pooled
from embedjax.config.model import Similarity


@dataclasses.dataclass(frozen=True)
class Taught(Pooled):
    """What all distillation has."""

    teacher: str = ""
    """A frozen tower that teaches in the same step, with the tokenizer of the student; empty for the set's own columns."""
    document_teacher: str = ""
    """The frozen tower of positives and negatives where it is another, as the tower of pictures of a CLIP that teaches; it sees
    the pictures that the student's tower sees, and their colours unvaried. Empty for the same."""

    def __post_init__(self):
        super().__post_init__()
        if self.document_teacher and not self.teacher:
            name = type(self).__name__
            raise ConfigError(f"{name}.document_teacher is {self.document_teacher!r}, but no teacher is named; name both")


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


@dataclasses.dataclass(frozen=True)
class ContrastiveDistillation(Taught):
    """What the student finds alike is to be what the teacher finds alike: its softmax of each anchor over all documents of the
    global batch, and of each positive over all anchors (contrastive relational distillation of CLIP-KD, Yang et al. 2024;
    TinyCLIP's affinity mimicking, Wu et al. 2023, differs by a constant). By a tower or two, not from columns; mostly in a
    `Sum` with an in-batch loss. All scores of the batch are held at once."""

    takes: ClassVar[tuple[str, ...]] = ("negative",)

    scale: float = 100.0
    """Factor on the student's similarities, at most 100."""
    learn_scale: bool = False
    """Train the logarithm of the student's scale, held in [0, ln 100]; one scale, shared by all losses that learn it."""
    teacher_scale: float = 100.0
    """Factor on the teacher's similarities: what its own training ended with; OpenAI's CLIPs with 100."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("scale", "teacher_scale"):
            if not 0 < (value := getattr(self, name)) <= 100:
                raise ConfigError(f"ContrastiveDistillation.{name} is {value}; it must be above 0 and at most 100")
        if self.learn_scale and self.scale < 1:
            raise ConfigError(f"ContrastiveDistillation.scale is {self.scale}; one that is learned must be at least 1")


Distillation = VectorDistillation | MarginMse | KlDistillation | ContrastiveDistillation
