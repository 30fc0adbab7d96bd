"""What a ranking or a similarity is worth: pure numpy, after trec_eval's conventions.

A ranking is row numbers of documents, best first, -1 where there is none; judgements give each query's {document: relevance}.
Relevance above 0 is relevant. A query whose judgements hold nothing relevant scores 0 everywhere. Every function of gains
returns one float64 a query.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Gains = Float[np.ndarray, "Q K"]
PerQuery = Float[np.ndarray, " Q"]


def gains_of(ranked: Int[np.ndarray, "Q K"], judgements: Sequence[Mapping[int, float]]) -> Gains:
    """The relevance of each ranked document; 0 where it is not judged, or below 0."""
    rows = zip(ranked.tolist(), judgements, strict=True)
    gains = [[max(0.0, judged.get(document, 0.0)) for document in row] for row, judged in rows]
    return np.array(gains, np.float64).reshape(ranked.shape)


def ideal_gains(judgements: Sequence[Mapping[int, float]]) -> Gains:
    """The relevances of each query's judged documents, highest first, zeros after them."""
    out = np.zeros((len(judgements), max([1, *map(len, judgements)])))
    for row, judged in zip(out, judgements, strict=True):
        row[: len(judged)] = sorted((max(0.0, gain) for gain in judged.values()), reverse=True)
    return out


def ndcg_at(gains: Gains, ideal: Gains, k: int) -> PerQuery:
    """Normalised discounted cumulative gain: gain = relevance, discount log2(rank + 1) (Jarvelin and Kekalainen 2002)."""
    discount = lambda part: part @ (1 / np.log2(np.arange(2, part.shape[1] + 2)))
    return _ratio(discount(gains[:, :k]), discount(ideal[:, :k]))


def mrr_at(gains: Gains, k: int) -> PerQuery:
    """1 / rank of the first relevant document among the first k, else 0."""
    hit = gains[:, :k] > 0
    return np.where(hit.any(1), 1 / (hit.argmax(1) + 1), 0.0)


def map_at(gains: Gains, ideal: Gains, k: int) -> PerQuery:
    """Average precision cut at k: the precisions at the relevant ranks, over the number of all relevant documents."""
    hit = gains[:, :k] > 0
    precision = hit.cumsum(1) / np.arange(1, hit.shape[1] + 1)
    return _ratio((precision * hit).sum(1), (ideal > 0).sum(1))


def success_at(gains: Gains, k: int) -> PerQuery:
    """1 for each query with a relevant document among the first k, else 0: the recall@k of image-text retrieval."""
    return np.where((gains[:, :k] > 0).any(1), 1.0, 0.0)


def recall_at(gains: Gains, ideal: Gains, k: int) -> PerQuery:
    """The share of all relevant documents that is among the first k."""
    return _ratio((gains[:, :k] > 0).sum(1), (ideal > 0).sum(1))


def by_chance(judgements: Sequence[Mapping[int, float]], documents: int) -> dict[str, float]:
    """What success@1, @5 and @10 and mrr@10 are on average where the order of so many documents is random."""
    relevant = np.array([sum(gain > 0 for gain in judged.values()) for judged in judgements], np.float64)
    left, first = np.ones(len(relevant)), []
    for rank in range(min(10, documents)):  # the probability that the first relevant one has this rank
        first.append(left * relevant / (documents - rank))
        left = left - first[-1]
    firsts = np.stack(first) if first else np.zeros((1, len(relevant)))
    found = {f"success@{k}": float(firsts[:k].sum(0).mean()) for k in (1, 5, 10)}
    return found | {"mrr@10": float((firsts / np.arange(1, len(firsts) + 1)[:, None]).sum(0).mean())}


def binary(scores: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"]) -> dict[str, float]:
    """What similarities tell of a yes or no: average precision; the accuracy at the threshold best for it; F1, precision and
    recall at the threshold best for F1. Pairs above a threshold are taken for right; equal scores stay together.

    A threshold lies midway between the score it accepts last and the next one. Both classes must occur.
    """
    order = np.argsort(-scores, kind="stable")
    found, hits = scores[order], right[order].cumsum()
    last = np.append(np.flatnonzero(np.diff(found)), len(found) - 1)  # of each group of equal scores
    taken, hits, total = last + 1, hits[last], hits[-1]
    precision, recall = hits / taken, hits / total
    accuracy = np.append(len(found) - total, len(found) - total + 2 * hits - taken) / len(found)  # the first: none is taken
    f1 = 2 * hits / (taken + total)
    edges = np.append(found[last][:-1] + np.diff(found[last]) / 2, found[-1])
    best, most = int(f1.argmax()), int(accuracy.argmax())
    return {
        "ap": float(np.diff(recall, prepend=0) @ precision),
        "accuracy": float(accuracy[most]),
        "accuracy_threshold": float(np.append(np.nextafter(found[0], np.inf), edges)[most]),
        "f1": float(f1[best]),
        "precision": float(precision[best]),
        "recall": float(recall[best]),
        "f1_threshold": float(edges[best]),
    }


def pearson(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """Pearson's correlation; NaN when either is constant."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (x, y))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def spearman(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs; NaN when either is constant."""
    return pearson(average_ranks(x), average_ranks(y))


def average_ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[which]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)
