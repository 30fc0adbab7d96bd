"""The shapes of a config's batches, from the config alone: no data set is opened and no tokenizer made."""

from typing import Any

import numpy as np

from embedjax.config import Config, ImageTower, Set, Tower
from embedjax.data.batches import Abstract
from embedjax.data.columns import is_text, tower_column
from embedjax.data.order import make_table

TEXTS = ("anchor", "positive", "negative")


def shapes(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """(task, columns) of the global batch for every set and bucket, as `Batches.shapes` gives them with the data at hand.

    `config` is resolved: towers without None.
    """
    return [
        (task.name, _columns(config, task, lengths)) for task in config.data.tasks for lengths in make_table(_buckets(config))
    ]


def _buckets(config: Config) -> tuple[tuple[int, int], ...]:
    if config.data.buckets:
        return config.data.buckets
    used = {tower_column(name) for task in config.data.sets for name in task.names if is_text(name)}
    towers = {name: config.model.towers[config.model.tower_of(name)] for name in used}
    longest = {name: tower.length_of(name) for name, tower in towers.items() if isinstance(tower, Tower)}
    anchor = longest.pop("anchor", 0)
    document = min(longest.values(), default=anchor)
    return ((anchor or document or 1, document or 1),)


def _columns(config: Config, task: Set, lengths: tuple[int, int]) -> dict[str, Any]:
    rows = config.data.batch_size
    columns: dict[str, Any] = {"hash": {}, "row": Abstract((rows,), np.dtype(np.int32))}
    for name in TEXTS:
        count = sum(tower_column(column) == name for column in task.names if is_text(column))
        if not count:
            continue
        tower = config.model.towers[config.model.tower_of(name)]
        front = (rows, count) if name == "negative" else (rows,)
        columns["hash"][name] = Abstract((*front, 2), np.dtype(np.uint32))
        if isinstance(tower, ImageTower):
            assert tower.arch is not None
            columns[name] = {"pixels": Abstract((*front, tower.arch.image, tower.arch.image, 3), np.dtype(np.uint8))}
            continue
        shape = (*front, lengths[0] if name == "anchor" else lengths[1])
        columns[name] = {"ids": Abstract(shape, np.dtype(np.int32)), "mask": Abstract(shape, np.dtype(bool))}
        if tower.late:
            columns[name]["score"] = Abstract(shape, np.dtype(bool))
        elif tower.include_prompt is False and (tower.prompts or {}).get(tower.prompt_for(name, task.prompt) or ""):
            columns[name]["pool"] = Abstract(shape, np.dtype(bool))
        if getattr(task.loss, "words", False):
            columns[name]["word"] = Abstract(shape, np.dtype(np.int32))
    return columns | _numbers(task, rows, config.model.towers[config.model.tower_of("anchor")])


def _numbers(task: Set, rows: int, tower: Tower | ImageTower) -> dict[str, Any]:
    """What the data alone know is taken for what it mostly is: vectors of the tower's own width, lists of labels where the
    loss is for several."""
    found = {}
    if count := sum(name.startswith("score") for name in task.columns):
        found["scores"] = Abstract((rows,) if count == 1 else (rows, count), np.dtype(np.float32))
    if "label" in task.columns:
        several = getattr(task.loss, "several_labels", False)
        found["labels"] = (
            Abstract((rows, len(task.labels)), np.dtype(np.float32)) if several else Abstract((rows,), np.dtype(np.int32))
        )
    if "vector" in task.columns:
        found["vectors"] = Abstract((rows, tower.width), np.dtype(np.float32))
    return found
