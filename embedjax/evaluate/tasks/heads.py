"""Classification by a class head that the model brings along."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh

from embedjax.config import HeadAccuracy, Similarity
from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.evaluate.rows import label_at
from embedjax.evaluate.tasks.classification import measured
from embedjax.evaluate.tasks.reading import opened, rows_of, texts_in
from embedjax.evaluate.tasks.side import Side, Vectors
from embedjax.load import Model
from embedjax.models.classifier import Head


@dataclasses.dataclass(frozen=True)
class HeadData:
    """N texts, or pairs of them, and the labels of each as text; the head once a model is chosen."""

    task: HeadAccuracy
    sides: tuple[Side, ...]
    labels: Sequence[Sequence[str]]
    head: Head | None = None

    def of(self, model: Model) -> "HeadData":
        """With the model's head. Raises ConfigError for a model without, or with several and none named."""
        heads, name = model.heads, self.task.head
        if not heads:
            raise ConfigError(f"{model.origin} has no class head; train one with the losses Classify or ClassifyPair")
        if name and name not in heads:
            raise ConfigError(f"{model.origin} has no class head {name!r}; {nearest(name, heads)}")
        if not name and len(heads) > 1:
            raise ConfigError(f"{model.origin} has the class heads {sorted(heads)}; say which in the task's `head`")
        return dataclasses.replace(self, head=heads[name or next(iter(heads))])

    def scores(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """Accuracy and macro F1; of a head for several labels a row both are over all its yes and no."""
        assert self.head is not None
        names = {label: number for number, label in enumerate(self.head.labels)}
        if odd := sorted({label for row in self.labels for label in row} - names.keys()):
            raise DataError(f"task {self.task.name!r}: the head knows no label {odd[0]!r}; {nearest(odd[0], names)}")
        found = self.head.predict(*vectors)
        if self.head.criterion == "softmax":
            if several := [row for row in self.labels if len(row) != 1]:
                raise DataError(f"task {self.task.name!r}: the head gives one label a row; a row has {list(several[0])}")
            return measured(np.array([names[row[0]] for row in self.labels], np.int32), found)
        wanted = np.zeros(found.shape, np.int32)
        for row, labels in zip(wanted, self.labels, strict=True):
            row[[names[label] for label in labels]] = 1
        return measured(wanted, found)


def read(task: HeadAccuracy) -> HeadData:
    """Texts get the prompts of the columns they were trained in: that of queries, the second of a pair that of documents."""
    source, roles = opened(task, ("text", "label")), {"text": "query", "other": "document"}
    sides = tuple(Side(texts_in(task, source, name), role) for name, role in roles.items() if name in task.columns)
    column, labels = task.columns["label"], []
    for row in rows_of(task, source):
        value = source[row].get(column)
        labels.append(tuple(map(str, value)) if isinstance(value, list) else (label_at(source, row, column),))
    return HeadData(task, sides, labels)
