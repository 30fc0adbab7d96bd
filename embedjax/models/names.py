"""The form of a family's table of names: Hugging Face tensors <-> our parameter paths, and what is left out on purpose.

Each families/ file states its own table in these rows; weights.py applies them in both directions.
"""

import dataclasses
from typing import Literal, cast

from embedjax.config.errors import ConfigError, nearest
from embedjax.config.model import Activation


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint, or one of each layer where `theirs` holds `{layer}`: those are stacked on axis 0."""

    ours: str | tuple[str, ...]
    """Our path, such as "blocks/attn/query/kernel"; several when their tensor holds ours one after another on its axis 0.
    A path that ends in "kernel" is the transpose of their [out, in] matrix."""
    theirs: str
    """Their name, without the family's prefix."""
    shape: str
    """Axes of their tensor: letters of the family's sizes, each with an optional factor, such as "3D D"."""
    first: bool = True
    """Whether the first layer has the tensor; where not, we hold a width of ones that are never used."""
    form: Literal["", "conv", "rows"] = ""
    """How else theirs differs from ours: "conv" is a convolution [out, channels, height, width], our kernel over patches
    [height * width * channels, out]; "rows" has other axes before the last, our table one."""

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor a layer."""
        return "{layer}" in self.theirs


@dataclasses.dataclass(frozen=True)
class Names:
    """A family's table."""

    rows: tuple[Row, ...]
    """Every tensor the encoder has."""
    left_out: tuple[str, ...]
    """Regular expressions of the names that are left out on purpose: heads, poolers, buffers."""
    prefix: str = ""
    """What models with a head put before every name of the encoder, such as "bert."; accepted, never written."""


def linear(ours: str, theirs: str, shape: str) -> tuple[Row, Row]:
    """The two rows of a projection with a bias; `shape` is that of their weight, "out in"."""
    return Row(f"{ours}/kernel", f"{theirs}.weight", shape), Row(f"{ours}/bias", f"{theirs}.bias", shape.split()[0])


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
    """The two rows of a layer normalisation over the width."""
    return Row(f"{ours}/scale", f"{theirs}.weight", "D"), Row(f"{ours}/bias", f"{theirs}.bias", "D")


ACTIVATIONS = {  # Hugging Face's names -> ours
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation_from_hf(name: str) -> Activation:
    """Our name of an activation; ConfigError when there is none."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported; {nearest(str(name), ACTIVATIONS)}")
    return cast(Activation, ACTIVATIONS[name])


def activation_to_hf(name: Activation) -> str:
    """Hugging Face's name of an activation, the first of several."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)
