"""From vectors back to words: the head of masked language modelling, and TSDAE's decoder, whose layers are the tower's own.

Both are thrown away after training: what they have that the tower has not is never exported.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.config.model import Bert, ModernBert, Roberta, Transformer
from embedjax.models.families.bert import embedded
from embedjax.models.layers import MASKED, Attention, Dense, LayerNorm, Spec, View, stack
from embedjax.models.ops import ACTIVATIONS, by_rows, dropout, layer_seeds, token_seeds

ONLY_DECODER = ("cross_value", "cross_out", "cross_norm")


class WordHead(nn.Module):
    """Token vectors -> scores of the vocabulary: dense, activation, norm, then the tower's token table transposed, and a bias
    (Devlin et al. 2018; as transformers' heads for masked language modelling, ModernBERT's without biases before the last)."""

    arch: Transformer
    compute: str = "float32"

    @nn.compact
    def __call__(self, x_BPD: Float[Array, "B P D"], table_VD: Float[Array, "V D"]) -> Float[Array, "B P V"]:
        c, biased = self.arch, not isinstance(self.arch, ModernBert)
        x_BPD = Dense(c.width, self.compute, biased, c.init_std, name="transform")(x_BPD)
        x_BPD = LayerNorm(c.norm_eps, biased, name="norm")(ACTIVATIONS[c.activation](x_BPD))
        bias_V = self.param("bias", nn.initializers.zeros, (c.vocab_size,), jnp.float32)
        x_BPD, table_VD = (a.astype(self.compute) for a in (by_rows(x_BPD), _whole(table_VD)))
        return jnp.einsum("bpd,vd->bpv", x_BPD, table_VD, preferred_element_type=jnp.float32) + bias_V[None, None]


def _whole(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """The table gathered on each device: split over the width, it would be the scores that are summed over devices."""
    return table if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(table, P())


class DecoderBlock(nn.Module):
    """BERT's layer with a second attention, to one vector a text, between the first and the feed-forward part.

    A softmax over one score is 1 whatever query and key are: the second attention is its value and output projections alone.
    Query and key, which other decoders hold, get no gradient there. Its probabilities are not dropped, its output is.
    """

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], view: View) -> Float[Array, "B L D"]:
        s, D = self.spec, x_BLD.shape[-1]
        assert view.memory is not None
        dense = lambda features, name: Dense(features, s.compute, s.use_bias, s.init_std, name=name)
        y_BLD = dropout(Attention(s, name="attn")(x_BLD, view), s.dropout, view.seed, 1)
        x_BLD = LayerNorm(s.norm_eps, name="attn_norm")(x_BLD + y_BLD)
        y_BD = dense(D, "cross_out")(dense(D, "cross_value")(view.memory.astype(x_BLD.dtype)))
        y_BLD = dropout(jnp.broadcast_to(y_BD[:, None], x_BLD.shape), s.dropout, view.seed, 4)
        x_BLD = LayerNorm(s.norm_eps, name="cross_norm")(x_BLD + y_BLD)
        h_BLF = ACTIVATIONS[s.activation](dense(s.mlp, "up")(x_BLD))
        y_BLD = dropout(dense(D, "down")(h_BLF), s.dropout, view.seed, 2)
        return LayerNorm(s.norm_eps, name="mlp_norm")(x_BLD + y_BLD)


class Decoder(nn.Module):
    """Token ids and a vector a text -> token vectors that know the vector and the tokens up to their own (Wang et al. 2021,
    section 3.1). Its parameters are a tower's, and in each layer those of ONLY_DECODER."""

    arch: Bert | Roberta
    compute: str = "float32"
    remat: bool = False
    layers: Literal["auto", "scan", "unroll"] = "auto"
    still: int = 0

    @nn.compact
    def __call__(
        self,
        ids_BL: Int[Array, "B L"],
        mask_BL: Bool[Array, "B L"],
        memory_BD: Float[Array, "B D"],
        *,
        row_B: Int[Array, "B"],
        key: UInt32[Array, ""] | None = None,
    ) -> Float[Array, "B L D"]:
        c, L = self.arch, ids_BL.shape[1]
        seed_BL = None if key is None else token_seeds(key, row_B, L)
        # Padding comes after the text, where no token of it looks.
        later_LL = jnp.arange(L)[None] > jnp.arange(L)[:, None]
        bias = jnp.where(later_LL, MASKED, 0.0).astype(jnp.float32)[None, None]
        tokens_BLD, _ = stack(
            self,
            DecoderBlock(Spec.of(c, compute=self.compute), parent=None),
            embedded(c, ids_BL, seed_BL),
            per_layer=jnp.arange(c.depth),
            view=lambda layer: View(bias, layer_seeds(seed_BL, layer), memory=memory_BD),
        )
        return tokens_BLD


def init_decoder(key: Array, arch: Bert | Roberta) -> dict[str, Any]:
    """Random values of what a decoder has and a tower has not: {"blocks": {"cross_value": ..., ...}}."""
    ids = jnp.zeros((1, 1), jnp.int32)
    vector, row = jnp.zeros((1, arch.width)), jnp.zeros(1, jnp.int32)
    params = Decoder(arch).init(key, ids, ids == 0, vector, row_B=row)["params"]
    return {"blocks": {name: params["blocks"][name] for name in ONLY_DECODER}}


def tied(encoder: Mapping[str, Any], own: Mapping[str, Any], still: int = 0) -> dict[str, Any]:
    """The parameters of a decoder: the tower's, the first `still` layers of which get no gradient, and its own."""
    # Unlike in the tower, what they see does: it is how the decoder hears of the vector.
    cut = lambda x: jnp.concatenate([jax.lax.stop_gradient(x[:still]), x[still:]]) if still else x
    return {**encoder, "blocks": {**jax.tree.map(cut, encoder["blocks"]), **own["blocks"]}}
