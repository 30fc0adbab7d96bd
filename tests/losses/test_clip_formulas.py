"""CLIP's and SigLIP's losses as open_clip states them (ClipLoss, SigLipLoss), in numpy and with their gradients by hand: every
form gives them on 1 to 8 devices, with and without Matryoshka."""

import math

import jax
import numpy as np
import pytest

from embedjax import config, objective, sharding
from embedjax.models.embedder import Embedder

B, D, DIMS = 16, 24, (24, 8)
RNG = np.random.default_rng(7)
TEXTS = RNG.normal(size=(B, D))
PICTURES = RNG.normal(size=(B, D)) + 0.5 * TEXTS
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}
LOSSES = {
    "clip": config.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True),
    "siglip": config.Siglip(),
}
FIRST = {"clip": (math.log(1 / 0.07), 0.0), "siglip": (math.log(10), -10.0)}


def softmax(x, axis):
    shifted = np.exp(x - x.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def clip(logits):
    """Mean cross-entropy of rows and columns with the diagonal right, and its derivative by the logits."""
    eye = np.eye(B)
    value = -(np.log(softmax(logits, 1)) + np.log(softmax(logits, 0)))[eye == 1].mean() / 2
    return value, (softmax(logits, 1) + softmax(logits, 0) - 2 * eye) / (2 * B)


def siglip(logits):
    """-log sigmoid of the logits, those off the diagonal negated, summed and divided by the rows; and its derivative."""
    labels = 2 * np.eye(B) - 1
    return np.log1p(np.exp(-labels * logits)).sum() / B, -labels / (1 + np.exp(labels * logits)) / B


def formula(name, dims):
    """Value, and gradients by texts, pictures, the logarithm of the scale and the bias; summed over prefixes."""
    log_scale, bias = FIRST[name]
    scale, value, of_scale, of_bias = math.exp(log_scale), 0.0, 0.0, 0.0
    grads = np.zeros((2, B, D))
    for dim in dims:
        lengths = [np.linalg.norm(x[:, :dim], axis=1, keepdims=True) for x in (TEXTS, PICTURES)]
        x, y = (v[:, :dim] / length for v, length in zip((TEXTS, PICTURES), lengths, strict=True))
        part, slope = {"clip": clip, "siglip": siglip}[name](scale * x @ y.T + bias)
        value, of_scale, of_bias = value + part, of_scale + (slope * scale * (x @ y.T)).sum(), of_bias + slope.sum()
        for n, (unit, back) in enumerate(((x, scale * slope @ y), (y, scale * slope.T @ x))):
            grads[n, :, :dim] += (back - unit * (unit * back).sum(1, keepdims=True)) / lengths[n]
    return value, *grads, of_scale, of_bias


CASES = [(form, devices) for form in ("dense", "tiled", "ring") for devices in MESHES if (form, devices) != ("tiled", 8)]
# A few of each loss, on one device whole vectors and on more prefixes; `slow` runs the rest.
FEW = {("clip", "dense", 4), ("clip", "ring", 8), ("siglip", "tiled", 1), ("siglip", "ring", 2), ("siglip", "dense", 8)}
CELLS = [(name, form, n, dims) for name in LOSSES for form, n in CASES for dims in ((D,), DIMS)]
USUAL = [cell for cell in CELLS if cell[:3] in FEW and (cell[3] == DIMS) == (cell[2] > 1)]


@pytest.mark.parametrize(
    ("name", "form", "devices", "dims"),
    [pytest.param(*cell, marks=[] if cell in USUAL else [pytest.mark.slow]) for cell in CELLS],
)
def test_open_clips_formulas(name, form, devices, dims):
    arch = config.Bert(vocab_size=8, width=D, depth=1, heads=1, mlp=4, positions=4)
    model = config.Model({"text": config.Tower(arch=arch)})
    loss = type(LOSSES[name])(**{**vars(LOSSES[name]), "form": form, "tile": 5, "matryoshka": dims if len(dims) > 1 else ()})
    task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=loss)
    mesh = sharding.make_mesh(config.Mesh(*MESHES[devices]), jax.devices()[:devices])
    made = objective.make(task, model, {"text": Embedder(arch)}, mesh)
    learned = objective.loss_params(task, model, {"text": Embedder(arch)}, jax.random.key(0))

    def value(learned, texts, pictures):
        return made.loss({"loss": learned}, {"anchor": texts, "positive": pictures[:, None]}, (None, None), None)[0]

    with jax.enable_x64(True):
        place = lambda x: jax.device_put(x, sharding.rows(mesh))
        learned = {key: np.float64(start) for key, start in zip(("scale", "bias"), FIRST[name], strict=True) if key in learned}
        arguments = learned, place(TEXTS), place(PICTURES)
        found, (of_loss, *of_vectors) = jax.device_get(jax.jit(jax.value_and_grad(value, (0, 1, 2)))(*arguments))
    wanted, *grads, of_scale, of_bias = formula(name, dims)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    np.testing.assert_allclose(of_loss["scale"], of_scale, rtol=1e-9)
    assert ("bias" in of_loss) == (name == "siglip")
    np.testing.assert_allclose(of_loss.get("bias", of_bias), of_bias, rtol=1e-9)
    for got, grad in zip(of_vectors, grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=1e-12)


def test_what_is_learned_begins_as_in_the_papers():
    """Radford et al. 2021, section 2.5; Zhai et al. 2023, section 3."""
    arch = config.Bert(vocab_size=8, width=D, depth=1, heads=1, mlp=4, positions=4)
    model, embedders = config.Model({"text": config.Tower(arch=arch)}), {"text": Embedder(arch)}
    for name, loss in LOSSES.items():
        task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=loss)
        found = objective.loss_params(task, model, embedders, jax.random.key(0))
        wanted = dict(zip(("scale", "bias"), FIRST[name], strict=True))
        np.testing.assert_allclose([found[key] for key in sorted(found)], [wanted[key] for key in sorted(found)], rtol=1e-6)
