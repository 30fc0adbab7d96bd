"""BM25, the ranking that a trained model should beat, through the library bm25s: a yardstick, never a part of a model."""

import logging
import re
from collections.abc import Sequence
from typing import Literal

import bm25s
import numpy as np
from jaxtyping import Int

Words = Literal["plain", "identifiers"]
"""What counts as a word: as bm25s has it (runs of two word characters or more, lowercased, less English stop words), or the
same after snake_case and camelCase names were taken apart, which is fairer to it on source code."""

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and tells of every index

BOUNDARY = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def bm25_rank(queries: Sequence[str], documents: Sequence[str], k: int, *, words: Words = "plain") -> Int[np.ndarray, "Q k"]:
    """Row numbers of each query's min(k, N) best documents, best first; -1 after the last that shares a word with it.

    BM25 in Lucene's form (k1 1.5, b 0.75), no stemming.
    """
    k = min(k, len(documents))
    prepare = {"plain": str, "identifiers": split_identifiers}[words]
    words_of = lambda texts: bm25s.tokenize([prepare(text) for text in texts], return_ids=False, show_progress=False)
    corpus = words_of(documents)
    if not any(corpus):
        return np.full((len(queries), k), -1, np.int32)
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    found, scores = index.retrieve(words_of(queries), k=k, show_progress=False, backend_selection="numpy")
    return np.where(scores > 0, found, -1).astype(np.int32)


def split_identifiers(text: str) -> str:
    """`parse_HTTPHeader` -> `parse HTTP Header`."""
    return BOUNDARY.sub(" ", text)
