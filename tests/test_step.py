"""The training step: devices, accumulation, dropout, skipped steps, learned scale and frozen parts, on a tiny tower."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from embedjax import config, objective, optim, sharding, step
from embedjax.models.embedder import Embedder

B, L = 16, 6
ARCH = config.Bert(
    vocab_size=32, width=16, depth=1, heads=2, mlp=32, positions=8, dropout=0.2, attention_dropout=0.2, init_std=0.2
)
MODEL = config.Model({"text": config.Tower(arch=ARCH)})
EMBEDDERS = {"text": Embedder(ARCH)}
INIT = jax.jit(EMBEDDERS["text"].init)


def mesh_of(data, fsdp):
    return sharding.make_mesh(config.Mesh(data, fsdp), jax.devices()[: data * fsdp])


ONE = mesh_of(1, 1)
# One device is the simpler case: `slow` has it.
several = pytest.mark.parametrize(("data", "fsdp"), [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)])


def batch(negatives=1, seed=0):
    rng = np.random.default_rng(seed)

    def text(*shape):
        mask = np.arange(L) < rng.integers(2, L + 1, (*shape, 1))
        return {"ids": np.where(mask, rng.integers(1, 32, (*shape, L)), 0).astype(np.int32), "mask": mask}

    columns = {"anchor": text(B), "positive": text(B), "row": np.arange(B, dtype=np.int32)}
    word = lambda *shape: rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
    columns["hash"] = {"anchor": word(B), "positive": word(B)}
    if negatives:
        columns["negative"] = text(B, negatives)
        columns["hash"]["negative"] = word(B, negatives)
    return columns


def task(**loss):
    return config.Set(columns={"anchor": "a", "positive": "b", "negative": "c"}, loss=config.MultipleNegatives(**loss))


def start(which, **options):
    params = {"towers": {"text": INIT(jax.random.key(0))}}
    if found := objective.loss_params(which, MODEL, EMBEDDERS, jax.random.key(1)):
        params["loss"] = found
    trained, constants = optim.partition(params, options.pop("freeze", ()))
    tx, schedule = optim.make(config.Optim(learning_rate=1e-2, warmup=0, schedule="constant", **options), 100, trained)
    return step.init_state(trained, tx), constants, tx, schedule


def run(which, columns, *, mesh=None, gradient=step.plain, steps=1, **options):
    state, constants, tx, schedule = start(which, **options)
    mesh = mesh or ONE
    shardings = sharding.shardings(jax.eval_shape(lambda: state), mesh)
    state, constants = jax.device_put(state, shardings), jax.device_put(constants, sharding.shardings(constants, mesh))
    made = step.make(gradient(objective.make(which, MODEL, EMBEDDERS, mesh)), tx, schedule, seed=3)
    jitted = step.jitted(made, shardings)
    for _ in range(steps):
        state, metrics = jitted(state, constants, sharding.place(columns, mesh))
    return state, metrics, constants


def assert_close(found, wanted, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol), found, wanted)


@pytest.fixture(scope="module")
def plain():
    return run(task(), batch())


@pytest.mark.parametrize(("data", "fsdp"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_same_step_on_every_mesh_with_dropout(plain, data, fsdp):
    state, metrics, _ = run(task(), batch(), mesh=mesh_of(data, fsdp))
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], plain[1]["grad_norm"], rtol=1e-4)
    # The first moment is the clipped gradient itself; Adam's first update is its sign, which rounding may turn.
    assert_close(state.opt_state["adam"].mu, plain[0].opt_state["adam"].mu)
    kernel = state.params["towers"]["text"]["encoder"]["blocks"]["up"]["kernel"]
    assert ("fsdp" in kernel.sharding.spec) or fsdp == 1


@several
def test_accumulation_is_the_mean_of_the_parts(plain, data, fsdp):
    gradient = lambda made: step.accumulated(made, 4)
    state, metrics, _ = run(task(), batch(), mesh=mesh_of(data, fsdp), gradient=gradient, clip_norm=0.0)
    which, columns = task(), batch()
    made = objective.make(which, MODEL, EMBEDDERS, ONE)
    params, constants = start(which)[0].params, {}
    key = jax.random.bits(jax.random.fold_in(jax.random.key(3), 0), (), jnp.uint32)
    parts = [jax.tree.map(lambda x, i=i: x[i::4], columns) for i in range(4)]
    gradient = jax.jit(step.plain(made))
    found = [gradient(params, constants, part, key) for part in parts]
    np.testing.assert_allclose(metrics["loss"], np.mean([value for (value, _), _ in found]), rtol=1e-5)
    mean = jax.tree.map(lambda *g: 0.1 * sum(g) / 4, *[grads for _, grads in found])
    assert_close(state.opt_state["adam"].mu, mean)
    assert abs(float(metrics["loss"]) - float(plain[1]["loss"])) > 1e-2  # fewer negatives: another loss


@several
def test_a_step_that_is_not_finite_is_skipped_and_counted(data, fsdp):
    """One number of a matrix is enough, on whichever device it lies."""
    which, mesh = task(learn_scale=True), mesh_of(data, fsdp)
    state, constants, tx, schedule = start(which)
    shardings = sharding.shardings(state, mesh)
    columns, state = sharding.place(batch(), mesh), jax.device_put(state, shardings)
    kernel = state.params["towers"]["text"]["encoder"]["blocks"]["up"]["kernel"]
    broken = jax.device_put(kernel.at[0, -1, -1].set(jnp.nan), kernel.sharding)
    put = lambda path, x: broken if sharding.path_of(path).endswith("up/kernel") else x
    bad = state._replace(params=jax.tree_util.tree_map_with_path(put, state.params))
    gradient = step.plain(objective.make(which, MODEL, EMBEDDERS, mesh))
    made = sharding.in_sight(mesh, step.make(gradient, tx, schedule, 0))
    made = jax.jit(made, out_shardings=(shardings, None))  # not donated: states are looked at again
    after, metrics = made(bad, constants, columns)
    assert not np.isfinite(metrics["loss"]) and int(metrics["skipped"]) == 1 and int(metrics["in_a_row"]) == 1
    assert int(after.step) == 1
    for kept, had in zip(jax.tree.leaves(after[1:3]), jax.tree.leaves(bad[1:3]), strict=True):
        for shard, before in zip(kept.addressable_shards, had.addressable_shards, strict=True):
            np.testing.assert_array_equal(shard.data, before.data)
    after, metrics = made(after, constants, columns)
    assert int(metrics["in_a_row"]) == 2
    after, metrics = made(after._replace(params=state.params), constants, columns)
    assert int(metrics["skipped"]) == 2 and int(metrics["in_a_row"]) == 0 and np.isfinite(metrics["loss"])
    assert int(optax.tree.get(after.opt_state["adam"], "count")) == 1  # the schedule counts applied updates


def test_a_learned_scale_stays_in_its_bounds():
    state, metrics, _ = run(task(learn_scale=True, scale=99.9999), batch(), steps=3)
    assert 0 <= float(state.params["loss"]["scale"]) <= np.log(100.0) + 1e-6
    assert "scale" in metrics
    moved, _, _ = run(task(learn_scale=True, scale=10.0), batch(), steps=1)
    assert abs(float(moved.params["loss"]["scale"]) - np.log(10.0)) > 1e-3


def test_frozen_parameters_have_no_state_and_give_the_same_gradient(plain):
    state, metrics, constants = run(task(), batch(), freeze=("encoder/tokens", "blocks/attn/"))
    assert "tokens" not in state.params["towers"]["text"]["encoder"] and "tokens" in constants["towers"]["text"]["encoder"]
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"], rtol=1e-6)
    whole = plain[0].opt_state["adam"].mu["towers"]["text"]["encoder"]["blocks"]["up"]["kernel"]
    part = state.opt_state["adam"].mu["towers"]["text"]["encoder"]["blocks"]["up"]["kernel"]
    ratio = float(plain[1]["grad_norm"]) / float(metrics["grad_norm"])  # both are clipped to norm 1
    np.testing.assert_allclose(np.asarray(part), np.asarray(whole) * ratio, rtol=1e-4, atol=1e-6)


def test_dropout_changes_with_the_step_and_repeats_with_the_seed(plain):
    again = run(task(), batch())
    jax.tree.map(np.testing.assert_array_equal, again[0].params, plain[0].params)
    which = task()
    made = objective.make(which, MODEL, EMBEDDERS, ONE)
    params = start(which)[0].params
    encode = jax.jit(made.encode)
    outputs = [encode(params, {}, batch(), jnp.uint32(key))["anchor"] for key in (1, 2)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_rows_do_not_depend_on_each_other_or_on_the_chunk():
    which = dataclasses.replace(task(), loss=config.MultipleNegatives())
    made = objective.make(which, MODEL, EMBEDDERS, ONE)
    params = start(which)[0].params
    encode = jax.jit(made.encode)
    whole = encode(params, {}, batch(), jnp.uint32(5))
    part = encode(params, {}, jax.tree.map(lambda x: x[4:8], batch()), jnp.uint32(5))
    assert_close(part, jax.tree.map(lambda x: x[4:8], whole), atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "word"), [({"anchor": "a"}, "positive"), ({"anchor": "a", "positive": "b", "score": "c"}, "score")]
)
def test_columns_a_loss_cannot_use_are_refused(columns, word):
    with pytest.raises(config.errors.ConfigError, match=word):
        objective.make(dataclasses.replace(task(), columns=columns), MODEL, EMBEDDERS, ONE)
