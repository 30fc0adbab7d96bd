"""Residual networks as image towers: CLIP's form and the standard one."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

from embedjax.config.errors import ConfigError
from embedjax.config.model import Activation


class Convolution(NamedTuple):
    """One convolution of a network; each is followed by a batch normalisation."""

    path: str
    """Where its parameters lie in the encoder, such as "stage1/block1/conv2"."""
    size: int
    """Side of its square of weights."""
    inputs: int
    """Channels it reads."""
    outputs: int
    """Channels it gives."""
    side: int
    """Side of the square of places it is computed at."""


@dataclasses.dataclass(frozen=True)
class ModifiedResnet:
    """The residual network of CLIP (Radford et al. 2021, section 2.4): a stem of three convolutions, averages in place of the
    other strides (Zhang 2019), and a vector that attends to the last map. RN50 by default."""

    image: int = 224
    """Side of the square picture, in pixels; at least 32."""
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks of each stage."""
    channels: int = 64
    """Channels behind the stem; the last map has 32 times as many."""
    heads: int = 32
    """Heads of the attention that pools; must divide the channels of the last map."""
    features: int = 1024
    """Numbers of a picture's vector."""
    norm_eps: float = 1e-5
    """Added to the variance in batch normalisation."""

    def __post_init__(self):
        _require_positive(self, ("channels", "heads", "features"))
        if self.image < 32:
            raise ConfigError(f"ModifiedResnet.image is {self.image}; it must be at least 32, of which one place is left")
        if self.channels % 2 or self.map_channels % self.heads:
            raise ConfigError(
                f"ModifiedResnet: channels {self.channels} must be even, and 32 times that divisible by heads {self.heads}"
            )

    @property
    def width(self) -> int:
        """Numbers of a picture's vector."""
        return self.features

    @property
    def map_channels(self) -> int:
        """Channels of the last map."""
        return 32 * self.channels

    @property
    def side(self) -> int:
        """Side of the last map, in places."""
        return (self.image + 1) // 2 // 16

    @property
    def tokens(self) -> int:
        """What batches are sized by: as many as a ViT with patches of 16 has. Maps before the last are the large ones."""
        return max(1, self.image // 16) ** 2

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """All convolutions, in the order of the data."""
        return tuple(self._convolutions())

    def _convolutions(self) -> Iterator[Convolution]:
        side, half = (self.image + 1) // 2, self.channels // 2
        for n, (inputs, outputs) in enumerate(((3, half), (half, half), (half, self.channels)), 1):
            yield Convolution(f"stem/conv{n}", 3, inputs, outputs, side)
        side, inputs = side // 2, self.channels
        for stage, depth in enumerate(self.depths):
            inner = self.channels * 2**stage
            for block in range(depth):
                path = f"stage{stage + 1}/block{block + 1}"
                yield Convolution(f"{path}/conv1", 1, inputs, inner, side)
                yield Convolution(f"{path}/conv2", 3, inner, inner, side)
                side = side // 2 if stage and not block else side
                yield Convolution(f"{path}/conv3", 1, inner, 4 * inner, side)
                if not block:
                    yield Convolution(f"{path}/shortcut", 1, inputs, 4 * inner, side)
                inputs = 4 * inner

    @property
    def products(self) -> int:
        """Multiplications of a picture's forward pass."""
        d, length = self.map_channels, self.side**2 + 1
        return _products(self.convolutions) + 2 * length * d * d + d * (d + self.features + 2 * length)


@dataclasses.dataclass(frozen=True)
class Resnet:
    """ResNet (He et al. 2015) with the stride in the middle of a bottleneck ("v1.5"), pooled by the mean: ResNet-50 by
    default."""

    image: int = 224
    """Side of the square picture, in pixels."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage."""
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels behind each stage."""
    stem: int = 64
    """Channels behind the first convolution."""
    block: Literal["bottleneck", "basic"] = "bottleneck"
    """A convolution of 3 x 3 at a quarter of the channels between two of 1 x 1, or two of 3 x 3."""
    activation: Activation = "relu"
    """Activation behind the stem and behind each block; in a block it is relu, as in Hugging Face's."""
    norm_eps: float = 1e-5
    """Added to the variance in batch normalisation."""

    def __post_init__(self):
        _require_positive(self, ("image", "stem"))
        if not self.depths or len(self.depths) != len(self.channels) or min(self.channels) < 1:
            raise ConfigError(f"Resnet has depths {self.depths} and channels {self.channels}; each stage needs one of both")
        if self.block == "bottleneck" and any(channels % 4 for channels in self.channels):
            raise ConfigError(f"Resnet.channels is {self.channels}; the bottleneck has a quarter of them")

    @property
    def width(self) -> int:
        """Numbers of a picture's vector."""
        return self.channels[-1]

    @property
    def side(self) -> int:
        """Side of the last map, in places."""
        return self.convolutions[-1].side

    @property
    def tokens(self) -> int:
        """What batches are sized by: as many as a ViT with patches of 16 has. Maps before the last are the large ones."""
        return max(1, self.image // 16) ** 2

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """All convolutions, in the order of the data."""
        return tuple(self._convolutions())

    def _convolutions(self) -> Iterator[Convolution]:
        halved = lambda side: (side + 1) // 2
        side = halved(self.image)
        yield Convolution("stem/conv", 7, 3, self.stem, side)
        side, inputs = halved(side), self.stem
        for stage, (depth, outputs) in enumerate(zip(self.depths, self.channels, strict=True)):
            for block in range(depth):
                path, first, before = f"stage{stage + 1}/block{block + 1}", not block, side
                side = halved(side) if stage and first else side
                if self.block == "bottleneck":
                    inner = outputs // 4
                    yield Convolution(f"{path}/conv1", 1, inputs, inner, before)
                    yield Convolution(f"{path}/conv2", 3, inner, inner, side)
                    yield Convolution(f"{path}/conv3", 1, inner, outputs, side)
                else:
                    yield Convolution(f"{path}/conv1", 3, inputs, outputs, side)
                    yield Convolution(f"{path}/conv2", 3, outputs, outputs, side)
                if first and (stage or inputs != outputs):
                    yield Convolution(f"{path}/shortcut", 1, inputs, outputs, side)
                inputs = outputs

    @property
    def products(self) -> int:
        """Multiplications of a picture's forward pass."""
        return _products(self.convolutions)


def _require_positive(arch: ModifiedResnet | Resnet, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(arch, name) < 1:
            raise ConfigError(f"{type(arch).__name__}.{name} is {getattr(arch, name)}; it must be at least 1")
    if min(arch.depths, default=1) < 1:
        raise ConfigError(f"{type(arch).__name__}.depths is {arch.depths}; a stage has at least 1 block")


def _products(convolutions: tuple[Convolution, ...]) -> int:
    return sum(c.size**2 * c.inputs * c.outputs * c.side**2 for c in convolutions)


RESNETS: dict[str, ModifiedResnet | Resnet] = {
    "RN50": ModifiedResnet(),
    "RN101": ModifiedResnet(depths=(3, 4, 23, 3), features=512),
    "RN50x4": ModifiedResnet(288, (4, 6, 10, 6), 80, 40, 640),
    "RN50x16": ModifiedResnet(384, (6, 8, 18, 8), 96, 48, 768),
    "RN50x64": ModifiedResnet(448, (3, 15, 36, 10), 128, 64, 1024),
    "resnet-18": Resnet(depths=(2, 2, 2, 2), channels=(64, 128, 256, 512), block="basic"),
    "resnet-50": Resnet(),
    "resnet-101": Resnet(depths=(3, 4, 23, 3)),
}
"""Published sizes: CLIP's by OpenAI's names (Radford et al. 2021, table 19), the standard ones by Hugging Face's."""
