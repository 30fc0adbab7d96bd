"""Every wrapper over every loss of vectors, plain and with GradCache, on 1 to 8 devices: equal in value and gradient."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, sharding, step
from embedjax.models.embedder import Output

B, L, D, V = 16, 3, 12, 32
KEY = jnp.uint32(7)
DEVICES = (1, 2, 4, 8)


class Bag:
    """A tower of three cheap layers over a table of tokens, pooled to their mean."""

    width, normalize = D, False
    arch = types.SimpleNamespace(depth=3)

    def init(self, key):
        of_table, of_kernels = jax.random.split(key)
        kernels = 0.3 * jax.random.normal(of_kernels, (3, D, D))
        return {"encoder": {"table": jax.random.normal(of_table, (V, D)), "kernels": list(kernels)}}

    def apply(self, params, column, *, row, key, want=("pooled",)):
        layers = [params["encoder"]["table"][column["ids"]]]
        for kernel in params["encoder"]["kernels"]:
            layers.append(jnp.tanh(layers[-1] @ kernel) + layers[-1])
        return Output(self.pool(params, layers[-1], column), layers=jnp.stack(layers) if "layers" in want else None)

    def pool(self, params, tokens, column):
        return tokens.mean(-2)


MODEL = config.Model(
    {name: config.Tower(arch=config.Bert()) for name in ("text", "wise")}, {"anchor": "text", "positive": "text"}
)
TOWERS = {name: Bag() for name in MODEL.towers}

LOSSES = {
    "softmax": config.MultipleNegatives(),
    "joint, ring": config.MultipleNegatives(directions=("q2d", "d2q", "q2q", "d2d"), form="ring", learn_scale=True),
    "sigmoid, tiled": config.Siglip(form="tiled"),
    "guide": config.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", guide="wise"),
    "gist, tiled": config.MultipleNegatives(directions=("q2d", "q2q", "p2p"), guide="wise", scale=100.0, form="tiled"),
    "contrastive": config.Contrastive(margin=1.0),
    "online contrastive": config.OnlineContrastive(distance="euclidean", margin=2.0),
    "cosine regression": config.CosineRegression(),
    "cosent": config.CoSent(),
    "angle": config.AnglE(),
    "triplet": config.Triplet(margin=1.0),
    "batch all": config.BatchAll(margin=0.3),
    "batch hard": config.BatchHard(distance="cosine", margin=0.5),
    "batch hard, soft": config.BatchHardSoftMargin(),
    "batch semi-hard": config.BatchSemiHard(margin=0.3),
    "mega-batch margin": config.MegaBatchMargin(),
    "vectors": config.VectorDistillation(),
    "vectors of a tower": config.VectorDistillation(teacher="wise", distance="cosine"),
    "margin-mse": config.MarginMse(),
    "kl": config.KlDistillation(temperature=0.5),
    "kl of a tower": config.KlDistillation(teacher="wise"),
    "scores of a batch": config.ContrastiveDistillation(teacher="wise", scale=5.0, learn_scale=True, teacher_scale=10.0),
    "global orthogonal": config.GlobalOrthogonal(),
    "classes": config.Classify(classes=4),
    "classes of pairs": config.ClassifyPair(classes=4, label_smoothing=0.1),
    "supcon": config.SupCon(),
}
PREFIXES = {"matryoshka": (12, 5), "matryoshka_weights": (1.0, 2.0)}
QUANTIZED = config.Quantized(("float32", "int8"), (1.0, 0.5))
LAYERS = config.Layers(per_step=2, prior_weight=0.7, weighting="log", kl_weight=0.5)
WRAPPERS = {
    "alone": lambda loss: loss,
    "matryoshka": lambda loss: dataclasses.replace(loss, **PREFIXES),
    "matryoshka, drawn": lambda loss: dataclasses.replace(loss, **PREFIXES, dims_per_step=1),
    "layers": lambda loss: dataclasses.replace(loss, layers=LAYERS),
    "2d matryoshka": lambda loss: dataclasses.replace(loss, **PREFIXES, dims_per_step=1, layers=LAYERS),
    "quantized": lambda loss: dataclasses.replace(loss, **PREFIXES, quantized=QUANTIZED),
    "quantized, 2d": lambda loss: dataclasses.replace(loss, **PREFIXES, dims_per_step=1, layers=LAYERS, quantized=QUANTIZED),
    "sum": lambda loss: config.Sum(losses=(loss, config.GlobalOrthogonal(**PREFIXES)), weights=(0.5, 2.0), layers=LAYERS),
}


def batch():
    rng = np.random.default_rng(0)
    text = lambda *shape: {"ids": rng.integers(0, V, (*shape, L)).astype(np.int32), "mask": np.ones((*shape, L), bool)}
    word = lambda *shape: rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
    shapes = {"anchor": (B,), "positive": (B,), "negative": (B, 2)}
    return {
        **{name: text(*shape) for name, shape in shapes.items()},
        "hash": {name: word(*shape) for name, shape in shapes.items()},
        "row": np.arange(B, dtype=np.int32),
        "labels": rng.integers(0, 4, B).astype(np.int32),
        "scores": rng.uniform(size=(B, 3)).astype(np.float32),
        "vectors": rng.normal(size=(B, D)).astype(np.float32),
    }


def columns_of(loss):
    """The columns of a set, and those of its batch."""
    names = [
        name for name in ("anchor", "positive", "negative", "label", "score", "vector") if name in (*loss.needs, *loss.takes)
    ]
    found = batch()
    if isinstance(loss, config.Contrastive | config.OnlineContrastive) or "label" in names and "positive" in loss.needs:
        found["labels"] = found["labels"] % 2
    numbers = {"label": ["label"], "score": ["score", "score_2", "score_3"], "negative": ["negative", "negative_2"]}
    if "score" in names and "negative" not in names:
        numbers["score"], found["scores"] = ["score"], found["scores"][:, 0]
    for name, key in (("positive",) * 2, ("negative",) * 2, ("label", "labels"), ("score", "scores"), ("vector", "vectors")):
        if name not in names:
            found.pop(key, None)
            found["hash"].pop(key, None)
    return [column for name in names for column in numbers.get(name, [name])], found


@functools.cache
def parts(loss, devices):
    """(objective, params, constants, batch) of a loss on a mesh."""
    names, columns = columns_of(loss)
    task = config.Set(columns={name: name for name in names}, loss=loss)
    mesh = sharding.make_mesh(config.Mesh(*{1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}[devices]), jax.devices()[:devices])
    towers = {name: jax.device_get(TOWERS[name].init(jax.random.key(i))) for i, name in enumerate(TOWERS)}
    params = {"towers": {"text": towers["text"]}, "loss": objective.loss_params(task, MODEL, TOWERS, jax.random.key(0))}
    return objective.make(task, MODEL, TOWERS, mesh), params, {"towers": {"wise": towers["wise"]}}, columns, mesh


@functools.cache
def plain(loss):
    made, params, constants, columns, _ = parts(loss, 1)
    return jax.device_get(jax.jit(step.plain(made))(params, constants, columns, KEY))


def check(wrapper, name, path, devices):
    # In float64 rounding moves no number from one 255th of its range to another.
    with jax.enable_x64(wrapper.startswith("quantized")):
        compare(wrapper, name, path, devices)


def compare(wrapper, name, path, devices):
    loss = WRAPPERS[wrapper](LOSSES[name])
    made, params, constants, columns, mesh = parts(loss, devices)
    gradient = step.plain(made) if path == "plain" else step.cached(made, 2, mesh)
    jitted = jax.jit(sharding.in_sight(mesh, gradient))
    (value, metrics), grads = jitted(params, constants, sharding.place(columns, mesh), KEY)
    whole = plain(dataclasses.replace(loss, form="dense") if isinstance(loss, config.InBatch) else loss)
    (wanted, _), known = whole
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert value > 0 and all(np.isfinite(x) for x in metrics.values())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(known))
    assert largest > 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest), jax.device_get(grads), known)


# With GradCache every wrapper over every loss, on a number of devices that goes round; and the plain step, on several devices,
# of every loss alone or in the wrapper that holds two others.
TABLE = [
    (wrapper, name, "cached", DEVICES[(i + j) % 4]) for i, wrapper in enumerate(WRAPPERS) for j, name in enumerate(LOSSES)
] + [
    (wrapper, name, "plain", DEVICES[1 + (i + j) % 3])
    for i, wrapper in enumerate(("alone", "2d matryoshka"))
    for j, name in enumerate(LOSSES)
    if (i + j) % 2 == 1
]
# One of every wrapper; `slow` runs the rest.
FEW = {
    ("matryoshka", "vectors of a tower", "cached"),
    ("matryoshka, drawn", "softmax", "cached"),
    ("layers", "batch all", "cached"),
    ("2d matryoshka", "triplet", "plain"),
    ("sum", "cosine regression", "cached"),
    ("quantized", "contrastive", "cached"),
    ("alone", "kl of a tower", "cached"),
}


@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=[] if c[:3] in FEW else [pytest.mark.slow], id="-".join(map(str, c))) for c in TABLE]
)
def test_wrapped_losses_are_the_same_however_computed(cell):
    check(*cell)
