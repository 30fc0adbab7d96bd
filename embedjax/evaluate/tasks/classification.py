"""Classification of texts or pictures with a frozen model: a logistic regression, or the nearest training rows."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.config import Classification, KnnClassification, Similarity
from embedjax.config.errors import DataError, nearest
from embedjax.data.sources import BadRow, Source
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.tasks.reading import items_in, labels_in, opened, rows_of, subject
from embedjax.evaluate.tasks.side import Side, Vectors, comparable

Labels = Int[np.ndarray, " N"]
ITERATIONS = 100


@dataclasses.dataclass(frozen=True)
class ProbeData:
    """What is learnt from and what is tested, the labels of both, and the training rows of each draw."""

    task: Classification
    sides: tuple[Side, Side]
    train: Labels
    test: Labels
    draws: Sequence[Int[np.ndarray, " M"]]

    def scores(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """Means over the draws of scikit-learn's logistic regression (L-BFGS, L2 with C = 1)."""
        from sklearn.linear_model import LogisticRegression

        train, test = vectors
        found = []
        for rows in self.draws:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # so few iterations, and rows of a label, are the definition
                probe = LogisticRegression(max_iter=ITERATIONS, random_state=self.task.seed).fit(train[rows], self.train[rows])
            found.append(measured(self.test, probe.predict(test)))
        return {key: float(np.mean([each[key] for each in found])) for key in found[0]}


@dataclasses.dataclass(frozen=True)
class KnnData:
    """What is learnt from, what is tested, and the labels of both."""

    task: KnnClassification
    sides: tuple[Side, Side]
    train: Labels
    test: Labels

    def scores(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """Each test row takes the label that most of its nearest training rows have."""
        train, test = (comparable(part, similarity) for part in vectors)
        voters = self.train[topk(test, train, self.task.k, mesh=mesh)[1]]
        votes = (voters[:, :, None] == np.arange(self.train.max() + 1)).sum(1)
        return measured(self.test, votes.argmax(1))


def measured(wanted: Labels, found: Labels) -> dict[str, float]:
    """Accuracy, and F1 as a mean over the labels."""
    from sklearn.metrics import f1_score

    return {"accuracy": float(np.mean(wanted == found)), "f1": float(f1_score(wanted, found, average="macro"))}


def read_probe(task: Classification) -> ProbeData:
    """Only training rows of a draw are encoded."""
    source, train, test = _read(task)
    draws = drawn(train, task.per_label, task.experiments, task.seed) if task.per_label else [np.arange(len(train))]
    used = np.unique(np.concatenate(draws))
    draws = [np.searchsorted(used, rows) for rows in draws]
    return ProbeData(task, (_side(task, source, used.tolist()), test[0]), train[used], test[1], draws)


def read_knn(task: KnnClassification) -> KnnData:
    source, train, test = _read(task)
    return KnnData(task, (_side(task, source, range(len(source))), test[0]), train, test[1])


def drawn(labels: Labels, per_label: int, experiments: int, seed: int) -> list[Int[np.ndarray, " M"]]:
    """The rows of each experiment: the first so many of each label, shuffled once more each time, as mteb draws them."""
    order, draws = np.arange(len(labels)), []
    for _ in range(experiments):
        np.random.RandomState(seed).shuffle(order)
        shuffled = labels[order]
        first = [order[np.flatnonzero(shuffled == label)[:per_label]] for label in np.unique(labels)]
        draws.append(np.concatenate(first))
    return draws


def _side(task: Classification | KnnClassification, source: Source, rows: Iterable[int] | None = None) -> Side:
    return Side(items_in(task, source, subject(task), rows), "anchor", subject(task) == "image")


def _read(task: Classification | KnnClassification) -> tuple[Source, Labels, tuple[Side, Labels]]:
    """The training source and its labels; what is tested and its labels. Labels are numbers in sorted order."""
    source, test = opened(task, (subject(task), "label"), task.train), opened(task, (subject(task), "label"))
    known = labels_in(task, source, range(len(source)))
    asked = labels_in(task, test, rows_of(task, test))
    names = sorted(set(known), key=lambda name: (len(name) if name.isdecimal() else 0, name))
    if len(names) < 2:
        raise DataError(f"task {task.name!r}: all {len(known)} training rows have the label {names[0]!r}")
    places = {name: place for place, name in enumerate(names)}
    for row, label in zip(rows_of(task, test), asked, strict=True):
        if label not in places:
            told = f"no training row of task {task.name!r} has the label {label!r}; {nearest(label, names)}"
            raise BadRow(*test.where(row), told)
    train, wanted = (np.array([places[name] for name in labels], np.int32) for labels in (known, asked))
    return source, train, (_side(task, test), wanted)
