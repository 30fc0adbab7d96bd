"""ResNet (He et al. 2015) with the stride in the middle of a bottleneck, as Hugging Face's ResNetModel; pooled by the mean.

Takes pictures as normalised numbers, as `vit.py` does. Strides elsewhere are left out, see `from_hf`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt32

from embedjax.config import resnet as config
from embedjax.config.errors import ConfigError
from embedjax.config.resnet import Resnet
from embedjax.models.convolution import Convolution, Seen, as_tokens, max_pool, present
from embedjax.models.names import Names, Row, activation_from_hf, activation_to_hf
from embedjax.models.ops import ACTIVATIONS, by_rows


class Tower(nn.Module):
    """Pictures -> the places of the last map, float32, and the statistics of the batch where they were not given.

    Nothing in it is drawn by a key. The stages are always unrolled: no two of their first blocks are alike. `remat` recomputes
    each block.
    """

    arch: Resnet
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
        x, seen["stem"] = Stem(c, self.compute, name="stem")(pixels_BHWC)
        x, block = max_pool(x), nn.remat(Block) if self.remat else Block
        for n, (depth, channels) in enumerate(zip(c.depths, c.channels, strict=True)):
            make = functools.partial(block, c, channels, 2 if n else 1, self.compute)
            x, seen[f"stage{n + 1}"] = Stage(make, depth, name=f"stage{n + 1}")(x)
        return as_tokens(x), None, present(**seen)


class Stem(nn.Module):
    """One wide convolution."""

    arch: Resnet
    compute: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], Seen]:
        c = self.arch
        x, seen = Convolution(c.stem, 7, 2, c.activation, c.norm_eps, compute=self.compute, name="conv")(x)
        return x, present(conv=seen)


class Stage(nn.Module):
    """Blocks at one resolution: `block(first=..., name=...)` makes one, the first of which may halve the map."""

    block: Callable[..., nn.Module]
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w F"], Seen]:
        seen: Seen = {}
        for n in range(1, self.depth + 1):
            made: Any = self.block(first=n == 1, name=f"block{n}")
            x, seen[f"block{n}"] = made(x)
            x = by_rows(x)
        return x, present(**seen)


class Block(nn.Module):
    """Convolutions beside a shortcut, which is one itself where the map's size or channels change. The last normalisation
    begins with scale 0, so that the block begins as its shortcut (Goyal et al. 2017, section 5.1)."""

    arch: Resnet
    channels: int
    stride: int
    compute: str
    first: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w F"], Seen]:
        c, stride, seen = self.arch, self.stride if self.first else 1, {}
        conv = functools.partial(Convolution, eps=c.norm_eps, compute=self.compute)
        plain = functools.partial(conv, self.channels, activation=None)
        if c.block == "bottleneck":
            inner = self.channels // 4
            y, seen["conv1"] = conv(inner, name="conv1")(x)
            y, seen["conv2"] = conv(inner, 3, stride, name="conv2")(y)
            y, seen["conv3"] = plain(scale=0.0, name="conv3")(y)
        else:
            y, seen["conv1"] = conv(self.channels, 3, stride, name="conv1")(x)
            y, seen["conv2"] = plain(3, scale=0.0, name="conv2")(y)
        if stride > 1 or x.shape[-1] != self.channels:
            x, seen["shortcut"] = plain(1, stride, name="shortcut")(x)
        return ACTIVATIONS[c.activation](x + y), present(**seen)


def require_picture(image: int, pixels_BHWC: Float[Array, "B H W 3"]) -> None:
    """Raises ConfigError for pictures of another size than the tower's."""
    if (picture := list(pixels_BHWC.shape[1:])) != [image, image, 3]:
        raise ConfigError(f"pictures of {picture} numbers do not fit the tower, which takes {image} x {image} x 3")


def pool(arch: Resnet, encoder: Mapping[str, Any], tokens_BLC: Float[Array, "B L C"], *, compute: str) -> Float[Array, "B C"]:
    """A picture's vector: the mean of the places."""
    return tokens_BLC.mean(1)


def resized(encoder: Mapping[str, Any], old: Resnet, new: Resnet) -> dict[str, Any]:
    """An encoder for pictures of another size: the same, since nothing in it knows of places."""
    return dict(encoder)


# ---- Hugging Face's form


def sizes(arch: Resnet) -> dict[str, int]:
    """The axis letters of the table of names."""
    return {"I": 1}


def norm_rows(c: config.Convolution, conv: str, norm: str) -> list[Row]:
    """The rows of a convolution and its normalisation, which are called so in the file."""
    parts = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    kernel = Row(f"{c.path}/kernel", f"{conv}.weight", f"{c.outputs}I {c.inputs}I {c.size}I {c.size}I", form="conv")
    return [kernel, *(Row(f"{c.path}/norm/{ours}", f"{norm}.{theirs}", f"{c.outputs}I") for ours, theirs in parts.items())]


def names(arch: Resnet) -> Names:
    """The table of names of an architecture."""
    rows = []
    for c in arch.convolutions:
        stage, *rest = c.path.split("/")
        if stage == "stem":
            at = "embedder.embedder"
        else:
            block, part = rest
            at = f"encoder.stages.{int(stage[5:]) - 1}.layers.{int(block[5:]) - 1}"
            at += ".shortcut" if part == "shortcut" else f".layer.{int(part[4:]) - 1}"
        rows += norm_rows(c, f"{at}.convolution", f"{at}.normalization")
    return Names(tuple(rows), left_out=(r".*\.num_batches_tracked", r"classifier\..*"), prefix="resnet.")


def from_hf(config: Mapping[str, Any]) -> Resnet:
    """The architecture a config.json of a ResNet describes; what it leaves out is as in transformers' defaults. It says nothing
    of the picture's size, for which 224 stands."""
    if config.get("num_channels", 3) != 3:
        raise ConfigError(f"num_channels is {config['num_channels']}; 3 is supported")
    for name in ("downsample_in_first_stage", "downsample_in_bottleneck"):
        if config.get(name, False):
            raise ConfigError(f"{name} is true, which is not supported: the stride is in the middle of later stages here")
    kind = config.get("layer_type", "bottleneck")
    if kind not in ("bottleneck", "basic"):
        raise ConfigError(f"layer_type is {kind!r}; expected 'bottleneck' or 'basic'")
    return Resnet(
        depths=_numbers(config, "depths", (3, 4, 6, 3)),
        channels=_numbers(config, "hidden_sizes", (256, 512, 1024, 2048)),
        stem=config.get("embedding_size", 64),
        block=kind,
        activation=activation_from_hf(config.get("hidden_act", "relu")),
    )


def to_hf(arch: Resnet) -> dict[str, Any]:
    """The config.json of an architecture. Raises ConfigError when Hugging Face has no model of its form."""
    if arch.norm_eps != 1e-5:
        raise ConfigError(f"Hugging Face's ResNets have norm_eps 1e-5, this one {arch.norm_eps}")
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": arch.stem,
        "hidden_sizes": list(arch.channels),
        "depths": list(arch.depths),
        "layer_type": arch.block,
        "hidden_act": activation_to_hf(arch.activation),
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _numbers(config: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = config.get(key, default)
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise ConfigError(f"{key} is {value!r}; expected whole numbers")
    return tuple(value)
