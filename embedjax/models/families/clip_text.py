"""CLIP's text tower (Radford et al. 2021), and the tower of SigLIP, which sees the whole text (names in `siglip_text.py`).

A tower's vectors are those of its tokens: the projection after pooling is the head's, and `models/clip.py` knows its name.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.model import ClipText, SiglipText, Transformer
from embedjax.models.layers import MASKED, Embed, LayerNorm, PreNormBlock, Spec, View, padding_bias, stack
from embedjax.models.names import Names, Row, activation_from_hf, activation_to_hf, linear, norm
from embedjax.models.ops import dropout, layer_seeds, token_seeds


class Tower(nn.Module):
    """Token ids -> token vectors, float32; with `only` the vector of the token at that place of each text alone. CLIP's tokens
    see those before them, SigLIP's all."""

    arch: ClipText | SiglipText
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
        only_B: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "S+1 B L D"] | None]:
        c, (B, L) = self.arch, ids_BL.shape
        if longest(c) < L:
            raise ConfigError(f"texts of {L} tokens do not fit the {longest(c)} positions of the tower; lower max_length")
        seed_BL = None if key is None else token_seeds(key, jnp.arange(B) if row_B is None else row_B, L)
        embed = lambda rows, name: Embed(rows, c.width, c.init_std, name=name)
        x_BLD = embed(c.vocab_size, "tokens")(ids_BL) + embed(c.positions, "positions")(jnp.arange(L)[None])
        later_LL = jnp.arange(L)[None] > jnp.arange(L)[:, None]
        if not isinstance(c, ClipText):
            later_LL = jnp.zeros_like(later_LL)
        padding, causal = padding_bias(mask_BL), jnp.where(later_LL, MASKED, 0.0).astype(jnp.float32)[None, None]
        x_BLD, each = stack(
            self,
            PreNormBlock(Spec.of(c, compute=self.compute, remat=self.remat), parent=None),
            dropout(x_BLD, c.dropout, seed_BL, 3),
            per_layer=jnp.arange(c.depth),
            # The sum is left to each layer, where it fuses with the softmax: stored, it would take B L L floats.
            view=lambda layer: View(padding + causal, layer_seeds(seed_BL, layer)),
            want_layers=want_layers,
            only_B=only_B,
        )
        return LayerNorm(c.norm_eps, name="final_norm")(x_BLD), each


def longest(arch: ClipText | SiglipText) -> int:
    """Most tokens a text may have."""
    return arch.positions


def sizes(arch: ClipText | SiglipText) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {"V": arch.vocab_size, "P": arch.positions, "D": arch.width, "F": arch.mlp}


LAYER = "encoder.layers.{layer}"
LAYERS: tuple[Row, ...] = (  # of the image towers too
    *norm("blocks/attn_norm", f"{LAYER}.layer_norm1"),
    *linear("blocks/attn/query", f"{LAYER}.self_attn.q_proj", "D D"),
    *linear("blocks/attn/key", f"{LAYER}.self_attn.k_proj", "D D"),
    *linear("blocks/attn/value", f"{LAYER}.self_attn.v_proj", "D D"),
    *linear("blocks/attn/out", f"{LAYER}.self_attn.out_proj", "D D"),
    *norm("blocks/mlp_norm", f"{LAYER}.layer_norm2"),
    *linear("blocks/up", f"{LAYER}.mlp.fc1", "F D"),
    *linear("blocks/down", f"{LAYER}.mlp.fc2", "D F"),
)
names = Names(
    prefix="text_model.",
    left_out=(
        r"embeddings\.position_ids",
        r"(text_projection|head)\..*",
        r"(vision_model|visual_projection)\..*",
        r"logit_(scale|bias)",
    ),
    rows=(
        Row("tokens/embedding", "embeddings.token_embedding.weight", "V D"),
        Row("positions/embedding", "embeddings.position_embedding.weight", "P D"),
        *LAYERS,
        *norm("final_norm", "final_layer_norm"),
    ),
)

LEGACY_EOS = 2  # in configs of before July 2023: then readers pool at the largest id, the vocabulary's last


def from_hf(config: dict[str, Any]) -> ClipText:
    """The architecture a config.json of a text tower describes; what it leaves out is as in transformers' defaults."""
    fields = fields_from_hf(config, ClipText())
    eos_id = config.get("eos_token_id", 49407)
    return ClipText(**fields, eos_id=fields["vocab_size"] - 1 if eos_id == LEGACY_EOS else eos_id)


def to_hf(arch: ClipText) -> dict[str, Any]:
    """The config.json of an architecture. Raises ConfigError for an end of text that other readers would not find."""
    if arch.eos_id == LEGACY_EOS and arch.vocab_size != LEGACY_EOS + 1:
        raise ConfigError(f"ClipText.eos_id is {LEGACY_EOS}, by which other readers know older models; let another token be it")
    kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    return kind | fields_to_hf(arch) | {"eos_token_id": arch.eos_id}


def fields_from_hf(config: dict[str, Any], default: Transformer) -> dict[str, Any]:
    """What CLIP's and SigLIP's text towers name alike in config.json."""
    pad_id = config.get("pad_token_id", 1)
    return {
        "vocab_size": config.get("vocab_size", default.vocab_size),
        "width": config.get("hidden_size", default.width),
        "depth": config.get("num_hidden_layers", default.depth),
        "heads": config.get("num_attention_heads", default.heads),
        "mlp": config.get("intermediate_size", default.mlp),
        "positions": config.get("max_position_embeddings", default.positions),
        "activation": activation_from_hf(config.get("hidden_act", activation_to_hf(default.activation))),
        "norm_eps": config.get("layer_norm_eps", default.norm_eps),
        "dropout": config.get("dropout", 0.0),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "init_std": config.get("initializer_range", 0.02),
        "pad_id": default.pad_id if pad_id is None else pad_id,
    }


def fields_to_hf(arch: Transformer) -> dict[str, Any]:
    """The inverse of `fields_from_hf`."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": arch.mlp,
        "max_position_embeddings": arch.positions,
        "hidden_act": activation_to_hf(arch.activation),
        "layer_norm_eps": arch.norm_eps,
        "dropout": arch.dropout,
        "attention_dropout": arch.attention_dropout,
        "initializer_range": arch.init_std,
        "pad_token_id": arch.pad_id,
    }
