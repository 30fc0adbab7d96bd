"""The first stage of a retrieval task that does not depend on the model that is scored: BM25, or a model of its own."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.config import Retrieval
from embedjax.config.errors import ConfigError
from embedjax.evaluate.bm25 import bm25_rank
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.stages import by_ranking
from embedjax.evaluate.tasks.side import Side, comparable
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import Model, load


@dataclasses.dataclass
class First:
    """Candidates, found when they are first asked for and kept for the run's other evaluations."""

    task: Retrieval
    model: Model | None
    found: Sequence[Int[np.ndarray, " n"]] | None = None

    def candidates(self, queries: Side, documents: Side, k: int, mesh: DeviceMesh | None) -> Sequence[Int[np.ndarray, " n"]]:
        """The k best documents of each query."""
        if self.found is None:
            self.found = by_ranking(self._ranked(queries, documents, k, mesh))
            self.model = None  # its weights are needed no more
        return self.found

    def some(self, queries: Int[np.ndarray, " q"]) -> "First":
        """The same of a few queries."""
        return dataclasses.replace(self, found=None if self.found is None else [self.found[query] for query in queries])

    def _ranked(self, queries: Side, documents: Side, k: int, mesh: DeviceMesh | None) -> Int[np.ndarray, "Q n"]:
        if self.model is None:
            return bm25_rank(queries.texts, documents.texts, k)
        asked, found = queries.vectors(self.model, mesh), documents.vectors(self.model, mesh)
        assert not isinstance(asked, TokenVectors) and not isinstance(found, TokenVectors)
        similarity = self.model.config.similarity
        return topk(comparable(asked, similarity), comparable(found, similarity), k, mesh=mesh)[1]


def first_of(task: Retrieval) -> First | None:
    """What a task's `first` names, its model loaded; None without one, or for the tokens of the model that is scored. Raises
    ConfigError for a model of late interaction."""
    if task.first in ("", "tokens"):
        return None
    return First(task, None if task.first == "bm25" else single(load(task.first)))


def single(model: Model) -> Model:
    """The same model. Raises ConfigError if it is no first stage: one of late interaction."""
    if model.config.late:
        raise ConfigError(f"the first stage {model.origin} has a vector a token; it must have one a text")
    return model
