"""A token table without layers: sentence-transformers' StaticEmbedding (torch's EmbeddingBag), and the tables of model2vec.

Token vectors are those of the table; the mean over a text is the head's, as for every tower. A table has no config.json: its
sizes are those of its tensor.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.model import Static
from embedjax.models.layers import Embed
from embedjax.models.names import Names, Row
from embedjax.models.ops import by_rows

LONGEST = 1 << 20  # stands for any text: there are no positions


class Tower(nn.Module):
    """Token ids -> the table's vectors, float32. There are no layers to loop over or to recompute."""

    arch: Static
    compute: str = "float32"
    remat: bool = False
    layers: Literal["auto", "scan", "unroll"] = "auto"
    still: int = 0

    @nn.compact
    def __call__(
        self,
        ids_BL: Int[Array, "B L"],
        mask_BL: Bool[Array, "B L"],
        *,
        row_B: Int[Array, "B"] | None = None,
        key: UInt32[Array, ""] | None = None,
        want_layers: bool = False,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "S+1 B L D"] | None]:
        x_BLD = by_rows(Embed(self.arch.vocab_size, self.arch.width, self.arch.init_std, name="tokens")(ids_BL))
        return x_BLD, x_BLD[None] if want_layers else None


def longest(arch: Static) -> int:
    """Most tokens a text may have."""
    return LONGEST


def sizes(arch: Static) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {"V": arch.vocab_size, "D": arch.width}


names = Names(rows=(Row("tokens/embedding", "embedding.weight", "V D"),), left_out=())


def from_model2vec(tensors: Mapping[str, np.ndarray], *, file: object) -> dict[str, np.ndarray]:
    """The tensors under StaticEmbedding's name. model2vec calls the table `embeddings`, and may hold fewer rows than tokens:
    `mapping` then tells each token's row, and `weights` its factor. Raises ConfigError for a mapping that points outside."""
    if "embeddings" not in tensors:
        return dict(tensors)
    table = tensors["embeddings"]
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("embeddings", "mapping", "weights")}
    if "mapping" in tensors:
        rows = tensors["mapping"]
        if rows.dtype.kind not in "iu" or rows.min(initial=0) < 0 or rows.max(initial=0) >= len(table):
            raise ConfigError(f"{file}: `mapping` points outside the {len(table)} rows of `embeddings`")
        table = table[rows]
    if "weights" in tensors:
        weights = tensors["weights"]
        if weights.shape != table.shape[:1]:
            raise ConfigError(f"{file}: `weights` holds {list(weights.shape)} numbers for {len(table)} tokens")
        table = table * weights[:, None]
    return {"embedding.weight": table} | rest
