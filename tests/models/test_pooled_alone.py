"""Towers that pool one token: the last layer makes no other, and neither vectors nor gradients change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import ClipText, Dense, SiglipText, Vit
from embedjax.models.embedder import Embedder
from embedjax.models.image import ImageEmbedder

SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp": 24, "init_std": 0.3, "dropout": 0.2, "attention_dropout": 0.2}
HEAD = (Dense(8, False, "identity"),)
VIT = Vit(image=12, patch=4, registers=1, patch_dropout=0.3, input_norm=True, **SIZES)
CLIP_TEXT = ClipText(vocab_size=40, positions=9, pad_id=39, eos_id=39, **SIZES)
EMBEDDERS = {
    "vit": ImageEmbedder(VIT, dense=HEAD),
    "clip": Embedder(CLIP_TEXT, "lasttoken", dense=HEAD),
    "clip, first token": Embedder(CLIP_TEXT, "cls", dense=HEAD),
    "siglip": Embedder(SiglipText(vocab_size=40, positions=9, **SIZES), "lasttoken", dense=HEAD),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These programs run once each and take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def column_of(embedder):
    rng = np.random.default_rng(0)
    if isinstance(embedder, ImageEmbedder):
        return {"pixels": rng.integers(0, 256, (4, 12, 12, 3)).astype(np.uint8)}
    mask = np.arange(9)[None] < np.array([9, 4, 1, 6])[:, None]
    pool = mask & (np.arange(9)[None] > 0) | (mask.sum(1) == 1)[:, None] & mask
    return {"ids": rng.integers(0, 38, (4, 9)).astype(np.int32), "mask": mask, "pool": pool}


def pulled(embedder, params, column, key, want):
    """The vectors, and the gradient of some function of them."""

    def value(params):
        found = embedder.apply(params, column, row=jnp.arange(5, 9), key=key, want=want).pooled
        return (found * jnp.cos(jnp.arange(found.size, dtype=jnp.float32).reshape(found.shape))).sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    return found, gradient


HOW = {"unrolled": {"layers": "unroll"}, "scanned": {"layers": "scan", "remat": True, "still": 1}, "still": {"still": 2}}
FEW = {("vit", "unrolled"), ("clip", "unrolled"), ("clip, first token", "scanned"), ("siglip", "unrolled")}


@pytest.mark.parametrize(
    ("name", "how"),
    [pytest.param(a, b, marks=[] if (a, b) in FEW else [pytest.mark.slow]) for a in EMBEDDERS for b in HOW],
)
def test_the_pooled_vector_and_its_gradient_are_those_of_all_tokens(name, how):
    embedder = dataclasses.replace(EMBEDDERS[name], **HOW[how])
    params, column = embedder.init(jax.random.key(1)), column_of(embedder)
    alone, whole = (pulled(embedder, params, column, jnp.uint32(7), want) for want in (("pooled",), ("pooled", "tokens")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), alone, whole)


def products(embedder, want):
    column = column_of(embedder)
    forward = lambda params: embedder.apply(params, column, want=want).pooled
    lowered = jax.jit(forward).lower(jax.eval_shape(embedder.init, jax.random.key(0)))
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("name", EMBEDDERS)
def test_what_is_not_pooled_is_not_made(name):
    embedder = dataclasses.replace(EMBEDDERS[name], layers="unroll")
    assert products(embedder, ("pooled",)) < 0.75 * products(embedder, ("pooled", "tokens"))


def test_a_text_without_tokens_still_has_a_finite_vector():
    embedder = dataclasses.replace(EMBEDDERS["clip"], normalize=False)
    params, column = embedder.init(jax.random.key(1)), column_of(embedder)
    column["mask"][2] = column["pool"][2] = False
    found, gradient = pulled(embedder, params, column, None, ("pooled",))
    assert (found[2] == 0).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
