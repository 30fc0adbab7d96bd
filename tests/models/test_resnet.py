"""ResNet towers: both forms by hand in float64, statistics of the batch and running ones, and the same numbers on any mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, optim, sharding, step
from embedjax.config import RESNETS, Dense, ImageTower, Lora, Mesh, Model, ModifiedResnet, Resnet
from embedjax.config.errors import ConfigError
from embedjax.models import lora, ops, weights
from embedjax.models.convolution import mean_pool
from embedjax.models.families import modified_resnet, names_of, resnet
from embedjax.models.image import ImageEmbedder

CLIP = ModifiedResnet(image=64, depths=(2, 1, 1, 1), channels=4, heads=4, features=6)
PLAIN = Resnet(image=32, depths=(1, 2), channels=(8, 16), stem=4)
BASIC = Resnet(image=21, depths=(2, 1), channels=(4, 8), stem=4, block="basic", activation="silu")
FORMS = {"clip": CLIP, "plain": PLAIN, "basic": BASIC}
RNG = np.random.default_rng(0)
B = 8
KEY = jnp.uint32(5)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These programs run once each and take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def params(name, seed=0):
    """Random parameters, those that begin as 0 or 1 included: nothing may hide behind them."""
    arch, rng = FORMS[name], np.random.default_rng(seed)
    tree = jax.device_get(jax.jit(ImageEmbedder(arch).init)(jax.random.key(seed)))

    def drawn(path, x):
        part = sharding.path_of(path).rsplit("/", 1)[1]
        if part == "kernel":
            return x
        low, high = {"scale": (0.5, 1.5), "var": (0.5, 2.0)}.get(part, (-0.5, 0.5))
        return rng.uniform(low, high, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, tree)


@functools.cache
def pictures(name, count=B):
    side = FORMS[name].image
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def parted(tree):
    """(parameters, running statistics) of a tower."""
    return tuple(part["towers"]["image"] for part in optim.statistics({"towers": {"image": tree}}))


@functools.partial(jax.jit, static_argnums=0)
def applied(embedder, params, pixels):
    return embedder.apply(params, {"pixels": pixels}, key=KEY, want=("pooled", "tokens"))


def flat(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def close_gradients(found, wanted):
    """Rounding of the largest gradient is no difference in a small one."""
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted))
    for path, g in flat(found).items():
        np.testing.assert_allclose(np.asarray(g), flat(wanted)[path], rtol=1e-3, atol=1e-5 * largest, err_msg=path)


# ---- by hand: from tensors by their names in torch, [B C H W], float64


def conv(x, weight, stride=1):
    """One place after another."""
    out, _, size, _ = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), *[(size // 2, size // 2)] * 2))
    places = range(0, x.shape[2] - size + 1, stride)
    found = np.empty((len(x), out, len(places), len(places)))
    for i, top in enumerate(places):
        for j, left in enumerate(places):
            found[:, :, i, j] = np.tensordot(x[:, :, top : top + size, left : left + size], weight, ([1, 2, 3], [1, 2, 3]))
    return found


def average(x, size):
    n = x.shape[2] // size
    found = np.empty((*x.shape[:2], n, n))
    for i in range(n):
        for j in range(n):
            found[:, :, i, j] = x[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size].mean((2, 3))
    return found


class Norm:
    """Batch normalisation that also tells the running statistics after the batch, as torch has them."""

    def __init__(self, tensors, training):
        self.tensors, self.training, self.after = tensors, training, {}

    def __call__(self, x, name):
        of = lambda part: self.tensors[f"{name}.{part}"].astype(np.float64)
        mean, var = of("running_mean"), of("running_var")
        if self.training:
            rows = x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
            self.after[f"{name}.running_mean"] = 0.9 * mean + 0.1 * rows.mean(1)
            self.after[f"{name}.running_var"] = 0.9 * var + 0.1 * rows.var(1, ddof=1)
            mean, var = rows.mean(1), rows.var(1)
        wide = lambda v: v[None, :, None, None]
        return (x - wide(mean)) / np.sqrt(wide(var) + 1e-5) * wide(of("weight")) + wide(of("bias"))


relu = lambda x: np.maximum(x, 0)


def clip_by_hand(tensors, x, norm):
    at = lambda name: tensors[name].astype(np.float64)
    for n, stride in ((1, 2), (2, 1), (3, 1)):
        x = relu(norm(conv(x, at(f"conv{n}.weight"), stride), f"bn{n}"))
    x = average(x, 2)
    for stage, depth in enumerate(CLIP.depths, 1):
        for block in range(depth):
            name, half = f"layer{stage}.{block}", stage > 1 and block == 0
            y = relu(norm(conv(x, at(f"{name}.conv1.weight")), f"{name}.bn1"))
            y = relu(norm(conv(y, at(f"{name}.conv2.weight")), f"{name}.bn2"))
            y = norm(conv(average(y, 2) if half else y, at(f"{name}.conv3.weight")), f"{name}.bn3")
            if block == 0:
                x = norm(conv(average(x, 2) if half else x, at(f"{name}.downsample.0.weight")), f"{name}.downsample.1")
            x = relu(x + y)
    vectors = []
    for picture in x.transpose(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]):
        rows = np.concatenate([picture.mean(0, keepdims=True), picture]) + at("attnpool.positional_embedding")
        linear = lambda v, part: v @ at(f"attnpool.{part}_proj.weight").T + at(f"attnpool.{part}_proj.bias")
        q, k, v = linear(rows[0], "q"), linear(rows, "k"), linear(rows, "v")
        heads, size = [], len(q) // CLIP.heads
        for h in range(CLIP.heads):
            part = slice(h * size, (h + 1) * size)
            share = np.exp(k[:, part] @ q[part] / np.sqrt(size))
            heads.append(share / share.sum() @ v[:, part])
        vectors.append(linear(np.concatenate(heads), "c"))
    return np.stack(vectors)


def plain_by_hand(tensors, x, norm):
    at = lambda name: tensors[f"{name}.convolution.weight"].astype(np.float64)
    both = lambda x, name, stride=1: norm(conv(x, at(name), stride), f"{name}.normalization")
    x = relu(both(x, "embedder.embedder", 2))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    n = (x.shape[2] + 1) // 2
    x = np.stack([[padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((2, 3)) for j in range(n)] for i in range(n)])
    x = x.transpose(2, 3, 0, 1)
    for stage, depth in enumerate(PLAIN.depths):
        for block in range(depth):
            name, stride = f"encoder.stages.{stage}.layers.{block}", 2 if stage and not block else 1
            y = relu(both(x, f"{name}.layer.0"))
            y = relu(both(y, f"{name}.layer.1", stride))
            y = both(y, f"{name}.layer.2")
            x = relu(y + (x if block else both(x, f"{name}.shortcut", stride)))
    return x.mean((2, 3))


HANDS = {"clip": clip_by_hand, "plain": plain_by_hand}


@pytest.mark.parametrize("training", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("name", HANDS)
def test_forward_by_hand(name, training):
    arch, tree, pixels = FORMS[name], params(name), pictures(name)
    embedder = ImageEmbedder(arch, normalize=False)
    tensors = weights.to_tensors(arch, tree["encoder"])
    norm = Norm(tensors, training)
    x = np.asarray(embedder.numbers(pixels, row=jnp.arange(B)), np.float64).transpose(0, 3, 1, 2)
    expected = HANDS[name](tensors, x, norm)
    kept, running = parted(tree)
    out = applied(embedder, kept if training else tree, pixels)
    np.testing.assert_allclose(out.pooled, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert (out.stats is None) != training
    if training:
        after = step.followed(running, out.stats)
        found = weights.to_tensors(arch, objective.combine(kept, after)["encoder"])
        assert norm.after.keys() == {key for key in tensors if "running" in key}
        for key, value in norm.after.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=key)


def test_a_mean_leaves_out_what_is_no_whole_square():
    x = RNG.normal(size=(2, 5, 5, 3)).astype(np.float32)
    close(mean_pool(jnp.asarray(x), 2), average(x.transpose(0, 3, 1, 2), 2).transpose(0, 2, 3, 1))


# ---- shapes and paths


@pytest.mark.parametrize("name", FORMS)
def test_shapes_and_paths(name):
    arch, tree = FORMS[name], params(name)
    out = applied(ImageEmbedder(arch, dense=()), tree, pictures(name))
    last = {"clip": (4, 128), "plain": (16, 16), "basic": (9, 8)}[name]
    assert out.tokens.shape == (B, *last) and out.pooled.shape == (B, arch.width) and last[0] == arch.side**2
    found = {path: leaf.shape for path, leaf in flat(tree["encoder"]).items()}
    for c in arch.convolutions:
        assert found[f"{c.path}/kernel"] == (c.size**2 * c.inputs, c.outputs)
        assert found[f"{c.path}/norm/mean"] == found[f"{c.path}/norm/scale"] == (c.outputs,)
    assert len(found) == 5 * len(arch.convolutions) + (9 if name == "clip" else 0)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(tree))


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="64 x 64 x 3"):
        jax.eval_shape(lambda: ImageEmbedder(CLIP).apply(params("clip"), {"pixels": np.zeros((1, 32, 32, 3), np.uint8)}))


@pytest.mark.parametrize("name", FORMS)
def test_tensors_go_out_and_come_back(name):
    arch, encoder = FORMS[name], params(name)["encoder"]
    tensors = weights.to_tensors(arch, encoder)
    counted = {key.replace("running_mean", "num_batches_tracked"): np.int64(7) for key in tensors if "running_mean" in key}
    prefix = names_of(arch).prefix
    stored = {prefix + key: np.asarray(x) for key, x in (tensors | counted).items()}
    jax.tree.map(np.testing.assert_array_equal, weights.from_tensors(arch, stored, file="model"), encoder)
    missing = dict(stored)
    del missing[next(key for key in stored if "running_var" in key)]
    with pytest.raises(ConfigError, match="missing: .*running_var"):
        weights.from_tensors(arch, missing, file="model")


def test_configs_of_others():
    for arch in (PLAIN, BASIC, Resnet(), RESNETS["resnet-18"]):
        back = resnet.from_hf(resnet.to_hf(arch))
        assert dataclasses.replace(back, image=arch.image) == arch
    for arch in (CLIP, *(arch for arch in RESNETS.values() if isinstance(arch, ModifiedResnet))):
        assert modified_resnet.from_open_clip(modified_resnet.to_open_clip(arch), arch.features) == arch
    for reason, changes in (
        ("num_channels is 1", {"num_channels": 1}),
        ("downsample_in_bottleneck is true", {"downsample_in_bottleneck": True}),
        ("layer_type is 'wide'", {"layer_type": "wide"}),
        ("depths is 3", {"depths": 3}),
    ):
        with pytest.raises(ConfigError, match=reason):
            resnet.from_hf({"model_type": "resnet", **changes})
    with pytest.raises(ConfigError, match="four stages"):
        modified_resnet.from_open_clip({"layers": 12, "width": 768}, 512)


def test_presets():
    def count(name):
        tree = jax.eval_shape(ImageEmbedder(RESNETS[name]).init, jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(parted(tree)[0]))

    assert count("RN50") == 38_316_896  # open_clip's RN50, image tower
    assert count("resnet-50") == 23_508_032  # microsoft/resnet-50 without its classifier
    assert count("resnet-18") == 11_176_512


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("at least 32", lambda: ModifiedResnet(image=31)),
        ("divisible by heads 7", lambda: ModifiedResnet(heads=7)),
        ("a stage has at least 1 block", lambda: ModifiedResnet(depths=(1, 0, 1, 1))),
        ("each stage needs one of both", lambda: Resnet(depths=(1, 2))),
        ("a quarter", lambda: Resnet(depths=(1,), channels=(6,))),
        ("no running statistics", lambda: ImageTower(config.Vit(), freeze_statistics=True)),
    ],
)
def test_wrong_sizes_are_refused(reason, make):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_positions_of_the_attention_are_interpolated():
    encoder, larger = params("clip")["encoder"], dataclasses.replace(CLIP, image=96)
    found = modified_resnet.resized(encoder, CLIP, larger)
    assert found["head"]["positions"]["embedding"].shape == (10, 128) and found["stage1"] is encoder["stage1"]
    np.testing.assert_array_equal(
        found["head"]["positions"]["embedding"][0], encoder["head"]["positions"]["embedding"][0]
    )  # that of the mean
    assert modified_resnet.resized(encoder, CLIP, dataclasses.replace(CLIP, image=65))["head"] is encoder["head"]
    out = applied(ImageEmbedder(larger), {"encoder": found}, np.zeros((1, 96, 96, 3), np.uint8))
    assert out.pooled.shape == (1, 6)


# ---- what a vector depends on


def test_with_running_statistics_pictures_do_not_meet():
    embedder, tree, pixels = ImageEmbedder(PLAIN), params("plain"), pictures("plain")
    whole = applied(embedder, tree, pixels).pooled
    close(applied(embedder, tree, pixels[2:4]).pooled, whole[2:4])
    kept, _ = parted(tree)
    by_batch = applied(embedder, kept, pixels).pooled
    assert np.abs(applied(embedder, kept, pixels[2:4]).pooled - by_batch[2:4]).max() > 0.01
    order = RNG.permutation(B)
    close(applied(embedder, kept, pixels[order]).pooled, by_batch[order], 1e-4)
    nested = applied(embedder, kept, pixels.reshape(4, 2, 32, 32, 3))
    close(nested.pooled.reshape(B, 16), by_batch)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(embedder, tree, pixels):
    def loss(tree):
        out = embedder.apply(tree, {"pixels": pixels})
        return (out.pooled * jnp.arange(out.pooled.size).reshape(out.pooled.shape) % 3).sum(), out.stats

    return jax.value_and_grad(loss, has_aux=True)(tree)


@pytest.mark.parametrize("name", ["basic", "plain", pytest.param("clip", marks=pytest.mark.slow)])
def test_recomputed_blocks_give_the_same(name):
    embedder, (kept, _) = ImageEmbedder(FORMS[name]), parted(params(name))
    (value, stats), grads = value_and_grad(embedder, kept, pictures(name))
    (again, same), other = value_and_grad(dataclasses.replace(embedder, remat=True), kept, pictures(name))
    close((value, stats), (again, same), 1e-4)
    close_gradients(other, grads)


@pytest.mark.parametrize("name", ["clip", "plain"])
def test_every_parameter_has_a_gradient(name):
    assert not [path for path, g in flat(alone(name)[1]).items() if not np.abs(g).max() > 0]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_bfloat16_is_close_to_float32(backend, monkeypatch):
    exact = ImageEmbedder(CLIP)
    kept, _ = parted(params("clip"))
    wanted = applied(exact, kept, pictures("clip")).pooled
    monkeypatch.setattr(ops, "on_cpu", lambda: backend == "cpu")
    rough = dataclasses.replace(exact, compute="bfloat16")
    out = jax.jit(lambda tree: rough.apply(tree, {"pixels": pictures("clip")}))(kept)
    assert out.pooled.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(out.stats))
    cosines = (out.pooled * wanted).sum(-1)
    assert 0.99 < cosines.min() < 1 - 1e-7


# ---- training steps


TASK = config.Set(columns={"anchor": "a", "positive": "b"}, loss=config.MultipleNegatives(mask_duplicates=False))


def objectives(arch, mesh, **changes):
    model = Model({"image": ImageTower(arch)})
    return objective.make(TASK, model, {"image": ImageEmbedder(arch, **changes)}, mesh)


def columns(name):
    pixels = pictures(name, 2 * B)
    return {"anchor": {"pixels": pixels[:B]}, "positive": {"pixels": pixels[B:]}, "row": np.arange(B, dtype=np.int32)}


def mesh_of(*shape):
    return sharding.make_mesh(Mesh(*shape), jax.devices()[: int(np.prod(shape))])


def gradient(name, shape, make=step.plain, freeze=()):
    """((value, metrics with statistics), gradient) on a mesh."""
    mesh = mesh_of(*shape)
    trained, constants = optim.partition({"towers": {"image": params(name)}}, freeze)
    kept, _ = optim.statistics(trained)
    kept, constants = (jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (kept, constants))
    function = sharding.in_sight(mesh, make(objectives(FORMS[name], mesh)))
    return jax.jit(function)(kept, constants, sharding.place(columns(name), mesh), KEY)


@functools.cache
def alone(name):
    return jax.device_get(gradient(name, (1, 1, 1)))


MESHES = [(2, 1, 1), (2, 2, 1), (2, 2, 2), (4, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8)]
USUAL = {"plain": MESHES[:2], "clip": MESHES[2:3]}
MESHES += [(4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 1, 4), (1, 4, 2), (1, 2, 4)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=[] if shape in USUAL[name] else [pytest.mark.slow])
        for name in ("clip", "plain")
        for shape in MESHES
    ],
    ids=str,
)
def test_value_gradient_and_statistics_are_those_of_one_device(name, shape):
    """The statistics are of the batch on all devices, not of each one's rows."""
    (value, metrics), grads = gradient(name, shape)
    (wanted, known), expected = alone(name)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    close(metrics["stats"], known["stats"], 1e-4)
    close_gradients(grads, expected)


def test_accumulated_parts_are_normalised_by_their_own_and_the_mean_is_returned():
    made, kept = objectives(PLAIN, mesh_of(1, 1, 1)), parted(params("plain"))[0]
    one = jax.jit(step.plain(made))
    parts = [one({"towers": {"image": kept}}, {}, jax.tree.map(lambda x, i=i: x[i::2], columns("plain")), KEY) for i in (0, 1)]
    (value, metrics), grads = gradient("plain", (2, 1, 1), lambda made: step.accumulated(made, 2))
    np.testing.assert_allclose(value, np.mean([value for (value, _), _ in parts]), rtol=1e-5)
    mean = lambda trees: jax.tree.map(lambda *x: sum(x) / 2, *trees)
    close(metrics["stats"], mean([found["stats"] for (_, found), _ in parts]), 1e-4)
    close_gradients(grads, mean([grads for _, grads in parts]))


@pytest.mark.parametrize(
    "how", [pytest.param("cached", marks=pytest.mark.slow), pytest.param("on two", marks=pytest.mark.slow), "cached on two"]
)
def test_frozen_statistics_make_a_fixed_map_that_chunks_do_not_change(how):
    (wanted, known), expected = _frozen()
    assert "stats" not in known
    assert not any(path.endswith(("mean", "var")) for path in flat(expected))
    mesh = (2, 1, 1) if "two" in how else (1, 1, 1)
    make = (lambda made: step.cached(made, 2, mesh_of(*mesh))) if "cached" in how else step.plain
    (value, metrics), grads = gradient("plain", mesh, make, freeze=("(mean|var)$",))
    assert "stats" not in metrics
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    close(grads, expected, 1e-3)


@functools.cache
def _frozen():
    return jax.device_get(gradient("plain", (1, 1, 1), freeze=("(mean|var)$",)))


@functools.cache
def begun():
    """(first state with a moving average, the jitted step)"""
    kept, stats = optim.statistics({"towers": {"image": params("plain")}})
    tx, schedule = optim.make(config.Optim(learning_rate=1e-3, warmup=0, schedule="constant"), 10, kept)
    state = step.init_state(jax.tree.map(jnp.asarray, kept), tx, 0.75, jax.tree.map(jnp.asarray, stats))
    made = objectives(PLAIN, mesh_of(1, 1, 1))
    return state, jax.jit(step.make(step.plain(made), tx, schedule, 0, 0.75))


def test_a_step_moves_the_running_statistics_a_tenth_of_the_way_and_a_skipped_one_does_not():
    state, advance = begun()
    after, metrics = advance(state, {}, columns("plain"))
    seen = alone("plain")[0][1]["stats"]
    expected = jax.tree.map(lambda old, batch: 0.9 * old + 0.1 * batch, jax.device_get(state.extra["stats"]), seen)
    close(after.extra["stats"], expected)
    assert "stats" not in metrics
    raw = after._replace(extra={name: x for name, x in after.extra.items() if name != "ema"})
    whole = step.weights(raw)["towers"]["image"]
    assert jax.tree.structure(whole) == jax.tree.structure(params("plain"))
    jax.tree.map(np.testing.assert_array_equal, parted(whole)[1], after.extra["stats"]["towers"]["image"])
    spoilt = jax.tree_util.tree_map_with_path(
        lambda path, x: x * jnp.nan if sharding.path_of(path).endswith("stem/conv/kernel") else x, state.params
    )
    stayed, metrics = advance(state._replace(params=spoilt), {}, columns("plain"))
    assert int(metrics["skipped"]) == 1
    for name in ("stats", "ema"):
        jax.tree.map(np.testing.assert_array_equal, stayed.extra[name], state.extra[name])


def test_a_moving_average_holds_statistics_too():
    state, advance = begun()
    close(step.weights(state), {"towers": {"image": params("plain")}}, 0)
    after, _ = advance(state, {}, columns("plain"))
    new = objective.combine(after.params, after.extra["stats"])
    close(step.weights(after), jax.tree.map(lambda a, p: a + 0.25 * (p - a), step.weights(state), new))


def test_statistics_of_a_tower_without_rows_stay():
    old = {"towers": {"a": {"encoder": {"norm": {"mean": 1.0}}}, "b": {"encoder": {"norm": {"mean": 2.0}}}}}
    after = step.followed(old, {"towers": {"b": {"encoder": {"norm": {"mean": 4.0}}}}})
    assert after["towers"]["a"] == old["towers"]["a"] and after["towers"]["b"]["encoder"]["norm"]["mean"] == 2.2
    assert step.followed(old, {}) == old


# ---- adapters and what is frozen


def test_adapters_and_frozen_parts_find_their_paths():
    tree = params("clip")
    adapters = {"a": Lora(rank=2, paths="(stage4/.*conv3|head/.*)/kernel")}
    pairs = jax.tree.map(lambda x: x + 0.1, lora.init(adapters, tree["encoder"], jax.random.key(1)))
    merged = lora.merged(tree | {"lora": pairs}, adapters, "a")
    found = applied(ImageEmbedder(CLIP), merged, pictures("clip")).pooled
    assert np.abs(found - applied(ImageEmbedder(CLIP), tree, pictures("clip")).pooled).max() > 0.01
    model = lambda **fields: Model({"image": ImageTower(CLIP, **fields)})
    (rule,) = optim.constant(model(freeze_statistics=True), ())
    frozen = {path for path in flat({"towers": {"image": tree}}) if re.search(rule, path)}
    assert frozen == set(flat(optim.statistics({"towers": {"image": tree}})[1]))
    with pytest.raises(ConfigError, match="of a ResNet name what is not trained"):
        optim.constant(model(freeze_layers=2), ())
    assert optim.constant(model(freeze_layers=5), ()) == ("^towers/image/encoder/",)


def test_statistics_alone_are_nothing_to_train():
    with pytest.raises(ConfigError, match="leave something to train"):
        optim.partition({"towers": {"image": params("plain")}}, ("(kernel|scale|bias)$",))


def test_earlier_layers_are_refused():
    layered = dataclasses.replace(TASK, loss=config.MultipleNegatives(layers=config.Layers()))
    model = Model({"image": ImageTower(PLAIN)})
    with pytest.raises(ConfigError, match="earlier layers of a ResNet"):
        objective.make(layered, model, {"image": ImageEmbedder(PLAIN, dense=(Dense(4),))}, mesh_of(1, 1, 1))
