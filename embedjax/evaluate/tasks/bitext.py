"""Bitext mining: is each text's nearest neighbour in the other language its translation?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.config import BitextMining, Similarity
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.tasks.reading import numbered, opened, texts_in
from embedjax.evaluate.tasks.side import Side, Vectors, comparable


@dataclasses.dataclass(frozen=True)
class BitextData:
    """The different texts of both languages, and the pairs of their numbers."""

    task: BitextMining
    sides: tuple[Side, Side]
    source: Int[np.ndarray, " N"]
    target: Int[np.ndarray, " N"]

    def scores(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """F1 from source to target, a mean over the targets by how often each is wanted, as mteb has it; the share of right
        neighbours to the target, back to the source, and the mean of both."""
        from sklearn.metrics import f1_score

        source, target = (comparable(part, similarity) for part in vectors)
        there = topk(source, target, 1, mesh=mesh)[1][self.source, 0]
        back = topk(target, source, 1, mesh=mesh)[1][self.target, 0]
        forward, backward = np.mean(there == self.target), np.mean(back == self.source)
        return {
            "f1": float(f1_score(self.target, there, average="weighted")),
            "accuracy": float(forward + backward) / 2,
            "accuracy_to_target": float(forward),
            "accuracy_to_source": float(backward),
        }


def read(task: BitextMining) -> BitextData:
    opened_source = opened(task, ("source", "target"))
    (sources, source), (targets, target) = (numbered(texts_in(task, opened_source, name)) for name in ("source", "target"))
    return BitextData(task, (Side(sources, "anchor"), Side(targets, "positive")), source, target)
