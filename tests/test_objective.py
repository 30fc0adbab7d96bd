"""From a loss in the config to the objective: what is refused, which form is chosen, the guide, learned scale and bias."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import build, config, objective, sharding
from embedjax.config.errors import ConfigError
from embedjax.losses import contrastive
from embedjax.losses.contrastive import Guide, Pairs, Rule
from embedjax.models.embedder import Embedder

ARCH = config.Bert(vocab_size=32, width=16, depth=1, heads=2, mlp=32, positions=8, init_std=0.2)
MODEL = config.Model({"text": config.Tower(arch=ARCH)})
EMBEDDERS = {"text": Embedder(ARCH)}
ONE = sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def make(loss, mesh=ONE, model=MODEL, embedders=EMBEDDERS):
    task = config.Set(columns={"anchor": "a", "positive": "b", "negative": "c"}, loss=loss)
    return objective.make(task, model, embedders, mesh)


def text(*shape, seed=0):
    ids = np.random.default_rng(seed).integers(1, 32, (*shape, 5)).astype(np.int32)
    return {"ids": ids, "mask": np.ones(ids.shape, bool)}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": 200.0}, "at most 100"),
        ({"tile": -1}, "tile"),
        ({"matryoshka": (8, 8)}, "matryoshka"),
        ({"matryoshka": (8, 4), "matryoshka_weights": (1.0,)}, "matryoshka_weights"),
        ({"guide_margin": -0.1}, "guide_margin"),
        ({"hardness": "hard"}, "hardness_strength"),
        ({"hardness_strength": 5.0}, "set both"),
        ({"hardness": "all", "hardness_strength": 50.0}, "hardness_strength"),
        ({"scale": 0.5, "learn_scale": True}, "learned must be at least 1"),
        ({"guide_margin": math.nan}, "guide_margin"),
        ({"directions": ("d2q",)}, "q2d is one of them"),
        ({"directions": ("q2d", "q2d")}, "they differ"),
        ({"directions": ("q2d", "d2d", "p2p")}, "name one of them"),
        ({"directions": ("q2d", "d2q", "q2q"), "partition": "per_direction"}, "'q2q'.*never hold the positive"),
        ({"matryoshka": (8, 4), "matryoshka_weights": (1.0, math.inf)}, "matryoshka_weights"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        config.MultipleNegatives(**options)


def test_a_prefix_longer_than_the_embedding_is_refused():
    with pytest.raises(ConfigError, match="prefix 32.*16"):
        make(config.MultipleNegatives(matryoshka=(32, 8)))


def test_losses_are_stored_and_read_back():
    from embedjax.config.serialize import from_json, to_json

    for loss in (config.MultipleNegatives(directions=("q2d", "q2q"), matryoshka=(8, 4)), config.Siglip(guide="other")):
        assert from_json(to_json(loss), config.Loss) == loss


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("devices", "width", "form"), [(1, 2, "dense"), (1, 4, "tiled"), (8, 4, "dense"), (8, 8, "ring")])
def test_auto_goes_by_the_scores_a_device_would_hold(devices, width, form, similarity):
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:devices])
    rows = width * 1024
    model = config.Model({"text": config.Tower(arch=ARCH, similarity=similarity)})
    made = make(config.MultipleNegatives(mask_duplicates=False), mesh, model)
    outputs = {
        "anchor": jax.ShapeDtypeStruct((rows, 8), jnp.float32),
        "positive": jax.ShapeDtypeStruct((rows, 1, 8), jnp.float32),
    }
    text = str(jax.make_jaxpr(lambda o: made.loss({}, o, (None, None), None)[0])(outputs))
    assert ("ppermute" in text) == (form == "ring")
    assert (f"f32[{rows},{rows}]" in text) == (form == "dense")


def test_clip_and_siglip_train_scale_and_bias_within_bounds():
    task = lambda loss: config.Set(columns={"anchor": "a", "positive": "b"}, loss=loss)
    initial = lambda loss: objective.loss_params(task(loss), MODEL, EMBEDDERS, jax.random.key(0))
    clip = config.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True)
    assert initial(clip).keys() == {"scale"}
    found = initial(config.Siglip())
    np.testing.assert_allclose((found["scale"], found["bias"]), (np.log(10.0), -10.0), rtol=1e-6)
    assert not initial(config.Siglip(learn_scale=False, learn_bias=False))
    for value, kept in ((9.0, np.log(100.0)), (-1.0, 0.0), (2.0, 2.0)):
        held = objective.bound({"towers": {}, "loss": {"scale": jnp.float32(value), "bias": jnp.float32(-50.0)}})["loss"]
        np.testing.assert_allclose((held["scale"], held["bias"]), (kept, -50.0), rtol=1e-6)
    sharding.shardings({"loss": found}, ONE)


def sets(*losses):
    columns = {"anchor": "a", "positive": "b"}
    return tuple(config.Set(columns=columns, loss=loss, name=f"set{i}") for i, loss in enumerate(losses))


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ((config.Siglip(), config.MultipleNegatives(learn_scale=True)), "'set0' and 'set1'.*scale.*10 and 20"),
        ((config.Siglip(learn_scale=False), config.CoSent(), config.Siglip(bias=-5.0)), "'set0' and 'set2'.*bias.*-10 and -5"),
        ((config.Sum(losses=(config.Siglip(), config.MultipleNegatives(learn_scale=True))),), "scale.*10 and 20"),
        ((config.Sum(losses=(config.Siglip(), config.ContrastiveDistillation(learn_scale=True))),), "scale.*10 and 100"),
    ],
)
def test_a_scale_or_bias_that_is_learned_begins_with_one_value(losses, word):
    model = config.Model({"text": config.Tower(arch=ARCH, max_length=8)})
    with pytest.raises(ConfigError, match=word):
        build.resolve(config.Config(model=model, data=config.Data(sets=sets(*losses))))


def test_what_is_learned_is_shared_by_sets_and_what_is_fixed_is_not():
    agreed = sets(config.Siglip(), config.MultipleNegatives(scale=10.0, learn_scale=True), config.MultipleNegatives(scale=50.0))
    assert objective.first_values(agreed, MODEL) == {"scale": 10.0, "bias": -10.0}


def test_sums_of_many_cosines_begin_with_scale_one():
    late = config.Model({"text": config.Tower(arch=ARCH, max_length=8, late=config.Late())})
    begun = lambda loss, model: objective.first_values(sets(loss), model)["scale"]
    assert (begun(config.Siglip(), MODEL), begun(config.Siglip(), late), begun(config.Siglip(xtr=9), late)) == (10, 1, 10)
    assert begun(config.Siglip(scale=2.0), late) == 2


@pytest.mark.parametrize("name", ["scale", "bias", "a/b"])
def test_a_set_has_no_name_of_what_losses_learn(name):
    with pytest.raises(ConfigError, match=f"named '{name}'"):
        config.Set(name=name)


def test_the_metrics_of_every_form_hold_the_cosine_of_the_positives_and_what_is_learned():
    rng = np.random.default_rng(0)
    outputs = {"anchor": rng.normal(size=(8, 16)), "positive": rng.normal(size=(8, 2, 16))}
    outputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), outputs)
    mesh = sharding.make_mesh(config.Mesh(2, 2, tensor=2))
    params = {"loss": {"scale": jnp.log(jnp.float32(10.0)), "bias": jnp.float32(-10.0)}}
    metrics = {
        form: jax.jit(make(config.Siglip(form=form, matryoshka=(8, 16)), mesh).loss)(params, outputs, (None, None), None)[1]
        for form in ("dense", "tiled", "ring")
    }
    unit = contrastive.normalize
    wanted = (unit(outputs["anchor"]) * unit(outputs["positive"][:, 0])).sum(-1).mean()
    for found in metrics.values():
        np.testing.assert_allclose((found["positive"], found["scale"], found["bias"]), (wanted, 10.0, -10.0), rtol=1e-4)


def guided(**wise):
    towers = {"text": config.Tower(arch=ARCH), "wise": config.Tower(**{"arch": ARCH, **wise})}
    model = config.Model(towers, {name: "text" for name in ("anchor", "positive", "negative")})
    return model, {name: Embedder(ARCH) for name in towers}


def test_a_guide_masks_what_it_finds_close():
    model, embedders = guided()
    params = {name: jax.jit(each.init)(jax.random.key(i)) for i, (name, each) in enumerate(embedders.items())}
    made = make(config.MultipleNegatives(guide="wise", guide_margin=0.05, mask_duplicates=False), ONE, model, embedders)
    row = np.arange(8, dtype=np.int32)
    columns = {"anchor": text(8), "positive": text(8, seed=1), "negative": text(8, 2, seed=2), "row": row}
    trained, constants = {"towers": {"text": params["text"]}}, {"towers": {"wise": params["wise"]}}
    outputs = jax.jit(made.encode)(trained, constants, columns, None)
    targets = jax.jit(made.targets)(constants, columns)
    vectors = lambda name, columns: jax.jit(lambda p, c: embedders[name].apply(p, c, row=row).pooled)(params[name], columns)
    documents = {
        key: np.concatenate([columns["positive"][key][:, None], columns["negative"][key]], 1) for key in ("ids", "mask")
    }
    np.testing.assert_allclose(outputs["positive"], vectors("text", documents), rtol=1e-5, atol=1e-6)
    told = Guide(vectors("wise", columns["anchor"]), vectors("wise", documents))
    wanted = contrastive.loss(Pairs(outputs["anchor"], outputs["positive"], None, told), Rule(margin=0.05), 20.0)[0]
    unmasked = contrastive.loss(Pairs(outputs["anchor"], outputs["positive"]), Rule(), 20.0)[0]
    np.testing.assert_allclose(made.loss(trained, outputs, targets, None)[0], wanted, rtol=1e-5)
    assert abs(wanted - unmasked) > 1e-3
    tables = {name: x for name, x in params["wise"]["encoder"].items() if name != "blocks"}
    for constant in ({}, {"towers": {"wise": {"encoder": tables}}}):
        with pytest.raises(ConfigError, match="guide 'wise' is trained; add .* to optim.freeze"):
            made.targets(constant, columns)


@pytest.mark.parametrize(
    ("wise", "told"),
    [
        ({"tokenizer": "another"}, r"share the tokenizer; they have \('another'"),
        ({"arch": config.Static(vocab_size=32, width=16)}, "share special tokens, which static tables do without"),
        ({"prompts": {"query": "q: "}}, "share the prompt of column 'anchor'; they have .'q: '"),
        ({"prompts": {"d": "d: "}, "default_prompt": "d"}, "share the prompt of column 'anchor'"),
        ({"prompts": {"document": "d: "}, "include_prompt": False}, "share the prompt of column 'positive'"),
        ({"prompts": {"odd": "o: "}, "include_prompt": False, "max_length": 4}, ""),
    ],
)
def test_a_guide_reads_the_tokens_of_the_columns_or_is_refused(wise, told):
    model, embedders = guided(**wise)
    loss = config.MultipleNegatives(guide="wise")
    if not told:
        make(loss, ONE, model, embedders)
        return
    with pytest.raises(ConfigError, match=told):
        make(loss, ONE, model, embedders)


def test_a_guide_that_is_no_tower_is_refused():
    with pytest.raises(ConfigError, match="nobody"):
        make(config.MultipleNegatives(guide="nobody"))
