"""MPNet (Song et al. 2020): BERT's layers, RoBERTa's positions, and one relative position bias shared by all layers."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.model import Mpnet
from embedjax.models.families import bert
from embedjax.models.layers import Embed, LayerNorm, PostNormBlock, Spec, View, counted_positions, padding_bias, stack
from embedjax.models.names import Names, Row, linear, norm
from embedjax.models.ops import dropout, layer_seeds, token_seeds

FARTHEST = 128  # distances from here on share the last bucket
PAD_ID, BUCKETS = 1, 32  # the reference implementation's code holds both, whatever its config says


class Tower(nn.Module):
    """The encoder."""

    arch: Mpnet
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
        c, (B, L) = self.arch, ids_BL.shape
        if longest(c) < L:
            raise ConfigError(f"texts of {L} tokens do not fit the {longest(c)} positions of the tower; lower max_length")
        embed = lambda rows, width, name: Embed(rows, width, c.init_std, name=name)
        seed_BL = None if key is None else token_seeds(key, jnp.arange(B) if row_B is None else row_B, L)
        x_BLD = embed(c.vocab_size, c.width, "tokens")(ids_BL)
        x_BLD = x_BLD + embed(c.positions, c.width, "positions")(counted_positions(ids_BL, c.pad_id))
        x_BLD = dropout(LayerNorm(c.norm_eps, name="norm")(x_BLD), c.dropout, seed_BL, 3)
        padding = padding_bias(mask_BL)
        relative = embed(c.relative_buckets, c.heads, "relative")(buckets(L, c.relative_buckets)).transpose(2, 0, 1)[None]
        return stack(
            self,
            PostNormBlock(Spec.of(c, compute=self.compute, remat=self.remat), parent=None),
            x_BLD,
            per_layer=jnp.arange(c.depth),
            # The sum is left to each layer, where it fuses with the softmax: stored, it would take B H L L floats.
            view=lambda layer: View(padding + relative, layer_seeds(seed_BL, layer)),
            want_layers=want_layers,
        )


def buckets(length: int, count: int) -> Int[Array, "L L"]:
    """The bucket of each (query, key) pair: half of them for keys after the query, each half exact up to a quarter of all
    buckets and logarithmic from there to FARTHEST (T5, Raffel et al. 2020, section 2.1)."""
    half, exact = count // 2, count // 4
    distance = np.arange(FARTHEST + 1, dtype=np.float32)
    # Of distances alone and in numpy: a backend's own logarithm may round to the other side of a bucket's edge.
    scaled = (
        np.log(np.maximum(distance, 1) / np.float32(exact)) / np.float32(np.log(FARTHEST / exact)) * np.float32(half - exact)
    )
    far = np.minimum(exact + scaled.astype(np.int32), half - 1)
    bucket = jnp.asarray(np.where(distance < exact, distance.astype(np.int32), far))
    offset_LL = jnp.arange(length)[None] - jnp.arange(length)[:, None]
    return bucket[jnp.minimum(jnp.abs(offset_LL), FARTHEST)] + half * (offset_LL > 0)


def longest(arch: Mpnet) -> int:
    """Most tokens a text may have: tokens never use the first pad_id + 1 rows of the position table."""
    return arch.positions - arch.pad_id - 1


def sizes(arch: Mpnet) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {
        "V": arch.vocab_size,
        "P": arch.positions,
        "R": arch.relative_buckets,
        "H": arch.heads,
        "D": arch.width,
        "F": arch.mlp,
    }


names = Names(
    prefix="mpnet.",
    left_out=(r"embeddings\.position_ids", r"pooler\..*", r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*"),
    rows=(
        Row("tokens/embedding", "embeddings.word_embeddings.weight", "V D"),
        Row("positions/embedding", "embeddings.position_embeddings.weight", "P D"),
        *norm("norm", "embeddings.LayerNorm"),
        Row("relative/embedding", "encoder.relative_attention_bias.weight", "R H"),
        *linear("blocks/attn/query", "encoder.layer.{layer}.attention.attn.q", "D D"),
        *linear("blocks/attn/key", "encoder.layer.{layer}.attention.attn.k", "D D"),
        *linear("blocks/attn/value", "encoder.layer.{layer}.attention.attn.v", "D D"),
        *linear("blocks/attn/out", "encoder.layer.{layer}.attention.attn.o", "D D"),
        *norm("blocks/attn_norm", "encoder.layer.{layer}.attention.LayerNorm"),
        *linear("blocks/up", "encoder.layer.{layer}.intermediate.dense", "F D"),
        *linear("blocks/down", "encoder.layer.{layer}.output.dense", "D F"),
        *norm("blocks/mlp_norm", "encoder.layer.{layer}.output.LayerNorm"),
    ),
)


def from_hf(config: dict[str, Any]) -> Mpnet:
    """The architecture a config.json describes."""
    pad_id = config.get("pad_token_id")
    arch = Mpnet(
        **bert.fields_from_hf(config),
        pad_id=PAD_ID if pad_id is None else pad_id,
        relative_buckets=config.get("relative_attention_num_buckets", BUCKETS),
    )
    _check(arch)
    return arch


def to_hf(arch: Mpnet) -> dict[str, Any]:
    """The config.json of an architecture."""
    _check(arch)
    kind = {"architectures": ["MPNetModel"], "model_type": "mpnet"}
    return kind | bert.fields_to_hf(arch) | {"relative_attention_num_buckets": arch.relative_buckets}


def _check(arch: Mpnet) -> None:
    if (arch.pad_id, arch.relative_buckets) != (PAD_ID, BUCKETS):
        raise ConfigError(
            f"Mpnet has pad_id {arch.pad_id} and relative_buckets {arch.relative_buckets}; other readers know only "
            f"{PAD_ID} and {BUCKETS}"
        )
