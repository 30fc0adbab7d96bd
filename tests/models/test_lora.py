"""Adapters: their shapes, W + alpha / rank * A B in value and gradient against float64, and the names they are asked for by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import Lora
from embedjax.config.errors import ConfigError
from embedjax.models import lora

S, D, F = 3, 4, 6


def make_encoder():
    draw = np.random.default_rng(0)
    leaf = lambda *shape: draw.normal(size=shape).astype(np.float32)
    attn = {name: {"kernel": leaf(S, D, D), "bias": leaf(S, D)} for name in ("query", "key", "value", "out")}
    blocks = {"attn": attn, "up": {"kernel": leaf(S, D, F)}, "down": {"kernel": leaf(S, F, D)}}
    return {"tokens": {"embedding": leaf(9, D)}, "blocks": blocks}


def flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def filled(adapters, encoder):
    """Adapters whose B is not 0."""
    draw = np.random.default_rng(1)
    tree = lora.init(adapters, encoder, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), tree)


def test_a_new_adapter_has_pairs_for_its_kernels_and_changes_nothing():
    adapters = {"wide": Lora(2, paths="blocks/"), "plain": Lora(3)}
    encoder = make_encoder()
    made = lora.init(adapters, encoder, jax.random.key(0))
    assert made.keys() == adapters.keys()
    assert {path for path in flat(made["plain"])} == {
        f"blocks/attn/{name}/kernel/{part}" for name in ("query", "value") for part in "ab"
    }
    assert len(flat(made["wide"])) == 12
    assert made["wide"]["blocks"]["down"]["kernel"]["a"].shape == (S, F, 2)
    assert made["wide"]["blocks"]["down"]["kernel"]["b"].shape == (S, 2, D)
    for path, value in flat(made).items():
        if path.endswith("/b"):
            assert not value.any()
        else:
            bound = 1 / np.sqrt(value.shape[-2])
            assert 0.5 * bound < np.abs(value).max() <= bound and np.unique(value).size == value.size
    params = {"encoder": encoder, "lora": made, "dense": {"0": 1}}
    for name in (*adapters, None):
        found = lora.merged(params, adapters, name)
        assert found.keys() == {"encoder", "dense"}
        jax.tree.map(np.testing.assert_array_equal, found["encoder"], encoder)


@pytest.mark.parametrize("name", ["wide", "plain"])
def test_value_and_gradient_are_those_of_the_formula_in_float64(name):
    adapters = {"wide": Lora(2, 8.0, "blocks/"), "plain": Lora(3, 1.0)}
    encoder, scale = make_encoder(), adapters[name].alpha / adapters[name].rank
    pairs = filled(adapters, encoder)
    weights = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), jnp.float32), encoder)

    def value(pairs):
        found = lora.merged({"encoder": encoder, "lora": pairs}, adapters, name)["encoder"]
        return sum(jax.tree.leaves(jax.tree.map(lambda w, x: (w * x).sum(), weights, found))), found

    (_, found), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(pairs)
    adapted = {path.removesuffix("/a") for path in flat(pairs[name]) if path.endswith("/a")}
    for path, kernel in flat(encoder).items():
        wanted = np.asarray(kernel, np.float64)
        if path in adapted:
            a, b, g = (np.asarray(x, np.float64) for x in (*pair(pairs[name], path), flat(weights)[path]))
            wanted = wanted + scale * np.einsum("sdr,srf->sdf", a, b)
            of_a, of_b = pair(grads[name], path)
            np.testing.assert_allclose(of_a, scale * np.einsum("sdf,srf->sdr", g, b), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(of_b, scale * np.einsum("sdr,sdf->srf", a, g), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(flat(found)[path], wanted, rtol=1e-5, atol=1e-5, err_msg=path)
    others = [grad for other in adapters if other != name for grad in jax.tree.leaves(grads[other])]
    assert not any(grad.any() for grad in others)


def pair(tree, path):
    return flat(tree)[f"{path}/a"], flat(tree)[f"{path}/b"]


def test_an_adapter_is_named_unless_there_is_one_or_a_default():
    assert lora.chosen({}) is None and lora.chosen({}, "sts") is None
    assert lora.chosen({"sts": Lora()}) == "sts"
    assert lora.chosen({"sts": Lora(), "default": Lora()}) == "default"
    assert lora.chosen({"sts": Lora(), "default": Lora()}, "sts") == "sts"
    with pytest.raises(ConfigError, match="adapters sts, search; name one"):
        lora.chosen({"sts": Lora(), "search": Lora()})
    with pytest.raises(ConfigError, match="no adapter 'ts'.*sts"):
        lora.chosen({"sts": Lora(), "search": Lora()}, "ts")


def test_what_adapts_nothing_is_refused():
    with pytest.raises(ConfigError, match="'x': paths 'attn/up' matches no kernel; the encoder has blocks/attn/query/kernel"):
        lora.init({"x": Lora(paths="attn/up")}, make_encoder(), jax.random.key(0))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"paths": "("}):
        with pytest.raises(ConfigError, match=f"Lora.{next(iter(wrong))} is"):
            Lora(**wrong)
