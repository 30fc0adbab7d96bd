"""Pairs and triplets: does one similarity, or the larger of two, tell what belongs together?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Bool

from embedjax.config import PairClassification, Similarity, TripletAccuracy
from embedjax.config.errors import DataError
from embedjax.evaluate import scores
from embedjax.evaluate.tasks.reading import labels_in, opened, rows_of, texts_in
from embedjax.evaluate.tasks.side import Side, TokenVectors, Vectors, pairwise


@dataclasses.dataclass(frozen=True)
class PairData:
    """N pairs of texts, and whether each belongs together."""

    task: PairClassification
    sides: tuple[Side, Side]
    right: Bool[np.ndarray, " N"]

    def scores(
        self, vectors: Sequence[Vectors | TokenVectors], similarity: Similarity, mesh: DeviceMesh | None
    ) -> dict[str, float]:
        """Average precision, and accuracy, F1, precision and recall, each at the threshold best for accuracy or F1."""
        a, b = vectors
        return scores.binary(pairwise(a, b, similarity), self.right)


@dataclasses.dataclass(frozen=True)
class TripletData:
    """N anchors, positives and negatives."""

    task: TripletAccuracy
    sides: tuple[Side, Side, Side]

    def scores(
        self, vectors: Sequence[Vectors | TokenVectors], similarity: Similarity, mesh: DeviceMesh | None
    ) -> dict[str, float]:
        """The share of anchors nearer to the positive; equally near counts as wrong."""
        anchor, positive, negative = vectors
        right = pairwise(anchor, positive, similarity) > pairwise(anchor, negative, similarity)
        return {"accuracy": float(right.mean())}


def read_pairs(task: PairClassification) -> PairData:
    source = opened(task, ("a", "b", "label"))
    sides = Side(texts_in(task, source, "a"), "anchor"), Side(texts_in(task, source, "b"), "positive")
    labels = labels_in(task, source, rows_of(task, source))
    right = np.array([label == task.positive for label in labels])
    if len(np.unique(right)) < 2:
        known = ", ".join(sorted(set(labels))[:5])
        raise DataError(f"task {task.name!r}: {right.sum()} of {len(right)} labels are {task.positive!r}; found: {known}")
    return PairData(task, sides, right)


def read_triplets(task: TripletAccuracy) -> TripletData:
    source = opened(task, ("anchor", "positive", "negative"))
    roles = {"anchor": "query", "positive": "document", "negative": "document"}
    anchor, positive, negative = (Side(texts_in(task, source, name), role) for name, role in roles.items())
    return TripletData(task, (anchor, positive, negative))
