"""Towers that stand still, wholly or in part, and towers that start from a run: what LiT (Zhai et al. 2022) is made of."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from embedjax import build, config, sharding
from embedjax.config.errors import ConfigError
from embedjax.load import load, read_start, resolve_tower
from embedjax.models.embedder import build_embedder
from embedjax.objective import combine
from embedjax.plan.shapes import shapes
from embedjax.sharding import path_of
from embedjax.train import train

HEAD = (config.Dense(16, bias=False, activation="identity"),)
VIT = config.Vit(image=16, patch=4, width=32, depth=2, heads=2, mlp=64)
BERT = config.Bert(vocab_size=96, width=32, depth=1, heads=2, mlp=64, positions=16)
SYMMETRIC = config.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    original = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: original(mesh, devices or jax.devices()[:1]))


def make(source="", *, image=None, text=None, freeze=(), steps=2, **optim):
    return config.Config(
        name="lit",
        steps=steps,
        model=config.Model(
            {
                "image": image or config.ImageTower(VIT, dense=HEAD),
                "text": text or config.Tower(BERT, tokenizer="wordpiece", max_length=8, dense=HEAD),
            },
            {"anchor": "text", "positive": "image"},
        ),
        data=config.Data(
            batch_size=16,
            sets=(config.Set(config.Tar(source), {"anchor": "txt", "positive": "image"}, SYMMETRIC, name="pairs"),),
        ),
        optim=config.Optim(**{"learning_rate": 1e-3, "warmup": 0, "freeze": freeze, **optim}),
        export=config.Export("none"),
        log_every=1,
    )


def compiled(made):
    """(what the run is made of, the FLOPs of its compiled step)."""
    made = build.resolve(made)
    mesh = sharding.make_mesh(made.mesh)
    parts, ((task, columns),) = build.parts(made, mesh), shapes(made)
    lowered = parts.steps[task].lower(parts.abstract, parts.constants, build.placed(columns, mesh))
    return parts, lowered.compile().cost_analysis()["flops"]


def forward(name):
    """The FLOPs of a tower's forward pass over the batch."""
    made = build.resolve(make())
    embedder = build_embedder(made.model.towers[name])
    ((_, columns),) = shapes(made)
    column = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), columns[{"image": "positive", "text": "anchor"}[name]]
    )
    params = jax.eval_shape(embedder.init, jax.random.key(0))
    called = lambda params, column: embedder.apply(params, column).pooled
    return jax.jit(called).lower(params, column).compile().cost_analysis()["flops"]


def trained(parts):
    """Towers and heads with optimiser state."""
    return {path_of(key) for key, _ in jax.tree_util.tree_leaves_with_path(parts.abstract.opt_state["adam"].mu)}


@pytest.mark.parametrize("cached", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_tower_that_stands_still_has_no_optimiser_state_and_no_backward_pass(cached):
    whole, most = compiled(make(cached=cached))
    for name, other in (("image", "text"), ("text", "image")):
        parts, cost = compiled(make(freeze=(f"^towers/{name}/",), cached=cached))
        assert trained(parts) == {path for path in trained(whole) if not path.startswith(f"towers/{name}/")}
        assert set(parts.constants["towers"]) == {name} and set(parts.abstract.params["towers"]) == {other}
        # A backward pass is two forward passes, but for the gradient by the pixels or ids, and Adam's few. XLA counts the body
        # of a loop once: with two chunks half the rows' backward pass, and half their forward pass again.
        least = {1: 2.0, 2: 1.5}[cached]
        assert 0.8 * least * forward(name) < most - cost < 2.6 * forward(name)


@pytest.mark.slow
def test_the_upper_layers_of_a_tower_may_be_unlocked(shards, tmp_path):
    image = config.ImageTower(VIT, dense=HEAD, freeze_layers=1)
    parts, cost = compiled(make(image=image))
    _, most = compiled(make())
    under = {"class/embedding", "patches/kernel", "patches/bias", "positions/embedding"}
    assert {f"towers/image/encoder/{path}" for path in under} & trained(parts) == set()
    assert most - cost > 1.6 * forward("image") / 2 * 0.8
    made = make(shards, image=image, weight_decay=0.1)
    before = start(made, tmp_path / "start")
    train(made, tmp_path / "run")
    after = load(tmp_path / "run").params["towers"]["image"]["encoder"]
    for key, x in jax.tree_util.tree_leaves_with_path(before["image"]["encoder"]):
        path, new = path_of(key), after
        for part in path.split("/"):
            new = new[part]
        if path.startswith("blocks/"):
            np.testing.assert_array_equal(new[:1], x[:1], err_msg=path)
            if path.endswith("kernel"):
                assert all(np.any(a != b) for a, b in zip(new[1:], x[1:], strict=True)), path
        else:
            assert np.array_equal(new, x) == (path in under), path


def start(made, folder):
    """The parameters of the towers before the first step."""
    state, constants = build.build(build.resolve(made), folder).init()
    return jax.device_get(combine(state.params["towers"], constants.get("towers", {})))


def test_what_a_regular_expression_finds_stands_still():
    parts, _ = compiled(make(freeze=("^towers/image/encoder/blocks/attn/", "^towers/text/encoder/(tokens|positions)/")))
    left = trained(parts)
    assert not any("image/encoder/blocks/attn/" in path or "text/encoder/tokens" in path for path in left)
    assert any("image/encoder/blocks/up" in path for path in left) and any("text/encoder/blocks/attn" in path for path in left)


@pytest.fixture
def run(shards, tmp_path):
    """A run of two steps, saved after each."""
    made = dataclasses.replace(make(shards), checkpoint=config.Checkpoint(every=1, keep=2))
    train(made, tmp_path / "first")
    return tmp_path / "first"


def test_towers_start_from_a_run(run, shards, tmp_path):
    """One tower of its last save, locked, beside a new one; of an earlier save; and its tower of texts with its tokenizer."""
    image = config.ImageTower(init=str(run))
    made = make(shards, image=image, freeze=("^towers/image/",))
    resolved = build.resolve(made).model.towers["image"]
    assert (resolved.arch, resolved.dense, resolved.init) == (VIT, HEAD, str(run))
    known = load(run).params["towers"]
    jax.tree.map(np.testing.assert_array_equal, start(made, tmp_path / "a")["image"], known["image"])
    train(made, tmp_path / "second")
    found = load(tmp_path / "second").params["towers"]
    jax.tree.map(np.testing.assert_array_equal, found["image"], known["image"])
    assert np.any(found["text"]["encoder"]["tokens"]["embedding"] != known["text"]["encoder"]["tokens"]["embedding"])
    # The run stands alone from now on: the folder it came from is not asked again.
    run.rename(run.with_name("moved"))
    assert train(made, tmp_path / "second").step == 2
    run.with_name("moved").rename(run)

    earlier = start(make(shards, image=config.ImageTower(init=f"{run}@1")), tmp_path / "b")["image"]
    assert np.any(earlier["encoder"]["positions"]["embedding"] != known["image"]["encoder"]["positions"]["embedding"])
    text = config.Tower(init=str(run))
    jax.tree.map(np.testing.assert_array_equal, start(make(shards, text=text), tmp_path / "c")["text"], known["text"])
    tokenizers = [folder / "tokenizer" / "text" / "tokenizer.json" for folder in (run, tmp_path / "c")]
    assert tokenizers[0].read_text() == tokenizers[1].read_text()


def test_a_tower_from_a_run_may_take_pictures_of_another_size_and_no_other_change(run):
    read = lambda **arch: read_start(resolve_tower(config.ImageTower(dataclasses.replace(VIT, **arch), init=str(run))))
    assert read(image=24)["encoder"]["positions"]["embedding"].shape == (37, 32)
    assert read(dropout=0.1)["encoder"]["positions"]["embedding"].shape == (17, 32)
    with pytest.raises(ConfigError, match=r"holds the tower .*width=32.*, not .*width=64"):
        read(width=64)
    with pytest.raises(ConfigError, match="projections"):
        read_start(resolve_tower(config.ImageTower(init=str(run), dense=(config.Dense(8),))))
    with pytest.raises(ConfigError, match="holds the tower"):
        read_start(resolve_tower(config.Tower(dataclasses.replace(BERT, depth=2), init=str(run))))


def test_a_run_without_such_a_tower_is_refused(tiny_config, tmp_path):
    train(dataclasses.replace(tiny_config, steps=1, evaluate=config.Evaluate()), tmp_path / "texts")
    with pytest.raises(ConfigError, match=r"texts, which has 0 towers of pictures"):
        resolve_tower(config.ImageTower(init=str(tmp_path / "texts")))


def test_equal_pictures_and_equal_captions_are_no_negatives(tmp_path):
    """The hashes of both sides are of the bytes, whatever a crop makes of them."""
    for n in range(4):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(tmp_path / f"{n}.png")
    rows = [{"image": f"{n % 4}.png", "txt": f"word {n % 8}"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = make(image=config.ImageTower(VIT, dense=HEAD, augment=config.Augment(area=(0.5, 0.9))))
    task = dataclasses.replace(made.data.sets[0], source=config.File(str(tmp_path / "rows.jsonl")))
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, sets=(task,)))
    _, columns = build.build(build.resolve(made), tmp_path / "run").batches.batch(0)
    equal = lambda x: (x[:, None] == x[None]).reshape(16, 16, -1).all(-1).sum()
    assert (equal(columns["hash"]["positive"]), equal(columns["hash"]["anchor"])) == (4 * 4**2, 8 * 2**2)
    assert equal(columns["positive"]["pixels"]) == 16
