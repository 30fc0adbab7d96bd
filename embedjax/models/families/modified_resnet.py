"""CLIP's ModifiedResNet (Radford et al. 2021, section 2.4): RN50 and its scalings, by the names OpenAI and open_clip give their
tensors. Hugging Face has no model of it.

Takes pictures as normalised numbers, as `vit.py` does.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.resnet import ModifiedResnet
from embedjax.models.attention import attend
from embedjax.models.convolution import Convolution, Seen, as_tokens, mean_pool, present
from embedjax.models.families.resnet import Stage, norm_rows, require_picture
from embedjax.models.families.vit import interpolated, no_bias
from embedjax.models.layers import Dense, Embed
from embedjax.models.names import Names, Row, linear


class Tower(nn.Module):
    """Pictures -> the places of the last map, float32, and the statistics of the batch where they were not given.

    Nothing in it is drawn by a key. The stages are always unrolled: no two of their first blocks are alike. `remat` recomputes
    each block.
    """

    arch: ModifiedResnet
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
    ) -> tuple[Float[Array, "B L C"], None, Seen]:
        c, seen = self.arch, {}
        require_picture(c.image, pixels_BHWC)
        x, seen["stem"] = Stem(c.channels, c.norm_eps, self.compute, name="stem")(pixels_BHWC)
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for n, depth in enumerate(c.depths):
            make = functools.partial(block, c.channels * 2**n, 2 if n else 1, c.norm_eps, self.compute)
            x, seen[f"stage{n + 1}"] = Stage(make, depth, name=f"stage{n + 1}")(x)
        tokens = as_tokens(x)
        # Of the encoder's tree, though `pool` is what applies it.
        self.param("head", lambda rng: AttentionPool(c, self.compute, parent=None).init(rng, tokens)["params"])
        return tokens, None, present(**seen)


class Stem(nn.Module):
    """Three convolutions, the first with stride 2, and the mean of 2 x 2."""

    channels: int
    eps: float
    compute: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], Seen]:
        seen: Seen = {}
        for n, (features, stride) in enumerate(((self.channels // 2, 2), (self.channels // 2, 1), (self.channels, 1)), 1):
            name = f"conv{n}"
            x, seen[name] = Convolution(features, 3, stride, eps=self.eps, compute=self.compute, name=name)(x)
        return mean_pool(x, 2), present(**seen)


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; the first of a stage halves the map by a mean in front of the last convolution
    and of the shortcut's."""

    inner: int
    stride: int
    eps: float
    compute: str
    first: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w F"], Seen]:
        conv = functools.partial(Convolution, eps=self.eps, compute=self.compute)
        last, smaller, seen = functools.partial(conv, 4 * self.inner, activation=None), self.stride if self.first else 1, {}
        y, seen["conv1"] = conv(self.inner, name="conv1")(x)
        y, seen["conv2"] = conv(self.inner, 3, name="conv2")(y)
        y, seen["conv3"] = last(scale=0.0, name="conv3")(mean_pool(y, smaller))
        if self.first:
            x, seen["shortcut"] = last(name="shortcut")(mean_pool(x, smaller))
        return jax.nn.relu(x + y), present(**seen)


class AttentionPool(nn.Module):
    """One vector of a map: what its mean attends to among the mean and the places, projected."""

    arch: ModifiedResnet
    compute: str

    @nn.compact
    def __call__(self, x_BLC: Float[Array, "B L C"]) -> Float[Array, "B D"]:
        c, (B, L, C) = self.arch, x_BLC.shape
        std = C**-0.5
        place_1L = jnp.arange(L + 1)[None]
        x_BLC = jnp.concatenate([x_BLC.mean(1, keepdims=True), x_BLC], 1) + Embed(L + 1, C, std, name="positions")(place_1L)
        inputs = (("query", x_BLC[:, :1]), ("key", x_BLC), ("value", x_BLC))
        dense = lambda features, name: Dense(features, self.compute, init_std=std, name=name)
        q, k, v = (dense(C, name)(x).reshape(B, x.shape[1], c.heads, -1).swapaxes(1, 2) for name, x in inputs)
        o_BH1K = attend(q, k, v, no_bias(), rate=0.0, seed=None, compute=self.compute)
        return dense(c.features, "out")(o_BH1K.reshape(B, C)).astype(jnp.float32)


def pool(
    arch: ModifiedResnet, encoder: Mapping[str, Any], tokens_BLC: Float[Array, "B L C"], *, compute: str
) -> Float[Array, "B D"]:
    """A picture's vector, of the tower's tokens."""
    head: Any = AttentionPool(arch, compute)  # Linen's apply is typed for every kind of module at once
    return head.apply({"params": encoder["head"]}, tokens_BLC)


def resized(encoder: Mapping[str, Any], old: ModifiedResnet, new: ModifiedResnet) -> dict[str, Any]:
    """An encoder for pictures of another size: the positions that its head knows are interpolated."""
    if old.side == new.side:
        return dict(encoder)
    table = interpolated(np.asarray(encoder["head"]["positions"]["embedding"]), new.side, first=1)
    return {**encoder, "head": {**encoder["head"], "positions": {"embedding": table}}}


# ---- the form of OpenAI and open_clip

POOL = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "c_proj"}


def sizes(arch: ModifiedResnet) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {"I": 1}


def names(arch: ModifiedResnet) -> Names:
    """The table of names of an architecture."""
    rows = []
    for c in arch.convolutions:
        stage, block, *last = c.path.split("/")
        if stage == "stem":
            conv, norm = block, block.replace("conv", "bn")
        else:
            at = f"layer{stage[5:]}.{int(block[5:]) - 1}"
            shortcut = last == ["shortcut"]
            conv, norm = (
                f"{at}.{name}" for name in (("downsample.0", "downsample.1") if shortcut else (last[0], f"bn{last[0][4:]}"))
            )
        rows += norm_rows(c, conv, norm)
    d, places = arch.map_channels, arch.side**2 + 1
    rows.append(Row("head/positions/embedding", "attnpool.positional_embedding", f"{places}I {d}I"))
    for ours, theirs in POOL.items():
        rows += linear(f"head/{ours}", f"attnpool.{theirs}", f"{arch.features if ours == 'out' else d}I {d}I")
    return Names(tuple(rows), left_out=(r".*\.num_batches_tracked",), prefix="visual.")


def from_open_clip(vision: Mapping[str, Any], features: int) -> ModifiedResnet:
    """The architecture that the `vision_cfg` of an open_clip_config.json describes, with its `embed_dim`. Raises ConfigError
    for what is none of ours."""
    channels, head = vision.get("width", 64), vision.get("head_width", 64)
    if not isinstance(vision.get("layers"), list) or len(vision["layers"]) != 4:
        raise ConfigError(f"layers is {vision.get('layers')!r}; a ModifiedResNet has four stages")
    if 32 * channels % head:
        raise ConfigError(f"head_width {head} does not divide the {32 * channels} channels of the last map")
    return ModifiedResnet(vision.get("image_size", 224), tuple(vision["layers"]), channels, 32 * channels // head, features)


def to_open_clip(arch: ModifiedResnet) -> dict[str, Any]:
    """The inverse of `from_open_clip`, without the vector's width. Raises ConfigError where open_clip has no such tower."""
    if arch.norm_eps != 1e-5 or arch.image % 32:
        raise ConfigError(f"open_clip's ModifiedResNet has norm_eps 1e-5 and pictures of a multiple of 32; this is {arch}")
    config = {"image_size": arch.image, "layers": list(arch.depths), "width": arch.channels, "patch_size": None}
    head = arch.map_channels // arch.heads
    return config | ({} if head == 64 else {"head_width": head})


def to_hf(arch: ModifiedResnet) -> dict[str, Any]:
    """Raises ConfigError: there is no such model."""
    raise ConfigError("Hugging Face has no model of CLIP's ModifiedResNet; open_clip's folder holds it")
