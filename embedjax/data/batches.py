"""Rows -> numpy batches of this host, by step, prefetched. The one file that imports grain; it places nothing on devices."""

import dataclasses
import functools
import pathlib
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from embedjax.config import Data
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.bad import BadRecords, stand_ins
from embedjax.data.columns import Layout, Picture, Values, hash_texts, make_layout, read_rows, tower_column
from embedjax.data.image import Images, hash_pictures
from embedjax.data.lengths import length_index
from embedjax.data.mined import Mined
from embedjax.data.mixture import make_order
from embedjax.data.order import Draw, Rows, Table, make_table
from embedjax.data.sources import Source
from embedjax.data.text import Texts

Batch = tuple[str, dict[str, Any]]
"""(task, columns): the name of the set the rows were drawn from, and a tree of arrays `[B, ...]`."""


@dataclasses.dataclass(frozen=True)
class Abstract:
    """Shape and dtype of an array that is not there; a leaf to jax, which takes it wherever it wants a shape."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Batches:
    """The batches of a run. Row order, task and bucket are pure functions of (seed, step, length index), so a data position
    is one integer, and n processes hold n slices of the same global batch.

    `sources` are the opened sources of `data.sets` in their order, and so are `prompts`, each the names of a set's prompts, or
    None for the tower's default. These, `texts` and `images` are keyed by the columns anchor, positive and negative (which
    serves negative_2, ... too).
    `mined` holds the sets whose hard negatives are mined in the run, by name.
    `run_folder` keeps `lengths/` (only with several buckets) and `bad_records.jsonl`; None keeps neither.
    Raises ConfigError for columns or buckets that do not fit, DataError for missing columns or too little data.
    """

    def __init__(
        self,
        data: Data,
        sources: Sequence[Source],
        texts: Mapping[str, Texts],
        prompts: Sequence[Mapping[str, str | None]] | None = None,
        *,
        seed: int,
        steps: int,
        images: Mapping[str, Images] | None = None,
        mined: Mapping[str, Mined] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        run_folder: str | pathlib.Path | None = None,
    ):
        if data.batch_size % process_count:
            raise ConfigError(f"data.batch_size {data.batch_size} is not divisible by the {process_count} processes")
        if not data.sets:
            raise ConfigError("data.sets is empty; training needs at least one set")
        counts = {which.name: len(source) for which, source in zip(data.sets, sources, strict=True)}
        for (name, count), source in zip(counts.items(), sources, strict=True):
            if count < data.batch_size and data.draw == "batches":
                raise DataError(f"set {name!r}: {source.name} has {count} rows, fewer than data.batch_size {data.batch_size}")
        if sum(counts.values()) < data.batch_size:
            raise DataError(f"the sets have {sum(counts.values())} rows, fewer than data.batch_size {data.batch_size}")
        self.data, self.sources, self.texts, self.steps = data, sources, texts, steps
        self.prompts = prompts or [{}] * len(sources)
        self.mined, self.images, self.seed = mined or {}, images or {}, seed
        least = {column: one.least for column, one in self.images.items()}
        self.layouts = [make_layout(which, source, least) for which, source in zip(data.sets, sources, strict=True)]
        if data.draw == "rows":
            _refuse_other_arrays(data, self.layouts)
        self.table = _table(data, self.layouts, texts)
        folder = pathlib.Path(run_folder) if run_folder is not None else None
        listing = "bad_records.jsonl" if process_index == 0 else f"bad_records-{process_index}.jsonl"
        self.bad = BadRecords(folder / listing if folder else None, share=data.bad_share, counts=counts)
        rows = [Rows(name, count) for name, count in counts.items()]
        if len(self.table) > 1:
            rows = self._measured(rows, folder / "lengths" if folder else None, write=process_index == 0)
        self.order = make_order(data, rows, seed=seed, table=self.table)
        share = data.batch_size // process_count
        self._mine = slice(process_index * share, (process_index + 1) * share)
        self._lock = threading.Lock()
        self._drawn: set[tuple[int, int]] = set()
        self._tokens = self._cells = 0

    def _measured(self, rows: list[Rows], folder: pathlib.Path | None, *, write: bool) -> list[Rows]:
        made = functools.partial(length_index, texts=self.texts, bad=self.bad, folder=folder, write=write)
        result = []
        for each, source, layout, prompts in zip(rows, self.sources, self.layouts, self.prompts, strict=True):
            lengths = made(each.name, source, layout, prompts=prompts)
            if layout.mined:
                lengths[:, 1] = self.table[-1][1]  # negatives not known yet may be of any length
            result.append(dataclasses.replace(each, lengths=lengths))
        return result

    def batch(self, step: int) -> Batch:
        """This process' rows of the batch of a step. Raises DataError when bad rows are too many. Thread-safe."""
        draw = self.order.at(step)
        columns = self._assemble(draw.set, draw.bucket, self._values(step, draw, self._mine), step)
        columns["row"] = np.arange(self._mine.start, self._mine.stop, dtype=np.int32)
        masks = [column["mask"] for column in columns.values() if isinstance(column, dict) and "mask" in column]
        with self._lock:
            self._drawn.add((draw.set, draw.bucket))
            self._tokens += sum(int(mask.sum()) for mask in masks)
            self._cells += sum(mask.size for mask in masks)
        return self.data.sets[draw.set].name, columns

    def blank(self, step: int) -> Batch:
        """A batch of zeros in the shape of a step's: stands in where this process cannot read its rows, but others do."""
        draw = self.order.at(step)
        task, columns = self.shapes()[draw.set * len(self.table) + draw.bucket]
        return task, _zeros(columns, self._mine.stop - self._mine.start)

    def iterate(self, start: int = 0) -> Generator[Batch, None, None]:
        """The batches from step `start` to the last, made ahead by threads from now on; beyond a step at which negatives are
        mined, only once it is asked for. Errors come out at their step."""
        starts = sorted({start, *(step for one in self.mined.values() for step in one.minings(start, self.steps))})
        parts = list(zip(starts, [*starts[1:], self.steps], strict=True))
        return self._drain(self._ahead(*parts[0]), parts[1:])

    def _ahead(self, start: int, stop: int) -> grain.DatasetIterator:
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(num_threads=self.data.threads, prefetch_buffer_size=self.data.prefetch)
        batches = iter(steps.to_iter_dataset(options))
        batches.start_prefetch()
        return batches

    def _drain(self, batches: grain.DatasetIterator, later: Sequence[tuple[int, int]]) -> Generator[Batch, None, None]:
        """Yields until the end or an error, then lets the threads go."""
        try:
            yield from batches
            for part in later:
                batches.close()
                batches = self._ahead(*part)
                yield from batches
        finally:
            batches.close()

    def rows_of(self, step: int) -> Int[np.ndarray, "B"]:
        """Row numbers of the global batch in its source, before bad ones are replaced."""
        return self.order.at(step).rows

    def shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """(task, columns of `Abstract`) of the global batch, for every task and bucket: what is to be compiled."""
        result = []
        for at, layout in enumerate(self.layouts[: len(self.data.tasks)]):
            for bucket in range(len(self.table)):
                columns = self._assemble(at, bucket, [layout.blank()])
                columns["row"] = np.zeros(1, np.int32)
                result.append((self.data.sets[at].name, _abstract(columns, self.data.batch_size)))
        return result

    def compilations(self) -> int:
        """How many (task, bucket) pairs were drawn so far: each is compiled once."""
        return len(self._drawn)

    def padding_share(self) -> float:
        """Share of padding among the tokens of this process' batches so far; 0 before the first."""
        with self._lock:
            return 1 - self._tokens / self._cells if self._cells else 0.0

    def decoded(self, step: int = 0, rows: int = 3) -> list[dict[str, tuple[str, str]]]:
        """Column of the source -> (raw text, its tokens as the model meets them), of this process' first rows of a step. Where
        the sets of mixed rows have some columns in the source and others mine them, each row has those of its own."""
        draw = self.order.at(step)
        lengths = self.table[draw.bucket]
        part = slice(self._mine.start, min(self._mine.start + rows, self._mine.stop))
        sets = [draw.set] * (part.stop - part.start) if draw.sets is None else draw.sets[part]
        result = []
        for at, values in zip(sets, self._values(None, draw, part), strict=True):
            shown = {}
            for name in self.layouts[int(at)].texts:
                tower, (text,) = tower_column(name), self._one_of(step, name, [values[name]])
                length = lengths[0] if name == "anchor" else lengths[1]
                column = self.texts[tower].encode([text], length=length, prompt=self.prompts[int(at)].get(tower))
                ids = column["ids"][column["mask"]].tolist()
                shown[name] = (text, self.texts[tower].tokenizer.decode(ids, skip_special_tokens=False))
            result.append(shown)
        return result

    def pictures(self, step: int = 0, rows: int = 3) -> list[bytes]:
        """The encoded pictures of this process' first rows of a step, [] without such columns."""
        if not self.images:
            return []
        draw = self.order.at(step)
        part = slice(self._mine.start, min(self._mine.start + rows, self._mine.stop))
        found = (value for values in self._values(None, draw, part) for value in values.values())
        return [value.encoded for value in found if isinstance(value, Picture)]

    def _values(self, step: int | None, draw: Draw, part: slice) -> list[Values]:
        """The values of a part of the rows of a step's draw, in order."""
        rows = draw.rows[part]
        if draw.sets is None:
            return self._read(step, draw.set, rows)
        sets = draw.sets[part]
        read = {int(at): iter(self._read(step, int(at), rows[sets == at])) for at in np.unique(sets)}
        return [next(read[int(at)]) for at in sets]

    def _read(self, step: int | None, at: int, rows: Int[np.ndarray, "b"]) -> list[Values]:
        """The rows' values in the order given, bad rows replaced; without a step, without what is mined at it. Read in file
        order, which sources in blocks are fast at."""
        source, layout, name = self.sources[at], self.layouts[at], self.data.sets[at].name
        good, bad = read_rows(source, layout, sorted(map(int, rows)))
        self.bad.read(name, [*good, *bad], bad)
        read = {row: row for row in good}
        for row, error in bad.items():
            for other in stand_ins(row, len(source)):
                found, wrong = read_rows(source, layout, [other])
                self.bad.read(name, [other], wrong)
                if found:
                    good[row], read[row] = found[other], other
                    break
            else:
                raise DataError(f"{error.file}, row {error.row}: {error.reason}; so are the rows tried in its place")
        if layout.mined and step is not None:
            for row, values in good.items():
                values.update(zip(layout.mined, self.mined[name].texts(step, read[row]), strict=True))
        return [good[int(row)] for row in rows]

    def _assemble(self, at: int, bucket: int, values: list[Values], step: int = 0) -> dict[str, Any]:
        """The columns of a step's rows, but for "row". One call of the tokenizer a column, one for all hard negatives."""
        layout, (anchor, document) = self.layouts[at], self.table[bucket]
        # Losses that mask whole words say so; others are spared the slower tokenizer.
        words = {"words": True} if getattr(self.data.sets[at].loss, "words", False) else {}
        columns: dict[str, Any] = {"hash": {}}
        for name in ("anchor", "positive", "negative"):
            sources = layout.negatives if name == "negative" else [name]
            if name not in layout.names:
                continue
            front = (len(values), len(sources)) if name == "negative" else (len(values),)
            if name in self.images:
                pictures = [row[source] for row in values for source in sources]
                encoded = self.images[name].vary([p.decoded for p in pictures], self._seeds(step, name, len(pictures)))
                hashes = hash_pictures([p.encoded for p in pictures])
            else:
                length = anchor if name == "anchor" else document
                texts = self._one_of(step, name, [row[source] for row in values for source in sources])
                encoded = self.texts[name].encode(texts, length=length, prompt=self.prompts[at].get(name), **words)
                hashes = hash_texts(texts)
            columns[name] = {key: leaf.reshape(*front, *leaf.shape[1:]) for key, leaf in encoded.items()}
            columns["hash"][name] = hashes.reshape(*front, 2)
        return columns | layout.arrays(values)

    def _seeds(self, step: int, name: str, count: int) -> list[tuple[int, ...]]:
        """One seed an item of a column, by its place in the global batch: hosts may be any number."""
        first = self._mine.start * (count // max(1, self._mine.stop - self._mine.start))
        column = ("anchor", "positive", "negative").index(name)
        return [(self.seed, step, column, first + n) for n in range(count)]

    def _one_of(self, step: int, name: str, values: Sequence[Any]) -> list[str]:
        """The texts; of several one is drawn."""
        if not any(isinstance(value, list) for value in values):
            return [str(value) for value in values]
        draw = lambda value, seed: value[np.random.default_rng(seed).integers(len(value))] if isinstance(value, list) else value
        return [str(draw(value, seed)) for value, seed in zip(values, self._seeds(step, name, len(values)), strict=True)]


def _table(data: Data, layouts: Sequence[Layout], texts: Mapping[str, Texts]) -> Table:
    """The buckets, or one of the towers' maxima. Raises ConfigError for a bucket longer than a tower takes, or shorter than
    it fills."""
    used = list(dict.fromkeys(tower_column(name) for layout in layouts for name in (*layout.texts, *layout.mined)))
    if unknown := [name for name in used if name not in texts]:
        raise ConfigError(f"no tower encodes the column {unknown[0]!r}; towers are given for {sorted(texts)}")
    longest = lambda names: min((texts[name].max_length for name in names), default=0)
    anchor, document = longest({"anchor"} & set(used)), longest(set(used) - {"anchor"})
    anchor, document = anchor or document or 1, document or anchor or 1  # a side of pictures, or none, has any length
    for pair in data.buckets:
        if pair[0] > anchor or pair[1] > document:
            raise ConfigError(
                f"data.buckets holds {pair}, but the towers take at most {(anchor, document)} tokens (max_length)"
            )
        for name in used:
            if texts[name].filled and (length := pair[name != "anchor"]) < (wanted := texts[name].max_length):
                raise ConfigError(
                    f"data.buckets holds {pair}, but texts of column {name!r} are filled to {wanted} tokens: set its "
                    f"{'first' if name == 'anchor' else 'second'} number {length} to {wanted}"
                )
    return make_table(data.buckets or ((anchor, document),))


def _refuse_other_arrays(data: Data, layouts: Sequence[Layout]) -> None:
    """Sets whose rows are mixed must have labels and vectors of one shape, which their data alone tell."""
    for which, layout in zip(data.sets, layouts, strict=True):
        if (layout.lists, layout.width) != (layouts[0].lists, layouts[0].width):
            raise ConfigError(
                f'data.draw is "rows", but the labels or vectors of sets {data.sets[0].name!r} and {which.name!r} have '
                'different shapes; use "batches"'
            )


def _abstract(tree: Any, rows: int) -> Any:
    if isinstance(tree, dict):
        return {key: _abstract(leaf, rows) for key, leaf in tree.items()}
    return Abstract((rows, *tree.shape[1:]), tree.dtype)


def _zeros(tree: Any, rows: int) -> Any:
    if isinstance(tree, dict):
        return {key: _zeros(leaf, rows) for key, leaf in tree.items()}
    return np.zeros((rows, *tree.shape[1:]), tree.dtype)
