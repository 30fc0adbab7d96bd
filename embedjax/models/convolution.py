"""The parts of convolutional towers: a convolution with its batch normalisation, and the means and maxima between them.

Pictures are [B H W C] here. A kernel lies flat, [height * width * inputs, outputs], so that adapters and the sharding table
meet a matrix. Axis letters as in `layers.py`, and C channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType
from jaxtyping import Array, Float

from embedjax.models.ops import ACTIVATIONS, by_rows, product

Seen = dict[str, Any]
"""Statistics of a batch by the paths of the running ones, {} where running ones were used: {"norm": {"mean": [C], ...}}."""


class Convolution(nn.Module):
    """A convolution without bias, borders of zeros, then batch normalisation and, if asked, an activation."""

    features: int
    size: int = 1
    stride: int = 1
    activation: str | None = "relu"
    eps: float = 1e-5
    scale: float = 1.0
    """What the scale of the normalisation starts from."""
    compute: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W F"], Seen]:
        shape = (self.size**2 * x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", _by_outputs, shape, self.size, jnp.float32)
        y = by_rows(convolved(x_BHWC, kernel, size=self.size, stride=self.stride, compute=self.compute))
        y, seen = BatchNorm(self.eps, self.scale, name="norm")(y)
        return ACTIVATIONS[self.activation](y) if self.activation else y, present(norm=seen)


def _by_outputs(key: Array, shape: tuple[int, int], size: int, dtype: Any) -> Float[Array, "N F"]:
    """Normal of variance 2 / (size^2 outputs), which keeps that of the gradient (He et al. 2015a, equation 14)."""
    return jax.random.normal(key, shape, dtype) * (2 / (size**2 * shape[1])) ** 0.5


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015), statistics in float32, result in the type of x.

    With running statistics among its parameters it normalises by these. Without, by those of the batch over all devices, and
    returns them, the variance without bias, as torch's running one is.
    """

    eps: float
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W C"], Seen]:
        C = x.shape[-1:]
        scale_C = self.param("scale", nn.initializers.constant(self.scale), C, jnp.float32)
        bias_C = self.param("bias", nn.initializers.zeros, C, jnp.float32)
        if self.is_initializing() or self.has_variable("params", "mean"):
            mean_C = self.param("mean", nn.initializers.zeros, C, jnp.float32)
            var_C = self.param("var", nn.initializers.ones, C, jnp.float32)
            seen: Seen = {}
        else:
            mean_C, var_C, count = batch_statistics(x)
            seen = jax.lax.stop_gradient({"mean": mean_C, "var": var_C * (count / max(count - 1, 1))})
        rate_C = jax.lax.rsqrt(var_C + self.eps) * scale_C
        of = lambda v_C: v_C[None, None, None]
        return ((x.astype(jnp.float32) - of(mean_C)) * of(rate_C) + of(bias_C)).astype(x.dtype), seen


def batch_statistics(x: Float[Array, "B H W C"]) -> tuple[Float[Array, "C"], Float[Array, "C"], int]:
    """Mean and (biased) variance of each channel over the global batch, and of how many numbers they are; float32."""
    held = _in_hands()
    mean = lambda y: jax.lax.pmean(y.mean((0, 1, 2)), held) if held else y.mean((0, 1, 2))
    x = x.astype(jnp.float32)
    mean_C = mean(x)
    # In two passes: the mean of squares less the square of the mean has no digits left where the mean is large.
    var_C = mean(jnp.square(x - mean_C[None, None, None]))
    parts = jax.lax.axis_size(held) if held else 1
    return mean_C, var_C, parts * x.shape[0] * x.shape[1] * x.shape[2]


def _in_hands() -> tuple[str, ...]:
    """The axes that a `shard_map` around us has taken in its hands: of the batch there is only a part here."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if name in ("data", "fsdp") and kind == AxisType.Manual)


def present(**seen: Seen) -> Seen:
    """What of the parts of a module has seen statistics, by their names."""
    return {name: part for name, part in seen.items() if part}


def convolved(
    x_BHWC: Float[Array, "B H W C"], kernel: Float[Array, "N F"], *, size: int, stride: int, compute: str
) -> Float[Array, "B h w F"]:
    """The convolution with a square of weights of odd side, as many zeros around as keep the picture's size at stride 1."""
    if size == 1:  # a plain product, of the places that the stride leaves
        x_BHWC = x_BHWC[:, ::stride, ::stride]
        return product(x_BHWC.reshape(-1, x_BHWC.shape[-1]), kernel, compute).reshape(*x_BHWC.shape[:-1], -1)
    weights = kernel.reshape(size, size, x_BHWC.shape[-1], -1).astype(compute)
    border = (size // 2, size // 2)
    return jax.lax.conv_general_dilated(
        x_BHWC.astype(compute), weights, (stride, stride), (border, border), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def mean_pool(x_BHWC: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """The mean of each square of places; what is left at the right and lower border is cut off."""
    if size == 1:
        return x_BHWC
    B, H, W, C = x_BHWC.shape
    h, w = H // size, W // size
    x = x_BHWC[:, : h * size, : w * size].reshape(B, h, size, w, size, C)
    return x.mean((2, 4), dtype=jnp.float32).astype(x.dtype)


def max_pool(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """The largest of 3 x 3 places around every other one, nothing beyond the borders."""
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x_BHWC, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), border)


def as_tokens(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B L C"]:
    """The places of a map one after another, float32."""
    return x_BHWC.reshape(x_BHWC.shape[0], -1, x_BHWC.shape[-1]).astype(jnp.float32)
