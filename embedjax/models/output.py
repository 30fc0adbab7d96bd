"""What every embedder returns, and how rows are numbered on their way there."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Want = Literal["pooled", "tokens", "layers", "vectors"]


class Output(NamedTuple):
    """What was asked for, float32; the leading axes are those of the column."""

    pooled: Float[Array, "*B E"] | None = None
    """One vector a text or picture."""
    tokens: Float[Array, "*B L D"] | None = None
    """The last layer's vectors of every token, padding included, or of every patch and what stands before them."""
    layers: Float[Array, "S+1 *B L D"] | None = None
    """Every layer's, what the first one sees first."""
    stats: dict[str, Any] | None = None
    """Statistics of the batch, {"encoder": ...} by the paths of the running ones, of a tower that was not given these."""
    vectors: Float[Array, "*B L E"] | None = None
    """For late interaction one vector a token, of length 1; zeros for tokens that are not compared."""


def spread(row_B: Int[Array, "B"], copies: int) -> Int[Array, "N"]:
    """The row numbers of [B K ...] from those of [B ...]: member k of row b is b * K + k."""
    return (row_B[:, None] * copies + jnp.arange(copies, dtype=row_B.dtype)[None]).reshape(-1)
