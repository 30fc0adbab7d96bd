"""Texts as the vectors of their tokens: they lie one text after the other without padding, as floats or as codes."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from embedjax import quantize
from embedjax.config import Precision
from embedjax.config.errors import ConfigError
from embedjax.evaluate.pool import check_factor, pooled
from embedjax.losses.late import Tokens

# Vectors that are quantized at a time: on the way to codes they take several times their memory.
QUANTIZED_ROWS = 65536


@dataclasses.dataclass(frozen=True)
class TokenVectors:
    """N texts as the vectors of those tokens that are compared: text n has the rows `starts[n]` to `starts[n + 1]`.

    They may be kept as codes (`quantized`); those of all texts share their ranges. Scores are made of float32, of a few texts
    at a time.
    """

    vectors: Float[np.ndarray, "T E"] | np.ndarray
    starts: Int[np.ndarray, " N+1"]
    precision: Precision = "float32"
    ranges: quantize.Ranges | None = None
    numbers: int = 0
    """Numbers of a vector, where `vectors` are codes that hold several; 0 for one a code."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        return np.diff(self.starts)

    def of(self, text: int) -> Float[np.ndarray, "L E"]:
        """The vectors of one text, float32."""
        return self.rows(slice(self.starts[text], self.starts[text + 1]))

    def rows(self, at: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n E"]:
        """Some vectors, float32."""
        found = self.vectors[at]
        if self.precision == "float32":
            return found
        return quantize.dequantize(np.asarray(found), self.precision, self.width, self.ranges)

    def take(self, texts: Sequence[int] | Int[np.ndarray, " n"]) -> "TokenVectors":
        """Some of the texts."""
        rows = [np.arange(self.starts[text], self.starts[text + 1]) for text in texts]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return dataclasses.replace(self, vectors=self.vectors[np.concatenate([np.zeros(0, np.int64), *rows])], starts=starts)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.numbers or self.vectors.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors as they are kept."""
        return self.vectors.nbytes

    def pooled(self, factor: int, protected: int = 1) -> "TokenVectors":
        """About one vector for `factor` of a text, as `pool.pooled` makes it. Raises ConfigError for a factor below 1, and for
        codes: pooling comes before them."""
        check_factor(factor, protected)
        if self.precision != "float32":
            raise ConfigError(f"these vectors are {self.precision} already; pool them before they are quantized")
        if factor == 1:
            return self
        return TokenVectors.joined((pooled(self.of(text), factor, protected) for text in range(len(self))), self.width)

    def quantized(self, precision: Precision, ranges: quantize.Ranges | None = None) -> "TokenVectors":
        """The same texts, their vectors as codes. int8 and uint8 take their ranges from all of these vectors where none are
        given. Raises ConfigError, NonFiniteError as `quantize.quantize`, and for vectors that are codes already."""
        if self.precision != "float32":
            raise ConfigError(f"these vectors are {self.precision} already")
        if quantize.in_ranges(precision) and ranges is None:
            ranges = quantize.ranges_of(self.vectors)
        starts = range(0, max(1, len(self.vectors)), QUANTIZED_ROWS)
        parts = [quantize.quantize(self.vectors[at : at + QUANTIZED_ROWS], precision, ranges) for at in starts]
        return TokenVectors(np.concatenate(parts), self.starts, precision, ranges, self.width)

    def padded(self, texts: Int[np.ndarray, " n"], shape: tuple[int, int]) -> Tokens:
        """Some texts as [count length E], with empty ones after the last."""
        length = np.zeros(shape[0], np.int64)
        length[: len(texts)] = self.lengths[texts]
        score = np.arange(shape[1])[None] < length[:, None]
        vectors = np.zeros((*shape, self.width), np.float32)
        first = self.starts[:-1][texts]
        vectors[score] = self.rows(np.concatenate([np.arange(n) + at for n, at in zip(length, first, strict=False)]))
        return Tokens(vectors, score)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def joined(texts: Iterable[Float[np.ndarray, "L E"]], width: int) -> "TokenVectors":
        each = list(texts)
        starts = np.concatenate([[0], np.cumsum([len(x) for x in each], dtype=np.int64)]).astype(np.int64)
        return TokenVectors(np.concatenate([np.zeros((0, width), np.float32), *each]), starts)
