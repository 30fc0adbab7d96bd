"""The embedder as a pure function of rows: what a text's embedding may depend on, and what it must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from embedjax.config import Bert, Dense, Roberta, Tower
from embedjax.config.errors import ConfigError
from embedjax.models.embedder import Embedder, build_embedder

ARCH = Bert(vocab_size=50, width=16, depth=2, heads=4, mlp=24, positions=12, dropout=0.2, attention_dropout=0.2, init_std=0.2)
EMBEDDER = Embedder(ARCH, dense=(Dense(6),))
PARAMS = jax.jit(EMBEDDER.init)(jax.random.key(0))
RNG = np.random.default_rng(0)
MASK = np.arange(7)[None] < RNG.integers(2, 8, (8, 1))
COLUMN = {"ids": RNG.integers(1, 50, MASK.shape).astype(np.int32), "mask": MASK}
KEY = jnp.uint32(5)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These programs run once each and take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pick(column, rows):
    return {name: leaf[rows] for name, leaf in column.items()}


def run(column=COLUMN, embedder=EMBEDDER, params=PARAMS, **arguments):
    return jax.jit(lambda p, c, r, k: embedder.apply(p, c, row=r, key=k, want=("pooled", "tokens", "layers")))(
        params, column, arguments.get("row"), arguments.get("key")
    )


def test_shapes_and_paths():
    out = run()
    assert (out.pooled.shape, out.tokens.shape, out.layers.shape) == ((8, 6), (8, 7, 16), (3, 8, 7, 16))
    assert EMBEDDER.width == 6
    assert np.allclose(np.linalg.norm(out.pooled, axis=-1), 1)
    paths = {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(PARAMS)}
    assert paths["encoder/blocks/attn/query/kernel"] == (2, 16, 16)
    assert paths["encoder/blocks/up/bias"] == (2, 24)
    assert paths["encoder/norm/scale"] == (16,)
    assert paths["dense/0/kernel"] == (16, 6)
    assert len(paths) == 23
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(PARAMS))


def test_only_what_is_wanted_is_returned():
    made = lambda want: jax.eval_shape(lambda: EMBEDDER.apply(PARAMS, COLUMN, want=want))._asdict()
    for want in (("pooled",), ("tokens",), ("layers", "tokens")):
        assert {name for name, leaf in made(want).items() if leaf is not None} == set(want)


def test_layers_are_initialised_apart():
    query = PARAMS["encoder"]["blocks"]["attn"]["query"]["kernel"]
    assert np.abs(query[0] - query[1]).max() > 0.1
    assert abs(float(query.std()) - ARCH.init_std) < 0.02


def test_permuting_the_batch_permutes_the_embeddings():
    order = RNG.permutation(8)
    np.testing.assert_allclose(run(pick(COLUMN, order)).pooled, run().pooled[order], atol=1e-6)
    kept = run(pick(COLUMN, order), row=jnp.asarray(order), key=KEY).pooled
    np.testing.assert_allclose(kept, run(row=jnp.arange(8), key=KEY).pooled[order], atol=1e-6)
    assert np.abs(kept - run(pick(COLUMN, order), key=KEY).pooled).max() > 0.01  # dropout goes by row


def test_chunks_equal_the_whole_with_dropout():
    whole = run(row=jnp.arange(8) + 100, key=KEY).pooled
    halves = [run(pick(COLUMN, slice(i, i + 2)), row=jnp.arange(i, i + 2) + 100, key=KEY).pooled for i in range(0, 8, 2)]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, atol=1e-6)
    assert np.abs(run(row=jnp.arange(8) + 100, key=jnp.uint32(6)).pooled - whole).max() > 0.01


def test_further_axes_are_rows_in_order():
    column = {name: leaf.reshape(4, 2, 7) for name, leaf in COLUMN.items()}
    out = run(column, row=jnp.arange(4), key=KEY)
    flat = run(row=jnp.arange(8), key=KEY)
    np.testing.assert_allclose(out.pooled, flat.pooled.reshape(4, 2, 6), atol=1e-6)
    np.testing.assert_allclose(out.layers, flat.layers.reshape(3, 4, 2, 7, 16), atol=1e-5)
    np.testing.assert_allclose(run(column, key=KEY).pooled, out.pooled, atol=1e-6)


@pytest.mark.parametrize(
    "arch", [ARCH, Roberta(**{**dataclasses.asdict(ARCH), "pad_id": 1, "token_types": 1})], ids=["bert", "roberta"]
)
def test_padding_has_no_gradient_and_no_say(arch):
    embedder = dataclasses.replace(EMBEDDER, arch=arch)
    params = jax.jit(embedder.init)(jax.random.key(0))
    padding, real = 49, np.where(MASK, np.minimum(COLUMN["ids"], 48), 49).astype(np.int32)
    column = {"ids": real, "mask": MASK}
    loss = lambda params: (embedder.apply(params, column, key=KEY).pooled ** 3).sum()
    gradient = jax.jit(jax.grad(loss))(params)["encoder"]["tokens"]["embedding"]
    assert (gradient[padding] == 0).all()
    assert (gradient[np.unique(real[MASK])] != 0).any(-1).all()
    other = column | {"ids": np.where(MASK, real, 7).astype(np.int32)}
    np.testing.assert_array_equal(run(other, embedder, params).pooled, run(column, embedder, params).pooled)
    longer = {"ids": np.pad(real, [(0, 0), (0, 3)]), "mask": np.pad(MASK, [(0, 0), (0, 3)])}
    np.testing.assert_allclose(
        run(longer, embedder, params, key=KEY).pooled, run(column, embedder, params, key=KEY).pooled, atol=1e-6
    )


def test_a_text_of_padding_alone_is_finite():
    column = COLUMN | {"mask": MASK & (np.arange(8) != 3)[:, None]}
    loss = lambda params: (EMBEDDER.apply(params, column, key=KEY).pooled ** 3).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    column, row = jax.device_put((COLUMN, np.arange(8, dtype=np.int32)), rows)

    def loss(params, column, row):
        pooled = EMBEDDER.apply(params, column, row=row, key=KEY).pooled
        return (pooled**3).sum(), pooled

    step = jax.jit(jax.grad(loss, has_aux=True))
    (split, pooled), (one, expected) = step(params, column, row), step(PARAMS, COLUMN, np.arange(8, dtype=np.int32))
    assert pooled.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), split, one)


def test_the_prompt_is_left_out_of_the_pool():
    pool = MASK & (np.arange(7) > 0)
    out = run(COLUMN | {"pool": pool}, dataclasses.replace(EMBEDDER, dense=(), normalize=False), PARAMS)
    expected = (np.asarray(out.tokens) * pool[..., None]).sum(1) / pool.sum(1, keepdims=True)
    np.testing.assert_allclose(out.pooled, expected, atol=1e-5)


def test_build_embedder_wants_a_resolved_tower():
    tower = Tower(arch=ARCH, pooling="cls", include_prompt=True, dense=(), normalize=False, compute="bfloat16")
    embedder = build_embedder(tower)
    assert (embedder.pooling, embedder.normalize, embedder.compute, embedder.width) == ("cls", False, "bfloat16", 16)
    with pytest.raises(ConfigError, match="pooling"):
        build_embedder(dataclasses.replace(tower, pooling=None))
