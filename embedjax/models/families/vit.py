"""ViT (Dosovitskiy et al. 2020) and its forms: the image towers of CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023).

Takes pictures as normalised numbers; `models/image.py` makes them of bytes and varies their colours. What form Hugging Face
knows an architecture by follows from its parts, see `model_type`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.image import Vit
from embedjax.models.families.clip_text import LAYERS
from embedjax.models.layers import Attention, Dense, Embed, LayerNorm, PreNormBlock, Spec, View, stack
from embedjax.models.names import Names, Row, activation_from_hf, activation_to_hf, linear, norm
from embedjax.models.ops import ACTIVATIONS, dropout, layer_seeds, mix, token_seeds

PATCH_DROPOUT = np.uint32(0x5BD1E995)  # tells what it draws from what dropout draws of the same key
KEYS_A = -0.75  # of the cubic through four neighbours (Keys 1981, equation 4): torch's choice


class Tower(nn.Module):
    """Pictures -> vectors of class token, registers and patches, as far as there are such, in this order; float32.

    With `pooled_alone` that of the class token alone, where `pool` takes no other. With a key, patches are left out by
    `arch.patch_dropout`: as many of each picture, which ones by key and row alone.
    """

    arch: Vit
    compute: str = "float32"
    remat: bool = False
    layers: Literal["auto", "scan", "unroll"] = "auto"
    still: int = 0

    @nn.compact
    def __call__(
        self,
        pixels_BHWC: Float[Array, "B H W 3"],
        *,
        row_B: Int[Array, "B"] | None = None,
        key: UInt32[Array, ""] | None = None,
        want_layers: bool = False,
        pooled_alone: bool = False,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "S+1 B L D"] | None]:
        c, (B, *picture) = self.arch, pixels_BHWC.shape
        if picture != [c.image, c.image, 3]:
            raise ConfigError(f"pictures of {picture} numbers do not fit the tower, which takes {c.image} x {c.image} x 3")
        row_B = jnp.arange(B) if row_B is None else row_B
        spec = Spec.of(c, compute=self.compute, remat=self.remat)
        x_BLD = self._embedded(pixels_BHWC, row_B, key)
        if c.input_norm:
            x_BLD = LayerNorm(c.norm_eps, name="norm")(x_BLD)
        seed_BL = None if key is None else token_seeds(key, row_B, x_BLD.shape[1])
        x_BLD, each = stack(
            self,
            PreNormBlock(spec, parent=None),
            dropout(x_BLD, c.dropout, seed_BL, 3),
            per_layer=jnp.arange(c.depth),
            view=lambda layer: View(no_bias(), layer_seeds(seed_BL, layer)),
            want_layers=want_layers,
            only_B=jnp.zeros(B, jnp.int32) if pooled_alone and c.pool == "cls" else None,
        )
        x_BLD = LayerNorm(c.norm_eps, name="final_norm")(x_BLD)
        if c.pool == "map":  # of the encoder's tree, though `pool` is what applies it
            self.param("head", lambda rng: AttentionPool(spec, parent=None).init(rng, x_BLD)["params"])
        return x_BLD, each

    def _embedded(
        self, pixels_BHWC: Float[Array, "B H W 3"], row_B: Int[Array, "B"], key: UInt32[Array, ""] | None
    ) -> Float[Array, "B L D"]:
        """What the first layer sees, without its norm. Patches are dropped as numbers: those that stay are all that is
        projected, and no gradient is scattered."""
        c = self.arch
        embed = lambda rows, name: Embed(rows, c.width, c.init_std, name=name)
        x_BLP = patches(pixels_BHWC, c.patch)
        place = jnp.arange(c.patches)[None]
        if key is not None and c.patch_dropout:
            place = kept(c, key, row_B)
            x_BLP = jnp.take_along_axis(x_BLP, place[..., None], axis=1)
        x_BLD = Dense(c.width, self.compute, c.patch_bias, c.init_std, name="patches")(x_BLP).astype(jnp.float32)
        broad = lambda x_1LD: jnp.broadcast_to(x_1LD, (x_BLD.shape[0], *x_1LD.shape[1:]))
        first = int(c.pool == "cls")
        if first:
            x_BLD = jnp.concatenate([broad(embed(1, "class")(jnp.zeros((1, 1), jnp.int32))), x_BLD], 1)
            place = jnp.pad(place + 1, ((0, 0), (1, 0)))
        if c.positions == "learned":
            x_BLD = x_BLD + embed(first + c.patches, "positions")(place)
        else:
            x_BLD = x_BLD + jnp.asarray(fixed_positions(c))[place]
        if c.registers:
            tokens = broad(embed(c.registers, "registers")(jnp.arange(c.registers)[None]))
            x_BLD = jnp.concatenate([x_BLD[:, :first], tokens, x_BLD[:, first:]], 1)
        return x_BLD


class AttentionPool(nn.Module):
    """One vector of many by a learned query that attends to them, and a feed-forward part on it (Lee et al. 2019, PMA; as
    the MAP head of Zhai et al. 2022)."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        s, (B, _, D) = self.spec, x_BLD.shape
        dense = lambda features, name: Dense(features, s.compute, s.use_bias, s.init_std, name=name)
        probe_11D = Embed(1, D, s.init_std, name="probe")(jnp.zeros((1, 1), jnp.int32))
        y_B1D = Attention(s, name="attn")(jnp.broadcast_to(probe_11D, (B, 1, D)), View(no_bias()), x_BLD)
        h_B1F = ACTIVATIONS[s.activation](dense(s.mlp, "up")(LayerNorm(s.norm_eps, name="mlp_norm")(y_B1D)))
        return (y_B1D + dense(D, "down")(h_B1F))[:, 0].astype(jnp.float32)


def no_bias() -> Float[Array, "1 1 1 1"]:
    """Of attention that hides nothing."""
    return jnp.zeros((1, 1, 1, 1), jnp.float32)


def pool(arch: Vit, encoder: Mapping[str, Any], tokens_BLD: Float[Array, "B L D"], *, compute: str) -> Float[Array, "B D"]:
    """A picture's vector, of the tower's tokens or an earlier layer's."""
    if arch.pool == "cls":
        return tokens_BLD[:, 0]
    patches_BLD = tokens_BLD[:, arch.registers :]
    if arch.pool == "mean":
        return patches_BLD.mean(1)
    head: Any = AttentionPool(Spec.of(arch, compute=compute))  # Linen's apply is typed for every kind of module at once
    return head.apply({"params": encoder["head"]}, patches_BLD)


def patches(pixels_BHWC: Float[Array, "B H W C"], size: int) -> Float[Array, "B L P"]:
    """The numbers of each patch, row by row of patches; in a patch by row, column and channel. What is left at the right and
    lower border of a picture that is no multiple of the patch is cut off, as a convolution does."""
    B, H, W, C = pixels_BHWC.shape
    h, w = H // size, W // size
    x = pixels_BHWC[:, : h * size, : w * size].reshape(B, h, size, w, size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * w, size * size * C)


def kept(arch: Vit, key: UInt32[Array, ""], row_B: Int[Array, "B"]) -> Int[Array, "B L"]:
    """The patches that a training step sees of each picture, ascending (Li et al. 2023, section 3)."""
    count = max(1, round(arch.patches * (1 - arch.patch_dropout)))
    draw_BL = mix(token_seeds(key, row_B, arch.patches) ^ PATCH_DROPOUT)
    return jnp.sort(jnp.argsort(draw_BL, axis=1)[:, :count], axis=1)


# ---- positions


def fixed_positions(arch: Vit) -> Float[np.ndarray, "L D"]:
    """Sines and cosines of the column, then of the row, of each patch (Beyer et al. 2022, after Vaswani et al. 2017): a
    quarter of the width each, wavelengths from 2 pi to 20,000 pi. A class token comes first, with zeros."""
    side, quarter = math.isqrt(arch.patches), arch.width // 4
    frequency = 10000.0 ** (-np.arange(quarter) / max(quarter - 1, 1))
    row, column = (place.reshape(-1, 1) * frequency for place in np.mgrid[:side, :side])
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], 1)
    return np.pad(table, ((int(arch.pool == "cls"), 0), (0, 0))).astype(np.float32)


def with_table(arch: Vit, encoder: Mapping[str, Any]) -> tuple[Vit, dict[str, Any]]:
    """The same tower with its fixed positions as a table, which is how Hugging Face's models hold them."""
    if arch.positions == "learned":
        return arch, dict(encoder)
    return dataclasses.replace(arch, positions="learned"), {**encoder, "positions": {"embedding": fixed_positions(arch)}}


def resized(encoder: Mapping[str, Any], old: Vit, new: Vit) -> dict[str, Any]:
    """An encoder for pictures, or patches in number, of another size: its table of positions is interpolated. The tree is
    otherwise as it was; with as many patches, or fixed positions, all of it."""
    if old.positions != "learned" or old.patches == new.patches:
        return dict(encoder)
    table = np.asarray(encoder["positions"]["embedding"])
    return {**encoder, "positions": {"embedding": interpolated(table, math.isqrt(new.patches), first=int(old.pool == "cls"))}}


def interpolated(table_LD: Float[np.ndarray, "L D"], side: int, *, first: int) -> Float[np.ndarray, "M D"]:
    """A table of a square of positions, behind `first` others, as one of side x side. Bicubic by pixel centres, borders
    repeated and nothing smoothed beforehand: torch's interpolate(mode="bicubic"), which transformers'
    interpolate_pos_encoding calls; jax.image.resize has another cubic."""
    others, square = table_LD[:first], table_LD[first:]
    old = math.isqrt(len(square))
    weights = cubic(old, side)
    found = np.einsum("ai,bj,ijd->abd", weights, weights, square.reshape(old, old, -1).astype(np.float64))
    return np.concatenate([others, found.reshape(side * side, -1)]).astype(table_LD.dtype)


def cubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The weights of `old` samples in each of `new` ones."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for neighbour in range(-1, 3):
        place = np.floor(at).astype(int) + neighbour
        x = np.abs(at - place)
        near = ((KEYS_A + 2) * x - (KEYS_A + 3)) * x * x + 1
        far = KEYS_A * (((x - 5) * x + 8) * x - 4)
        np.add.at(weights, (np.arange(new), np.clip(place, 0, old - 1)), np.where(x <= 1, near, far))
    return weights


# ---- Hugging Face's forms


def model_type(arch: Vit) -> str:
    """The model_type of config.json by which Hugging Face knows such a tower. Raises ConfigError when there is none."""
    form = arch.pool, arch.input_norm, arch.patch_bias
    found = {
        ("cls", False, True): "vit",
        ("cls", True, False): "clip_vision_model",
        ("map", False, True): "siglip_vision_model",
        ("mean", False, True): "siglip_vision_model",  # without its head
    }
    if form not in found or arch.registers:
        told = f"pool {arch.pool!r}, input_norm {arch.input_norm}, patch_bias {arch.patch_bias} and {arch.registers} registers"
        raise ConfigError(f"no Hugging Face model of a ViT has {told}")
    if arch.positions != "learned":
        raise ConfigError("Hugging Face's ViTs hold their positions in a table: `vit.with_table` makes one of fixed positions")
    return found[form]


def sizes(arch: Vit) -> dict[str, int]:
    """The axis letters of the table of names."""
    rows = arch.patches + (arch.pool == "cls")
    return {"D": arch.width, "F": arch.mlp, "P": arch.patch, "C": 3, "N": rows, "I": 1}


OTHERS = (r"(text_model|text_projection|visual_projection)\..*", r"logit_(scale|bias)", r"embeddings\.position_ids")
LAYER = "encoder.layer.{layer}"
TABLES = {
    "vit": Names(
        prefix="vit.",
        left_out=(r"pooler\..*", r"(classifier|decoder)\..*", r"embeddings\.mask_token"),
        rows=(
            Row("class/embedding", "embeddings.cls_token", "I I D", form="rows"),
            Row("patches/kernel", "embeddings.patch_embeddings.projection.weight", "D C P P", form="conv"),
            Row("patches/bias", "embeddings.patch_embeddings.projection.bias", "D"),
            Row("positions/embedding", "embeddings.position_embeddings", "I N D", form="rows"),
            *norm("blocks/attn_norm", f"{LAYER}.layernorm_before"),
            *linear("blocks/attn/query", f"{LAYER}.attention.attention.query", "D D"),
            *linear("blocks/attn/key", f"{LAYER}.attention.attention.key", "D D"),
            *linear("blocks/attn/value", f"{LAYER}.attention.attention.value", "D D"),
            *linear("blocks/attn/out", f"{LAYER}.attention.output.dense", "D D"),
            *norm("blocks/mlp_norm", f"{LAYER}.layernorm_after"),
            *linear("blocks/up", f"{LAYER}.intermediate.dense", "F D"),
            *linear("blocks/down", f"{LAYER}.output.dense", "D F"),
            *norm("final_norm", "layernorm"),
        ),
    ),
    "clip_vision_model": Names(
        prefix="vision_model.",
        left_out=OTHERS,
        rows=(
            Row("class/embedding", "embeddings.class_embedding", "D", form="rows"),
            Row("patches/kernel", "embeddings.patch_embedding.weight", "D C P P", form="conv"),
            Row("positions/embedding", "embeddings.position_embedding.weight", "N D"),
            *norm("norm", "pre_layrnorm"),  # sic
            *LAYERS,
            *norm("final_norm", "post_layernorm"),
        ),
    ),
    "siglip_vision_model": Names(
        prefix="vision_model.",
        left_out=OTHERS,
        rows=(
            Row("patches/kernel", "embeddings.patch_embedding.weight", "D C P P", form="conv"),
            Row("patches/bias", "embeddings.patch_embedding.bias", "D"),
            Row("positions/embedding", "embeddings.position_embedding.weight", "N D"),
            *LAYERS,
            *norm("final_norm", "post_layernorm"),
        ),
    ),
}
IN_PROJECTION = tuple(f"head/attn/{part}" for part in ("query", "key", "value"))
HEAD = (
    Row("head/probe/embedding", "head.probe", "I I D", form="rows"),
    Row(tuple(f"{part}/kernel" for part in IN_PROJECTION), "head.attention.in_proj_weight", "3D D"),
    Row(tuple(f"{part}/bias" for part in IN_PROJECTION), "head.attention.in_proj_bias", "3D"),
    *linear("head/attn/out", "head.attention.out_proj", "D D"),
    *norm("head/mlp_norm", "head.layernorm"),
    *linear("head/up", "head.mlp.fc1", "F D"),
    *linear("head/down", "head.mlp.fc2", "D F"),
)


def names(arch: Vit) -> Names:
    """The table of names of an architecture's form. Raises ConfigError when there is none."""
    table = TABLES[model_type(arch)]
    return dataclasses.replace(table, rows=table.rows + HEAD) if arch.pool == "map" else table


def from_hf(config: dict[str, Any]) -> Vit:
    """The architecture a config.json of an image tower describes; what it leaves out is as in transformers' defaults. A ViT's
    picture is its class token, a SigLIP without its head the mean of its patches."""
    kind = config["model_type"]
    clip, siglip = kind == "clip_vision_model", kind == "siglip_vision_model"
    if config.get("num_channels", 3) != 3 or not config.get("qkv_bias", True):
        raise ConfigError("num_channels other than 3 and qkv_bias false are not supported")
    probs = config.get("attention_probs_dropout_prob" if kind == "vit" else "attention_dropout", 0.0)
    activation = "quick_gelu" if clip else "gelu_pytorch_tanh" if siglip else "gelu"
    return Vit(
        image=_side(config, "image_size", 224),
        patch=_side(config, "patch_size", 32 if clip else 16),
        width=config.get("hidden_size", 768),
        depth=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        mlp=config.get("intermediate_size", 3072),
        activation=activation_from_hf(config.get("hidden_act", activation)),
        norm_eps=config.get("layer_norm_eps", 1e-5 if clip else 1e-6 if siglip else 1e-12),
        pool=("map" if config.get("vision_use_head", True) else "mean") if siglip else "cls",
        input_norm=clip,
        patch_bias=not clip,
        dropout=config.get("hidden_dropout_prob" if kind == "vit" else "dropout", 0.0),
        attention_dropout=probs,
        init_std=config.get("initializer_range", 0.02),
    )


def to_hf(arch: Vit) -> dict[str, Any]:
    """The config.json of an architecture. Raises ConfigError when Hugging Face has no model of its form."""
    kind = model_type(arch)
    name = {"vit": "ViTModel", "clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}[kind]
    drop, drop_probs = (
        ("hidden_dropout_prob", "attention_probs_dropout_prob") if kind == "vit" else ("dropout", "attention_dropout")
    )
    return {
        "architectures": [name],
        "model_type": kind,
        "image_size": arch.image,
        "patch_size": arch.patch,
        "num_channels": 3,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": arch.mlp,
        "hidden_act": activation_to_hf(arch.activation),
        "layer_norm_eps": arch.norm_eps,
        drop: arch.dropout,
        drop_probs: arch.attention_dropout,
        "initializer_range": arch.init_std,
    } | ({"vision_use_head": arch.pool == "map"} if kind == "siglip_vision_model" else {})


def _side(config: dict[str, Any], key: str, default: int) -> int:
    """The side of a square, which may be written as [side, side]."""
    value = config.get(key, default)
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        return value[0]
    if isinstance(value, list):
        raise ConfigError(f"{key} is {value}; pictures and patches are squares here")
    return value
