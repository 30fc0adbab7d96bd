"""Image towers: what a picture's vector may depend on, what is drawn for it in training, and the parts of ViT by hand."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import optim, sharding
from embedjax.config import VITS, Augment, Dense, ImageTower, Lora, Mesh, Model, Pixels, Vit
from embedjax.config.errors import ConfigError
from embedjax.models import lora, ops, weights
from embedjax.models.augment import jitter, uniform
from embedjax.models.embedder import build_embedder
from embedjax.models.families import vit
from embedjax.models.image import ImageEmbedder

ARCH = Vit(
    image=13, patch=3, width=16, depth=2, heads=4, mlp=24, pool="cls", input_norm=True, registers=2,
    patch_dropout=0.5, dropout=0.2, attention_dropout=0.2, init_std=0.2,
)  # fmt: skip
COLOURS = Augment(brightness=0.4, contrast=0.4, saturation=0.4, grey=0.3)
EMBEDDER = ImageEmbedder(ARCH, augment=COLOURS, dense=(Dense(6, False, "identity"),))
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (8, 13, 13, 3)).astype(np.uint8)
KEY = jnp.uint32(5)
FORMS = {
    "cls": ARCH,
    "mean": dataclasses.replace(ARCH, pool="mean", positions="sincos", input_norm=False),
    "map": dataclasses.replace(ARCH, pool="map", patch_bias=False),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These programs run once each and take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def init(embedder):
    return jax.jit(embedder.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return init(EMBEDDER)


@functools.partial(jax.jit, static_argnums=0)
def applied(embedder, params, pictures, row, key):
    return embedder.apply(params, {"pixels": pictures}, row=row, key=key, want=("pooled", "tokens", "layers"))


def run(params, pictures=PICTURES, embedder=EMBEDDER, row=None, key=None):
    return applied(embedder, params, pictures, row, key)


@functools.partial(jax.jit, static_argnums=0)
def pooled(embedder, params, tokens):
    return embedder.pool(params, tokens, {})


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# ---- rows


def test_shapes_and_paths(params):
    out = run(params)
    assert (out.pooled.shape, out.tokens.shape, out.layers.shape) == ((8, 6), (8, 19, 16), (3, 8, 19, 16))
    assert run(params, key=KEY).tokens.shape == (8, 11, 16)  # half of the 16 patches
    np.testing.assert_allclose(np.linalg.norm(out.pooled, axis=-1), 1, rtol=1e-5)
    paths = {sharding.path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert paths["encoder/patches/kernel"] == (27, 16) and paths["encoder/positions/embedding"] == (17, 16)
    assert paths["encoder/class/embedding"] == (1, 16) and paths["encoder/registers/embedding"] == (2, 16)
    assert paths["encoder/blocks/attn_norm/scale"] == (2, 16) and paths["dense/0/kernel"] == (16, 6)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_only_what_is_wanted_is_returned(params):
    of = lambda *want: [
        leaf is None for leaf in jax.eval_shape(lambda: EMBEDDER.apply(params, {"pixels": PICTURES}, want=want))
    ]
    assert of("pooled") == [False, True, True, True, True]
    assert of("tokens") == [True, False, True, True, True]
    assert of("layers") == [True, True, False, True, True]


def test_chunks_equal_the_whole_and_permuting_the_batch_permutes_the_vectors(params):
    """With dropout, patches left out and colours varied: all are drawn by key and row alone."""
    whole = run(params, row=jnp.arange(8) + 100, key=KEY).pooled
    parts = [run(params, PICTURES[i : i + 2], row=jnp.arange(i, i + 2) + 100, key=KEY).pooled for i in range(0, 8, 2)]
    close(jnp.concatenate(parts), whole)
    order = RNG.permutation(8)
    close(run(params, PICTURES[order], row=jnp.asarray(order) + 100, key=KEY).pooled, whole[order])
    close(run(params, PICTURES[order]).pooled, run(params).pooled[order])
    for other in (
        run(params, row=jnp.arange(8), key=KEY),
        run(params, row=jnp.arange(8) + 100, key=jnp.uint32(6)),
        run(params),
    ):
        assert np.abs(other.pooled - whole).max() > 0.01


def test_further_axes_are_rows_in_order(params):
    flat = run(params, row=jnp.arange(8), key=KEY)
    out = run(params, PICTURES.reshape(4, 2, 13, 13, 3), row=jnp.arange(4), key=KEY)
    close(out.pooled, flat.pooled.reshape(4, 2, 6))
    close(out.layers, flat.layers.reshape(3, 4, 2, 11, 16))
    close(out.pooled, run(params, PICTURES.reshape(4, 2, 13, 13, 3), key=KEY).pooled)


def test_scanned_unrolled_and_recomputed_layers_are_the_same():
    """Every parameter has a gradient in all of them."""
    params = init(ImageEmbedder(FORMS["map"]))

    def value_and_grad(**how):
        embedder = ImageEmbedder(FORMS["map"], augment=COLOURS, **how)
        return jax.jit(jax.value_and_grad(lambda p: (embedder.apply(p, {"pixels": PICTURES}, key=KEY).pooled ** 3).sum()))(
            params
        )

    plain = value_and_grad(layers="unroll")
    close(plain, value_and_grad(layers="scan"), 1e-4)
    close(plain, value_and_grad(layers="scan", remat=True), 1e-4)
    gone = [sharding.path_of(path) for path, g in jax.tree_util.tree_leaves_with_path(plain[1]) if not np.abs(g).max() > 0]
    assert not gone
    held = value_and_grad(layers="scan", still=1)
    close(plain[0], held[0], 1e-4)
    expected = weights.flatten(jax.tree.map(np.array, plain[1]["encoder"]))
    for path, gradient in expected.items():
        if path.startswith("blocks/"):
            gradient[0] = 0
        elif not path.startswith(("final_norm/", "head/")):
            gradient[:] = 0
    close(weights.flatten(held[1]["encoder"]), expected, 1e-4)


def test_earlier_layers_are_pooled_as_the_last_one_is():
    embedder = ImageEmbedder(FORMS["map"])
    params = init(embedder)
    out = run(params, embedder=embedder)
    close(pooled(embedder, params, out.tokens), out.pooled)
    nested = pooled(embedder, params, out.layers.reshape(3, 4, 2, 18, 16)[1])
    close(nested.reshape(8, 16), pooled(embedder, params, out.layers[1]))
    assert np.abs(nested.reshape(8, 16) - out.pooled).max() > 0.01


def test_a_mesh_of_eight_devices_equals_one():
    embedder = ImageEmbedder(FORMS["map"], augment=COLOURS)
    mesh, params = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2)), jax.device_get(init(embedder))
    batch = {"pixels": PICTURES, "row": np.arange(8, dtype=np.int32) + 3}

    def loss(params, batch):
        pooled = embedder.apply(params, {"pixels": batch["pixels"]}, row=batch["row"], key=KEY).pooled
        return (pooled**3).sum(), pooled

    step = jax.value_and_grad(loss, has_aux=True)
    named = lambda tree: {"towers": {"image": tree}}
    placed = sharding.put(named(params), mesh)["towers"]["image"]
    split = jax.jit(sharding.in_sight(mesh, step))(placed, sharding.place(batch, mesh))
    close(split, jax.jit(step)(params, batch), 1e-4)
    kernels = {
        sharding.path_of(p): x.sharding.spec for p, x in jax.tree_util.tree_leaves_with_path(placed) if "kernel" in str(p)
    }
    assert all(spec for spec in kernels.values())


# ---- by hand


@pytest.mark.parametrize(("side", "size"), [(6, 3), (13, 3), (4, 1)])
def test_patches_are_those_of_a_loop(side, size):
    x = RNG.normal(size=(2, side, side, 3)).astype(np.float32)
    found, n = np.asarray(vit.patches(x, size)), side // size
    for b in range(2):
        for i in range(n):
            for j in range(n):
                square = [x[b, i * size + r, j * size + c, k] for r in range(size) for c in range(size) for k in range(3)]
                np.testing.assert_array_equal(found[b, i * n + j], square)
    assert found.shape == (2, n * n, size * size * 3)


def test_bytes_become_normalised_numbers(params):
    pixels = Pixels(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    found = dataclasses.replace(EMBEDDER, pixels=pixels).numbers(PICTURES, row=jnp.arange(8))
    close(found, (PICTURES / 255 - np.array(pixels.mean)) / np.array(pixels.std))


def test_sines_and_cosines_of_column_and_row():
    """Beyer et al. 2022: at patch (y, x), [sin(x w), cos(x w), sin(y w), cos(y w)], w = 10000^(-i / (D/4 - 1))."""
    arch = Vit(image=12, patch=4, width=16, heads=4, positions="sincos", pool="mean")
    table = vit.fixed_positions(arch)
    assert table.shape == (9, 16) and table.dtype == np.float32
    w = np.array([10000 ** (-i / 3) for i in range(4)])
    for y, x in ((0, 0), (1, 2), (2, 1)):
        expected = np.concatenate([np.sin(x * w), np.cos(x * w), np.sin(y * w), np.cos(y * w)])
        np.testing.assert_allclose(table[3 * y + x], expected, atol=1e-6)
    with_class = vit.fixed_positions(dataclasses.replace(arch, pool="cls"))
    np.testing.assert_array_equal(with_class, np.concatenate([np.zeros((1, 16)), table]))
    np.testing.assert_allclose(
        vit.fixed_positions(Vit(image=4, patch=2, width=4, heads=1, positions="sincos"))[4],
        [np.sin(1), np.cos(1)] * 2,
        atol=1e-6,
    )


def test_fixed_positions_as_a_table_are_the_same_tower():
    arch = dataclasses.replace(FORMS["mean"], registers=0)
    params = init(ImageEmbedder(arch))
    learned, encoder = vit.with_table(arch, params["encoder"])
    assert learned.positions == "learned" and vit.model_type(learned) == "siglip_vision_model"
    close(run({"encoder": encoder}, embedder=ImageEmbedder(learned)).pooled, run(params, embedder=ImageEmbedder(arch)).pooled)


def test_what_stands_before_the_patches():
    """Registers are pooled in no form, and positions are the patches' and the class token's alone."""
    for form in ("cls", "mean"):
        arch = dataclasses.replace(FORMS[form], depth=1, input_norm=False, positions="learned", patch_dropout=0)
        embedder = ImageEmbedder(arch, normalize=False)
        params = init(embedder)
        encoder, first = params["encoder"], int(form == "cls")
        out = run(params, embedder=embedder)
        assert out.tokens.shape[1] == first + 2 + 16
        close(out.layers[0][:, first : first + 2], jnp.broadcast_to(encoder["registers"]["embedding"][None], (8, 2, 16)))
        if first:
            expected = encoder["class"]["embedding"][0] + encoder["positions"]["embedding"][0]
            close(out.layers[0][:, 0], jnp.broadcast_to(expected[None], (8, 16)))
            close(out.pooled, out.tokens[:, 0])
        if form == "mean":
            close(out.pooled, out.tokens[:, 2:].mean(1))
        x = embedder.numbers(PICTURES, row=jnp.arange(8)).reshape(8, 13, 13, 3)
        kernel, bias = encoder["patches"]["kernel"], encoder["patches"].get("bias", 0)
        expected = x[3, 3:6, 6:9].reshape(-1) @ kernel + bias + encoder["positions"]["embedding"][first + 4 + 2]
        close(out.layers[0][3, first + 2 + 4 + 2], expected, 1e-4)
        tokens = np.asarray(out.tokens).copy()
        tokens[:, first : first + 2] = 7
        close(pooled(embedder, params, jnp.asarray(tokens)), out.pooled)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_attention_pooling_by_hand(backend, monkeypatch):
    monkeypatch.setattr(ops, "on_cpu", lambda: backend == "cpu")
    arch = dataclasses.replace(FORMS["map"], registers=0)
    encoder = jax.device_get(init(ImageEmbedder(arch)))["encoder"]
    encoder = jax.tree.map(lambda x: x + 0.1 * RNG.normal(size=x.shape).astype(np.float32), encoder)
    pool = jax.jit(functools.partial(vit.pool, arch, compute="float32"))
    tokens, head = RNG.normal(size=(2, 5, 16)).astype(np.float32), encoder["head"]
    attn, found = head["attn"], pool(encoder, tokens)
    linear = lambda x, part: x @ part["kernel"] + part["bias"]
    for b in range(2):
        q, k, v = (
            linear(head["probe"]["embedding"][0], attn["query"]),
            linear(tokens[b], attn["key"]),
            linear(tokens[b], attn["value"]),
        )
        heads = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            weights = np.exp(k[:, part] @ q[part] / 2)
            heads.append(weights / weights.sum() @ v[:, part])
        y = linear(np.concatenate(heads), attn["out"])
        normed = (y - y.mean()) / np.sqrt(y.var() + arch.norm_eps) * head["mlp_norm"]["scale"] + head["mlp_norm"]["bias"]
        expected = y + linear(np.asarray(jax.nn.gelu(linear(normed, head["up"]), approximate=False)), head["down"])
        close(found[b], expected, 1e-4)


# ---- another resolution


def test_positions_interpolated_to_the_same_size_stay():
    table = RNG.normal(size=(17, 8)).astype(np.float32)
    np.testing.assert_array_equal(vit.interpolated(table, 4, first=1), table)
    assert (vit.cubic(6, 6) == np.eye(6)).all()


def test_interpolation_keeps_constants_ramps_and_what_stands_before():
    for old, new in ((4, 7), (7, 4), (2, 3)):
        np.testing.assert_allclose(vit.cubic(old, new).sum(1), 1, atol=1e-12)
    y, x = np.mgrid[:8, :8]
    table = np.concatenate([[[9.0, 9.0]], np.stack([y.ravel(), x.ravel()], 1)]).astype(np.float32)
    found = vit.interpolated(table, 16, first=1)
    assert found.shape == (257, 2) and found[0].tolist() == [9, 9]
    inner = found[1:].reshape(16, 16, 2)[4:-4, 4:-4]  # borders are repeated, so ramps end there
    np.testing.assert_allclose(inner[2, 5], [2.75, 4.25], atol=0.05)
    assert (np.diff(inner[..., 0], axis=0) > 0).all() and np.ptp(inner[..., 0], axis=1).max() < 1e-5


def test_an_encoder_of_another_resolution():
    old, new = ARCH, dataclasses.replace(ARCH, image=21)
    encoder = jax.device_get(init(EMBEDDER))["encoder"]
    found = vit.resized(encoder, old, new)
    assert found["positions"]["embedding"].shape == (50, 16) and found["blocks"] is encoder["blocks"]
    assert vit.resized(encoder, old, dataclasses.replace(old, image=14))["positions"] is encoder["positions"]
    pictures = RNG.integers(0, 256, (2, 21, 21, 3)).astype(np.uint8)
    assert run({"encoder": found}, pictures, ImageEmbedder(new)).tokens.shape == (2, 52, 16)


# ---- what training draws


def test_patches_are_left_out_by_key_and_row():
    arch = dataclasses.replace(ARCH, image=48, patch_dropout=0.7)
    rows = jnp.arange(2000)
    kept = np.asarray(jax.jit(lambda k: vit.kept(arch, k, rows))(KEY))
    assert kept.shape == (2000, 77) and (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < 256
    shares = np.bincount(kept.ravel(), minlength=256) / 2000
    assert abs(shares - 77 / 256).max() < 5 * np.sqrt(0.3 * 0.7 / 2000)  # every patch as often
    together = np.zeros((2000, 256), bool)
    np.put_along_axis(together, kept, True, axis=1)
    assert abs((together[:, 0] & together[:, 1]).mean() - 0.3**2) < 0.05
    np.testing.assert_array_equal(kept[7:9], vit.kept(arch, KEY, rows[7:9]))
    assert (kept != np.asarray(vit.kept(arch, jnp.uint32(6), rows))).any()
    assert vit.kept(dataclasses.replace(arch, patch_dropout=0.999), KEY, rows[:2]).shape == (2, 1)


def test_only_the_kept_patches_are_seen():
    arch = dataclasses.replace(ARCH, dropout=0, attention_dropout=0, pool="mean", positions="learned")
    params = init(ImageEmbedder(arch))
    kept = np.asarray(vit.kept(arch, KEY, jnp.arange(8)))
    x = RNG.normal(size=(8, 13, 13, 3)).astype(np.float32)
    tower = ImageEmbedder(arch).tower
    loss = lambda x: (tower.apply({"params": params["encoder"]}, x, key=KEY)[0] ** 3).sum()
    seen = np.abs(vit.patches(jax.jit(jax.grad(loss))(jnp.asarray(x)), 3)).max(-1) > 0
    expected = np.zeros((8, 16), bool)
    np.put_along_axis(expected, kept, True, axis=1)
    np.testing.assert_array_equal(seen, expected)


def test_colours_by_hand():
    x = RNG.uniform(size=(6, 4, 4, 3)).astype(np.float32)
    rows = jnp.arange(6) + 40
    draw = np.asarray(uniform(KEY, rows, 4))
    found = np.asarray(jax.jit(lambda x: jitter(x, COLOURS, KEY, rows))(x))
    luma = lambda x: x @ np.array([0.299, 0.587, 0.114])
    for b in range(6):
        factor = 1 + 0.4 * (2 * draw[b] - 1)
        y = np.clip(x[b] * factor[0], 0, 1)
        y = np.clip(luma(y).mean() + factor[1] * (y - luma(y).mean()), 0, 1)
        y = np.clip(luma(y)[..., None] + factor[2] * (y - luma(y)[..., None]), 0, 1)
        y = np.repeat(luma(y)[..., None], 3, -1) if draw[b, 3] < 0.3 else y
        np.testing.assert_allclose(found[b], y, atol=1e-5)
    many = np.asarray(uniform(KEY, jnp.arange(4000), 4))
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.08


def test_colours_stay_without_a_key_and_without_a_wish(params):
    plain = dataclasses.replace(EMBEDDER, augment=Augment(flip=0.5))
    row = jnp.arange(8)
    np.testing.assert_array_equal(plain.numbers(PICTURES, row=row, key=KEY), plain.numbers(PICTURES, row=row))
    np.testing.assert_array_equal(EMBEDDER.numbers(PICTURES, row=row), plain.numbers(PICTURES, row=row))
    assert np.abs(EMBEDDER.numbers(PICTURES, row=row, key=KEY) - plain.numbers(PICTURES, row=row)).max() > 0.1


# ---- configs


def test_pictures_of_another_size_are_refused(params):
    with pytest.raises(ConfigError, match="13 x 13 x 3"):
        jax.eval_shape(lambda: EMBEDDER.apply(params, {"pixels": PICTURES[:, :-1]}))


def test_build_embedder_wants_a_resolved_tower():
    tower = ImageTower(arch=ARCH, pixels=Pixels(), dense=(), normalize=False, compute="bfloat16", augment=COLOURS)
    embedder = build_embedder(tower)
    assert isinstance(embedder, ImageEmbedder)
    assert (embedder.normalize, embedder.compute, embedder.width, embedder.augment) == (False, "bfloat16", 16, COLOURS)
    with pytest.raises(ConfigError, match="pixels"):
        build_embedder(dataclasses.replace(tower, pixels=None))


def test_presets():
    kinds = {name: vit.model_type(arch) for name, arch in VITS.items()}
    assert {kind for name, kind in kinds.items() if name.startswith("siglip-")} == {"siglip_vision_model"}
    assert kinds["clip-B/32"] == "clip_vision_model" and kinds["vit-Ti/16"] == "vit"
    count = lambda name: sum(x.size for x in jax.tree.leaves(jax.eval_shape(ImageEmbedder(VITS[name]).init, jax.random.key(0))))
    assert count("clip-B/32") == 87_456_000  # CLIPVisionModel of openai/clip-vit-base-patch32
    assert count("siglip-B/16") == 92_884_224  # SiglipVisionModel of google/siglip-base-patch16-224
    assert count("vit-B/16") == 85_798_656  # google/vit-base-patch16-224 without its classifier


def test_adapters_and_frozen_layers_find_their_paths():
    arch = FORMS["map"]
    params = init(ImageEmbedder(arch))
    adapters = {"a": Lora(rank=2)}
    pairs = lora.init(adapters, params["encoder"], jax.random.key(1))
    kernels = {sharding.path_of(path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(pairs)}
    assert kernels == {f"a/{place}/attn/{part}/kernel" for place in ("blocks", "head") for part in ("query", "value")}
    trained = jax.tree.map(lambda x: x + 0.1, pairs)
    merged = lora.merged(params | {"lora": trained}, adapters, "a")
    assert (
        np.abs(run(merged, embedder=ImageEmbedder(arch)).pooled - run(params, embedder=ImageEmbedder(arch)).pooled).max() > 0.01
    )
    (rule,) = optim.constant(Model({"image": ImageTower(arch=arch, freeze_layers=1)}), ())  # type: ignore[arg-type]
    frozen = {path for path in weights.flatten({"towers": {"image": params}}) if re.search(rule, path)}
    parts = ("patches/kernel", "positions/embedding", "registers/embedding", "norm/scale", "norm/bias")
    assert frozen == {f"towers/image/encoder/{part}" for part in parts}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_bfloat16_is_close_to_float32(backend, monkeypatch):
    exact, rough = ImageEmbedder(FORMS["map"]), ImageEmbedder(FORMS["map"], compute="bfloat16")
    params = init(exact)
    monkeypatch.setattr(ops, "on_cpu", lambda: backend == "cpu")
    vectors = jax.jit(lambda p: rough.apply(p, {"pixels": PICTURES}).pooled)(params)
    assert vectors.dtype == jnp.float32
    cosines = (vectors * run(params, embedder=exact).pooled).sum(-1)
    assert 0.999 < cosines.min() < 1 - 1e-7
