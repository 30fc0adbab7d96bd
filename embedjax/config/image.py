"""What an image tower is made of: architectures, how a picture becomes its pixels, and how training varies it."""

import dataclasses
import math
import re
from typing import Any, Literal

from embedjax.config.errors import ConfigError
from embedjax.config.model import Activation, Dense, Dtype, Lora, Similarity
from embedjax.config.resnet import ModifiedResnet, Resnet


@dataclasses.dataclass(frozen=True)
class Vit:
    """ViT (Dosovitskiy et al. 2020), pre-norm; CLIP's and SigLIP's image towers are forms of it."""

    image: int = 224
    """Side of the square picture, in pixels; what is left of it beside whole patches goes unseen."""
    patch: int = 16
    """Side of a patch, in pixels."""
    width: int = 768
    """Width of the residual stream (D)."""
    depth: int = 12
    """Number of layers."""
    heads: int = 12
    """Attention heads (H); must divide the width."""
    mlp: int = 3072
    """Width inside the feed-forward part (F)."""
    activation: Activation = "gelu"
    """Activation of the feed-forward part; OpenAI's CLIP has quick_gelu."""
    norm_eps: float = 1e-6
    """Added to the variance in layer normalisation."""
    pool: Literal["cls", "mean", "map"] = "cls"
    """A picture's vector: that of a class token, the mean of the patches, or a learned query that attends to them (SigLIP's
    multi-head attention pooling)."""
    positions: Literal["learned", "sincos"] = "learned"
    """A trained table, or fixed sines and cosines of both coordinates (Beyer et al. 2022)."""
    input_norm: bool = False
    """Whether the embedded patches are normalised before the first layer, as CLIP's are."""
    patch_bias: bool = True
    """Whether the patch projection has a bias; CLIP's has none."""
    registers: int = 0
    """Tokens without input that attention may use as scratch space (Darcet et al. 2024)."""
    patch_dropout: float = 0.0
    """Share of the patches left out of each training step (Li et al. 2023, FLIP); evaluation sees all."""
    dropout: float = 0.0
    """Dropout of the embeddings and of each part's output."""
    attention_dropout: float = 0.0
    """Dropout of the attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of random initial weights."""

    def __post_init__(self):
        for name in ("image", "patch", "width", "depth", "heads", "mlp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Vit.{name} is {getattr(self, name)}; it must be at least 1")
        if self.image < self.patch:
            raise ConfigError(f"Vit: image {self.image} is smaller than patch {self.patch}")
        if self.width % self.heads:
            raise ConfigError(f"Vit: width {self.width} is not divisible by heads {self.heads}")
        if self.positions == "sincos" and self.width % 4:
            raise ConfigError(f"Vit: width {self.width} is not divisible by 4, which sincos positions need")
        if self.registers < 0:
            raise ConfigError(f"Vit.registers is {self.registers}; it must be at least 0")
        for name in ("dropout", "attention_dropout", "patch_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"Vit.{name} is {getattr(self, name)}; it must be in [0, 1)")

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """What the layers see of a picture: class token, registers and patches, none dropped."""
        return int(self.pool == "cls") + self.registers + self.patches


ImageArchitecture = Vit | ModifiedResnet | Resnet

_SIZES = {  # width, depth, heads, mlp: Touvron et al. 2021 (Ti, S), Dosovitskiy et al. 2020, Alabdulmohsin et al. 2023 (So400m)
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "So400m": (1152, 27, 16, 4304),
}
_FORMS: dict[str, dict[str, Any]] = {
    "vit": {},
    "clip": {"input_norm": True, "patch_bias": False, "norm_eps": 1e-5},
    "siglip": {"pool": "map", "activation": "gelu_tanh"},
}
_OPENAI: dict[str, dict[str, Any]] = dict.fromkeys(("clip-B/32", "clip-B/16", "clip-L/14"), {"activation": "quick_gelu"})


def _preset(form: str, size: str, patch: int) -> tuple[str, Vit]:
    name = f"{form}-{size}/{patch}"
    return name, Vit(224, patch, *_SIZES[size], **_FORMS[form] | _OPENAI.get(name, {}))


_PATCHES = (("Ti", 16), ("S", 16), ("B", 32), ("B", 16), ("L", 16), ("L", 14), ("H", 14), ("So400m", 14))
VITS: dict[str, Vit] = dict(_preset(form, *sizes) for form in _FORMS for sizes in _PATCHES)
"""Published sizes at 224 pixels, by form, size and patch: VITS["clip-B/32"], VITS["siglip-So400m/14"], VITS["vit-S/16"]."""


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How a picture becomes the tower's square of pixels, as Hugging Face's image processors do it."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from red, green and blue, in [0, 1]; the default is OpenAI CLIP's."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """What the difference is divided by."""
    fit: Literal["crop", "squash"] = "crop"
    """Scale the shorter side and cut the middle out, or scale both sides."""
    shorter: int = 0
    """What the shorter side is scaled to before the middle is cut out; 0 for the picture's side."""
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    """Filter of the scaling."""

    def __post_init__(self):
        if not all(math.isfinite(x) for x in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ConfigError(f"Pixels has mean {self.mean} and std {self.std}; they must be finite, and std above 0")
        if self.shorter < 0:
            raise ConfigError(f"Pixels.shorter is {self.shorter}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class Augment:
    """How training varies its pictures, by seed, step and row alone. The defaults vary nothing."""

    area: tuple[float, float] = (1.0, 1.0)
    """Share of the picture's area that a random crop keeps, least and most; 1 and 1 for the plain fit."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of a random crop, least and most."""
    flip: float = 0.0
    """Probability of a mirror image."""
    brightness: float = 0.0
    """Factor on the pixels, drawn within 1 - this and 1 + this."""
    contrast: float = 0.0
    """Factor on the distance to the picture's mean grey, likewise."""
    saturation: float = 0.0
    """Factor on the distance to each pixel's grey, likewise."""
    grey: float = 0.0
    """Probability of a picture without colour."""

    def __post_init__(self):
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"Augment.area is {self.area}; it must be two ascending shares in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"Augment.ratio is {self.ratio}; it must be two ascending numbers above 0")
        for name in ("flip", "brightness", "contrast", "saturation", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"Augment.{name} is {getattr(self, name)}; it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """An image tower: architecture, where its weights come from, preprocessing and head.

    None means "as the folder of `init` says", or the plain default when there is no such folder.
    """

    arch: ImageArchitecture | None = None
    """Architecture and its sizes; None reads them from `init`."""
    init: str = ""
    """Folder or hub id the weights start from; empty for random weights."""
    pixels: Pixels | None = None
    """Preprocessing (default that of OpenAI's CLIP)."""
    augment: Augment = Augment()
    """How training varies the pictures."""
    dense: tuple[Dense, ...] | None = None
    """Projections after pooling (default none)."""
    normalize: bool | None = None
    """Whether the vector is scaled to length 1 (default yes, but not where similarity is set to "dot")."""
    similarity: Similarity | None = None
    """How vectors are compared, in losses and in use: their cosine, or the plain product (default cosine)."""
    compute: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """How the layers are looped over; auto unrolls on a CPU and scans elsewhere."""
    lora: dict[str, Lora] = dataclasses.field(default_factory=dict)
    """Adapters by name, such as one a task. With any, the encoder itself is not trained."""
    freeze_layers: int = 0
    """With n, the patch projection, the positions and the first n layers are not trained; 0 for none of them."""
    freeze_statistics: bool = False
    """Whether the running statistics of a ResNet's batch normalisation stay as they are and are what training normalises by;
    else each step normalises by those of its batch, over all devices, and the running ones follow."""

    def __post_init__(self):
        for name in self.lora:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(f"the adapter {name!r} of a tower needs a name of letters, digits, '_', '.' and '-'")
        if self.freeze_layers < 0:
            raise ConfigError(f"freeze_layers is {self.freeze_layers}; it must be at least 0")
        if self.freeze_statistics and isinstance(self.arch, Vit):
            raise ConfigError("freeze_statistics is true; a Vit has no running statistics")
        if self.arch is None and not self.init:
            raise ConfigError("a tower needs `arch` (sizes) or `init` (a folder or hub id to start from)")

    @property
    def width(self) -> int:
        """Numbers of a vector; 0 while the tower is not resolved."""
        if self.dense:
            return self.dense[-1].features
        return self.arch.width if self.arch else 0

    @property
    def prompts(self) -> dict[str, str]:
        """None: pictures are not prompted."""
        return {}

    def prompt_for(self, column: str, name: str = "") -> None:
        """None, as of a tower of texts without prompts."""

    def prompt_named(self, name: str, column: str = "text") -> None:
        """None, as of a tower of texts without prompts."""

    def knows(self, name: str) -> bool:
        """Whether it has an adapter of that name."""
        return name in self.lora
