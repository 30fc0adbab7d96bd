"""Clustering: do k-means clusters of the vectors agree with the labels?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.config import Clustering, Similarity
from embedjax.config.errors import DataError
from embedjax.evaluate.tasks.reading import items_in, labels_in, numbered, opened, rows_of, subject
from embedjax.evaluate.tasks.side import Side, Vectors

# Rows of a step of k-means.
BATCH = 512


@dataclasses.dataclass(frozen=True)
class ClusteringData:
    """Texts or pictures and the number of each one's label."""

    task: Clustering
    sides: tuple[Side]
    labels: Int[np.ndarray, " N"]

    def scores(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """The mean V-measure (Rosenberg and Hirschberg 2007) of scikit-learn's mini-batch k-means over its starts."""
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.metrics import v_measure_score

        count, found = int(self.labels.max()) + 1, []
        for seed in range(self.task.seed, self.task.seed + self.task.experiments):
            means = MiniBatchKMeans(n_clusters=count, batch_size=BATCH, n_init="auto", random_state=seed)
            found.append(v_measure_score(self.labels, means.fit_predict(vectors[0])))
        return {"v_measure": float(np.mean(found))}


def read(task: Clustering) -> ClusteringData:
    source = opened(task, (subject(task), "label"))
    names, labels = numbered(labels_in(task, source, rows_of(task, source)))
    if len(names) < 2:
        raise DataError(f"task {task.name!r}: all {len(labels)} rows have the label {names[0]!r}; clusters need two or more")
    side = Side(items_in(task, source, subject(task)), "anchor", subject(task) == "image")
    return ClusteringData(task, (side,), labels)
