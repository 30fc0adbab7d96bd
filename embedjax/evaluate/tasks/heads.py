"""Classification by a class head that the model brings along."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh

from embedjax.config import HeadAccuracy, Model, Similarity
from embedjax.config.errors import ConfigError, nearest
from embedjax.data.sources import BadRow, Source
from embedjax.evaluate.encode import asked
from embedjax.evaluate.rows import several_labels_at
from embedjax.evaluate.tasks.classification import measured
from embedjax.evaluate.tasks.reading import items_in, opened, rows_of, subject
from embedjax.evaluate.tasks.side import Side, Vectors
from embedjax.models import lora
from embedjax.models.classifier import Head


@dataclasses.dataclass(frozen=True)
class HeadData:
    """N texts or pictures, or pairs of them, the rows they are of, and the labels of each, names or numbers. The head once a
    model is chosen."""

    task: HeadAccuracy
    sides: tuple[Side, ...]
    source: Source
    rows: range
    labels: Sequence[Sequence[str | int]]
    head: Head | None = None

    def of(self, heads: Mapping[str, Head], origin: str, model: Model) -> "HeadData":
        """With the head that the task means, trained or not yet. Raises ConfigError as `head_of` does, BadRow for labels that
        the head does not know."""
        head = head_of(self.task, heads, origin, model)
        known = _numbers(head)
        for row, labels in zip(self.rows, self.labels, strict=True):
            bad = functools.partial(BadRow, *self.source.where(row))
            if odd := [label for label in labels if label not in known]:
                raise bad(f"task {self.task.name!r}: the head knows no label {odd[0]!r}; {nearest(str(odd[0]), head.labels)}")
            if len(labels) != 1 and head.criterion == "softmax":
                raise bad(f"task {self.task.name!r}: the head gives one label a row; this one has {list(labels)}")
        return dataclasses.replace(self, head=head)

    def scores(self, vectors: Sequence[Vectors], similarity: Similarity, mesh: DeviceMesh | None) -> dict[str, float]:
        """Accuracy and macro F1. Of a head for several labels a row, accuracy is the share of all its yes and no that are
        right, and F1 the mean of the labels' F1."""
        assert self.head is not None
        names = _numbers(self.head)
        found = self.head.predict(*vectors)
        if self.head.criterion == "softmax":
            return measured(np.array([names[row[0]] for row in self.labels], np.int32), found)
        wanted = np.zeros(found.shape, np.int32)
        for row, labels in zip(wanted, self.labels, strict=True):
            row[[names[label] for label in labels]] = 1
        return measured(wanted, found)


def _numbers(head: Head) -> dict[str | int, int]:
    """The class of each name and number, as training has them, and of each number as text that is no name."""
    numbers = range(len(head.labels))
    return {str(n): n for n in numbers} | {label: n for n, label in enumerate(head.labels)} | {n: n for n in numbers}


def head_of(task: HeadAccuracy, heads: Mapping[str, Head], origin: str, model: Model) -> Head:
    """The head that a task means. Raises ConfigError for a model without, or with several and none named, for an unknown name,
    for a head of pairs and single texts or the other way round, and for texts under another adapter than the head's."""
    name = task.head
    if not heads:
        raise ConfigError(f"{origin} has no class head; train one with the losses Classify or ClassifyPair")
    if name and name not in heads:
        raise ConfigError(f"{origin} has no class head {name!r}; {nearest(name, heads)}")
    if not name and len(heads) > 1:
        raise ConfigError(f"{origin} has the class heads {sorted(heads)}; say which in the task's `head`, or with --head")
    head = heads[name or next(iter(heads))]
    if head.pair != ("other" in task.columns):
        what = "pairs of texts; the second is the column `other`" if head.pair else "single texts; leave out the column `other`"
        raise ConfigError(f"task {task.name!r}: the class head reads {what}")
    for column in task.sides:
        used = lora.chosen(model.towers[model.tower_of(column)].lora, asked(model, column, task=task.prompt or None)[1])
        if used and head.adapter and used != head.adapter:
            raise ConfigError(
                f"task {task.name!r}: the class head was trained on the adapter {head.adapter!r}, but texts are encoded with "
                f"{used!r}; name the adapter in the task's prompt, or with --prompt"
            )
    return head


def read(task: HeadAccuracy) -> HeadData:
    """Texts get the prompts of the columns they were trained in: that of queries, the second of a pair that of documents."""
    what = subject(task)
    source = opened(task, (what, "label"), optional=() if what == "image" else ("other",))
    roles = {what: "query", "other": "document"}
    sides = tuple(
        Side(items_in(task, source, name), role, name == "image") for name, role in roles.items() if name in task.columns
    )
    rows = rows_of(task, source)
    labels = [several_labels_at(source, row, task.columns["label"]) for row in rows]
    return HeadData(task, sides, source, rows, labels)
