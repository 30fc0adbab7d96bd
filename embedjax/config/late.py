"""Late interaction: one vector a token, and what is done to queries and documents before they are compared."""

import dataclasses
import string
from typing import Literal

from embedjax.config.errors import ConfigError

Side = Literal["query", "document"]

TOKEN_FEATURES = 128
"""Numbers of a token's vector where the tower's `dense` says nothing else (Khattab & Zaharia 2020, section 3.2)."""


@dataclasses.dataclass(frozen=True)
class Late:
    """A tower of token vectors that are compared by MaxSim (ColBERT, Khattab & Zaharia 2020). Its `dense` projects every token,
    by default to 128 numbers without bias; each vector gets length 1."""

    query_marker: str = "[unused0]"
    """Token put after the first one of every query, which is special; empty for none. One that the tokenizer lacks is added
    where the token table has room; PyLate's own models have "[Q] "."""
    document_marker: str = "[unused1]"
    """The same of every document; PyLate's own models have "[D] "."""
    query_length: int = 32
    """Longest query in tokens, special ones and the marker included."""
    document_length: int = 180
    """Longest document in tokens, special ones and the marker included."""
    expand: bool = True
    """Fill every query with [MASK] to its length; these tokens are scored like the others."""
    attend: bool = False
    """Whether the other tokens of a query see its [MASK] tokens."""
    skip: tuple[str, ...] = tuple(string.punctuation)
    """Tokens of documents that are not scored; by default punctuation."""

    def __post_init__(self):
        for name in ("query_length", "document_length"):
            if getattr(self, name) < 4:
                raise ConfigError(f"Late.{name} is {getattr(self, name)}; a text of one token and its special ones are 4")

        if self.attend and not self.expand:
            raise ConfigError("Late.attend is about [MASK] tokens, which are there with Late.expand alone")

    def marker(self, side: Side) -> str:
        return self.query_marker if side == "query" else self.document_marker

    def length(self, side: Side) -> int:
        return self.query_length if side == "query" else self.document_length
