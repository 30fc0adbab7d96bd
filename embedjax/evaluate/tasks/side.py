"""The texts of one column -> vectors, their prefixes, and how they are compared. Every task is made of such sides."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float

from embedjax.config import ImageTower, Similarity, Tower
from embedjax.config.errors import ConfigError
from embedjax.evaluate.encode import Columns, Encoder, encoder_of, side_of
from embedjax.evaluate.late import TokenEncoder, maxsim_own
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import Model

Vectors = Float[np.ndarray, "N E"]

# Bytes of tokens that a side keeps for the next evaluation; more are made again each time.
KEPT = 256 << 20


class Side:
    """The texts of one column (or its pictures, as `encode_images` takes them), and their tokens as the last tokenizer gave
    them, so that a run tokenizes them once; those of a large corpus, which would fill the memory, each time."""

    def __init__(self, texts: Sequence[Any], column: str, pictures: bool = False):
        self.texts, self.column, self.pictures = list(texts), column, pictures
        self.tokens: tuple[tuple, list[Columns]] | None = None

    def vectors(
        self,
        model: Model,
        mesh: DeviceMesh | None,
        prompt: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> Vectors | TokenVectors:
        """Encoded by the column's tower, with the prompt that `encode` gives it. `prompt` names other prompts, or an adapter;
        `progress(rows)` tells how many are done. Raises ConfigError for an unknown one, and where no tower takes these."""
        column = side_of(model.config, self.column, self.pictures)
        if model.config.late:
            tokens = TokenEncoder(model, column=column, task=prompt or None, mesh=mesh)
            return tokens.gather(self._blocks(tokens), progress=progress)
        encoder = encoder_of(model, column=column, task=prompt or None, mesh=mesh)
        out, start = np.empty((len(self.texts), encoder.width), np.float32), 0
        for vectors in encoder.stream(self._blocks(encoder), progress=progress):
            out[start : start + len(vectors)] = vectors
            start += len(vectors)
        return out

    def _blocks(self, encoder: Encoder) -> Iterable[Columns]:
        key = encoder.identity
        return self.tokens[1] if self.tokens and self.tokens[0] == key else self._tokenized(encoder, key)

    def _tokenized(self, encoder: Encoder, key: tuple) -> Iterator[Columns]:
        self.tokens, kept, size = None, [], 0
        for at in range(0, len(self.texts), encoder.block):
            block = encoder.tokenize(self.texts[at : at + encoder.block])
            size += sum(array.nbytes for array in block.values())
            kept = [*kept, block] if size <= KEPT else []  # what is beyond the limit is not held while it is made
            yield block
        if size <= KEPT:
            self.tokens = key, kept

    def check(self, model: Model, dims: Sequence[int]) -> None:
        """Raises ConfigError for a prefix longer than the vectors, before anything is encoded."""
        width = model.embedders[self._tower(model)].width
        if max(dims, default=0) > width:
            raise ConfigError(f"dims holds {max(dims)}; the model's vectors have {width} numbers")

    def prefix(self, model: Model, vectors: Vectors | TokenVectors, dim: int) -> Vectors | TokenVectors:
        """The first `dim` numbers of this side's vectors."""
        tower = model.config.towers[self._tower(model)]
        if isinstance(vectors, TokenVectors):
            return dataclasses.replace(vectors, vectors=prefixed(vectors.vectors, dim, tower))
        return prefixed(vectors, dim, tower)

    def _tower(self, model: Model) -> str:
        return model.config.tower_of(side_of(model.config, self.column, self.pictures))


def prefixed(vectors: Vectors, dim: int, tower: Tower | ImageTower) -> Vectors:
    """The first `dim` numbers of a tower's vectors, at length 1 again where the tower scales them. Raises ConfigError."""
    if dim > vectors.shape[1]:
        raise ConfigError(f"dims holds {dim}; the model's vectors have {vectors.shape[1]} numbers")
    return vectors[:, :dim] if tower.normalize is False else unit(vectors[:, :dim])


def comparable(vectors: Vectors, similarity: Similarity) -> Vectors:
    """Vectors whose products with each other are the model's similarities."""
    return vectors if similarity == "dot" else unit(vectors)


def pairwise(a: Vectors | TokenVectors, b: Vectors | TokenVectors, similarity: Similarity) -> Float[np.ndarray, " N"]:
    """The similarity of each row of `a` and the same row of `b`, float64; of tokens by late interaction that of query `a` with
    document `b`."""
    if isinstance(a, TokenVectors) or isinstance(b, TokenVectors):
        assert isinstance(a, TokenVectors) and isinstance(b, TokenVectors)
        return np.array([maxsim_own(a.of(row), b, [row])[0] for row in range(len(a))], np.float64)
    return np.einsum("ne,ne->n", *(comparable(vectors.astype(np.float64), similarity) for vectors in (a, b)))


def own_scores(
    vectors: Sequence[Vectors | TokenVectors], similarity: Similarity
) -> Callable[[int, Sequence[int]], Float[np.ndarray, " n"]]:
    """(queries, documents) -> `(query, some documents) -> similarities`, by numbers."""
    queries, documents = vectors
    if isinstance(queries, TokenVectors) or isinstance(documents, TokenVectors):
        assert isinstance(queries, TokenVectors) and isinstance(documents, TokenVectors)
        return lambda query, some: maxsim_own(queries.of(query), documents, some)
    these, those = comparable(queries, similarity), comparable(documents, similarity)
    return lambda query, some: those[some] @ these[query]


def unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length 1; a row of zeros stays one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
