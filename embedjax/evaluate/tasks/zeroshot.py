"""Zero-shot classification: which class's texts is a picture, or a text, nearest to?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.config import Similarity, ZeroShot
from embedjax.config.errors import DataError, nearest
from embedjax.data.sources import BadRow, Source, class_names
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.tasks.reading import items_in, labels_in, opened, rows_of, subject
from embedjax.evaluate.tasks.side import Side, Vectors, comparable

# How many classes may be guessed at most; where there are no more than these it would always be right.
MOST = 5


@dataclasses.dataclass(frozen=True)
class ZeroShotData:
    """The texts of C classes, T of each (its name in every template), N pictures or texts, and the class of each."""

    task: ZeroShot
    sides: tuple[Side, Side]
    names: Sequence[str]
    labels: Int[np.ndarray, " N"]

    def classify(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> Int[np.ndarray, "N k"]:
        """The numbers of the min(5, C) classes nearest to each picture, nearest first."""
        texts, pictures = (comparable(part, similarity) for part in vectors)
        classes = comparable(texts.reshape(len(self.names), -1, texts.shape[1]).mean(1), similarity)
        return topk(pictures, classes, MOST, mesh=mesh)[1]

    def scores(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """Share of the pictures whose class is the nearest (top1), or among the nearest five (top5, of more classes than five),
        and the mean over the classes that occur of their own top1 (mean_per_class)."""
        hits = self.classify(vectors, similarity, mesh) == self.labels[:, None]
        first, count = hits[:, 0], np.bincount(self.labels)
        right = np.bincount(self.labels, weights=first)
        found = {"top1": float(first.mean()), "mean_per_class": float((right[count > 0] / count[count > 0]).mean())}
        return found | ({"top5": float(hits.any(1).mean())} if len(self.names) > MOST else {})


def read(task: ZeroShot) -> ZeroShotData:
    """Labels are those of `classes`, or its names. Raises DataError for a label that is neither."""
    source = opened(task, (subject(task), "label"))
    said = labels_in(task, source, rows_of(task, source))
    classes = task.classes or _classes(source, task.columns["label"], said)
    names = list(dict.fromkeys(classes.values()))
    places = {name: place for place, name in enumerate(names)} | {key: names.index(name) for key, name in classes.items()}
    for row, label in enumerate(said):
        if label not in places:
            told = f"column {task.columns['label']!r} is {label!r}, none of the {len(names)} classes"
            raise BadRow(*source.where(row), f"{told}; {nearest(label, places)}")
    texts = [template.replace("{}", name) for name in names for template in task.templates]
    items = Side(items_in(task, source, subject(task)), "document", subject(task) == "image")
    return ZeroShotData(task, (Side(texts, "query"), items), names, np.array([places[label] for label in said], np.int32))


def _classes(source: Source, column: str, said: Sequence[str]) -> dict[str, str]:
    """The names that the data set has for its numbers, else the labels that occur, sorted. Raises DataError for numbers without
    names, and for one class alone."""
    if names := class_names(source, column):
        return {str(number): name.replace("_", " ") for number, name in enumerate(names)}
    found = {label: label.replace("_", " ") for label in sorted(set(said))}
    if all(label.isdecimal() for label in found):
        raise DataError(f"{source.name}: column {column!r} holds numbers, and nothing says what they mean: name the classes")
    if len(found) < 2:
        raise DataError(f"{source.name}: all {len(said)} rows have the label {said[0]!r}; classes must be two or more")
    return found
