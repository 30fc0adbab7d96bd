"""Hard negatives that a run mines for itself: which documents they are at each step, read from the run folder."""

import hashlib
import os
import pathlib
import re

import numpy as np
from jaxtyping import Int32

from embedjax.config import Set
from embedjax.config.errors import DataError, StorageError
from embedjax.data.corpus import Corpus, Pairs
from embedjax.data.order import Held
from embedjax.data.sources import Source, open_source, select


class Mined:
    """The mined negatives of one set. Those of a step are what was mined at the last multiple of `every` before it, so that
    batches stay a function of (seed, step) and of the files in `folder`, which are written once and kept."""

    def __init__(self, which: Set, source: Source, folder: pathlib.Path):
        assert which.mine is not None
        self.how, self.name, self.every = which.mine, which.name, which.mine.every
        self.adapter, self.prompt = which.adapter, which.prompt
        self.source = open_source(which.mine.corpus) if which.mine.corpus else None
        anchor, positive = which.columns["anchor"], which.columns["positive"]
        select(source, {"anchor": anchor, "positive": positive}, f"set {which.name!r}")  # else told of the corpus
        own = [(self.source, which.mine.corpus_columns)] if self.source else []
        self.corpus = Corpus([*own, (source, [positive])])
        self.pairs = Pairs(source, anchor, positive, self.corpus)
        self.folder = folder
        self._held = Held(self._load)

    def mining(self, step: int) -> int:
        """The step at which the negatives of the batch of a step were mined."""
        return step // self.every * self.every

    def minings(self, start: int, stop: int) -> range:
        """The steps from `start` on at which negatives are mined."""
        return range(-(-start // self.every) * self.every, stop, self.every)

    def file(self, mining: int) -> pathlib.Path:
        """Sets whose names differ in what no file name can have have files of their own."""
        plain = re.sub(r"[^\w.-]", "_", self.name)
        mark = f"-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}" if plain != self.name else ""
        return self.folder / f"{plain}{mark}-{mining}.npy"

    def there(self, mining: int) -> bool:
        return self.file(mining).exists()

    def texts(self, step: int, row: int) -> list[str]:
        """The K negatives of a row. Raises DataError for a step whose negatives were not mined."""
        return self.corpus.take(self._held[self.mining(step)][row])

    def keep(self, mining: int, numbers: Int32[np.ndarray, "N K"]) -> None:
        """Writes what was mined: whole or not at all."""
        path = self.file(mining)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as out:
                np.save(out, numbers, allow_pickle=False)
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise StorageError(f"{path}: cannot keep the mined negatives: {error.strerror}") from error

    def _load(self, mining: int) -> Int32[np.ndarray, "N K"]:
        path = self.file(mining)
        try:
            numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: the negatives mined at step {mining} cannot be read ({error})") from None
        if numbers.shape != (len(self.pairs), self.how.num_negatives) or numbers.max() >= len(self.corpus):
            raise DataError(
                f"{path}: holds {numbers.shape} negatives; {(len(self.pairs), self.how.num_negatives)} were expected"
            )
        return numbers
