"""The arguments of `embedjax encode`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from embedjax.config import Precision, overrides
from embedjax.config.errors import ConfigError
from embedjax.evaluate.engines import Feed
from embedjax.quantize import in_ranges


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
    """.npy (N x E) or .parquet (texts, or names of the pictures, and vectors); .faiss or .usearch, an index of row numbers;
    .jsonl or .csv for an engine. By late interaction NAME.npy (the vectors of all tokens) with NAME.starts.npy (where each text
    begins), .parquet (a list of vectors a text), or .jsonl for an engine."""
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
    """What the numbers are kept as; bfloat16 as its bits in uint16, binary and ubinary eight signs a byte. NAME.ranges.npy has
    the ranges of int8 and uint8: those saved with the model, or taken from --calibrate; by late interaction, in .npy alone,
    those of the file's own tokens."""
    dim: int = 0
    """Keep the first so many numbers of a vector, at length 1 again; 0 for all."""
    calibrate: str = ""
    """File of 10,000 rows or more, others than those encoded, that int8 and uint8 take their ranges from, for a model without
    saved ones (export FOLDER --calibrate FILE saves them)."""
    engine: Annotated[Literal["qdrant", "vespa", "pgvector"] | None, tyro.conf.arg(name="for")] = None
    """What reads the output. .jsonl of a point with a named vector for Qdrant, of a put of a document with a
    tensor<float>(x[E]) (with --precision bfloat16 or ubinary a tensor<bfloat16>(x[E]), tensor<int8>(x[E/8])) for Vespa; by late
    interaction a multivector, a tensor<float>(dt{},x[E]). .csv for COPY ... WITH (FORMAT csv, HEADER) into a vector of
    pgvector's (float16: a halfvec, ubinary: a bit)."""
    ids: str = ""
    """Column of the texts' ids for the engine (default: row numbers)."""
    field: str = ""
    """Name of Qdrant's vector, or of Vespa's or Postgres' field, that holds the vectors (default: embedding; by late
    interaction colbert)."""
    doctype: str = "doc"
    """Vespa's type of document, and namespace."""
    bits: bool = False
    """Write the signs alone, as Vespa's tensor<int8>(dt{},x[E/8])."""

    def late(self) -> dict[str, Any]:
        """What is asked of late interaction, whose model has `dim` numbers already. Raises ConfigError for what it has not."""
        if self.calibrate:
            raise ConfigError("--calibrate is for models of one vector a text")
        return {"pool": self.pool, "precision": self.precision, "feed": self._feed("colbert", self.bits)}

    def single(self) -> dict[str, Any]:
        """What is asked of one vector a text, without --calibrate. Raises ConfigError for what it has not."""
        if self.pool > 1:
            raise ConfigError(f"{self.model} gives one vector a text; --pool is of late interaction")
        if self.bits and self.engine != "vespa":
            raise ConfigError("--bits is for Vespa; other outputs take --precision ubinary")
        precision = "ubinary" if self.bits else self.precision
        return {"dim": self.dim or None, "precision": precision, "feed": self._feed("embedding", False)}

    def _feed(self, field: str, bits: bool) -> Feed | None:
        return Feed(self.engine, self.ids, self.field or field, self.doctype, bits) if self.engine else None


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line, read. Raises ConfigError for options that do not go together."""
    made = overrides.parse(Arguments, arguments, prog="embedjax encode")
    if made.engine is None and (made.ids, made.field, made.doctype, made.bits) != ("", "", "doc", False):
        raise ConfigError("--ids, --field, --doctype and --bits are for an engine: --for qdrant, --for vespa or --for pgvector")
    if made.dim < 0:
        raise ConfigError(f"--dim is {made.dim}; it must be at least 1, or 0 for all numbers")
    if made.calibrate and not in_ranges(made.precision):
        raise ConfigError(f"--calibrate takes the ranges of int8 and uint8; --precision is {made.precision}")
    return made
