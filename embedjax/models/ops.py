"""The array functions under the layers: products in the compute type, norm, activations, dropout.

Pure functions of arrays, without parameters of their own; axis letters as in `layers.py`.
"""

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

GOLDEN = np.uint32(0x9E3779B1)  # 2^32 / golden ratio: consecutive multiples of it lie far apart


@jax.custom_vjp
def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016), by the error function.

    Value and gradient cost half of what jax.nn.gelu's do on a CPU: that takes erfc, which is dearer, and differentiates it.
    """
    return (x * (0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_fwd(x):
    y = gelu(x)
    return y, (x, y)


def _gelu_bwd(residuals, g):
    x, y = (r.astype(jnp.float32) for r in residuals)
    phi = jnp.where(x == 0, 0.5, y / x)
    return ((g * (phi + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))).astype(g.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


@jax.custom_vjp
def quick_gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x sigmoid(1.702 x) (Hendrycks & Gimpel 2016, section 2), as OpenAI's CLIP has it.

    Its gradient is made of x and of the value, which the next product keeps anyway; autodiff keeps the sigmoid beside them.
    """
    y = x.astype(jnp.float32)
    return (y * jax.nn.sigmoid(1.702 * y)).astype(x.dtype)


def _quick_gelu_fwd(x):
    y = quick_gelu(x)
    return y, (x, y)


def _quick_gelu_bwd(residuals, g):
    x, y = (r.astype(jnp.float32) for r in residuals)
    share = jnp.where(x == 0, 0.5, y / x)
    return ((g * (share + 1.702 * y * (1 - share))).astype(g.dtype),)


quick_gelu.defvjp(_quick_gelu_fwd, _quick_gelu_bwd)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)
"""What is traced for, when that is not this process' default device: "cpu", "gpu" or "tpu"."""


def on_cpu() -> bool:
    return (PLATFORM.get() or jax.default_backend()) == "cpu"


# ---- places


def by_rows(x: Float[Array, "B *n"]) -> Float[Array, "B *n"]:
    """x, split over the mesh by its first axis as batches are, and in no other way; without a mesh in sight simply x.

    What a block passes on is said to lie so: left to itself XLA splits it as the next parameters are, and moves activations
    where it could gather parameters.
    """
    axes = _free({"data", "fsdp"})
    return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def lookup(table: Float[Array, "V D"], ids: Int[Array, "B *n"]) -> Float[Array, "B *n D"]:
    """table[ids], the table whole on each device of the mesh in sight and the ids split by rows."""
    axes = _free({"data", "fsdp"})
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    if parts == 1 or ids.shape[0] % parts:
        return table[ids]
    return _lookup(jax.lax.with_sharding_constraint(table, P()), ids, axes, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table, ids, axes, parts):
    """Its gradient is summed on each device, then over devices; XLA may gather the gradients of all rows first."""
    return table[ids]


def _lookup_bwd(axes, parts, residuals, g):
    table, ids = residuals
    split = lambda x, *rest: jax.lax.with_sharding_constraint(x.reshape(parts, -1, *rest), P(axes))
    sums = jax.vmap(lambda i, rows: jnp.zeros_like(table).at[i].add(rows))(split(ids), split(g, g.shape[-1]))
    return jax.lax.with_sharding_constraint(sums, P(axes)).sum(0), None


_lookup.defvjp(lambda table, ids, axes, parts: (table[ids], (table, ids)), _lookup_bwd)


def _free(names: set[str]) -> tuple[str, ...]:
    """Which of these axes the mesh in sight has, without those that a `shard_map` around us has taken in its hands."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if name in names and kind == AxisType.Auto)


# ---- products


def product(x: Float[Array, "N D"], w: Float[Array, "D F"], compute: str) -> Float[Array, "N F"]:
    """x @ w in the compute type, summed in float32. On a CPU bfloat16 products come out in float32, elsewhere in bfloat16."""
    if compute == "float32":
        return x @ w
    return _product_bf16_cpu(x, w) if on_cpu() else x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)


@jax.custom_vjp
def _product_bf16_cpu(x, w):
    """XLA:CPU is fast in bfloat16 only on operands stored row-major: the backward products lay theirs out first."""
    return _bf16_matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def _product_bf16_cpu_fwd(x, w):
    residuals = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _bf16_matmul(*residuals), residuals


def _product_bf16_cpu_bwd(residuals, g):
    x, w = residuals
    g = g.astype(jnp.bfloat16)
    return _bf16_matmul(g, _row_major(w.T)), _bf16_matmul(_row_major(x.T), g)


_product_bf16_cpu.defvjp(_product_bf16_cpu_fwd, _product_bf16_cpu_bwd)


def _bf16_matmul(x, w):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def product_int8(x: Float[Array, "N D"], w: Int[Array, "D F"], scale_F: Float[Array, "F"]) -> Float[Array, "N F"]:
    """x @ (w * scale), w of int8: each row of x is rounded to int8 by its largest number, and products are summed as integers
    (vector-wise quantization, Dettmers et al. 2022, section 3)."""
    scale_N = jnp.maximum(jnp.abs(x).max(1), 1e-30) / 127
    rounded = jnp.round(x / scale_N[:, None]).astype(jnp.int8)
    sums = jax.lax.dot_general(rounded, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * scale_N[:, None] * scale_F[None]


def _row_major(x):
    return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


# ---- norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*n D"], scale_D: Float[Array, "D"], bias_D: Float[Array, "D"] | None, eps: float
) -> Float[Array, "*n D"]:
    """Layer normalisation over the last axis, computed in float32, returned in the type of x.

    Keeps x for its gradient, where autodiff would keep three arrays of that size.
    """
    return _layer_norm_fwd(x, scale_D, bias_D, eps)[0]


def _layer_norm_fwd(x, scale_D, bias_D, eps):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    y = y - mean
    rate = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale_D.shape
    y = y * rate * scale_D.reshape(shape)
    return (y if bias_D is None else y + bias_D.reshape(shape)).astype(x.dtype), (x, mean, rate, scale_D, bias_D)


def _layer_norm_bwd(eps, residuals, g):
    x, mean, rate, scale_D, bias_D = residuals
    rows, g = tuple(range(x.ndim - 1)), g.astype(jnp.float32)
    y = (x.astype(jnp.float32) - mean) * rate
    of_y = g * scale_D.reshape((1,) * (x.ndim - 1) + scale_D.shape)
    of_x = rate * (of_y - of_y.mean(-1, keepdims=True) - y * (of_y * y).mean(-1, keepdims=True))
    return of_x.astype(x.dtype), (g * y).sum(rows), None if bias_D is None else g.sum(rows)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


# ---- dropout


def mix(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Bijective 32-bit mixer (murmur3's finaliser): every input bit flips every output bit half the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def token_seeds(key: UInt32[Array, ""], row_B: Int[Array, "B"], length: int) -> UInt32[Array, "B L"]:
    """One dropout seed a token, of key, global row and position alone: masks depend neither on chunks nor on devices."""
    seed_B = mix(row_B.astype(jnp.uint32) ^ mix(key + GOLDEN))
    return mix(seed_B[:, None] + GOLDEN * jnp.arange(1, length + 1, dtype=jnp.uint32)[None])


def layer_seeds(seed_BL: UInt32[Array, "B L"] | None, layer: Int[Array, ""]) -> UInt32[Array, "B L"] | None:
    """The seeds of one layer, from those of the tokens."""
    if seed_BL is None:
        return None
    return mix(seed_BL ^ mix(jnp.uint32(0x2545F491) + layer.astype(jnp.uint32)))


def dropout(x: Float[Array, "*n D"], rate: float, seed: UInt32[Array, "*n"] | None, site: int) -> Float[Array, "*n D"]:
    """Zero a share `rate` of each token's elements, scale up the rest. `site`, 1 to 15, tells the places in a layer apart."""
    if seed is None or rate == 0:
        return x
    feature = jnp.arange(x.shape[-1], dtype=jnp.uint32).reshape((1,) * (x.ndim - 1) + (-1,))
    return keep(x, seed[..., None], np.uint32(site << 28) + feature, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def keep(x, seed, feature, rate):
    """A token's features walk the Weyl sequence from its seed; the mixer makes bits of it (splitmix, Steele et al. 2014).

    The gradient draws the same mask again: cheaper than to store it.
    """
    return jnp.where(mix(seed + feature * GOLDEN) >= jnp.uint32(int(rate * 2**32)), x / (1 - rate), jnp.zeros((), x.dtype))


keep.defvjp(
    lambda x, seed, feature, rate: (keep(x, seed, feature, rate), (seed, feature)),
    lambda rate, residuals, g: (keep(g, *residuals, rate), None, None),
)
