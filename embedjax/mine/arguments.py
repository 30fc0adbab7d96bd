"""The arguments of `embedjax mine`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from embedjax.config import Negatives
from embedjax.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Finds hard negatives with a model. The same command after a kill goes on where it stopped."""

    model: tyro.conf.Positional[str]
    """Run folder, exported folder, Hugging Face or sentence-transformers folder, or hub id."""
    corpus: tyro.conf.Positional[str]
    """Documents: .txt with a text a line, .jsonl, .csv, .tsv or .parquet."""
    pairs: tyro.conf.Positional[str]
    """Pairs of anchor and positive; all positives of an anchor are known, none becomes its negative."""
    output: tyro.conf.Positional[str]
    """.jsonl or .parquet, with the columns anchor, positive, negative, negative_2, ... and score, score_2, ..."""
    how: Annotated[Negatives, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Negatives)
    corpus_columns: str = ""
    """Columns that make a document, comma-separated, such as title,text (default: "text", or the only one)."""
    columns: str = "anchor,positive"
    """Columns of the pairs: that of anchors, that of positives."""
    scores: bool = False
    """Write the model's scores of the positive and the negatives."""
    teacher: str = ""
    """Write the scores of this embedding model instead."""
    cross_encoder: str = ""
    """Write the scores of this sentence-transformers CrossEncoder instead."""
    seed: int = 0
    """Seed of random sampling."""

    @property
    def pair_columns(self) -> tuple[str, str]:
        first, _, second = self.columns.partition(",")
        if not (first and second):
            raise ConfigError(f"--columns is {self.columns!r}; it must be ANCHOR,POSITIVE, such as question,answer")
        return first, second


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line, read. Raises ConfigError for options that do not go together."""
    made = tyro.cli(Arguments, args=arguments, prog="embedjax mine")
    if made.teacher and made.cross_encoder:
        raise ConfigError("--teacher and --cross-encoder both give the scores; choose one")
    return made
