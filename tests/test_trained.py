"""What of a model is trained: adapters, layers held still, rates by layer and the moving average, alike on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from embedjax import build, config, objective, sharding, step
from embedjax.config.errors import ConfigError
from embedjax.models import lora
from embedjax.models.embedder import Embedder
from embedjax.sharding import path_of

B, L, S = 8, 6, 2
ARCH = config.Bert(vocab_size=32, width=16, depth=S, heads=2, mlp=32, positions=8, dropout=0.1, init_std=0.2)
ADAPTERS = {"sts": config.Lora(2, 4.0, "blocks/"), "search": config.Lora(2, 4.0, "attn/query|down")}


def make_config(*, optim=(), adapter="", arch=ARCH, **tower):
    loss = config.MultipleNegatives(scale=20.0)
    task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=loss, adapter=adapter, name="pairs")
    rates = {"learning_rate": 1e-2, "warmup": 0, "schedule": "constant", "clip_norm": 0.0, **dict(optim)}
    return build.resolve(
        config.Config(
            model=config.Model({"text": config.Tower(arch=arch, max_length=L, **tower)}),
            data=config.Data(batch_size=B, sets=(task,)),
            optim=config.Optim(**rates),
            export=config.Export("none"),
        )
    )


def batch():
    draw = np.random.default_rng(0)

    def text():
        mask = np.arange(L) < draw.integers(2, L + 1, (B, 1))
        return {"ids": np.where(mask, draw.integers(1, 32, (B, L)), 0).astype(np.int32), "mask": mask}

    word = lambda: draw.integers(0, 2**32, (B, 2), dtype=np.uint32)
    hashes = {"anchor": word(), "positive": word()}
    return {"anchor": text(), "positive": text(), "row": np.arange(B, dtype=np.int32), "hash": hashes}


def mesh_of(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(config.Mesh(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def params():
    """Of a tower with both adapters, their B not 0; drawn without compiling anything."""

    def shapes(key):
        encoder = Embedder(ARCH).init(key)["encoder"]
        return {"encoder": encoder, "lora": lora.init(ADAPTERS, encoder, key)}

    draw = lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32) / 4
    return jax.tree.map(draw, jax.eval_shape(shapes, jax.random.key(0)))


def start(made, mesh):
    """(the step, the first state, the constants) of a run on a mesh."""
    parts = build.parts(made, mesh)
    tower = params() if made.model.towers["text"].lora else {"encoder": params()["encoder"]}
    trained, constants = build._partition(made, {"towers": {"text": tower}})
    state = step.init_state(trained, parts.tx, made.optim.ema)
    places = jax.tree.map(lambda x: x.sharding, (parts.abstract, parts.constants))
    return parts.steps["pairs"], *jax.device_put((state, constants), places)


def flat(tree):
    return {path_of(key): np.asarray(x) for key, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def reference():
    """(loss, gradient of the kernels, pairs) of the adapted tower as a plain one, on one device."""
    merged = {"towers": {"text": lora.merged(params(), ADAPTERS, "search")}}
    plain = make_config()
    loss = objective.make(plain.data.sets[0], plain.model, {"text": Embedder(ARCH)}, mesh_of())
    key = jax.random.bits(jax.random.fold_in(jax.random.key(0), 0), (), jnp.uint32)
    (value, _), grads = jax.jit(step.plain(loss))(merged, {}, batch(), key)
    return float(value), flat(grads["towers"]["text"]["encoder"]), flat(params()["lora"]["search"])


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
CELLS = [((2, 2, 2), {"cached": 2}), slow((2, 1, 1), {"cached": 2}), slow((1, 4, 1), {"cached": 2})]
CELLS += [slow(sizes, {}) for sizes in ((1, 1, 1), (4, 1, 1), (8, 1, 1), (2, 2, 1), (1, 1, 2))]


@pytest.mark.parametrize(("sizes", "how"), CELLS, ids=str)
def test_adapters_have_the_gradient_of_the_formula(reference, sizes, how):
    """dA = s dW B', dB = s A' dW of the plain tower at the merged kernels; none in a frozen layer or for the other adapter."""
    mesh, (value, kernels, pairs) = mesh_of(*sizes), reference
    remat = sizes != (1, 1, 1)
    made = make_config(lora=ADAPTERS, adapter="search", freeze_layers=1, optim=how.items(), remat=remat)
    update, state, constants = start(made, mesh)
    state, metrics = update(state, constants, sharding.place(batch(), mesh))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    found = flat(state.opt_state["adam"].mu)
    assert all(path.startswith("towers/text/lora/search/") for path in found) and len(found) == 4
    for path in ("blocks/attn/query/kernel", "blocks/down/kernel"):
        a, b = pairs[f"{path}/a"], pairs[f"{path}/b"]
        wanted = {"a": 2 * kernels[path] @ b.swapaxes(1, 2), "b": 2 * a.swapaxes(1, 2) @ kernels[path]}
        for part, grad in wanted.items():
            got = found[f"towers/text/lora/search/{path}/{part}"]
            assert not got[0].any()
            np.testing.assert_allclose(10 * got[1:], grad[1:], rtol=1e-3, atol=1e-5, err_msg=f"{path}/{part}")
    placed = state.params["towers"]["text"]["lora"]["search"]["blocks"]["down"]["kernel"]["a"].sharding.spec
    assert "tensor" in placed


@pytest.mark.parametrize("sizes", [(2, 2, 1), slow((1, 1, 1)), slow((2, 1, 2))], ids=str)
def test_layers_held_still_keep_every_bit_and_the_average_follows_the_rest(sizes):
    mesh = mesh_of(*sizes)
    made = make_config(freeze_layers=1, optim={"weight_decay": 0.1, "layer_decay": 0.5, "ema": 0.9}.items())
    update, state, constants = start(made, mesh)
    first = wanted = flat(state.params)
    assert {path.split("/")[3] for path in flat(constants)} == {"tokens", "positions", "types", "norm"}
    for _ in range(3):
        state, metrics = update(state, constants, sharding.place(batch(), mesh))
        wanted = {path: wanted[path] + np.float32(0.1) * (x - wanted[path]) for path, x in flat(state.params).items()}
    assert not any(name.startswith("ema") for name in metrics)
    after, average = flat(state.params), flat(state.extra["ema"])
    for path, x in after.items():
        assert "blocks" in path
        np.testing.assert_array_equal(x[:1], first[path][:1], err_msg=path)
        np.testing.assert_array_equal(average[path][:1], first[path][:1], err_msg=path)
        assert (x[1:] != first[path][1:]).any(), path
        np.testing.assert_allclose(average[path], wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)
    assert step.weights(state) is state.extra["ema"]
    assert state.extra["ema"]["towers"]["text"]["encoder"]["blocks"]["up"]["kernel"].sharding.spec == (
        state.params["towers"]["text"]["encoder"]["blocks"]["up"]["kernel"].sharding.spec
    )


@pytest.mark.slow
def test_frozen_layers_cost_no_backward_pass():
    """With all but the top layer of four frozen, most of the backward pass is gone."""
    arch = dataclasses.replace(ARCH, depth=4, dropout=0.0)
    flops = []
    for frozen in (0, 3):
        made = make_config(freeze_layers=frozen, arch=arch)
        parts = build.parts(made, mesh_of())
        lowered = parts.steps["pairs"].lower(parts.abstract, parts.constants, build.placed(batch(), mesh_of()))
        flops.append(lowered.compile().cost_analysis()["flops"])
    # Forward 1, backward 2: of 12 parts of work 6 are left.
    assert flops[1] < 0.62 * flops[0]


@pytest.mark.slow
def test_an_accumulated_step_trains_an_adapter_and_its_average():
    made = make_config(lora=ADAPTERS, adapter="sts", optim={"accumulate": 2, "ema": 0.5}.items())
    update, state, constants = start(made, mesh_of(2))
    first = flat(state.params)
    state, metrics = update(state, constants, sharding.place(batch(), mesh_of(2)))
    assert np.isfinite(metrics["loss"]) and first.keys() == flat(state.extra["ema"]).keys()
    for path, mean in flat(state.extra["ema"]).items():
        assert path.startswith("towers/text/lora/sts/")
        np.testing.assert_allclose(mean, (first[path] + flat(state.params)[path]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"adapter": "stz", "lora": ADAPTERS}, "set 'pairs', tower 'text': there is no adapter 'stz'; .*'sts'"),
        ({"lora": ADAPTERS}, "the tower has the adapters sts, search; name one"),
        ({"adapter": "sts"}, "set 'pairs' names the adapter 'sts'; no tower has `lora`"),
    ],
)
def test_an_adapter_that_cannot_be_meant_is_refused_at_once(where, words):
    with pytest.raises(ConfigError, match=words):
        make_config(**where)


def test_a_skipped_step_leaves_the_average_alone():
    tx = optax.sgd(1.0)
    gradient = lambda params, constants, columns, key: ((jnp.sum(columns), {}), {"w": columns})
    update = jax.jit(step.make(gradient, tx, lambda count: 1.0, 0, ema=0.75))
    state = step.init_state({"w": jnp.asarray([1.0, -2.0])}, tx, ema=0.75)
    params = average = np.array([1.0, -2.0])
    for columns in ([1.0, 0.5], [np.nan, 1.0], [0.25, -1.0]):
        state, metrics = update(state, {}, jnp.asarray(columns))
        if np.isfinite(columns).all():
            params = params - columns
            average = 0.75 * average + 0.25 * params
        np.testing.assert_allclose(state.extra["ema"]["w"], average, rtol=1e-6)
    assert int(metrics["skipped"]) == 1 and step.weights(state) is state.extra["ema"]
    assert "ema" not in step.init_state({"w": jnp.zeros(1)}, tx).extra
