"""The arguments of `embedjax mine`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from embedjax.config import File, Negatives, overrides
from embedjax.config.errors import ConfigError

Named = Annotated[
    File,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda texts: File(texts[0]),
        is_instance=lambda value: isinstance(value, File),
        str_from_instance=lambda file: [file.path],
    ),
]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Finds hard negatives with a model. The same command after a kill goes on where it stopped."""

    model: tyro.conf.Positional[str]
    """Run folder, exported folder, Hugging Face or sentence-transformers folder, or hub id."""
    corpus: tyro.conf.Positional[Named]
    """Documents: .txt with a text a line, .jsonl, .csv, .tsv or .parquet."""
    pairs: tyro.conf.Positional[Named]
    """Pairs of anchor and positive; all positives of an anchor are known, none becomes its negative."""
    output: tyro.conf.Positional[str]
    """.jsonl or .parquet, with the columns anchor, positive, negative, negative_2, ... and score, score_2, ..."""
    how: Annotated[Negatives, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Negatives)
    corpus_columns: str = ""
    """Columns that make a document, comma-separated, such as title,text (default: "text", or the only one)."""
    columns: str = "anchor,positive"
    """Columns of the pairs: that of anchors, that of positives."""
    names: str = ""
    """Comma-separated column names of CSV or TSV pairs without a header row."""
    corpus_names: str = ""
    """Comma-separated column names of a CSV or TSV corpus without a header row."""
    task: str = ""
    """Name of one of the model's prompts, of one of its adapters, or of both; without it anchors and documents have the prompts
    of queries and documents, where the model has such."""
    scores: bool = False
    """Write the model's scores of the positive and the negatives."""
    teacher: str = ""
    """Write the scores of this embedding model instead."""
    teacher_task: str = ""
    """Name of one of the teacher's prompts, adapters, or of both."""
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
    made = overrides.parse(Arguments, arguments, prog="embedjax mine")
    if made.teacher and made.cross_encoder:
        raise ConfigError("--teacher and --cross-encoder both give the scores; choose one")
    if made.teacher_task and not made.teacher:
        raise ConfigError("--teacher-task is for --teacher, which is not given")
    corpus, pairs = (
        dataclasses.replace(file, names=tuple(filter(None, names.split(","))))
        for file, names in ((made.corpus, made.corpus_names), (made.pairs, made.names))
    )
    return dataclasses.replace(made, corpus=corpus, pairs=pairs)
