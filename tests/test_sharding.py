"""The mesh, the path table, and that placing splits what it says it splits."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from embedjax import config, sharding
from embedjax.config.errors import ConfigError
from embedjax.models.embedder import Embedder

PRESETS = [
    config.Bert(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.Roberta(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.DistilBert(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.Mpnet(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.ModernBert(vocab_size=64, width=16, depth=3, heads=2, mlp=32, positions=16, pad_id=0),
]


def params(arch):
    embedder = Embedder(arch, dense=(config.Dense(8),))
    return {
        "towers": {"text": jax.eval_shape(embedder.init, jax.random.key(0))},
        "loss": {"scale": jax.ShapeDtypeStruct((), "f4")},
    }


def paths(tree):
    return {sharding.path_of(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_every_parameter_matches_and_no_rule_is_idle():
    mesh = sharding.make_mesh(config.Mesh(data=4, fsdp=2))
    used = set()
    for arch in PRESETS:
        for path, shape in paths(params(arch)).items():
            sharding.spec(path, shape, mesh)
            used.add(next((rule for rule, _ in sharding.RULES if sharding.re.search(rule, path))))
    assert used == {rule for rule, _ in sharding.RULES}


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ConfigError, match="towers/text/new/thing"):
        sharding.spec("towers/text/new/thing", (4, 4), sharding.make_mesh(config.Mesh()))


@pytest.mark.parametrize("arch", PRESETS, ids=lambda a: type(a).__name__)
def test_large_matrices_are_split_over_fsdp(arch):
    mesh = sharding.make_mesh(config.Mesh(data=4, fsdp=2))
    split = {
        path: s.spec
        for (path, s) in zip(paths(params(arch)), jax.tree.leaves(sharding.shardings(params(arch), mesh)), strict=True)
    }
    for path, found in split.items():
        if path.endswith(("kernel", "tokens/embedding")):
            assert "fsdp" in found, path


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=8))
    assert sharding.spec("towers/text/encoder/tokens/embedding", (10, 12), mesh) == P(None, None)


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (8, 2), (0, 1), (1, 0)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
    with pytest.raises(ConfigError, match="mesh"):
        sharding.make_mesh(config.Mesh(data=data, fsdp=fsdp))


def test_placed_rows_and_parameters_keep_their_values():
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=4))
    batch = sharding.place({"ids": np.arange(32).reshape(16, 2)}, mesh)
    assert batch["ids"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(batch["ids"], np.arange(32).reshape(16, 2))
    table = {"tokens": {"embedding": np.arange(24.0, dtype=np.float32).reshape(3, 8)}}
    placed = sharding.put(table, mesh)["tokens"]["embedding"]
    assert placed.sharding.spec == P(None, "fsdp")
    np.testing.assert_array_equal(placed, table["tokens"]["embedding"])
