"""Colours of pictures varied on the device, each picture by key and global row alone: chunks and devices do not matter.

Cuts and mirror images are made by the data loader (`data/image.py`), where they save decoding.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from embedjax.config.image import Augment
from embedjax.models.ops import mix, token_seeds

COLOURS = np.uint32(0x7F4A7C15)  # tells what is drawn here from what dropout draws of the same key
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow and torchvision have it


def jitter(
    x_BHWC: Float[Array, "B H W 3"], augment: Augment, key: UInt32[Array, ""], row_B: Int[Array, "B"]
) -> Float[Array, "B H W 3"]:
    """Pictures in [0, 1] with their brightness, contrast and saturation changed, in this order, each by a factor drawn for the
    picture and cut off at 0 and 1; then some without colour. torchvision's ColorJitter, whose order is random."""
    draw_4B111 = uniform(key, row_B, 4).T[:, :, None, None, None]
    factor = lambda site, most: 1 + most * (2 * draw_4B111[site] - 1)
    if augment.brightness:
        x_BHWC = jnp.clip(x_BHWC * factor(0, augment.brightness), 0, 1)
    if augment.contrast:
        mean = grey(x_BHWC).mean((1, 2, 3), keepdims=True)
        x_BHWC = jnp.clip(mean + factor(1, augment.contrast) * (x_BHWC - mean), 0, 1)
    if augment.saturation:
        plain = grey(x_BHWC)
        x_BHWC = jnp.clip(plain + factor(2, augment.saturation) * (x_BHWC - plain), 0, 1)
    if augment.grey:
        x_BHWC = jnp.where(draw_4B111[3] < augment.grey, grey(x_BHWC), x_BHWC)
    return x_BHWC


def grey(x_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B H W 1"]:
    """The luma of each pixel. A sum, not a product of matrices: those are rounded more on accelerators."""
    return (x_BHWC * GREY.reshape(1, 1, 1, 3)).sum(-1, keepdims=True)


def uniform(key: UInt32[Array, ""], row_B: Int[Array, "B"], count: int) -> Float[Array, "B n"]:
    """Numbers in [0, 1) of each row."""
    bits = mix(token_seeds(key, row_B, count) ^ COLOURS)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def jitters(augment: Augment) -> bool:
    """Whether there is anything to vary here."""
    return any((augment.brightness, augment.contrast, augment.saturation, augment.grey))
