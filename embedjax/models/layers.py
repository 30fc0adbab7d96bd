"""The parts every tower is built of: dense, norm, embedding, attention, feed-forward, blocks and the stack of layers.

Knows no architecture, no config and no file format. Parameters are always float32; `compute` is the type of the products.

Axis letters, used in einsum, annotations and suffixes everywhere:
B batch · N documents · L tokens or patches · D width · H heads · K head dim · F mlp · V vocab · E embedding dim · S layers
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from embedjax.models.attention import attend, attend_again, rotate
from embedjax.models.ops import ACTIVATIONS, by_rows, dropout, layer_norm, lookup, on_cpu, product, product_int8

MASKED = -1e9  # finite, so that a row of padding alone still has a softmax and a gradient


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the parts of a layer need to know; the names are those of the architecture configs."""

    heads: int
    mlp: int
    activation: str
    norm_eps: float
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    use_bias: bool = True
    compute: str = "float32"
    remat: bool = False
    """The layer is computed again for its gradient: what it keeps until then does not matter."""

    @classmethod
    def of(cls, arch: Any, **changes) -> "Spec":
        """From an architecture config, by field name."""
        shared = {f.name: getattr(arch, f.name) for f in dataclasses.fields(cls) if hasattr(arch, f.name)}
        return cls(**(shared | changes))


class View(NamedTuple):
    """What one layer sees besides the residual stream."""

    bias: Float[Array, "..."]
    """Added to the attention scores, float32 [B|1 H|1 L|1 L]: padding, window, relative positions."""
    seed: UInt32[Array, "B L"] | None = None
    """Dropout seeds of the tokens in this layer (ops.layer_seeds); None drops nothing."""
    rope: tuple[Float[Array, "L K"], Float[Array, "L K"]] | None = None
    """Cosine and sine of rotary positions (attention.rope_table)."""
    attn_norm: Bool[Array, ""] | None = None
    """Pre-norm blocks: False skips the norm before attention; None never skips."""
    memory: Float[Array, "B D"] | None = None
    """Decoders: the vector of each text that it is told of."""

    def at(self, place_B: Int[Array, "B"]) -> "View":
        """What the token at one place of each row sees. Without rotary positions."""
        assert self.rope is None
        pick = lambda x, index, axis: jnp.take_along_axis(jnp.broadcast_to(x, (place_B.shape[0], *x.shape[1:])), index, axis)
        bias = self.bias if self.bias.shape[2] == 1 else pick(self.bias, place_B[:, None, None, None], 2)
        return self._replace(bias=bias, seed=None if self.seed is None else pick(self.seed, place_B[:, None], 1))


class Dense(nn.Module):
    """x W + b over the last axis. A kernel of int8 has a scale beside it and is multiplied as `product_int8` does."""

    features: int
    compute: str = "float32"
    use_bias: bool = True
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features), jnp.float32)
        rows = x.reshape(-1, x.shape[-1])
        if kernel.dtype == jnp.int8:
            y = product_int8(rows, kernel, self.get_variable("params", "kernel_scale"))
        else:
            y = product(rows, kernel, self.compute)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(y.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the last axis, statistics in float32."""

    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32) if self.use_bias else None
        return layer_norm(x, scale_D, bias_D, self.eps)


class Embed(nn.Module):
    """A table of vectors, looked up by id; ids outside are clipped, as XLA does. One of int8 has a scale a row beside it."""

    rows: int
    width: int
    init_std: float = 0.02

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        table = self.param("embedding", nn.initializers.normal(self.init_std), (self.rows, self.width), jnp.float32)
        if table.dtype == jnp.int8:
            scale_V = self.get_variable("params", "embedding_scale")
            return lookup(table, ids).astype(jnp.float32) * lookup(scale_V, ids)[..., None]
        return lookup(table, ids)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) of a sequence to itself, or to another if one is given, with an
    additive bias and, if asked, rotary positions."""

    spec: Spec

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], view: View, other_BMD: Float[Array, "B M D"] | None = None
    ) -> Float[Array, "B L D"]:
        s, (B, L, D) = self.spec, x_BLD.shape
        dense = lambda name: Dense(D, s.compute, s.use_bias, s.init_std, name=name)
        seen = x_BLD if other_BMD is None else other_BMD
        inputs = (("query", x_BLD), ("key", seen), ("value", seen))
        q, k, v = (dense(name)(x).reshape(B, x.shape[1], s.heads, -1).swapaxes(1, 2) for name, x in inputs)
        if view.rope is not None:
            q, k = rotate(q, view.rope), rotate(k, view.rope)
        # Inside a layer that is computed again scores would be made a third time.
        form = attend if s.remat else attend_again
        o_BHLK = form(q, k, v, view.bias, rate=s.attention_dropout, seed=view.seed, compute=s.compute)
        return dense("out")(o_BHLK.swapaxes(1, 2).reshape(B, L, D))


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)): BERT's layer (Devlin et al. 2018)."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], view: View) -> Float[Array, "B L D"]:
        s, D = self.spec, x_BLD.shape[-1]
        dense = lambda features, name: Dense(features, s.compute, s.use_bias, s.init_std, name=name)
        y_BLD = dropout(Attention(s, name="attn")(x_BLD, view), s.dropout, view.seed, 1)
        x_BLD = LayerNorm(s.norm_eps, name="attn_norm")(x_BLD + y_BLD)
        h_BLF = ACTIVATIONS[s.activation](dense(s.mlp, "up")(x_BLD))
        y_BLD = dropout(dense(D, "down")(h_BLF), s.dropout, view.seed, 2)
        return LayerNorm(s.norm_eps, name="mlp_norm")(x_BLD + y_BLD)


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the layer of ViT and CLIP (Dosovitskiy et al. 2020, equations 2 and 3).

    With `only` the vector of the token at that place of each row alone: the same numbers for a sixth of the products.
    """

    spec: Spec

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], view: View, only_B: Int[Array, "B"] | None = None
    ) -> Float[Array, "B M D"]:
        s, D = self.spec, x_BLD.shape[-1]
        dense = lambda features, name: Dense(features, s.compute, s.use_bias, s.init_std, name=name)
        seen_BLD = y_BLD = LayerNorm(s.norm_eps, name="attn_norm")(x_BLD)
        if only_B is not None:
            x_BLD, y_BLD, view = token_at(x_BLD, only_B), token_at(y_BLD, only_B), view.at(only_B)
        y_BLD = Attention(s, name="attn")(y_BLD, view, seen_BLD)
        x_BLD = x_BLD + dropout(y_BLD, s.dropout, view.seed, 1)
        h_BLF = ACTIVATIONS[s.activation](dense(s.mlp, "up")(LayerNorm(s.norm_eps, name="mlp_norm")(x_BLD)))
        return x_BLD + dropout(dense(D, "down")(h_BLF), s.dropout, view.seed, 2)


class PreNormGatedBlock(nn.Module):
    """x + attention(norm(x)), then x + gated mlp(norm(x)): ModernBERT's layer (Warner et al. 2024; GeGLU: Shazeer 2020).

    `up` holds the activated half, then the gate. Drops after attention (at its rate) and before `down`, as ModernBERT does.
    """

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], view: View) -> Float[Array, "B L D"]:
        s, D = self.spec, x_BLD.shape[-1]
        dense = lambda features, name: Dense(features, s.compute, s.use_bias, s.init_std, name=name)
        norm = lambda name: LayerNorm(s.norm_eps, s.use_bias, name=name)
        y_BLD = norm("attn_norm")(x_BLD)
        if view.attn_norm is not None:
            y_BLD = jnp.where(view.attn_norm, y_BLD, x_BLD)
        x_BLD = x_BLD + dropout(Attention(s, name="attn")(y_BLD, view), s.attention_dropout, view.seed, 1)
        h_BLF, gate_BLF = jnp.split(dense(2 * s.mlp, "up")(norm("mlp_norm")(x_BLD)), 2, axis=-1)
        h_BLF = dropout(ACTIVATIONS[s.activation](h_BLF) * gate_BLF, s.dropout, view.seed, 2)
        return x_BLD + dense(D, "down")(h_BLF)


def token_at(x_BLD: Float[Array, "B L D"], place_B: Int[Array, "B"]) -> Float[Array, "B 1 D"]:
    """One token of each row. By a sum over all, whose gradient is no scatter."""
    here_BL = jnp.arange(x_BLD.shape[1])[None] == place_B[:, None]
    return jnp.where(here_BL[..., None], x_BLD, jnp.zeros((), x_BLD.dtype)).sum(1, keepdims=True)


def padding_bias(mask_BL: Bool[Array, "B L"]) -> Float[Array, "B 1 1 L"]:
    """Attention bias that hides padding."""
    return jnp.where(mask_BL, 0.0, MASKED).astype(jnp.float32)[:, None, None, :]


def counted_positions(ids_BL: Int[Array, "B L"], pad_id: int) -> Int[Array, "B L"]:
    """Positions as RoBERTa and MPNet number them: tokens from pad_id + 1 on, padding pad_id. What counts as padding is told by
    the id: late interaction has tokens that no other sees and that are numbered like the rest."""
    here_BL = ids_BL != pad_id
    return jnp.where(here_BL, pad_id + jnp.cumsum(here_BL, axis=1), pad_id)


def stack(
    tower: Any,
    block: nn.Module,
    x_BLD: Float[Array, "B L D"],
    *,
    per_layer: PyTree,
    view: Callable[[PyTree], View],
    want_layers: bool = False,
    only_B: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B M D"], Float[Array, "S+1 B L D"] | None]:
    """Run S copies of a block, their parameters stacked on axis 0 under `blocks` of the tower; float32 results, of each layer
    behind what the first one sees. With `only` the last layer gives the token at that place of each row alone, if the block
    can.

    `block` is a template, made with parent=None. `per_layer` is a tree of arrays [S ...]; `view` turns one layer's slice of it
    into what the block sees. The tower's fields say how: `remat` recomputes layers in the backward pass; `layers` scans
    (compiles one layer) or unrolls (compiles all; a sixth faster on a CPU, where "auto" does it); the first `still` layers and
    what they see have no gradient, and no backward pass. The numbers are the same.
    """
    depth = jax.tree.leaves(per_layer)[0].shape[0]

    def init(rng):
        first = view(jax.tree.map(lambda a: a[0], per_layer))
        return jax.vmap(lambda r: block.init(r, x_BLD, first)["params"])(jax.random.split(rng, depth))

    def layer(x: Array, slices: PyTree, *only: Array) -> Any:
        params, inputs = slices
        y: Any = block.apply({"params": params}, x, view(inputs), *only)
        return by_rows(y)

    layer = jax.checkpoint(layer) if tower.remat else layer
    loop = _unrolled if tower.layers == "unroll" or (tower.layers == "auto" and on_cpu()) else _scanned
    # Linen would compare what is stored with `init`, which knows no scales of int8 kernels.
    blocks = tower.get_variable("params", "blocks") if tower.has_variable("params", "blocks") else tower.param("blocks", init)
    x_BLD, stacked = by_rows(x_BLD), (blocks, per_layer)
    each: list[Any] = [x_BLD[None]]
    only = () if only_B is None else (only_B,)
    if tower.still:
        # A scan has one backward pass for all its layers: those without are a scan of their own, cut off before and after.
        below = jax.tree.map(lambda a: a[: tower.still], stacked)
        stacked = jax.tree.map(lambda a: a[tower.still :], stacked)
        x_BLD, outputs = jax.lax.stop_gradient(
            loop(layer, *jax.lax.stop_gradient((x_BLD, below)), want_layers, only if tower.still == depth else ())
        )
        each.append(outputs)
    if tower.still < depth:
        x_BLD, outputs = loop(layer, x_BLD, stacked, want_layers, only)
        each.append(outputs)
    return x_BLD.astype(jnp.float32), jnp.concatenate(each).astype(jnp.float32) if want_layers else None


def _scanned(layer: Callable, x_BLD: Array, stacked: PyTree, want_layers: bool, only: tuple) -> tuple[Array, Array | None]:
    """`only` is what the last layer is given besides."""
    if only:
        leaves, structure = jax.tree.flatten(stacked)
        parts = [jax.lax.split(leaf, (leaf.shape[0] - 1, 1)) for leaf in leaves]
        stacked, last = (structure.unflatten(part) for part in zip(*parts, strict=True))
    x_BLD, outputs = jax.lax.scan(lambda x, slices: (y := layer(x, slices), y if want_layers else None), x_BLD, stacked)
    return (layer(x_BLD, jax.tree.map(lambda a: a.squeeze(0), last), *only), None) if only else (x_BLD, outputs)


def _unrolled(layer: Callable, x_BLD: Array, stacked: PyTree, want_layers: bool, only: tuple) -> tuple[Array, Array | None]:
    outputs, parts = [], unstack(stacked)
    for n, slices in enumerate(parts, 1):
        x_BLD = layer(x_BLD, slices, *(only if n == len(parts) else ()))
        outputs.append(x_BLD)
    return x_BLD, jnp.stack(outputs) if want_layers else None


def unstack(tree: PyTree) -> list[PyTree]:
    """[S ...] leaves -> S trees. By split, whose gradient is one concatenation (that of indexing adds S padded copies)."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[p.squeeze(0) for p in jax.lax.split(leaf, (1,) * leaf.shape[0])] for leaf in leaves]
    return [structure.unflatten(layer) for layer in zip(*parts, strict=True)]
