"""Runs of towers with running statistics: they are saved, loaded, evaluated, averaged and gone on with like parameters."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from embedjax import build, runs, sharding
from embedjax import config as c
from embedjax.config import serialize
from embedjax.config.errors import ConfigError, Saved
from embedjax.evaluate import tasks
from embedjax.evaluate.encode import encode
from embedjax.load import load
from embedjax.metrics.pace import train_flops
from embedjax.metrics.writers import read_rows
from embedjax.models.image import ImageEmbedder
from embedjax.objective import combine
from embedjax.plan import chips, measure, variants
from embedjax.plan.flops import flops
from embedjax.step import weights
from embedjax.train import train


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    original = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: original(mesh, devices or jax.devices()[:1]))


@pytest.fixture
def config():
    """CLIP on glyphs: a ResNet of 19 convolutions and a small BERT."""
    image = c.ImageTower(c.ModifiedResnet(image=32, depths=(1, 1, 1, 1), channels=4, heads=4, features=16))
    text = c.Tower(c.Bert(vocab_size=96, width=16, depth=1, heads=2, mlp=32, positions=16), tokenizer="wordpiece", max_length=8)
    held_out = c.Glyphs("test", limit=24)
    loss = c.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True)
    return c.Config(
        name="glyphs",
        steps=4,
        model=c.Model({"image": image, "text": text}, {"anchor": "text", "positive": "image"}),
        data=c.Data(batch_size=16, sets=(c.Set(c.Glyphs("train", limit=64), {"anchor": "name", "positive": "image"}, loss),)),
        optim=c.Optim(learning_rate=1e-3, ema=0.5),
        evaluate=c.Evaluate(
            tasks=(c.Retrieval(held_out, {"query": "name", "document": "image"}, pictures=("document",), name="drawings"),)
        ),
        checkpoint=c.Checkpoint(every=2),
        export=c.Export("none"),
        log_every=1,
    )


def with_image(config, **changes):
    image = dataclasses.replace(config.model.towers["image"], **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, towers={**config.model.towers, "image": image}))


def with_optim(config, **changes):
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))


def flat(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def statistics(tree):
    return {path: x for path, x in flat(tree).items() if path.endswith(("/mean", "/var"))}


class StopAt:
    def __init__(self, n):
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


def rows(folder):
    return [
        {k: v for k, v in row.items() if k not in ("pairs_per_second", "data_wait")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_run_goes_on_bitwise_and_its_statistics_are_loaded(config, tmp_path, monkeypatch):
    result = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "stop_signal", lambda: contextlib.nullcontext(StopAt(1)))
        with pytest.raises(Saved):
            train(config, tmp_path / "parts")
    again = train(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole") and again.scores == result.scores
    model = load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, model.params, load(tmp_path / "parts").params)
    averaged, raw, mean = (statistics(load(f"{tmp_path / 'whole'}{which}").params) for which in ("", "@raw", "@raw:soup:2,4"))
    assert len(averaged) == len(raw) == len(mean) == 2 * 19
    assert all((averaged[path] != x).any() and (mean[path] != x).any() for path, x in raw.items())
    scores = tasks.evaluate(model, config.evaluate.tasks)
    np.testing.assert_allclose([scores[key] for key in result.scores], list(result.scores.values()), atol=1e-6)
    # A picture has one vector, whatever it is encoded with, and rows of padding change nothing.
    drawings = [row["image"] for row in map(build.open_source(c.Glyphs("test", limit=24)).__getitem__, range(5))]
    vectors = encode(model, drawings, column="document")
    np.testing.assert_allclose(encode(model, drawings[2:3], column="document"), vectors[2:3], atol=1e-5)


def made(config):
    """The abstract (state, constants) of a run."""
    config = build.resolve(config)
    parts = build.parts(config, sharding.make_mesh(config.mesh))
    return parts.abstract, parts.constants


def test_running_statistics_are_neither_trained_nor_constant(config):
    state, constants = made(config)
    assert not statistics(state.params) and not statistics(constants) and not statistics(state.opt_state)
    assert len(statistics(state.extra["stats"])) == 2 * 19
    assert flat(weights(state)).keys() == flat(combine(state.params, state.extra["stats"])).keys()


def test_frozen_towers_and_frozen_statistics_are_constants(config):
    for changed in (
        with_image(config, freeze_statistics=True),
        with_optim(config, freeze=("^towers/image/",)),
        with_image(config, lora={"a": c.Lora(2, paths="head/.*kernel")}),
    ):
        state, constants = made(changed)
        assert "stats" not in state.extra and len(statistics(constants)) == 2 * 19
        made(with_optim(changed, cached=2))  # without statistics of the batch it is allowed
    state, constants = made(with_optim(config, freeze=("^towers/image/encoder/(stem|stage1)/",)))
    assert len(statistics(constants)) == 2 * 7 and len(statistics(state.extra["stats"])) == 2 * 12


def test_cached_steps_are_refused_with_statistics_of_the_batch(config):
    with pytest.raises(ConfigError, match=r"optim.cached is 2, but tower 'image'.*model.towers.image.freeze_statistics"):
        made(with_optim(config, cached=2))
    told = [text for text, _ in variants.smaller(config, 1)]
    assert not any("cached" in text for text in told)
    assert any("cached" in text for text, _ in variants.smaller(with_image(config, freeze_statistics=True), 1))


def test_what_a_resnet_cannot_be(config):
    with pytest.raises(ConfigError, match="freeze_layers counts a transformer's layers"):
        made(with_image(config, freeze_layers=1))
    with pytest.raises(ConfigError, match="layer_decay counts a transformer's layers"):
        made(with_optim(config, layer_decay=0.9))
    with pytest.raises(ConfigError, match="mesh.tensor 3 does not divide the 4 heads"):
        build.parts(build.resolve(config), sharding.make_mesh(c.Mesh(tensor=3), jax.devices()[:3]))


def test_a_frozen_tower_keeps_its_statistics_through_a_run(config, tmp_path):
    frozen = dataclasses.replace(with_optim(config, freeze=("^towers/image/",), ema=0.0), steps=2, evaluate=c.Evaluate())
    train(frozen, tmp_path / "run")
    image = load(tmp_path / "run").params["towers"]["image"]
    assert all((x == path.endswith("var")).all() for path, x in statistics(image).items())  # as they begin
    assert len(statistics(image)) == 2 * 19


def test_the_config_of_a_run_is_read_again(config, tmp_path):
    stored = json.loads(json.dumps(serialize.to_json(config)))
    assert serialize.from_json(stored) == config
    plain = with_image(config, arch=c.Resnet(image=32, depths=(1, 1), channels=(8, 16), stem=4))
    assert serialize.from_json(serialize.to_json(plain)) == plain


@pytest.mark.slow
def test_a_plan(config):
    (found,) = measure.measure(build.resolve(config), chips.parse("cpu:1"), None)
    assert found["step"] == "train 16x8 16x32x32x3" and found["fits"]
    # Running statistics lie beside the moments and the average, not among the parameters.
    state, _ = made(config)
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(state.params))
    numbers = sum(x.size for x in statistics(state.extra["stats"]).values())
    assert found["optimizer_bytes"] >= 4 * (3 * found["parameters"] + 2 * numbers)
    assert 0.8 < found["model_flops"] / found["flops"] < 1.2


def test_the_flops_of_convolutions():
    """The whole step of a tower is three times its forward pass."""
    arch = c.ModifiedResnet(image=64, depths=(1, 1, 1, 1), channels=16, heads=8, features=32)
    embedder = ImageEmbedder(arch)
    params = jax.eval_shape(embedder.init, jax.random.key(0))
    pixels = {"pixels": jax.ShapeDtypeStruct((4, 64, 64, 3), np.uint8)}
    forward = jax.make_jaxpr(lambda p, x: embedder.apply(p, x).pooled.sum())
    counted = flops(forward(params, pixels)).total
    assert counted == pytest.approx(train_flops(arch, 4, arch.tokens) / 3, rel=0.01)
    both = jax.make_jaxpr(jax.grad(lambda p, x: embedder.apply(p, x).pooled.sum()))
    # Nothing is asked of the gradient of the pictures, so the first convolution has one product fewer.
    assert counted * 2.8 < flops(both(params, pixels)).total <= counted * 3.01
