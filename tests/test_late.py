"""Late interaction in training: its losses however computed, what it refuses, and a run from texts to search."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, optim, sharding, step
from embedjax.config.errors import ConfigError
from embedjax.models.embedder import Embedder

B, LQ, LD = 16, 4, 6
KEY = jnp.uint32(7)
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}
ARCH = config.Bert(vocab_size=32, width=16, depth=1, heads=2, mlp=32, positions=8, dropout=0.2, init_std=0.5)
DENSE = (config.Dense(8, bias=False, activation="identity"),)
TOWER = config.Tower(arch=ARCH, dense=DENSE, late=config.Late(query_length=LQ, document_length=LD))
MODEL = config.Model({name: TOWER for name in ("text", "wise")}, {"anchor": "text", "positive": "text"})
TOWERS = {name: Embedder(ARCH, dense=DENSE, late=TOWER.late) for name in MODEL.towers}

LOSSES = {
    "softmax": config.MultipleNegatives(),
    "symmetric, ring": config.MultipleNegatives(
        directions=("q2d", "d2q"), partition="per_direction", learn_scale=True, form="ring"
    ),
    "hardness, ragged": config.MultipleNegatives(hardness="all", hardness_strength=2.0, tile=5),
    "sigmoid": config.Siglip(),
    "xtr": config.MultipleNegatives(xtr=20),
    "xtr, symmetric, ragged": config.MultipleNegatives(
        xtr=40, directions=("q2d", "d2q"), partition="per_direction", learn_scale=True, tile=5
    ),
    "kl": config.KlDistillation(),
    "kl of a tower, scaled": config.KlDistillation(teacher="wise", min_max=True, temperature=0.5),
    "margin-mse": config.MarginMse(),
}
PREFIXES = {"matryoshka": (8, 3), "matryoshka_weights": (1.0, 2.0)}
WRAPPERS = {
    "alone": lambda loss: loss,
    "matryoshka": lambda loss: dataclasses.replace(loss, **PREFIXES),
    "matryoshka, drawn": lambda loss: dataclasses.replace(loss, **PREFIXES, dims_per_step=1),
    "sum": lambda loss: config.Sum(losses=(loss, config.MarginMse()), weights=(0.5, 2.0), **PREFIXES),
}


def batch():
    rng = np.random.default_rng(0)

    def text(length, *shape):
        ids = rng.integers(1, 32, (*shape, length)).astype(np.int32)
        mask = np.arange(length) < rng.integers(2, length + 1, (*shape, 1))
        score = rng.random(mask.shape) < 0.7 if length == LD else np.ones_like(mask)
        return {"ids": ids, "mask": mask, "score": score & (mask | (length == LQ))}

    word = lambda *shape: np.stack([rng.integers(0, 40, shape), np.zeros(shape)], -1).astype(np.uint32)
    shapes = {"anchor": (LQ, B), "positive": (LD, B), "negative": (LD, B, 2)}
    return {
        **{name: text(*shape) for name, shape in shapes.items()},
        "hash": {name: word(*shape[1:]) for name, shape in shapes.items()},
        "row": np.arange(B, dtype=np.int32),
        "scores": rng.uniform(size=(B, 3)).astype(np.float32),
    }


def task_of(loss):
    names = ["anchor", "positive", "negative", "negative_2"]
    stored = "score" in loss.needs
    return config.Set(columns={name: name for name in names + ["score", "score_2", "score_3"] * stored}, loss=loss)


@functools.cache
def parts(loss, devices):
    """(objective, trained, constants, mesh)"""
    mesh = sharding.make_mesh(config.Mesh(*MESHES[devices]), jax.devices()[:devices])
    towers = {name: jax.device_get(jax.jit(TOWERS[name].init)(jax.random.key(i))) for i, name in enumerate(TOWERS)}
    params = {"towers": towers, "loss": objective.loss_params(task_of(loss), MODEL, TOWERS, jax.random.key(0))}
    trained, constants = optim.partition(params, ("^towers/wise/",))
    return objective.make(task_of(loss), MODEL, TOWERS, mesh), trained, constants, mesh


@functools.cache
def plain(loss):
    made, trained, constants, _ = parts(loss, 1)
    return jax.device_get(jax.jit(step.plain(made))(trained, constants, batch(), KEY))


def dense(loss):
    return dataclasses.replace(loss, form="dense") if isinstance(loss, config.InBatch) else loss


def check(wrapper, name, path, devices):
    loss = WRAPPERS[wrapper](LOSSES[name])
    made, trained, constants, mesh = parts(loss, devices)
    trained, constants = (jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (trained, constants))
    gradient = step.plain(made) if path == "plain" else step.cached(made, 2, mesh)
    jitted = jax.jit(sharding.in_sight(mesh, gradient))
    (value, metrics), grads = jitted(trained, constants, sharding.place(batch(), mesh), KEY)
    (wanted, _), known = plain(WRAPPERS[wrapper](dense(LOSSES[name])))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert all(np.isfinite(x) for x in metrics.values())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(known))
    assert largest > 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5 * largest), jax.device_get(grads), known)


TABLE = [
    (wrapper, name, ("cached", "plain")[(i + j) % 2], (1, 2, 4, 8)[(i + 2 * j) % 4])
    for i, wrapper in enumerate(WRAPPERS)
    for j, name in enumerate(LOSSES)
]
FEW = [
    ("alone", "symmetric, ring", "cached", 8),
    ("matryoshka", "xtr", "cached", 4),
    ("matryoshka", "softmax", "cached", 2),
    ("matryoshka, drawn", "kl of a tower, scaled", "cached", 4),
    ("sum", "hardness, ragged", "plain", 1),
]


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id="-".join(map(str, c))) for c in FEW[:1]]
    + [
        pytest.param(c, marks=pytest.mark.slow, id="-".join(map(str, c)))
        for c in dict.fromkeys((*FEW[1:], *TABLE))
        if c not in FEW[:1]
    ],
)
def test_losses_are_the_same_however_computed(cell):
    check(*cell)


# ---- what the losses are


def outputs(seed=0):
    """Unit vectors of tokens, and which count."""
    rng = np.random.default_rng(seed)
    unit = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(rng.normal(size=shape))
    vectors = {"anchor": unit(B, LQ, 8), "positive": unit(B, 3, LD, 8)}
    masks = {"anchor": np.ones((B, LQ), bool), "positive": rng.random((B, 3, LD)) < 0.8}
    return vectors, masks


def looped(vectors, masks):
    """Scores of every query with every document [B B C]."""
    found = np.zeros((B, B, 3))
    for b, r, c in np.ndindex(found.shape):
        products = vectors["anchor"][b] @ vectors["positive"][r, c][masks["positive"][r, c]].T
        found[b, r, c] = products.max(1).sum() if products.size else 0.0
    return found


def value_of(loss, targets):
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    vectors, masks = outputs()
    with jax.enable_x64(True):
        made = objective.make(task_of(loss), MODEL, TOWERS, mesh)
        return float(made.loss({}, vectors, (masks, targets), None)[0]), looped(vectors, masks)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_in_batch_is_a_softmax_over_maxsim_scores_at_scale_1():
    found, scores = value_of(config.MultipleNegatives(mask_duplicates=False), None)
    row = np.arange(B)
    wanted = -log_softmax(scores.reshape(B, -1))[row, 3 * row].mean()
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_xtr_is_a_softmax_over_means_of_what_was_retrieved_at_scale_20():
    found, _ = value_of(config.MultipleNegatives(mask_duplicates=False, xtr=30), None)
    vectors, masks = outputs()
    scores = np.zeros((B, B, 3))
    for b in range(B):
        products = np.einsum("ie,rcje->ircj", vectors["anchor"][b], vectors["positive"])
        products[:, ~masks["positive"]] = -np.inf
        least = np.sort(products.reshape(LQ, -1), 1)[:, -30]
        kept = np.ma.masked_less(products, least[:, None, None, None]).max(-1)
        scores[b] = kept.mean(0).filled(0)
    row = np.arange(B)
    wanted = -log_softmax(20 * scores.reshape(B, -1))[row, 3 * row].mean()
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


@pytest.mark.parametrize("min_max", [False, True])
def test_distillation_is_the_divergence_of_own_scores(min_max):
    teacher = np.random.default_rng(5).normal(size=(B, 3))
    found, scores = value_of(config.KlDistillation(min_max=min_max), teacher)
    own = scores[np.arange(B), np.arange(B)]
    if min_max:
        low, high = own.min(1, keepdims=True), own.max(1, keepdims=True)
        own = (own - low) / (high - low + 1e-8)
    p, q = log_softmax(teacher), log_softmax(own)
    np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-10)


def test_margin_mse_compares_differences_of_own_scores():
    teacher = np.random.default_rng(5).normal(size=(B, 2))
    found, scores = value_of(config.MarginMse(), teacher)
    own = scores[np.arange(B), np.arange(B)]
    np.testing.assert_allclose(found, ((own[:, :1] - own[:, 1:] - teacher) ** 2).mean(), rtol=1e-10)


@pytest.mark.parametrize(
    "loss, message",
    [
        (config.Triplet(), "Triplet is no loss of late interaction"),
        (config.MultipleNegatives(directions=("q2d", "q2q")), "q2q"),
        (config.MultipleNegatives(guide="wise"), "no guide"),
        (config.MultipleNegatives(layers=config.Layers()), "earlier layers"),
        (config.KlDistillation(similarity="dot"), "MaxSim"),
        (config.MultipleNegatives(matryoshka=(16,)), "prefix 16; embeddings of column '.*' have 8"),
        (config.Sum(losses=(config.MultipleNegatives(), config.GlobalOrthogonal())), "GlobalOrthogonal"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_what_does_not_fit_is_refused(loss, message):
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    with pytest.raises(ConfigError, match=message):
        objective.make(task_of(loss), MODEL, TOWERS, mesh)
    plain = dataclasses.replace(TOWER, late=None)
    with pytest.raises(ConfigError, match="xtr is 5, which is of late interaction"):
        objective.make(task_of(config.MultipleNegatives(xtr=5)), config.Model({"text": plain}), {}, mesh)
    mixed = config.Model({"text": TOWER, "other": plain}, {"anchor": "text", "positive": "other"})
    with pytest.raises(ConfigError, match="not all by late interaction"):
        _ = mixed.late


# ---- the tower


@pytest.mark.parametrize("loss", [config.KlDistillation, config.MarginMse])
def test_teachers_that_do_not_fit_are_refused(loss):
    wide = {"wide": dataclasses.replace(TOWER, dense=(config.Dense(6, bias=False, activation="identity"),))}
    pooled = {"pooled": config.Tower(arch=ARCH)}
    model = dataclasses.replace(MODEL, towers={**MODEL.towers, **wide, **pooled})
    towers = TOWERS | {
        name: Embedder(ARCH, dense=tower.dense or (), late=tower.late) for name, tower in (wide | pooled).items()
    }
    make = lambda **names: objective.make(
        task_of(loss(**names)), model, towers, sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    )
    make(teacher="wide")
    with pytest.raises(ConfigError, match="teacher 'wize' is no tower; did you mean 'wise'"):
        make(teacher="wize")
    with pytest.raises(ConfigError, match="have widths {'wise': 8, 'wide': 6}"):
        make(teacher="wise", document_teacher="wide")
    with pytest.raises(ConfigError, match="'pooled'"):
        make(teacher="pooled")


def test_vectors_are_unit_and_blind_to_padding():
    embedder, column = TOWERS["text"], batch()["positive"]
    params = jax.jit(embedder.init)(jax.random.key(0))

    @jax.jit
    def vectors(table, column):
        encoder = params["encoder"] | {"tokens": {"embedding": table}}
        return embedder.apply(params | {"encoder": encoder}, column, want=("vectors",)).vectors

    table = params["encoder"]["tokens"]["embedding"]
    found = vectors(table, column)
    assert found.shape == (B, LD, 8) and found.dtype == jnp.float32
    norms = np.linalg.norm(found, axis=-1)
    np.testing.assert_allclose(norms, column["score"], atol=1e-6)
    other = column | {"ids": np.where(column["mask"], column["ids"], 31)}
    np.testing.assert_allclose(vectors(table, other), found, atol=1e-6)
    gradient = jax.grad(lambda table: (vectors(table, column) ** 3).sum())(table)
    assert np.isfinite(gradient).all() and np.any(gradient)
