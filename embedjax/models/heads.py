"""Token vectors -> one vector a text: pooling, projections, length 1. As sentence-transformers' modules of these names compute.

Knows no tower. Every function is finite, in value and gradient, for a text without tokens: its vector is zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from embedjax.config.model import Dense, PoolingName


def pool(
    tokens_BLD: Float[Array, "B L D"], mask_BL: Bool[Array, "B L"], pool_BL: Bool[Array, "B L"], pooling: PoolingName
) -> Float[Array, "B D"]:
    """One float32 vector a text, of the tokens in `pool_BL`: those of `mask_BL`, without the prompt's if it is left out."""
    return POOLINGS[pooling](tokens_BLD.astype(jnp.float32), mask_BL, pool_BL)


def _mean(tokens_BLD, mask_BL, pool_BL):
    return _weighted(tokens_BLD, pool_BL.astype(jnp.float32))


def _weightedmean(tokens_BLD, mask_BL, pool_BL):
    """Weights 1, 2, 3, ... from the text's first token, the prompt's counted (Muennighoff 2022, equation 2)."""
    place_BL = jnp.arange(1, mask_BL.shape[1] + 1)[None] - _first(mask_BL)[:, None]
    return _weighted(tokens_BLD, pool_BL * place_BL.astype(jnp.float32))


def _weighted(tokens_BLD, weight_BL):
    total_B1 = jnp.maximum(weight_BL.sum(1, keepdims=True), 1e-9)
    return jnp.einsum("bld,bl->bd", tokens_BLD, weight_BL) / total_B1


def _max(tokens_BLD, mask_BL, pool_BL):
    best_BD = jnp.where(pool_BL[..., None], tokens_BLD, jnp.finfo(jnp.float32).min).max(1)
    return jnp.where(pool_BL.any(1, keepdims=True), best_BD, 0.0)


def _cls(tokens_BLD, mask_BL, pool_BL):
    return _at(tokens_BLD, _first(pool_BL), pool_BL)


def _lasttoken(tokens_BLD, mask_BL, pool_BL):
    return _at(tokens_BLD, _last(pool_BL), pool_BL)


def _at(tokens_BLD, place_B, pool_BL):
    """One token of each text. Selected by a product with a one-hot row: its gradient is no scatter."""
    here_BL = (jnp.arange(pool_BL.shape[1])[None] == place_B[:, None]) & pool_BL
    return jnp.einsum("bld,bl->bd", tokens_BLD, here_BL.astype(jnp.float32))


def _first(mask_BL: Bool[Array, "B L"]) -> Int[Array, "B"]:
    return jnp.argmax(mask_BL, axis=1)


def _last(mask_BL: Bool[Array, "B L"]) -> Int[Array, "B"]:
    return mask_BL.shape[1] - 1 - _first(mask_BL[:, ::-1])


PLACES: dict[str, Callable[[Array], Array]] = {"cls": _first, "lasttoken": _last}
"""Where the token lies that alone is pooled, by the pooling that has one."""

POOLINGS: dict[str, Callable[..., Array]] = {
    "mean": _mean,
    "cls": _cls,
    "max": _max,
    "weightedmean": _weightedmean,
    "lasttoken": _lasttoken,
}


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu, "identity": lambda x: x}
"""Those of projections."""


def init_projections(key: Array, width: int, specs: Sequence[Dense]) -> dict[str, dict[str, Any]]:
    """Random projections {"0": {"kernel", "bias", "residual": {"kernel"}}, ...}, as far as they have these, uniform in
    +-1/sqrt(inputs) as torch's Linear."""
    params: dict[str, dict[str, Any]] = {}
    for n, spec in enumerate(specs):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, n))
        draw = lambda key, shape, bound=width**-0.5: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        params[str(n)] = {"kernel": draw(kernel_key, (width, spec.features))}
        if spec.bias:
            params[str(n)]["bias"] = draw(bias_key, (spec.features,))
        if spec.residual and width != spec.features:
            params[str(n)]["residual"] = {"kernel": draw(jax.random.fold_in(kernel_key, 1), (width, spec.features))}
        width = spec.features
    return params


def project(params: dict[str, dict[str, Any]], x_BD: Float[Array, "*n D"], specs: Sequence[Dense]) -> Float[Array, "*n E"]:
    """The projections one after the other, in float32."""
    for n, spec in enumerate(specs):
        own, before_BD = params[str(n)], x_BD
        x_BD = x_BD @ own["kernel"]
        if spec.bias:
            x_BD = x_BD + own["bias"].reshape(*(1,) * (x_BD.ndim - 1), -1)
        x_BD = ACTIVATIONS[spec.activation](x_BD)
        if spec.residual:
            x_BD = x_BD + (before_BD @ own["residual"]["kernel"] if "residual" in own else before_BD)
    return x_BD


def normalize(x_BE: Float[Array, "*n E"]) -> Float[Array, "*n E"]:
    """x / max(|x|, 1e-12), as torch's normalize; the zero vector stays, with a finite gradient."""
    return x_BE * jax.lax.rsqrt(jnp.maximum(jnp.square(x_BE).sum(-1, keepdims=True), 1e-24))
