"""Weights of int8 for the portable programs: kernels rounded by output channel, the table of tokens by row.

What a program multiplies them with is rounded as it runs (`ops.product_int8`); projections, norms, positions and biases stay
float32.
"""

import re
from collections.abc import Mapping

import numpy as np

KERNEL = re.compile(r"(.*/)?blocks/\d+/.*/?kernel")
TABLE = re.compile(r"(.*/)?tokens/embedding")


def rounded(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a tower by path, layer by layer, with int8 kernels [D F] and float32 `kernel_scale` [F], and an int8
    table of tokens [V D] with `embedding_scale` [V]; the rest as it was."""
    made: dict[str, np.ndarray] = {}
    for path, value in params.items():
        axis = 0 if KERNEL.fullmatch(path) else 1 if TABLE.fullmatch(path) else None
        if axis is None:
            made[path] = value
        else:
            made[path], made[f"{path}_scale"] = symmetric(value, axis)
    return made


def symmetric(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(round(w / s) of int8, s = max |w| / 127 along an axis), so that 0 stays 0; s is 1 where all are 0."""
    scale = np.abs(weights).max(axis, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return np.round(weights / scale).astype(np.int8), scale.squeeze(axis)
