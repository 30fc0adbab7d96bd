"""Attention, and rotary positions.

Pure functions of arrays, without parameters of their own; axis letters as in `layers.py`, M those tokens that are attended to.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from embedjax.models.ops import keep, on_cpu


def attend(
    q: Float[Array, "B H L K"],
    k: Float[Array, "B H M K"],
    v: Float[Array, "B H M K"],
    bias: Float[Array, "..."],
    *,
    rate: float,
    seed: UInt32[Array, "B L"] | None,
    compute: str,
) -> Float[Array, "B H L K"]:
    """softmax(q k' / sqrt(K) + bias) v (Vaswani et al. 2017, equation 1), probabilities dropped at `rate`; `bias` is
    [B|1 H|1 L|1 M]. Products in the compute type, scores and softmax in float32. Keeps the probabilities for its gradient."""
    dropped, dtype = seed is not None and rate > 0, jnp.dtype(compute)
    if not dropped and not on_cpu():
        heads_last = (a.astype(dtype).swapaxes(1, 2) for a in (q, k, v))
        return jax.nn.dot_product_attention(*heads_last, bias=bias).swapaxes(1, 2).astype(q.dtype)
    p_BHLM = cast(Array, _softmax(_scores(_scaled(q), k, bias, dtype)))
    return _product("bhlm,bhmk->bhlk", _drop(p_BHLM, rate, seed if dropped else None), v, dtype).astype(q.dtype)


def attend_again(
    q: Float[Array, "B H L K"],
    k: Float[Array, "B H M K"],
    v: Float[Array, "B H M K"],
    bias: Float[Array, "..."],
    *,
    rate: float,
    seed: UInt32[Array, "B L"] | None,
    compute: str,
) -> Float[Array, "B H L K"]:
    """`attend` that keeps q, k, v, the result and two numbers a row for its gradient, and makes scores and probabilities again
    (Dao et al. 2022, algorithm 4): nothing of L x M numbers stays between the passes."""
    dropped = seed is not None and rate > 0
    # Inside `shard_map` a bias that is the same on all devices is to count as their own, as q is: so does its gradient.
    bias = bias + jnp.zeros_like(q[:1, :1, :1, :1], jnp.float32)
    return _attend(_scaled(q), k, v, bias, seed if dropped else None, rate if dropped else 0.0, compute)


@jax.custom_vjp
def _softmax(x: Array) -> Array:
    """Over the last axis. Keeps its result for the gradient, where autodiff keeps the exponentials beside it."""
    return jax.nn.softmax(x, axis=-1)


def _softmax_bwd(p, g):
    return (p * (g - (g * p).sum(-1, keepdims=True)),)


_softmax.defvjp(lambda x: (p := _softmax(x), p), _softmax_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, bias, seed, rate, compute):
    return _attend_fwd(q, k, v, bias, seed, rate, compute)[0]


def _attend_fwd(q, k, v, bias, seed, rate, compute):
    dtype = jnp.dtype(compute)
    s_BHLM = _scores(q, k, bias, dtype)
    most_BHL1 = s_BHLM.max(-1, keepdims=True)
    e_BHLM = jnp.exp(s_BHLM - most_BHL1)
    sum_BHL1 = e_BHLM.sum(-1, keepdims=True)
    o_BHLK = _product("bhlm,bhmk->bhlk", _drop(e_BHLM, rate, seed), v, dtype) / sum_BHL1
    o_BHLK = o_BHLK.astype(q.dtype)
    return o_BHLK, (q, k, v, bias, seed, o_BHLK, most_BHL1, sum_BHL1)


def _attend_bwd(rate, compute, residuals, g):
    q, k, v, bias, seed, o_BHLK, most_BHL1, sum_BHL1 = residuals
    dtype = jnp.dtype(compute)
    # What divides the exponentials divides the few numbers they are multiplied with instead.
    g_BHLK = g.astype(jnp.float32) / sum_BHL1
    mean_BHL1 = (g_BHLK * o_BHLK.astype(jnp.float32)).sum(-1, keepdims=True)
    e_BHLM = jnp.exp(_scores(q, k, bias, dtype) - most_BHL1)
    dropped_BHLM = _drop(e_BHLM, rate, seed)
    # In the compute type, as autodiff has it: what an accelerator's memory moves is mostly this and the scores.
    to_dropped_BHLM = _product("bhlk,bhmk->bhlm", g_BHLK, v, dtype).astype(dtype)
    ds_BHLM = dropped_BHLM * to_dropped_BHLM - e_BHLM * mean_BHL1
    return (
        _product("bhlm,bhmk->bhlk", ds_BHLM, k, dtype).astype(q.dtype),
        _product("bhlm,bhlk->bhmk", ds_BHLM, q, dtype).astype(k.dtype),
        _product("bhlm,bhlk->bhmk", dropped_BHLM, g_BHLK, dtype).astype(v.dtype),
        _as(ds_BHLM, bias),
        None,
    )


_attend.defvjp(_attend_fwd, _attend_bwd)


def _scaled(q: Array) -> Array:
    return q * q.dtype.type(q.shape[-1] ** -0.5)


def _scores(q, k, bias, dtype) -> Float[Array, "B H L M"]:
    """Heads are a batch axis: up to three times faster on a CPU than products over [B L H K]."""
    return _product("bhlk,bhmk->bhlm", q, k, dtype) + bias


def _product(axes: str, a: Array, b: Array, dtype) -> Float[Array, "..."]:
    return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _drop(p_BHLM, rate, seed_BL) -> Float[Array, "B H L M"]:
    """As `ops.dropout`, site 0; a query token's features are (head, key position), numbered without regard to the padded
    length."""
    if seed_BL is None:
        return p_BHLM
    _, H, _, M = p_BHLM.shape
    head = jnp.arange(H, dtype=jnp.uint32)[None, :, None, None] * jnp.uint32(1 << 16)
    feature = head + jnp.arange(M, dtype=jnp.uint32)[None, None, None, :]
    return keep(p_BHLM, seed_BL[:, None, :, None], feature, rate)


def _as(gradient: Array, x: Array) -> Array:
    """The gradient of x, of that of x broadcast."""
    axes = tuple(axis for axis, size in enumerate(x.shape) if size == 1 and gradient.shape[axis] != 1)
    return gradient.sum(axes, keepdims=True).astype(x.dtype)


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
