"""The arguments of `embedjax encode`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from embedjax.config import Precision, overrides
from embedjax.config.errors import ConfigError
from embedjax.evaluate.engines import Feed


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes one vector a text or picture, or by late interaction one a token. The same command after a kill goes on where it
    stopped."""

    model: tyro.conf.Positional[str]
    """Run folder, exported folder, Hugging Face or sentence-transformers folder, or hub id."""
    input: tyro.conf.Positional[str]
    """.txt with a text a line, .jsonl, .csv, .tsv or .parquet; or a folder of pictures, at any depth and in the order of their
    paths, a table with a column of pictures (paths relative to it, or bytes), or .tar archives of webdataset's layout (one, or
    a pattern in quotes such as "train-{0000..0127}.tar")."""
    output: tyro.conf.Positional[str]
    """.npy (float32, N x E) or .parquet (texts, or names of the pictures, and vectors). By late interaction NAME.npy (those of
    all tokens) with NAME.starts.npy (where each text begins), .parquet (a list of vectors a text), or .jsonl for an engine."""
    column: str = ""
    """Column of the texts or pictures in the input (default: "text" or "image", or the only one)."""
    kind: Annotated[Literal["query", "document", "text", "image"] | None, tyro.conf.arg(name="as")] = None
    """What the inputs are. Queries and documents have prompts or towers of their own where the model has such (default: text,
    without; for a model of two towers of texts, or of late interaction, query where the column is called query or anchor, else
    document). A model of texts and pictures takes folders, archives and columns of bytes or of names such as a.jpg for
    pictures, all else for texts, unless this says text or image."""
    task: str = ""
    """Name of one of the model's prompts, of one of its adapters, or of both."""
    pool: int = 1
    """Late interaction: write about one vector for so many tokens of a document."""
    precision: Precision = "float32"
    """Late interaction: what the numbers of .npy are kept as; NAME.ranges.npy has the ranges of int8 and uint8."""
    engine: Annotated[Literal["qdrant", "vespa"] | None, tyro.conf.arg(name="for")] = None
    """Late interaction: what reads the .jsonl: a line a text, a point with a named multivector for Qdrant, a put of a document
    with a tensor<float>(dt{},x[E]) for Vespa."""
    ids: str = ""
    """Column of the texts' ids for the engine (default: row numbers)."""
    field: str = "colbert"
    """Name of Qdrant's vector, or Vespa's field, that holds the vectors."""
    doctype: str = "doc"
    """Vespa's type of document, and namespace."""
    bits: bool = False
    """Write the signs alone, as Vespa's tensor<int8>(dt{},x[E/8])."""

    def late(self) -> dict[str, Any]:
        """What is asked of late interaction alone."""
        feed = Feed(self.engine, self.ids, self.field, self.doctype, self.bits) if self.engine else None
        return {"pool": self.pool, "precision": self.precision, "feed": feed}


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line, read. Raises ConfigError for options that do not go together."""
    made = overrides.parse(Arguments, arguments, prog="embedjax encode")
    if made.engine is None and (made.ids, made.field, made.doctype, made.bits) != ("", "colbert", "doc", False):
        raise ConfigError("--ids, --field, --doctype and --bits are for an engine: --for qdrant or --for vespa")
    return made
