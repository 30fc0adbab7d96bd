"""DistilBERT (Sanh et al. 2019): BERT's encoder without token types."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.model import DistilBert
from embedjax.models.layers import Embed, LayerNorm, PostNormBlock, Spec, View, padding_bias, stack
from embedjax.models.names import Names, Row, activation_from_hf, activation_to_hf, linear, norm
from embedjax.models.ops import dropout, layer_seeds, token_seeds

NORM_EPS = 1e-12  # the reference implementation has no setting for it


class Tower(nn.Module):
    """The encoder. Drops attention's output too, as BERT does and the reference implementation does not."""

    arch: DistilBert
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
        table = Sinusoids if c.sinusoidal else Embed
        x_BLD = Embed(c.vocab_size, c.width, c.init_std, name="tokens")(ids_BL)
        x_BLD = x_BLD + table(c.positions, c.width, c.init_std, name="positions")(jnp.arange(L)[None])
        x_BLD = dropout(LayerNorm(c.norm_eps, name="norm")(x_BLD), c.dropout, seed_BL, 3)
        bias = padding_bias(mask_BL)
        return stack(
            self,
            PostNormBlock(Spec.of(c, compute=self.compute, remat=self.remat), parent=None),
            x_BLD,
            per_layer=jnp.arange(c.depth),
            view=lambda layer: View(bias, layer_seeds(seed_BL, layer)),
            want_layers=want_layers,
        )


class Sinusoids(Embed):
    """A table that starts from sines at even features and cosines at odd ones (Vaswani et al. 2017, section 3.5)."""

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.param("embedding", lambda key: sinusoids(self.rows, self.width))[ids]


def sinusoids(rows: int, width: int) -> Float[Array, "P D"]:
    """sin(p / 10000^(2i/D)) at feature 2i and the cosine of the same angle at 2i + 1, for position p."""
    angle = np.arange(rows)[:, None] / 10000 ** (2 * (np.arange(width) // 2) / width)[None]
    return jnp.asarray(np.where(np.arange(width) % 2 == 0, np.sin(angle), np.cos(angle)), jnp.float32)


def longest(arch: DistilBert) -> int:
    """Most tokens a text may have."""
    return arch.positions


def sizes(arch: DistilBert) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {"V": arch.vocab_size, "P": arch.positions, "D": arch.width, "F": arch.mlp}


names = Names(
    prefix="distilbert.",
    left_out=(r"embeddings\.position_ids", r"vocab_.*", r"pre_classifier\..*", r"classifier\..*", r"qa_outputs\..*"),
    rows=(
        Row("tokens/embedding", "embeddings.word_embeddings.weight", "V D"),
        Row("positions/embedding", "embeddings.position_embeddings.weight", "P D"),
        *norm("norm", "embeddings.LayerNorm"),
        *linear("blocks/attn/query", "transformer.layer.{layer}.attention.q_lin", "D D"),
        *linear("blocks/attn/key", "transformer.layer.{layer}.attention.k_lin", "D D"),
        *linear("blocks/attn/value", "transformer.layer.{layer}.attention.v_lin", "D D"),
        *linear("blocks/attn/out", "transformer.layer.{layer}.attention.out_lin", "D D"),
        *norm("blocks/attn_norm", "transformer.layer.{layer}.sa_layer_norm"),
        *linear("blocks/up", "transformer.layer.{layer}.ffn.lin1", "F D"),
        *linear("blocks/down", "transformer.layer.{layer}.ffn.lin2", "D F"),
        *norm("blocks/mlp_norm", "transformer.layer.{layer}.output_layer_norm"),
    ),
)


def from_hf(config: dict[str, Any]) -> DistilBert:
    """The architecture a config.json describes."""
    return DistilBert(
        vocab_size=config["vocab_size"],
        width=config["dim"],
        depth=config["n_layers"],
        heads=config["n_heads"],
        mlp=config["hidden_dim"],
        positions=config["max_position_embeddings"],
        activation=activation_from_hf(config.get("activation", "gelu")),
        norm_eps=NORM_EPS,
        dropout=config.get("dropout", 0.1),
        attention_dropout=config.get("attention_dropout", 0.1),
        init_std=config.get("initializer_range", 0.02),
        pad_id=config.get("pad_token_id", 0),
        sinusoidal=config.get("sinusoidal_pos_embds", False),
    )


def to_hf(arch: DistilBert) -> dict[str, Any]:
    """The config.json of an architecture."""
    if arch.norm_eps != NORM_EPS:
        raise ConfigError(f"DistilBert.norm_eps is {arch.norm_eps}; other readers know only {NORM_EPS}")
    return {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": arch.vocab_size,
        "dim": arch.width,
        "n_layers": arch.depth,
        "n_heads": arch.heads,
        "hidden_dim": arch.mlp,
        "max_position_embeddings": arch.positions,
        "activation": activation_to_hf(arch.activation),
        "dropout": arch.dropout,
        "attention_dropout": arch.attention_dropout,
        "initializer_range": arch.init_std,
        "pad_token_id": arch.pad_id,
        "sinusoidal_pos_embds": arch.sinusoidal,
    }
