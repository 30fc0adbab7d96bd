"""Semantic textual similarity: does the model's similarity rank pairs as people do?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float

from embedjax.config import Similarity, Sts
from embedjax.config.errors import DataError
from embedjax.evaluate import scores
from embedjax.evaluate.rows import number_at
from embedjax.evaluate.tasks.reading import opened, rows_of, texts_in
from embedjax.evaluate.tasks.side import Side, TokenVectors, Vectors, pairwise


@dataclasses.dataclass(frozen=True)
class StsData:
    """N pairs of texts and the similarity people gave each."""

    task: Sts
    sides: tuple[Side, Side]
    wanted: Float[np.ndarray, " N"]

    def scores(
        self, vectors: Sequence[Vectors | TokenVectors], similarity: Similarity, mesh: DeviceMesh | None
    ) -> dict[str, float]:
        """Correlations of the similarities with the scores; 0 for a model whose similarities are all equal."""
        a, b = vectors
        found = pairwise(a, b, similarity)
        values = {"spearman": scores.spearman(found, self.wanted), "pearson": scores.pearson(found, self.wanted)}
        return {key: 0.0 if np.isnan(value) else value for key, value in values.items()}


def read(task: Sts) -> StsData:
    source = opened(task, ("a", "b", "score"))
    sides = Side(texts_in(task, source, "a"), "anchor"), Side(texts_in(task, source, "b"), "positive")
    values = np.array([number_at(source, row, task.columns["score"]) for row in rows_of(task, source)])
    if len(np.unique(values)) < 2:
        raise DataError(f"task {task.name!r}: all {len(values)} scores are {values[0]:g}; a correlation needs different ones")
    return StsData(task, sides, values)
