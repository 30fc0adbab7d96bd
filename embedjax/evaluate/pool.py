"""Token pooling: the vectors of a document's tokens -> fewer vectors that stand for groups of like ones (Clavie et al. 2024,
"Reducing the Footprint of Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling"). Numpy arrays only.

The groups of a document are those of hierarchical clustering with Ward's update on the cosine distances, one for `factor`
tokens: the groups of PyLate and sentence-transformers, so that an index of theirs and vectors from here are pooled alike. (On
vectors of length 1 the cosine distance is half the squared distance, so the criterion is not quite Ward's, which wants
distances.) A group's vector is the mean of its vectors at length 1 again, as in sentence-transformers, since MaxSim compares
cosines; PyLate leaves the mean as it is, which favours tokens that were left alone.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster import hierarchy

from embedjax.config.errors import ConfigError


def pooled(vectors: Float[np.ndarray, "L E"], factor: int, protected: int = 1) -> Float[np.ndarray, "G E"]:
    """The first `protected` vectors, such as that of [CLS], and one vector for each group of the others."""
    return means(vectors, groups(vectors, factor, protected)) if factor > 1 else vectors


def groups(vectors: Float[np.ndarray, "L E"], factor: int, protected: int = 1) -> Int[np.ndarray, " L"]:
    """The number of each vector's group. Protected ones are groups of their own, the first ones; the others make one group for
    `factor` of them, rounded down but not to 0, and fewer where distances tie."""
    count = len(vectors) - protected
    wanted = max(count // factor, 1)
    if wanted >= count:
        return np.arange(len(vectors))
    some = vectors[protected:]
    distances = np.clip(1 - some @ some.T, 0, 2)
    tree = hierarchy.linkage(distances[np.triu_indices(count, 1)], method="ward")
    labels = hierarchy.fcluster(tree, wanted, criterion="maxclust")
    return np.concatenate([np.arange(protected), protected + np.unique(labels, return_inverse=True)[1]])


def means(vectors: Float[np.ndarray, "L E"], group: Int[np.ndarray, " L"]) -> Float[np.ndarray, "G E"]:
    """The mean of each group at length 1; vectors that are alone stay as they are."""
    sizes = np.bincount(group)
    sums = np.zeros((len(sizes), vectors.shape[1]), np.float32)
    np.add.at(sums, group, vectors)
    several = sizes > 1
    sums[several] /= np.maximum(np.linalg.norm(sums[several], axis=1, keepdims=True), 1e-12)
    return sums


def check_factor(factor: int, protected: int = 1) -> None:
    """Raises ConfigError for a factor below 1, or a negative number of protected tokens."""
    if factor < 1 or protected < 0:
        raise ConfigError(f"pool is {factor} and protected {protected}; they must be at least 1 and 0")
