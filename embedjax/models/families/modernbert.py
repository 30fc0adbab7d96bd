"""ModernBERT (Warner et al. 2024): pre-norm, rotary positions, gated feed-forward, local and global attention, no biases."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.model import ModernBert
from embedjax.models.attention import rope_table
from embedjax.models.layers import MASKED, Embed, LayerNorm, PreNormGatedBlock, Spec, View, padding_bias, stack
from embedjax.models.names import Names, Row, activation_from_hf, activation_to_hf
from embedjax.models.ops import dropout, layer_seeds, token_seeds


class Tower(nn.Module):
    """The encoder. What differs between layers (window, rotary base, the first one's missing norm) is data, not structure."""

    arch: ModernBert
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
        x_BLD = Embed(c.vocab_size, c.width, c.init_std, name="tokens")(ids_BL)
        x_BLD = dropout(LayerNorm(c.norm_eps, use_bias=False, name="norm")(x_BLD), c.dropout, seed_BL, 3)
        padding, window_LL = padding_bias(mask_BL), outside(L, c.local_window)
        ropes = [rope_table(L, c.width // c.heads, theta) for theta in (c.global_theta, c.local_theta)]
        cos_2LK, sin_2LK = (jnp.stack(tables) for tables in zip(*ropes, strict=True))

        def view(layer: Int[Array, ""]) -> View:
            local = layer % c.global_every != 0
            bias = padding + jnp.where(local & window_LL, MASKED, 0.0)[None, None]
            rope = cos_2LK[local.astype(jnp.int32)], sin_2LK[local.astype(jnp.int32)]
            return View(bias, layer_seeds(seed_BL, layer), rope, attn_norm=layer > 0)

        x_BLD, each = stack(
            self,
            PreNormGatedBlock(Spec.of(c, compute=self.compute, remat=self.remat, use_bias=False), parent=None),
            x_BLD,
            per_layer=jnp.arange(c.depth),
            view=view,
            want_layers=want_layers,
        )
        return LayerNorm(c.norm_eps, use_bias=False, name="final_norm")(x_BLD), each


def outside(length: int, window: int) -> Bool[Array, "L L"]:
    """Which (query, key) pairs a local layer hides: those more than half a window apart."""
    place_L = jnp.arange(length)
    return jnp.abs(place_L[:, None] - place_L[None]) > window // 2


def longest(arch: ModernBert) -> int:
    """Most tokens a text may have."""
    return arch.positions


def sizes(arch: ModernBert) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {"V": arch.vocab_size, "D": arch.width, "F": arch.mlp}


names = Names(
    prefix="model.",
    left_out=(r"head\..*", r"decoder\..*", r"classifier\..*", r"qa_outputs\..*"),
    rows=(
        Row("tokens/embedding", "embeddings.tok_embeddings.weight", "V D"),
        Row("norm/scale", "embeddings.norm.weight", "D"),
        Row("blocks/attn_norm/scale", "layers.{layer}.attn_norm.weight", "D", first=False),
        Row(
            ("blocks/attn/query/kernel", "blocks/attn/key/kernel", "blocks/attn/value/kernel"),
            "layers.{layer}.attn.Wqkv.weight",
            "3D D",
        ),
        Row("blocks/attn/out/kernel", "layers.{layer}.attn.Wo.weight", "D D"),
        Row("blocks/mlp_norm/scale", "layers.{layer}.mlp_norm.weight", "D"),
        Row("blocks/up/kernel", "layers.{layer}.mlp.Wi.weight", "2F D"),
        Row("blocks/down/kernel", "layers.{layer}.mlp.Wo.weight", "D F"),
        Row("final_norm/scale", "final_norm.weight", "D"),
    ),
)


def from_hf(config: dict[str, Any]) -> ModernBert:
    """The architecture a config.json describes, in transformers' newer spelling (rope_parameters, layer_types) or the older."""
    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        if config.get(key):
            raise ConfigError(f"{key} is {config[key]}; a ModernBERT with biases is not supported")
    global_theta = _theta(config, "full_attention", "global_rope_theta", 160000.0)
    return ModernBert(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        positions=config["max_position_embeddings"],
        activation=activation_from_hf(config.get("hidden_activation", "gelu")),
        norm_eps=config.get("norm_eps", 1e-5),
        dropout=config.get("mlp_dropout", 0.0),
        attention_dropout=config.get("attention_dropout", 0.0),
        init_std=config.get("initializer_range", 0.02),
        pad_id=config.get("pad_token_id", 50283),
        global_every=_global_every(config),
        local_window=config.get("local_attention", 128),
        global_theta=global_theta,
        local_theta=_theta(config, "sliding_attention", "local_rope_theta", 10000.0),
    )


def to_hf(arch: ModernBert) -> dict[str, Any]:
    """The config.json of an architecture, in both spellings: transformers before 5 and today's servers read the older."""
    rope = {"full_attention": arch.global_theta, "sliding_attention": arch.local_theta}
    return {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": arch.mlp,
        "max_position_embeddings": arch.positions,
        "hidden_activation": activation_to_hf(arch.activation),
        "norm_eps": arch.norm_eps,
        "embedding_dropout": arch.dropout,
        "mlp_dropout": arch.dropout,
        "attention_dropout": arch.attention_dropout,
        "initializer_range": arch.init_std,
        "pad_token_id": arch.pad_id,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "local_attention": arch.local_window,
        "layer_types": _layer_types(arch.depth, arch.global_every),
        "global_attn_every_n_layers": arch.global_every,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in rope.items()},
        "global_rope_theta": arch.global_theta,
        "local_rope_theta": arch.local_theta,
    }


def _theta(config: dict[str, Any], kind: str, older: str, default: float) -> float:
    rope = (config.get("rope_parameters") or {}).get(kind) or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ConfigError(f"rotary positions of type {rope.get('rope_type', config.get('rope_scaling'))!r} are not supported")
    theta = rope.get("rope_theta", config.get(older))
    return default if theta is None else theta


def _layer_types(depth: int, every: int) -> list[str]:
    return ["sliding_attention" if layer % every else "full_attention" for layer in range(depth)]


def _global_every(config: dict[str, Any]) -> int:
    every, types = config.get("global_attn_every_n_layers") or 3, config.get("layer_types")
    if types is None:
        return every
    second = next((n for n, kind in enumerate(types) if n and kind == "full_attention"), max(len(types), 1))
    for candidate in (every, second):
        if len(types) == config["num_hidden_layers"] and types == _layer_types(len(types), candidate):
            return candidate
    raise ConfigError(
        f"layer_types is {types}; expected full_attention in the first and every n-th layer, else sliding_attention"
    )
