"""The arguments of `embedjax search`."""

import dataclasses
from collections.abc import Sequence

import tyro

from embedjax.config import Precision, overrides
from embedjax.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prints the texts or pictures nearest to a text or picture; by late interaction also which tokens matched."""

    model: tyro.conf.Positional[str]
    """Run folder, exported folder, Hugging Face or sentence-transformers folder, or hub id."""
    query: tyro.conf.Positional[str] = ""
    """What to look for, in words."""
    corpus: str = ""
    """File of texts (.txt, .jsonl, .csv, .tsv, .parquet), or a folder whose Python functions are the texts."""
    images: str = ""
    """Folder of pictures, at any depth; or a table or .tar archives of them. Those that cannot be decoded are passed over."""
    like: str = ""
    """A picture to look for, instead of words."""
    column: str = ""
    """Column of the texts or pictures (default: "text" or "image", or the only one)."""
    k: int = 5
    """How many to print."""
    task: str = ""
    """Name of one of the model's prompts, of one of its adapters, or of both, as `encode` has it."""
    pool: int = 1
    """Late interaction: keep one vector for so many tokens of a text."""
    precision: Precision = "float32"
    """What the numbers of the corpus's vectors are kept as."""
    dim: int = 0
    """Compare the first so many numbers of the vectors alone (default: all), for models trained for such prefixes."""
    funnel: str = ""
    """One vector a text: stages DIM:PRECISION:SHORTLIST that find what is then compared by --dim and --precision, such as
    64:int8:200, or 64:binary:400,256:int8:100."""
    first: str = ""
    """Late interaction: score the candidates of a first stage alone: bm25, tokens (the texts of the tokens nearest to the
    query's), or a MODEL of one vector a text."""
    candidates: int = 100
    """How many --first finds, of tokens for each token of the query."""
    html: str = ""
    """File to write a page to that shows which tokens matched."""


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line, read. Raises ConfigError unless it names one thing to look in and one to look for, and for options that
    do not go together."""
    made = overrides.parse(Arguments, arguments, prog="embedjax search")
    if bool(made.corpus) == bool(made.images):
        raise ConfigError("search looks in texts (--corpus FILE) or in pictures (--images FOLDER): name one of them")
    if bool(made.query) == bool(made.like):
        raise ConfigError('search looks for a text or a picture: embedjax search MODEL ... "words", or --like PICTURE')
    if made.dim < 0:
        raise ConfigError(f"--dim is {made.dim}; it must be at least 1, or 0 for all numbers")
    if made.funnel and (made.pool, made.first, made.candidates) != (1, "", 100):
        raise ConfigError("--pool, --first and --candidates are for late interaction, --funnel for one vector a text")
    return made
