"""Losses of vectors as they will be stored: the sum written out; every form and device count the same; refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, sharding
from embedjax.config import serialize
from embedjax.config.errors import ConfigError
from embedjax.losses import contrastive, late, quantized, triplet
from embedjax.losses.contrastive import Hashes, Pairs, Rule, normalize
from embedjax.losses.late import Tokens
from embedjax.models.embedder import Embedder
from embedjax.objective.wrapped import chosen_prefixes

B, D = 16, 12
DIMS, WEIGHTS = (5, 12), (2.0, 1.0)
PREFIXES = {"matryoshka": DIMS, "matryoshka_weights": WEIGHTS}
HOW = config.Quantized(("float32", "int8", "binary"), (1.0, 0.5, 0.25))
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}
ARCH = config.Bert(vocab_size=32, width=D, depth=1, heads=2, mlp=8, positions=8)
COLUMNS = ("anchor", "positive", "negative", "negative_2")


def make(loss, devices=1, columns=COLUMNS, **tower):
    """The objective and its mesh."""
    mesh = sharding.make_mesh(config.Mesh(*MESHES[devices]), jax.devices()[:devices])
    model = config.Model({"text": config.Tower(arch=ARCH, **tower)})
    task = config.Set(columns={name: name for name in columns}, loss=loss)
    return objective.make(task, model, {"text": Embedder(ARCH, late=tower.get("late"))}, mesh), mesh


def outputs(*tokens):
    """Vectors [B *tokens D] of anchors and of three documents a row."""
    rng = np.random.default_rng(0)
    return {"anchor": rng.normal(size=(B, *tokens, D)), "positive": rng.normal(size=(B, 3, *tokens, D))}


def hashes():
    words = np.random.default_rng(1).integers(0, 20, (B, 4, 2)).astype(np.uint32)
    return Hashes(words[:, 0], words[:, 1:])


def written_out(loss, vectors, of, make=normalize):
    """The sum over prefixes and precisions of `of(vectors)`."""
    total = 0.0
    for dim, weight in zip(loss.matryoshka, loss.matryoshka_weights, strict=True):
        cut = {name: make(x[..., :dim]) for name, x in vectors.items()}
        for precision, share in zip(loss.quantized.precisions, loss.quantized.weights, strict=True):
            store = {"float32": lambda x: x, "int8": quantized.int8, "binary": quantized.binary}[precision]
            kept = {name: store(x) if name in loss.quantized.columns else x for name, x in cut.items()}
            total = total + weight * share * of(kept)
    return total


IN_BATCH = {
    "dense": config.MultipleNegatives(),
    "tiled": config.Siglip(tile=5, form="tiled"),
    "ring": config.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", form="ring", tile=3),
}
RULES = {"tiled": Rule("sigmoid"), "ring": Rule("softmax", ("q2d", "d2q"), "per_direction"), "dense": Rule()}


@pytest.mark.parametrize(
    ("form", "devices"),
    [("dense", 8)]
    + [pytest.param("dense", n, marks=pytest.mark.slow) for n in (1, 2, 4)]
    + [pytest.param("tiled", 1, marks=pytest.mark.slow)]
    + [pytest.param("ring", n, marks=pytest.mark.slow) for n in (1, 2, 4, 8)],
)
def test_in_batch_losses_are_the_sum_written_out_in_every_form(form, devices):
    """Value and gradient, in float64: rounding moves no number over a border there."""
    loss = dataclasses.replace(IN_BATCH[form], matryoshka=DIMS[:1], matryoshka_weights=WEIGHTS[:1], quantized=HOW)
    made, mesh = make(loss, devices)
    params = {"loss": {"scale": np.log(10.0), "bias": -10.0}} if form == "tiled" else {}
    scale, bias = (10.0, -10.0) if form == "tiled" else (20.0, 0.0)
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, (outputs(), hashes()))
        placed = jax.device_put(arrays, sharding.rows(mesh))
        value = lambda vectors, known: made.loss(params, vectors, (known, None), None)
        (found, metrics), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(*placed)
        pairs = lambda o: Pairs(o["anchor"], o["positive"], arrays[1])
        of = lambda o: contrastive.loss(pairs(o), RULES[form], scale, bias)[0]
        wanted, known = jax.jit(jax.value_and_grad(lambda o: written_out(loss, o, of)))(arrays[0])
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), gradient, known)
    assert metrics.keys() >= {"float32", "int8", "binary", "positive"} and metrics["binary"] != metrics["float32"]


TRIPLET = config.Triplet(margin=1.0, **PREFIXES, quantized=HOW)
SINGLE = jax.tree.map(lambda x: x.astype(np.float32), outputs())


def triplets(vectors):
    return triplet.triplet(vectors["anchor"], vectors["positive"][:, 0], vectors["positive"][:, 1:], "euclidean", 1.0)


def test_prefixes_are_drawn_and_queries_stay_floats():
    """In-batch losses leave their prefixes to what stores them."""
    how = dataclasses.replace(HOW, columns=("positive",))
    loss = config.MultipleNegatives(**PREFIXES, dims_per_step=1, quantized=how, mask_duplicates=False)
    of = lambda o: contrastive.loss(Pairs(o["anchor"], o["positive"]), Rule(), 20.0)[0]
    part = lambda p: dataclasses.replace(loss, matryoshka=DIMS[p : p + 1], matryoshka_weights=WEIGHTS[p : p + 1])

    @jax.jit
    def both(vectors, key):
        parts = jnp.stack([written_out(part(p), vectors, of) for p in range(2)])
        return make(loss)[0].loss({}, vectors, (None, None), key)[0], chosen_prefixes(loss, key) @ parts

    for key in map(jnp.uint32, range(4)):
        np.testing.assert_allclose(*both(SINGLE, key), rtol=1e-5)
    assert len({tuple(np.asarray(chosen_prefixes(loss, jnp.uint32(key))).tolist()) for key in range(4)}) == 2


def test_products_are_of_vectors_stored_as_they_are_and_a_sum_stores_for_its_losses():
    dot, _ = make(TRIPLET, similarity="dot")
    bare = dataclasses.replace(TRIPLET, matryoshka=(), matryoshka_weights=(), quantized=None)
    inner = (bare, config.MegaBatchMargin())
    sums = [
        config.Sum(losses=inner, weights=(2.0, 0.5), **PREFIXES, quantized=HOW),
        config.Sum(losses=tuple(dataclasses.replace(x, **PREFIXES, quantized=HOW) for x in inner), weights=(2.0, 0.5)),
        config.Sum(losses=inner, weights=(2.0, 0.5), **PREFIXES),
    ]
    sums = [make(loss, columns=("anchor", "positive", "negative"))[0] for loss in sums]

    @jax.jit
    def all_of(vectors):
        of_sums = [made.loss({}, vectors, (None, None), None)[0] for made in sums]
        return dot.loss({}, vectors, None, None)[0], written_out(TRIPLET, vectors, triplets, lambda x: x), of_sums

    found, wanted, (together, apart, floats) = all_of(SINGLE)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.isclose(together, apart, rtol=1e-6) and not np.isclose(together, floats, rtol=0.1)


@pytest.mark.slow
def test_tokens_that_do_not_count_have_no_range():
    """By late interaction, in tiles round four devices: MaxSim of the stored tokens, whatever is in the padding."""
    how = config.Quantized(("float32", "int8"), (1.0, 0.5))
    made, mesh = make(
        config.MultipleNegatives(form="ring", mask_duplicates=False, quantized=how),
        4,
        late=config.Late(query_length=4, document_length=4),
    )
    rng = np.random.default_rng(2)
    masks = {"anchor": np.ones((B, 4), bool), "positive": rng.random((B, 3, 4)) < 0.8}
    masks["positive"][..., 0] = True
    unit = {name: x / np.linalg.norm(x, axis=-1, keepdims=True) for name, x in outputs(4).items()}
    odd = {name: np.where(masks[name][..., None], x, 7 * x) for name, x in unit.items()}

    def definition(vectors):
        total = 0.0
        for store, share in ((lambda x, m: x, 1.0), (lambda x, m: quantized.int8(normalize(x), m), 0.5)):
            q, d = (Tokens(store(vectors[name], masks[name]), masks[name]) for name in ("anchor", "positive"))
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), d)
            total = total + share * late.loss(late.maxsim(q, flat).reshape(B, B, 3), Rule(), 1.0)[0]
        return total

    with jax.enable_x64(True):
        placed = jax.device_put((odd, masks), sharding.rows(mesh))
        value = lambda vectors, masks: made.loss({}, vectors, (masks, None), None)[0]
        found, gradient = jax.jit(jax.value_and_grad(value))(*placed)
        wanted, known = jax.jit(jax.value_and_grad(definition))(odd)
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), gradient, known)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: config.Quantized(("int4",)), "precisions is .*int4.*float32, int8, binary"),
        (lambda: config.Quantized(()), "precisions is ()"),
        (lambda: config.Quantized(("int8", "int8")), "they differ"),
        (lambda: config.Quantized(("float32",)), "float32 alone"),
        (lambda: config.Quantized(columns=("negative",)), "columns is .*negative"),
        (lambda: config.Quantized(columns=()), "columns is ()"),
        (lambda: config.Quantized(weights=(1.0,)), "1 numbers for 2 precisions"),
        (lambda: config.Quantized(weights=(1.0, -2.0)), "Quantized.weights"),
        (lambda: config.Sum(losses=(config.Triplet(quantized=HOW),), quantized=HOW), "Sum.quantized is set.*Triplet"),
        (lambda: serialize.from_json({"type": "MaskedLanguage", "quantized": None}, config.Loss), "no field 'quantized'"),
        (lambda: make(config.BatchHard(quantized=config.Quantized(columns=("positive",))), columns=("anchor", "label")), "has"),
        (lambda: make(config.Triplet(matryoshka=(13,), quantized=HOW)), "prefix 13"),
    ],
)
def test_what_makes_no_sense_is_refused(build, word):
    with pytest.raises(ConfigError, match=word):
        build()


def test_it_is_stored_and_read_back():
    loss = config.Sum(losses=(config.MultipleNegatives(quantized=config.Quantized(("binary",), (2.0,), ("positive",))),))
    assert serialize.from_json(json.loads(json.dumps(serialize.to_json(loss))), config.Loss) == loss
