"""What an engine is told of documents, and token vectors -> the lines that Qdrant and Vespa take: documents with a vector a
token, their texts and their ids. `vector_lines.py` has those of one vector a text.

Qdrant's points and multivectors: https://qdrant.tech/documentation/manage-data/vectors/. Vespa's documents, and the hexadecimal
form of their tensors: https://docs.vespa.ai/en/reference/schemas/document-json-format.html.
"""

import dataclasses
import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from embedjax import quantize
from embedjax.config.errors import ConfigError
from embedjax.data.sources import BadRow, Source
from embedjax.evaluate.rows import column_of, key_at

NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
DIGITS = 7
"""Decimals of Qdrant's numbers: those of float32 below 1."""
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufdcf\ufde0-\ufffd\U00010000-\U0010fffd]")
"""Characters that Vespa refuses in a text."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """What an engine is told besides texts and vectors."""

    engine: Literal["qdrant", "vespa", "pgvector"]
    ids: str = ""
    """Column of the documents' ids, which are unique; row numbers without one."""
    field: str = "colbert"
    """Name of Qdrant's vector, or of Vespa's or Postgres' field, that holds the vectors."""
    doctype: str = "doc"
    """Vespa's type of document, and namespace."""
    bits: bool = False
    """The signs alone, eight numbers a byte, as Vespa's int8 for its hamming distance and unpack_bits."""

    def check(self, source: Source, column: str, width: int) -> None:
        """Raises ConfigError for what the engine would refuse, BadRow for an id that is none or is there twice."""
        if self.bits and (self.engine != "vespa" or width % 8):
            found = f"{width} for {self.engine}"
            raise ConfigError(f"--bits is for Vespa and vectors of a multiple of 8 numbers; these have {found}")
        names = {"--field": self.field, "--doctype": self.doctype, "--column": column} if self.engine == "vespa" else {}
        for option, name in names.items():
            if not NAME.fullmatch(name):
                raise ConfigError(f"{option} {name!r} is no name to Vespa, which has letters, digits and '_'")
        if self.engine == "vespa" and column == self.field:
            raise ConfigError(f"--field {self.field!r} is the name of the texts' column; choose another")
        if self.ids:
            column_of(source, self.ids)
            self._check_ids(source)

    def _check_ids(self, source: Source) -> None:
        """In 8 bytes a row, for the ids themselves may be long and many."""
        known = qdrant_id if self.engine == "qdrant" else str
        said = lambda row: str(known(key_at(source, row, self.ids))).encode()
        short = b"".join(hashlib.blake2b(said(row), digest_size=8).digest() for row in range(len(source)))
        found = np.frombuffer(short, np.uint64)
        order = np.argsort(found, kind="stable")
        twice = np.flatnonzero(found[order][1:] == found[order][:-1])
        if len(twice):
            first, again = sorted(int(order[twice[0] + n]) for n in (0, 1))
            where = ":".join(map(str, source.where(first)))
            raise BadRow(*source.where(again), f"{self.ids} {key_at(source, again, self.ids)!r} is that of {where} too")


def lines(
    feed: Feed, source: Source, column: str, start: int, texts: Iterable[str], vectors: Iterable[Float[np.ndarray, "L E"]]
) -> Iterator[str]:
    """The lines of some rows from `start` on. Raises BadRow for a text without a token that is compared."""
    line = {"qdrant": qdrant_point, "vespa": vespa_put}[feed.engine]
    for row, (text, each) in enumerate(zip(texts, vectors, strict=True), start):
        if not len(each):
            raise BadRow(*source.where(row), f"no token of {text[:40]!r} is compared, so that nothing finds it")
        id = key_at(source, row, feed.ids) if feed.ids else str(row)
        yield json.dumps(line(feed, id, {column: text}, each), ensure_ascii=False, separators=(",", ":")) + "\n"


def qdrant_point(feed: Feed, id: str, fields: dict[str, str], vectors: Float[np.ndarray, "*L E"]) -> dict[str, Any]:
    """A point with a named vector, or a multivector of several. Ids stay as they are in the payload, under their column's
    name."""
    payload = {**({feed.ids: id} if feed.ids else {}), **fields}
    numbers = np.round(vectors.astype(np.float64), DIGITS).tolist()
    return {"id": qdrant_id(id), "vector": {feed.field: numbers}, "payload": payload}


def qdrant_id(id: str) -> int | str:
    """What Qdrant takes for an id: a whole number or a UUID; another becomes a UUID (version 5, of URLs)."""
    if id.isascii() and id.isdecimal() and str(int(id)) == id and int(id) < 2**64:
        return int(id)
    try:
        return str(uuid.UUID(id))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, id))


def vespa_put(feed: Feed, id: str, fields: dict[str, str], vectors: Float[np.ndarray, "L E"]) -> dict[str, Any]:
    """A put of a document with a tensor<float>(dt{},x[E]), or tensor<int8>(dt{},x[E/8]) of bits, cells in hexadecimal."""
    cells = quantize.quantize(vectors, "ubinary") if feed.bits else vectors.astype(">f4")
    return document(feed, id, fields, {str(n): row.tobytes().hex().upper() for n, row in enumerate(cells)})


def document(feed: Feed, id: str, fields: dict[str, str], tensor: dict[str, str]) -> dict[str, Any]:
    """A put of a document with a tensor, and texts without what Vespa refuses."""
    clean = {name: ILLEGAL.sub(" ", text) for name, text in fields.items()}
    return {"put": f"id:{feed.doctype}:{feed.doctype}::{id}", "fields": {**clean, feed.field: tensor}}
