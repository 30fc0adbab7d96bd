"""One vector a text -> the lines that Qdrant, Vespa and Postgres take. `engines.py` has what an engine is told besides, and the
lines of late interaction.

Vespa's indexed tensors: https://docs.vespa.ai/en/reference/schemas/document-json-format.html. pgvector's literals and COPY:
https://github.com/pgvector/pgvector#loading.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from embedjax.config import Precision
from embedjax.config.errors import ConfigError
from embedjax.data.sources import Source
from embedjax.evaluate.conventions import bit_string, literal, packed_of
from embedjax.evaluate.engines import Feed, document, qdrant_point
from embedjax.evaluate.kept import Kept
from embedjax.evaluate.rows import key_at
from embedjax.quantize import in_bits

TAKEN: dict[str, tuple[Precision, ...]] = {
    "qdrant": ("float32",),
    "vespa": ("float32", "bfloat16", "binary", "ubinary"),
    "pgvector": ("float32", "float16", "binary", "ubinary"),
}
ENDINGS = {"qdrant": ".jsonl", "vespa": ".jsonl", "pgvector": ".csv"}
DIGITS = {"float32": 9, "float16": 5}


def check(feed: Feed, ending: str, precision: Precision) -> None:
    """Raises ConfigError for an ending or a precision that the engine does not read."""
    if ending != ENDINGS[feed.engine]:
        raise ConfigError(f"--for {feed.engine} writes {ENDINGS[feed.engine]}, not {ending}")
    if precision not in TAKEN[feed.engine]:
        raise ConfigError(
            f"--for {feed.engine} takes {' or '.join(TAKEN[feed.engine])}, not {precision}: engines know no ranges, and make "
            "bytes of floats themselves"
        )


def lines(
    feed: Feed, kept: Kept, source: Source, column: str, start: int, texts: Iterable[str], codes: np.ndarray
) -> Iterator[str]:
    """The lines of some rows from `start` on; of pgvector the first names the columns."""
    ids = lambda row: key_at(source, row, feed.ids) if feed.ids else str(row)
    if feed.engine == "pgvector":
        if not start:
            yield _csv((feed.ids or "id", column, feed.field))
        for row, (text, each) in enumerate(zip(texts, codes, strict=True), start):
            yield _csv((ids(row), text.replace("\0", " "), pgvector_value(each, kept)))
        return
    for row, (text, each) in enumerate(zip(texts, codes, strict=True), start):
        if feed.engine == "qdrant":
            line = qdrant_point(feed, ids(row), {column: text}, each)
        else:
            line = document(feed, ids(row), {column: text}, vespa_tensor(each, kept))
        yield json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"


def pgvector_value(codes: np.ndarray, kept: Kept) -> str:
    """The text of a `vector`, of a `halfvec` for float16, or of a `bit(n)`."""
    if in_bits(kept.precision):
        return bit_string(packed_of(codes[None], kept.precision)[0], kept.dim)
    return literal(codes.tolist(), DIGITS[kept.precision])


def vespa_tensor(codes: np.ndarray, kept: Kept) -> dict[str, Any]:
    """The cells of a tensor<float>(x[E]), tensor<bfloat16>(x[E]) or, of bits, tensor<int8>(x[E/8]), in hexadecimal."""
    cells = (
        packed_of(codes[None], kept.precision)[0] if in_bits(kept.precision) else codes.astype(codes.dtype.newbyteorder(">"))
    )
    return {"values": cells.tobytes().hex().upper()}


def _csv(fields: tuple[str, ...]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(fields)
    return out.getvalue()
