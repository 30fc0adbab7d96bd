"""A CLIP that teaches another: its two towers read the student's pictures and texts in the same step, frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import build, config, objective, sharding, step
from embedjax.config.errors import ConfigError
from embedjax.models.embedder import build_embedder

B, L, V = 16, 6, 32
KEY = jnp.uint32(5)
HEAD = (config.Dense(12, bias=False, activation="identity"),)
TEXT = config.Bert(vocab_size=V, width=16, depth=1, heads=2, mlp=32, positions=8, init_std=0.3, dropout=0.1)
WISE = config.Bert(vocab_size=V, width=24, depth=1, heads=2, mlp=32, positions=8, init_std=0.4, dropout=0.1)
VIT = config.Vit(image=8, patch=4, width=16, depth=1, heads=2, mlp=32, init_std=0.3, patch_dropout=0.25)
WISE_VIT = config.Vit(image=8, patch=2, width=24, depth=1, heads=2, mlp=32, init_std=0.4, patch_dropout=0.25)
# The teacher normalises pictures by numbers of its own, and its vectors have another length than the student's.
TOWERS = {
    "text": config.Tower(TEXT, max_length=L, dense=HEAD),
    "image": config.ImageTower(VIT, dense=HEAD, augment=config.Augment(brightness=0.3)),
    "wise_text": config.Tower(WISE, max_length=L),
    "wise_image": config.ImageTower(WISE_VIT, pixels=config.Pixels(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))),
}
TEACHER = {"teacher": "wise_text", "document_teacher": "wise_image"}
SYMMETRIC = config.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=10.0, learn_scale=True)
LOSSES = {
    "scores": config.ContrastiveDistillation(scale=10.0, learn_scale=True, teacher_scale=20.0, **TEACHER),
    "scores, prefixes": config.ContrastiveDistillation(scale=10.0, teacher_scale=20.0, matryoshka=(12, 5), **TEACHER),
    "with the contrastive loss": config.Sum(
        losses=(SYMMETRIC, config.ContrastiveDistillation(scale=10.0, learn_scale=True, **TEACHER)), weights=(1.0, 0.5)
    ),
    "own candidates": config.KlDistillation(**TEACHER),
}


def made_config(loss, *, cached=1, towers=None, steps=4):
    columns = {"anchor": "a", "positive": "b"} | ({"negative": "c"} if isinstance(loss, config.KlDistillation) else {})
    return build.resolve(
        config.Config(
            steps=steps,
            model=config.Model({**TOWERS, **(towers or {})}, {"anchor": "text", "positive": "image"}),
            data=config.Data(batch_size=B, sets=(config.Set(columns=columns, loss=loss, name="pairs"),)),
            optim=config.Optim(learning_rate=1e-2, warmup=0, freeze=("^towers/wise_",), cached=cached),
            export=config.Export("none"),
        )
    )


def batch(negatives=0):
    rng = np.random.default_rng(3)
    pixels = lambda *shape: {"pixels": rng.integers(0, 256, (*shape, 8, 8, 3)).astype(np.uint8)}
    word = lambda *shape: rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
    mask = np.arange(L) < rng.integers(2, L + 1, (B, 1))
    ids = np.where(mask, rng.integers(1, V, (B, L)), 0).astype(np.int32)
    columns = {"anchor": {"ids": ids, "mask": mask}, "positive": pixels(B), "row": np.arange(B, dtype=np.int32)}
    columns["hash"] = {"anchor": word(B), "positive": word(B)}
    if negatives:
        columns["negative"], columns["hash"]["negative"] = pixels(B, negatives), word(B, negatives)
    return columns


@functools.cache
def parameters():
    """(trained, constants): random ones of all towers, drawn once."""
    embedders = {name: build_embedder(tower) for name, tower in made_config(LOSSES["scores"]).model.towers.items()}
    draw = lambda n, name: jax.device_get(jax.jit(embedders[name].init)(jax.random.key(n)))
    towers = {name: draw(n, name) for n, name in enumerate(embedders)}
    split = lambda wise: {name: tree for name, tree in towers.items() if name.startswith("wise_") == wise}
    return {"towers": split(False)}, {"towers": split(True)}


def gradient(loss, *, devices=1, cached=1):
    """(value, gradients) of a step's loss on the batch."""
    made = made_config(loss)
    embedders = {name: build_embedder(tower) for name, tower in made.model.towers.items()}
    shape = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}[devices]
    mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[:devices])
    (task,) = made.data.sets
    found = objective.make(task, made.model, embedders, mesh)
    trained, constants = parameters()
    learned = objective.loss_params(task, made.model, embedders, jax.random.key(0))
    trained = {**trained, **({"loss": jax.device_get(learned)} if learned else {})}
    taken = step.plain(found) if cached == 1 else step.cached(found, cached, mesh)
    columns = sharding.place(batch(2 if "negative" in task.columns else 0), mesh)
    (value, _), grads = jax.jit(sharding.in_sight(mesh, taken))(trained, constants, columns, KEY)
    return float(value), jax.device_get(grads)


@functools.cache
def plain(name):
    return gradient(LOSSES[name])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def test_the_value_and_gradient_of_the_formula():
    """In numpy and float64: KL of rows and columns, and its gradient by hand, taken back through the student's towers."""
    model = made_config(LOSSES["scores"]).model
    embedders = {name: build_embedder(tower) for name, tower in model.towers.items()}
    trained, constants = parameters()
    columns, row = batch(), np.arange(B, dtype=np.int32)

    def encode(towers):
        """As a step does: with dropout, patches left out and colours varied for the student alone."""
        text = embedders["text"].apply(towers["text"], columns["anchor"], row=row, key=KEY)
        salted = KEY + jnp.uint32(0x9E3779B9)
        image = embedders["image"].apply(towers["image"], columns["positive"], row=row, key=salted)
        return text.pooled, image.pooled

    student, back = jax.vjp(jax.jit(encode), trained["towers"])
    wise = constants["towers"]
    told = [
        jax.jit(embedders[name].apply)(wise[name], columns[column]).pooled
        for name, column in (("wise_text", "anchor"), ("wise_image", "positive"))
    ]
    x, y, u, v = (unit(np.asarray(vectors, np.float64)) for vectors in (*student, *told))
    score, taught = 10.0 * x @ y.T, 20.0 * u @ v.T
    kl = lambda p, q: (p * np.log(p / q)).sum(-1).mean()
    value = (kl(softmax(taught), softmax(score)) + kl(softmax(taught.T), softmax(score.T))) / 2
    slope = (softmax(score) - softmax(taught) + (softmax(score.T) - softmax(taught.T)).T) / (2 * B)
    of_text, of_image = 10.0 * slope @ y, 10.0 * slope.T @ x
    across = lambda unit, grad: (grad - unit * (unit * grad).sum(-1, keepdims=True)).astype(np.float32)
    (wanted,) = back((jnp.asarray(across(x, of_text)), jnp.asarray(across(y, of_image))))
    found, grads = plain("scores")
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert value > 0.1
    np.testing.assert_allclose(grads["loss"]["scale"], (slope * score).sum(), rtol=1e-4)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-5 * largest), grads["towers"], dict(wanted))


USUAL = ("own candidates", 2, 2)
# Each loss on every number of devices, whole or in chunks in turn.
TABLE = {(name, 2 if n == 1 else 1 + (i + j) % 2, n) for i, name in enumerate(LOSSES) for j, n in enumerate((1, 2, 4, 8))}
CELLS = sorted({USUAL, ("scores", 2, 4), ("scores, prefixes", 1, 8)} | TABLE)


@pytest.mark.parametrize(
    ("name", "cached", "devices"), [pytest.param(*c, marks=[] if c == USUAL else [pytest.mark.slow]) for c in CELLS]
)
def test_in_chunks_and_on_several_devices_it_is_the_same(name, cached, devices):
    value, grads = gradient(LOSSES[name], devices=devices, cached=cached)
    wanted, known = plain(name)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(known))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * largest), grads, known)


@pytest.mark.slow
def test_the_teacher_stands_still_and_the_student_comes_nearer():
    made = made_config(LOSSES["scores"], cached=2, steps=12)
    mesh = sharding.make_mesh(config.Mesh(2), jax.devices()[:2])
    parts = build.parts(made, mesh)
    names = lambda tree: set(tree["towers"])
    assert names(parts.abstract.params) == {"text", "image"} and names(parts.constants) == {"wise_text", "wise_image"}
    assert names(parts.abstract.opt_state["adam"].mu) == {"text", "image"}
    trained, constants = parameters()
    state = step.init_state({**trained, "loss": {"scale": np.float32(np.log(10.0))}}, parts.tx)
    places = jax.tree.map(lambda x: x.sharding, (parts.abstract, parts.constants))
    state, constants = jax.device_put((state, constants), places)
    losses = []
    for _ in range(12):
        state, metrics = parts.steps["pairs"](state, constants, sharding.place(batch(), mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("names", "towers", "word"),
    [
        ({"teacher": "wise_text"}, {}, "'wise_text' is a tower of texts, but column 'positive' holds pictures"),
        ({"teacher": "wise_image", "document_teacher": "wise_text"}, {}, "is a tower of pictures, but column 'anchor'"),
        (TEACHER, {"wise_image": dataclasses.replace(WISE_VIT, image=16)}, "must share their size"),
        (TEACHER, {"wise_image": dataclasses.replace(WISE_VIT, width=8)}, "vectors of"),
        ({"teacher": "wise_text", "document_teacher": "nobody"}, {}, "'nobody' is no tower"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(names, towers, word):
    changed = {name: dataclasses.replace(TOWERS[name], arch=arch) for name, arch in towers.items()}
    model = made_config(LOSSES["scores"], towers=changed).model
    embedders = {name: build_embedder(tower) for name, tower in model.towers.items()}
    task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=config.ContrastiveDistillation(**names))
    with pytest.raises(ConfigError, match=word):
        objective.make(task, model, embedders, sharding.make_mesh(config.Mesh(), jax.devices()[:1]))


def test_a_teacher_that_cuts_pictures_otherwise_or_pads_texts_otherwise_is_refused():
    squashed = dataclasses.replace(TOWERS["wise_image"], pixels=config.Pixels(fit="squash"))
    filled = config.Tower(
        config.SiglipText(vocab_size=V, width=24, depth=1, heads=2, mlp=32, positions=8), max_length=L, pooling="lasttoken"
    )
    for name, tower, word in (("wise_image", squashed, "cuts and scales"), ("wise_text", filled, "padding that counts")):
        with pytest.raises(ConfigError, match=word):
            build.parts(made_config(LOSSES["scores"], towers={name: tower}), sharding.make_mesh(config.Mesh()))
