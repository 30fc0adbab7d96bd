"""BERT (Devlin et al. 2018), and the tower of RoBERTa and XLM-R, which number positions otherwise (names in `roberta.py`).

Decoders, cross-attention and relative positions are refused.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.model import Bert, Roberta, Transformer
from embedjax.models.layers import Embed, LayerNorm, PostNormBlock, Spec, View, counted_positions, padding_bias, stack
from embedjax.models.names import Names, Row, activation_from_hf, activation_to_hf, linear, norm
from embedjax.models.ops import dropout, layer_seeds, token_seeds


class Tower(nn.Module):
    """Token ids -> token vectors, float32; with `want_layers` every layer's too."""

    arch: Bert | Roberta
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
        seed_BL = None if key is None else token_seeds(key, jnp.arange(B) if row_B is None else row_B, L)
        bias = padding_bias(mask_BL)
        return stack(
            self,
            PostNormBlock(Spec.of(c, compute=self.compute, remat=self.remat), parent=None),
            embedded(c, ids_BL, seed_BL),
            per_layer=jnp.arange(c.depth),
            view=lambda layer: View(bias, layer_seeds(seed_BL, layer)),
            want_layers=want_layers,
        )


def embedded(c: Bert | Roberta, ids_BL: Int[Array, "B L"], seed_BL: UInt32[Array, "B L"] | None) -> Float[Array, "B L D"]:
    """What the first layer sees, with parameters of the module it is called in."""
    embed = lambda rows, name: Embed(rows, c.width, c.init_std, name=name)
    places = counted_positions(ids_BL, c.pad_id) if isinstance(c, Roberta) else jnp.arange(ids_BL.shape[1])[None]
    x_BLD = embed(c.vocab_size, "tokens")(ids_BL) + embed(c.positions, "positions")(places)
    x_BLD = x_BLD + embed(c.token_types, "types")(jnp.zeros((1, 1), jnp.int32))
    return dropout(LayerNorm(c.norm_eps, name="norm")(x_BLD), c.dropout, seed_BL, 3)


def longest(arch: Bert | Roberta) -> int:
    """Most tokens a text may have: RoBERTa's tokens never use the first pad_id + 1 rows of the position table."""
    return arch.positions - (arch.pad_id + 1 if isinstance(arch, Roberta) else 0)


def sizes(arch: Bert | Roberta) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {"V": arch.vocab_size, "P": arch.positions, "T": arch.token_types, "D": arch.width, "F": arch.mlp}


LAYER = "encoder.layer.{layer}"
names = Names(
    prefix="bert.",
    left_out=(r"embeddings\.(position_ids|token_type_ids)", r"pooler\..*", r"cls\..*", r"(lm_head|classifier|qa_outputs)\..*"),
    rows=(
        Row("tokens/embedding", "embeddings.word_embeddings.weight", "V D"),
        Row("positions/embedding", "embeddings.position_embeddings.weight", "P D"),
        Row("types/embedding", "embeddings.token_type_embeddings.weight", "T D"),
        *norm("norm", "embeddings.LayerNorm"),
        *linear("blocks/attn/query", f"{LAYER}.attention.self.query", "D D"),
        *linear("blocks/attn/key", f"{LAYER}.attention.self.key", "D D"),
        *linear("blocks/attn/value", f"{LAYER}.attention.self.value", "D D"),
        *linear("blocks/attn/out", f"{LAYER}.attention.output.dense", "D D"),
        *norm("blocks/attn_norm", f"{LAYER}.attention.output.LayerNorm"),
        *linear("blocks/up", f"{LAYER}.intermediate.dense", "F D"),
        *linear("blocks/down", f"{LAYER}.output.dense", "D F"),
        *norm("blocks/mlp_norm", f"{LAYER}.output.LayerNorm"),
    ),
)


def from_hf(config: dict[str, Any]) -> Bert:
    """The architecture a config.json describes."""
    return Bert(**fields_from_hf(config), token_types=config.get("type_vocab_size", 2), pad_id=config.get("pad_token_id") or 0)


def to_hf(arch: Bert) -> dict[str, Any]:
    """The config.json of an architecture."""
    kind = {"architectures": ["BertModel"], "model_type": "bert", "position_embedding_type": "absolute"}
    return kind | fields_to_hf(arch) | {"type_vocab_size": arch.token_types}


def fields_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """What all descendants of BERT name alike in config.json. Raises ConfigError for what the tower does not compute."""
    for key, known in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
        if config.get(key, known) != known:
            raise ConfigError(f"{key} {config[key]!r} is not supported; expected {known!r}")
    return {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp": config["intermediate_size"],
        "positions": config["max_position_embeddings"],
        "activation": activation_from_hf(config.get("hidden_act", "gelu")),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
        "init_std": config.get("initializer_range", 0.02),
    }


def fields_to_hf(arch: Transformer) -> dict[str, Any]:
    """The inverse of `fields_from_hf`, and the padding token."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": arch.mlp,
        "max_position_embeddings": arch.positions,
        "hidden_act": activation_to_hf(arch.activation),
        "layer_norm_eps": arch.norm_eps,
        "hidden_dropout_prob": arch.dropout,
        "attention_probs_dropout_prob": arch.attention_dropout,
        "initializer_range": arch.init_std,
        "pad_token_id": arch.pad_id,
    }
