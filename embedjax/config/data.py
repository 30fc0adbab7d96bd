"""The training sets, what their columns mean, and how they are batched and mixed."""

import dataclasses
import math
from typing import Literal

from embedjax.config.errors import ConfigError
from embedjax.config.losses import Loss, MultipleNegatives
from embedjax.config.mine import Mine
from embedjax.config.sources import File, Functions, Glyphs, Pictures, Source, Tar, Tfds

__all__ = ["Data", "File", "Functions", "Glyphs", "Pictures", "Set", "Source", "Tar", "Tfds"]


@dataclasses.dataclass(frozen=True)
class Set:
    """A data set, what its columns mean and the loss it is trained with."""

    source: Source = dataclasses.field(default_factory=File)
    """Where the rows come from."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Our column -> the source's. Texts are anchor, positive, negative, negative_2, ...; numbers score, or score, score_2, ...
    for positive, negative, ...; label is a number, one of `labels`, or a list of these; vector is a list of numbers."""
    loss: Loss = dataclasses.field(default_factory=MultipleNegatives)
    """The loss of this set."""
    name: str = "train"
    """Name of the task, used in metrics and checkpoints."""
    adapter: str = ""
    """Name of the adapter it trains where its towers have several; those that no set trains stay as they are."""
    prompt: str = ""
    """Name of the prompts its texts have: anchors NAME-query and the rest NAME-document where their tower has such, else NAME;
    empty for `query` and `document`, or the tower's default. An adapter of the same name is served together with it."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers, where the column `label` holds names or lists."""
    weight: float = 1.0
    """How often it is drawn, relative to the other sets, with data.mixing "weights"."""
    several: tuple[str, ...] = ()
    """Columns of texts that hold a list, such as the captions of a picture, of which each step draws one."""
    mine: Mine | None = None
    """Hard negatives that the model finds in training, in place of columns of the source."""

    @property
    def names(self) -> tuple[str, ...]:
        """Our columns in a batch: those of the source, and the negatives that are mined."""
        mined = self.mine.num_negatives if self.mine else 0
        return (*self.columns, *["negative", *(f"negative_{k}" for k in range(2, mined + 1))][:mined])

    def __post_init__(self):
        if self.mine and (not {"anchor", "positive"} <= self.columns.keys() or len(set(self.names)) < len(self.names)):
            raise ConfigError(
                f"set {self.name!r}: mining takes the columns anchor and positive and gives the negatives; columns are "
                f"{sorted(self.columns)}"
            )
        if len(set(self.labels)) < len(self.labels) or "" in self.labels:
            raise ConfigError(f"set {self.name!r}: labels must differ and not be empty; they are {self.labels}")
        if self.name in ("scale", "bias") or "/" in self.name:
            raise ConfigError(f'a set is named {self.name!r}; "scale", "bias" and names with "/" mean parameters of losses')
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"set {self.name!r}: weight is {self.weight}; it must be above 0 and finite")


@dataclasses.dataclass(frozen=True)
class Data:
    """The training sets and how batches are made of them."""

    batch_size: int = 64
    """Rows of the global batch, over all devices and hosts."""
    buckets: tuple[tuple[int, int], ...] = ()
    """(anchor length, document length) pairs in tokens, one compiled step each; empty for one, the towers' maxima."""
    sets: tuple[Set, ...] = ()
    """The training sets."""
    mixing: Literal["proportional", "weights"] = "proportional"
    """How often each set is drawn: as its number of rows says, or its `weight`."""
    temperature: float = 1.0
    """Proportional to rows ** (1 / temperature): above 1 small sets are drawn more often than their rows say."""
    draw: Literal["batches", "rows"] = "batches"
    """What is drawn from a set: whole batches, each of one set; or rows, so that a batch holds those of all sets, which then
    have the same columns and loss."""
    shuffle: bool = True
    """Whether rows are drawn in a new order each epoch."""
    threads: int = 2
    """Threads that decode and tokenize ahead."""
    prefetch: int = 8
    """Batches kept ready."""
    bad_share: float = 0.01
    """Share of bad rows above which the run stops; below it they are replaced and listed."""

    def __post_init__(self):
        for name in ("batch_size", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        for pair in self.buckets:
            if min(pair) < 1:
                raise ConfigError(f"data.buckets holds {pair}; lengths must be at least 1")
        if not 0 <= self.bad_share <= 1:
            raise ConfigError(f"data.bad_share is {self.bad_share}; it must be in [0, 1]")
        if len({s.name for s in self.sets}) < len(self.sets):
            raise ConfigError(f"data.sets have names {[s.name for s in self.sets]}; each must have its own")
        self._check_mixture()

    @property
    def tasks(self) -> tuple[Set, ...]:
        """The sets that are a task of their own: all, or where rows are mixed the first, which stands for all."""
        return self.sets if self.draw == "batches" else self.sets[:1]

    def _check_mixture(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"data.temperature is {self.temperature}; it must be above 0 and finite")
        if self.mixing == "weights" and self.temperature != 1:
            raise ConfigError(f'data.temperature is {self.temperature}; it is for mixing "proportional", leave it at 1')
        if self.mixing != "weights" and (named := [s.name for s in self.sets if s.weight != 1]):
            raise ConfigError(f'set {named[0]!r} has a weight; set data.mixing to "weights"')
        for other in self.sets[1:] if self.draw == "rows" else ():
            first = self.sets[0]
            for what, a, b in (
                ("columns", sorted(first.names), sorted(other.names)),
                ("loss", first.loss, other.loss),
                ("labels", first.labels, other.labels),
                ("adapter", first.adapter, other.adapter),
                ("prompt", first.prompt, other.prompt),
            ):
                if a != b:
                    raise ConfigError(
                        f'data.draw is "rows", but sets {first.name!r} and {other.name!r} differ in their {what} ({a} and '
                        f'{b}); rows of one batch share them: use "batches"'
                    )
