"""The optimiser: rates by update, decay and rates by path, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from embedjax import optim
from embedjax.config import Bert, Group, Lora, Model, Optim, Set, Tower
from embedjax.config.errors import ConfigError
from embedjax.objective import combine
from embedjax.sharding import path_of


def make_params():
    draw = np.random.default_rng(0)
    leaf = lambda: jnp.asarray(draw.normal(size=(2, 3)), jnp.float32)  # one shape, so that few operations are compiled
    attn = {"query": {"kernel": leaf(), "bias": leaf()}, "norm": {"scale": leaf()}}
    tables = {"tokens": {"embedding": leaf()}, "relative": {"embedding": leaf()}}
    adapter = {"blocks": {"attn": {"query": {"kernel": {"a": leaf(), "b": leaf()}}}}}
    text = {"encoder": {"blocks": {"attn": attn}, **tables}, "dense": {"0": {"kernel": leaf()}}, "lora": {"sts": adapter}}
    query = {"encoder": {"tokens": {"embedding": leaf()}, "final_norm": {"scale": leaf()}}, "dense": {}}
    return {"towers": {"text": text, "query": query}, "loss": {"scale": leaf()}}


def flat(tree):
    return {path_of(key): value for key, value in jax.tree_util.tree_leaves_with_path(tree)}


def first_update(config, steps, params, grads):
    """(updates, state) of one step."""
    tx, _ = optim.make(config, steps, params)
    return tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_schedule_rises_to_its_peak_and_falls_to_0_after_the_last_update(shape):
    rate = optim.schedule(Optim(learning_rate=2.0, schedule=shape, warmup=0.25), 16)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(17)))
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    x = (np.arange(3, 17) - 3) / 13
    want = {"linear": 2 * (1 - x), "cosine": 1 + np.cos(np.pi * x), "constant": 2 + 0 * x}[shape]
    np.testing.assert_allclose(rates[3:], want, rtol=1e-5, atol=1e-7)
    assert (rates[:16] > 0).all()


def test_warmup_is_a_share_below_one_and_a_number_of_steps_from_one():
    for warmup, peak in ((0.0, 0), (1.0, 0), (0.5, 4), (5, 4), (10, 9)):
        rates = np.asarray(jax.vmap(optim.schedule(Optim(warmup=warmup), 10))(jnp.arange(10)))
        assert int(np.argmax(rates)) == peak, warmup
        assert rates[peak] == pytest.approx(2e-5)
    with pytest.raises(ConfigError, match="11 steps, but the run has 10"):
        optim.schedule(Optim(warmup=11), 10)


def test_a_run_of_one_step_learns():
    assert optim.schedule(Optim(), 1)(0) == pytest.approx(2e-5)


def test_update_is_adamw_by_hand():
    params, config = make_params(), Optim(learning_rate=0.1, schedule="constant", warmup=0, weight_decay=0.5, clip_norm=0)
    grads = jax.tree.map(lambda x: x * 0.3 + 0.01, params)
    updates, _ = first_update(config, 10, params, grads)
    decaying = {"kernel", "embedding", "a", "b"}
    for path, got in flat(updates).items():
        g, p = np.asarray(flat(grads)[path]), np.asarray(flat(params)[path])
        decay = 0.5 * p if path.split("/")[-1] in decaying and "relative" not in path else 0
        np.testing.assert_allclose(got, -0.1 * (g / (np.abs(g) + 1e-8) + decay), rtol=1e-4, atol=1e-6, err_msg=path)


def test_decay_never_touches_norms_biases_or_the_scale():
    decayed = {path for path, value in flat(optim.decays(make_params())).items() if value}
    assert decayed and all(path.endswith(("/kernel", "/a", "/b", "tokens/embedding")) for path in decayed)
    params = make_params()
    shrunk, _ = first_update(Optim(warmup=0, clip_norm=0), 2, params, jax.tree.map(jnp.zeros_like, params))
    assert {path for path, value in flat(shrunk).items() if np.any(value)} == decayed


def test_a_path_without_a_decay_rule_is_an_error():
    with pytest.raises(ConfigError, match="'towers/image/class_token' matches no rule"):
        optim.decays({"towers": {"image": {"class_token": jnp.zeros(2)}}})


def test_every_decay_rule_is_used_and_none_overlap():
    used = {rule for rule, _ in optim.DECAY for path in flat(make_params()) if optim.re.search(rule, path)}
    assert used == {rule for rule, _ in optim.DECAY}
    optim.decays({"loss": {"bias": jnp.zeros(2), "task": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}}})


def test_clipping_bounds_the_gradient_adam_sees():
    grads = jax.tree.map(lambda x: 100 * x, make_params())
    _, state = first_update(Optim(clip_norm=0.5), 2, make_params(), grads)
    assert optax.tree.norm(state["adam"].mu) == pytest.approx(0.1 * 0.5, rel=1e-5)


def test_the_first_matching_group_scales_rate_and_decay():
    params, grads = make_params(), jax.tree.map(jnp.ones_like, make_params())
    groups = (Group("text/encoder/tokens", 0.0), Group("towers/text", 0.1), Group("tokens", 7.0))
    plain, _ = first_update(Optim(warmup=0), 2, params, grads)
    grouped, _ = first_update(Optim(warmup=0, groups=groups), 2, params, grads)
    for path, got in flat(grouped).items():
        by = {"towers/text/encoder/tokens": 0, "towers/text": 0.1, "towers/query/encoder/tokens": 7.0}
        factor = next((f for start, f in by.items() if path.startswith(start)), 1.0)
        np.testing.assert_allclose(got, factor * flat(plain)[path], rtol=1e-6, err_msg=path)


def test_rates_fall_from_layer_to_layer_and_stop_at_what_is_held_still():
    """Two layers: the upper learns at the decay's power 1, the lower at 2 (or not at all), the tables at 3, the rest at 1."""
    params, grads = make_params(), jax.tree.map(jnp.ones_like, make_params())
    groups = (Group("attn/norm", 10.0),)
    plain, _ = first_update(Optim(warmup=0, groups=groups), 2, params, grads)
    for still, lowest in ((None, 0.25), ({"text": 1}, 0.0)):
        tx, _ = optim.make(Optim(warmup=0, layer_decay=0.5, groups=groups), 2, params, still)
        for path, got in flat(tx.update(grads, tx.init(params), params)[0]).items():
            blocks = path.startswith("towers/text") and "/blocks/" in path
            table = path == "towers/text/encoder/tokens/embedding"  # of a tower without layers, and what all read: as ever
            factor = np.array([[lowest], [0.5]]) if blocks else 0.125 if table else 1.0
            np.testing.assert_allclose(got, factor * np.asarray(flat(plain)[path]), rtol=1e-6, err_msg=path)


TABLES = ("encoder/tokens/", "encoder/relative/")
ENCODER, LORAS = (*TABLES, "encoder/blocks/"), ("lora/sts/", "lora/x/")


@pytest.mark.parametrize(
    ("tower", "sets", "held"),
    [
        ({"freeze_layers": 1}, ("",), TABLES),
        ({"freeze_layers": 2}, ("",), ENCODER),
        ({"lora": ("sts",)}, ("",), ENCODER),
        ({"lora": ("sts", "x")}, ("x", "x"), (*ENCODER, "lora/sts/")),
        ({"lora": ("sts", "x")}, ("x", "sts"), ENCODER),
        ({"lora": ("sts", "x"), "freeze_layers": 1}, ("sts", "x"), ENCODER),
        ({"lora": ("sts", "x"), "freeze_layers": 2}, ("sts", "x"), (*ENCODER, *LORAS)),
    ],
)
def test_towers_say_what_is_constant(tower, sets, held):
    adapters = dict.fromkeys(tower.pop("lora", ()), Lora())
    model = Model({"text": Tower(arch=Bert(depth=2), lora=adapters, **tower), "query": Tower(arch=Bert())})
    params = make_params()
    pair = params["towers"]["text"].pop("lora")["sts"]
    params["towers"]["text"] |= {"lora": dict.fromkeys(adapters, pair)} if adapters else {}
    found = optim.constant(model, [Set(adapter=name, name=f"set {i}") for i, name in enumerate(sets)])
    _, frozen = optim.partition(params, found)
    wanted = {path for path in flat(params) if path.startswith(tuple(f"towers/text/{part}" for part in held))}
    assert flat(frozen).keys() == wanted and len(wanted) >= len(held)


def test_more_layers_than_there_are_cannot_be_frozen():
    with pytest.raises(ConfigError, match="tower 'text': freeze_layers is 3; it has 2 layers"):
        optim.constant(Model({"text": Tower(arch=Bert(depth=2), freeze_layers=3)}), (Set(),))


def test_state_holds_two_moments_and_counts_only():
    params = make_params()
    _, state = first_update(Optim(groups=(Group("text", 0.1),)), 2, params, params)
    assert len(jax.tree.leaves(state)) == 2 * len(jax.tree.leaves(params)) + 2


def test_abstract_parameters_do_as_well():
    params = make_params()
    tx, _ = optim.make(Optim(groups=(Group("text", 0.1),)), 2, jax.eval_shape(lambda: params))
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(jax.eval_shape(tx.init, params))


@pytest.mark.parametrize("freeze", [(), ("towers/query",), ("norm", "bias$"), ("^towers/text/encoder/blocks/", "scale$")])
def test_partition_takes_apart_what_combine_puts_together(freeze):
    params = make_params()
    trained, frozen = optim.partition(params, freeze)
    assert flat(trained).keys().isdisjoint(flat(frozen))
    for path in flat(params):
        assert (path in flat(frozen)) == any(optim.re.search(regex, path) for regex in freeze)
    whole = combine(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True))
    assert all(jax.tree.leaves(branch) for branch in branches(frozen))
    assert whole["towers"]["query"]["dense"] == {}


def branches(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield value
            yield from branches(value)


def test_what_matches_nothing_or_everything_is_refused():
    params = make_params()
    with pytest.raises(ConfigError, match=r"optim.freeze 'towers/image' matches no parameter; .* towers/text/encoder/blocks"):
        optim.partition(params, ("towers/image",))
    with pytest.raises(ConfigError, match="optim.groups 'blocks/99' matches no parameter"):
        optim.make(Optim(groups=(Group("text", 0.1), Group("blocks/99", 2.0))), 2, params)
    for freeze in (("towers", "loss"), ("towers",)):  # a scale alone changes no vector
        with pytest.raises(ConfigError, match="freezes every parameter; leave"):
            optim.partition(params, freeze)
    optim.partition(params, ("encoder", "towers/query"))
    with pytest.raises(ConfigError, match=r"optim.freeze has '\(', which is not a regular expression"):
        optim.partition(params, ("(",))


def test_the_schedule_counts_applied_updates():
    params, grads = make_params(), jax.tree.map(jnp.ones_like, make_params())
    tx, rate = optim.make(Optim(learning_rate=1.0, warmup=0, weight_decay=0), 4, params)
    kept, update = tx.init(params), tx.update
    for count in range(4):
        update(grads, kept, params)  # as a skipped step: the new state is dropped
        updates, kept = update(grads, kept, params)
        np.testing.assert_allclose(-updates["loss"]["scale"], rate(count), rtol=1e-4)
