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
    """Late interaction: what the numbers of the texts' vectors are kept as."""
    first: str = ""
    """Late interaction: score the candidates of a first stage alone: bm25, tokens (the texts of the tokens nearest to the
    query's), or a MODEL of one vector a text."""
    candidates: int = 100
    """How many --first finds, of tokens for each token of the query."""
    html: str = ""
    """File to write a page to that shows which tokens matched."""


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line, read. Raises ConfigError unless it names one thing to look in, and one to look for."""
    made = overrides.parse(Arguments, arguments, prog="embedjax search")
    if bool(made.corpus) == bool(made.images):
        raise ConfigError("search looks in texts (--corpus FILE) or in pictures (--images FOLDER): name one of them")
    if bool(made.query) == bool(made.like):
        raise ConfigError('search looks for a text or a picture: embedjax search MODEL ... "words", or --like PICTURE')
    return made
