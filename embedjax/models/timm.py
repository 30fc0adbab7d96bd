"""timm's ViTs that models of open_clip see with, by timm's names: what they are, and what they call their tensors."""

import dataclasses
from typing import Literal

from embedjax.config import Vit
from embedjax.config.errors import ConfigError
from embedjax.config.model import Activation
from embedjax.models.names import Names, Row, linear, norm

Pooling = Literal["cls", "mean", "map"]

_SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
}
_PLAIN = (
    ("tiny", 16, (224, 384)),
    ("small", 32, (224, 384)),
    ("small", 16, (224, 384)),
    ("small", 8, (224,)),
    ("base", 32, (224, 384)),
    ("base", 16, (224, 384)),
    ("base", 8, (224,)),
    ("large", 32, (224, 384)),
    ("large", 16, (224, 384)),
    ("large", 14, (224,)),
    ("huge", 14, (224,)),
)
_SIGLIP: tuple[tuple[str, int, tuple[int, ...], Activation], ...] = (  # SigLIP itself has gelu_tanh throughout
    ("base", 32, (256,), "gelu_tanh"),
    ("base", 16, (224, 256, 384, 512), "gelu"),
    ("large", 16, (256, 384), "gelu"),
    ("large", 16, (512,), "gelu_tanh"),
    ("so400m", 14, (224, 378, 384), "gelu"),
    ("so400m", 16, (256, 384, 512), "gelu_tanh"),
)
_FORMS: tuple[tuple[str, Pooling], ...] = (("siglip", "map"), ("siglip_gap", "mean"))

VITS: dict[str, Vit] = {
    **{
        f"vit_{size}_patch{patch}_{image}": Vit(image, patch, *_SIZES[size])
        for size, patch, images in _PLAIN
        for image in images
    },
    **{
        f"vit_{size}_patch{patch}_{form}_{image}": Vit(image, patch, *_SIZES[size], activation=activation, pool=pool)
        for form, pool in _FORMS
        for size, patch, images, activation in _SIGLIP
        for image in images
    },
}
POOLS: dict[Pooling, str] = {"cls": "token", "mean": "avg", "map": "map"}
"""timm's name of each way to pool."""


def name_of(arch: Vit) -> str:
    """The model of an architecture. Raises ConfigError where timm has none, and says how the nearest differs."""
    mine = _shape(arch)
    apart = {name: sum(mine[key] != value for key, value in _shape(vit).items()) for name, vit in VITS.items()}
    nearest = min(apart, key=lambda name: apart[name])
    if apart[nearest]:
        odd = ", ".join(f"{key} {value}, not {mine[key]}" for key, value in _shape(VITS[nearest]).items() if mine[key] != value)
        raise ConfigError(f"open_clip has no image tower like this; the nearest, timm's {nearest}, has {odd}")
    return nearest


def _shape(arch: Vit) -> dict[str, object]:
    """What decides an architecture's vectors."""
    training = {"dropout", "attention_dropout", "patch_dropout", "init_std"}
    return {key: value for key, value in dataclasses.asdict(arch).items() if key not in training}


LAYER = "blocks.{layer}"
ATTENTION = tuple(f"blocks/attn/{part}" for part in ("query", "key", "value"))
ROWS = (
    Row("patches/kernel", "patch_embed.proj.weight", "D C P P", form="conv"),
    Row("patches/bias", "patch_embed.proj.bias", "D"),
    Row("positions/embedding", "pos_embed", "I N D", form="rows"),
    *norm("blocks/attn_norm", f"{LAYER}.norm1"),
    Row(tuple(f"{part}/kernel" for part in ATTENTION), f"{LAYER}.attn.qkv.weight", "3D D"),
    Row(tuple(f"{part}/bias" for part in ATTENTION), f"{LAYER}.attn.qkv.bias", "3D"),
    *linear("blocks/attn/out", f"{LAYER}.attn.proj", "D D"),
    *norm("blocks/mlp_norm", f"{LAYER}.norm2"),
    *linear("blocks/up", f"{LAYER}.mlp.fc1", "F D"),
    *linear("blocks/down", f"{LAYER}.mlp.fc2", "D F"),
    *norm("final_norm", "norm"),
)
CLASS = (Row("class/embedding", "cls_token", "I I D", form="rows"),)
KEY_VALUE = tuple(f"head/attn/{part}" for part in ("key", "value"))
HEAD = (
    Row("head/probe/embedding", "attn_pool.latent", "I I D", form="rows"),
    *linear("head/attn/query", "attn_pool.q", "D D"),
    Row(tuple(f"{part}/kernel" for part in KEY_VALUE), "attn_pool.kv.weight", "2D D"),
    Row(tuple(f"{part}/bias" for part in KEY_VALUE), "attn_pool.kv.bias", "2D"),
    *linear("head/attn/out", "attn_pool.proj", "D D"),
    *norm("head/mlp_norm", "attn_pool.norm"),
    *linear("head/up", "attn_pool.mlp.fc1", "F D"),
    *linear("head/down", "attn_pool.mlp.fc2", "D F"),
)


def names(arch: Vit, prefix: str) -> Names:
    """The table of names of an architecture's form."""
    return Names(ROWS + {"cls": CLASS, "mean": (), "map": HEAD}[arch.pool], left_out=(), prefix=prefix)
