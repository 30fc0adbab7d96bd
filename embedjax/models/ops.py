"""The array functions under the layers: products in the compute type, norm, activations, dropout, attention, rotary positions.

Pure functions of arrays, without parameters of their own; axis letters as in `layers.py`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
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

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


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


def _row_major(x):
    return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


# ---- norm


def layer_norm(
    x: Float[Array, "*n D"], scale_D: Float[Array, "D"], bias_D: Float[Array, "D"] | None, eps: float
) -> Float[Array, "*n D"]:
    """Layer normalisation over the last axis, computed in float32, returned in the type of x."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale_D.shape
    y = y * scale_D.reshape(shape)
    return (y if bias_D is None else y + bias_D.reshape(shape)).astype(x.dtype)


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
    return _keep(x, seed[..., None], np.uint32(site << 28) + feature, rate)


def _drop_scores(p_BHLL, rate, seed_BL):
    """As dropout, site 0; a query token's features are (head, key position), numbered without regard to the padded length."""
    _, H, L, _ = p_BHLL.shape
    head = jnp.arange(H, dtype=jnp.uint32)[None, :, None, None] * jnp.uint32(1 << 16)
    feature = head + jnp.arange(L, dtype=jnp.uint32)[None, None, None, :]
    return _keep(p_BHLL, seed_BL[:, None, :, None], feature, rate)


def _keep(x, seed, feature, rate):
    """A token's features walk the Weyl sequence from its seed; the mixer makes bits of it (splitmix, Steele et al. 2014)."""
    return jnp.where(mix(seed + feature * GOLDEN) >= jnp.uint32(int(rate * 2**32)), x / (1 - rate), jnp.zeros((), x.dtype))


# ---- attention


def attend(
    q: Float[Array, "B H L K"],
    k: Float[Array, "B H L K"],
    v: Float[Array, "B H L K"],
    bias: Float[Array, "..."],
    *,
    rate: float,
    seed: UInt32[Array, "B L"] | None,
    compute: str,
) -> Float[Array, "B H L K"]:
    """softmax(q k' / sqrt(K) + bias) v, probabilities dropped at `rate`; scores and softmax in float32."""
    dropped, dtype = seed is not None and rate > 0, jnp.dtype(compute)
    if not dropped and not on_cpu():
        heads_last = (a.astype(dtype).swapaxes(1, 2) for a in (q, k, v))
        return jax.nn.dot_product_attention(*heads_last, bias=bias).swapaxes(1, 2).astype(q.dtype)
    q = q * q.dtype.type(q.shape[-1] ** -0.5)
    # Heads are a batch axis: up to three times faster on a CPU than products over [B L H K].
    s_BHLL = jnp.einsum("bhqd,bhkd->bhqk", q.astype(dtype), k.astype(dtype), preferred_element_type=jnp.float32)
    p_BHLL = jax.nn.softmax(s_BHLL + bias, axis=-1)
    p_BHLL = _drop_scores(p_BHLL, rate, seed) if dropped else p_BHLL
    return jnp.einsum("bhqk,bhkd->bhqd", p_BHLL.astype(dtype), v.astype(dtype), preferred_element_type=q.dtype)


def rotate(x: Float[Array, "B H L K"], rope: tuple[Float[Array, "L K"], Float[Array, "L K"]]) -> Float[Array, "B H L K"]:
    """Rotary positions (Su et al. 2021, equation 34), halves paired as in GPT-NeoX; in float32."""
    cos, sin = rope
    y = x.astype(jnp.float32)
    low, high = jnp.split(y, 2, axis=-1)
    return (y * cos[None, None] + jnp.concatenate([-high, low], -1) * sin[None, None]).astype(x.dtype)


def rope_table(length: int, head_dim: int, theta: float) -> tuple[Float[Array, "L K"], Float[Array, "L K"]]:
    """Cosine and sine of rotary positions 0 .. length-1."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    angle = jnp.concatenate([angle, angle], -1)
    return jnp.cos(angle), jnp.sin(angle)
