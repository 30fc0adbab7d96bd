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


def products(program, times=1):
    """How many matrix products a traced program makes; those of a loop as often as it goes round."""
    found = 0
    for equation in program.eqns:
        found += times * (equation.primitive.name == "dot_general")
        rounds = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            found += products(inner, rounds) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_frozen_layers_have_no_backward_pass(layers, remat):
    arch, found = dataclasses.replace(ARCH, depth=4, dropout=0.0), []
    for frozen in (0, 1, 3):
        made = make_config(freeze_layers=frozen, arch=arch, layers=layers, remat=remat)
        parts = build.parts(made, mesh_of())
        traced = parts.steps["pairs"].trace(parts.abstract, parts.constants, build.placed(batch(), mesh_of()))
        found.append(products(traced.jaxpr.jaxpr))
    # A layer has 8 products: query, key, value, their scores, the values' mean, out, up, down; each has two for its gradient,
    # and what is not kept is made again: with remat all of them, else the scores.
    backward = 2 * 8 + (8 if remat else 1)
    assert found[0] - found[1] >= backward and found[0] - found[2] >= 3 * backward
    assert found[2] >= found[0] - 3 * backward - 3  # those of the first trained layer's own input may go too


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_frozen_layers_change_no_number(layers):
    """Each layer's vectors are those of the whole tower, in value; gradients stop below the first layer that is trained."""
    embedder = Embedder(dataclasses.replace(ARCH, depth=3, dropout=0.0), layers=layers)
    tower = jax.jit(embedder.init)(jax.random.key(0))
    column = batch()["anchor"]

    def value(params, embedder):
        out = embedder.apply(params, column, want=("pooled", "layers"))
        return (out.pooled**3).sum(), (out.pooled, out.layers)

    run = lambda still: jax.jit(jax.grad(lambda p: value(p, dataclasses.replace(embedder, still=still)), has_aux=True))(tower)
    whole, wanted = run(0)
    for still in (1, 3):
        grads, found = run(still)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
        for path, grad in flat(grads).items():
            kept = flat(whole)[path] * (np.arange(3) >= still).reshape(-1, *(1,) * (grad.ndim - 1)) if "blocks" in path else 0
            np.testing.assert_allclose(grad, kept, atol=1e-5, err_msg=path)


def test_a_decoder_tied_to_frozen_layers_leaves_them_alone():
    """TSDAE writes with the tower's own layers: frozen ones get no gradient there either, the decoder's own part does."""
    task = config.Set(columns={"anchor": "a"}, loss=config.DenoisingAutoEncoder())
    model, embedders = config.Model({"text": config.Tower(arch=ARCH, freeze_layers=1)}), {"text": Embedder(ARCH)}
    made = objective.make(task, model, embedders, mesh_of())
    own = objective.loss_params(task, model, embedders, jax.random.key(0))
    columns = {name: x for name, x in batch().items() if name in ("anchor", "row")}
    columns["anchor"]["word"] = np.where(columns["anchor"]["mask"], np.arange(L), -1).astype(np.int32)

    def value(params):
        return made.loss(params, made.encode(params, {}, columns, jnp.uint32(0)), {}, None)[0]

    grads = jax.jit(jax.grad(value))({"towers": {"text": {"encoder": params()["encoder"]}}, "loss": own})
    for path, grad in flat(grads).items():
        if "/blocks/" in path and not path.endswith("key/bias"):  # which no softmax sees
            assert np.any(grad[1:]) and np.any(grad[:1]) == path.startswith("loss/"), path


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
