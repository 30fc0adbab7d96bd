"""The mesh, the path table, and that placing splits what it says it splits."""

import functools
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from embedjax import config, objective, optim, sharding
from embedjax.config.errors import ConfigError
from embedjax.models import lora
from embedjax.models.embedder import Embedder
from embedjax.models.image import ImageEmbedder

PRESETS = [
    config.Bert(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.Roberta(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.DistilBert(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.Mpnet(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.ModernBert(vocab_size=64, width=16, depth=3, heads=2, mlp=32, positions=16, pad_id=0),
    config.ClipText(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.SiglipText(vocab_size=64, width=16, depth=2, heads=2, mlp=32, positions=16),
    config.Vit(image=8, patch=4, width=16, depth=2, heads=2, mlp=32, pool="map", registers=2),
    config.Vit(image=8, patch=4, width=16, depth=2, heads=2, mlp=32, input_norm=True),
    config.ModifiedResnet(image=32, depths=(1, 1, 1, 1), channels=8, heads=4, features=16),
    config.Resnet(image=16, depths=(1, 1), channels=(16, 32), stem=8),
]
RESNETS = config.ModifiedResnet | config.Resnet


def params(arch):
    if isinstance(arch, config.ImageArchitecture):
        tower = jax.eval_shape(ImageEmbedder(arch, dense=(config.Dense(8),)).init, jax.random.key(0))
        adapters = {"wide": config.Lora(2, paths="kernel")}
        tower["lora"] = jax.eval_shape(lambda key: lora.init(adapters, tower["encoder"], key), jax.random.key(0))
        return {"towers": {"image": tower}, "loss": {"scale": jax.ShapeDtypeStruct((), "f4")}}
    embedder = Embedder(arch, dense=(config.Dense(8),))
    tower = jax.eval_shape(embedder.init, jax.random.key(0))
    adapters = {"wide": config.Lora(2, paths="blocks/")}
    tower["lora"] = jax.eval_shape(lambda key: lora.init(adapters, tower["encoder"], key), jax.random.key(0))
    model, losses = config.Model({"text": config.Tower(arch=arch)}), {"scale": jax.ShapeDtypeStruct((), "f4")}
    trained = [config.MaskedLanguage(), config.Classify(classes=3)]
    for loss in trained + [config.DenoisingAutoEncoder()] * isinstance(arch, config.Bert):
        task = config.Set(columns={"anchor": "text"}, loss=loss, name=type(loss).__name__)
        make = functools.partial(objective.loss_params, task, model, {"text": embedder})
        losses |= jax.eval_shape(make, jax.random.key(0))
    return {"towers": {"text": tower}, "loss": losses}


def paths(tree):
    return {sharding.path_of(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def paths_and_specs(arch, mesh):
    placed = jax.tree.leaves(sharding.shardings(params(arch), mesh))
    return [(path, place.spec) for path, place in zip(paths(params(arch)), placed, strict=True)]


def test_every_parameter_matches_and_no_rule_is_idle():
    mesh = sharding.make_mesh(config.Mesh(data=4, fsdp=2))
    used = set()
    for arch in PRESETS:
        for path, shape in paths(params(arch)).items():
            sharding.spec(path, shape, mesh)
            used.add(next((rule for rule, _ in sharding.RULES if sharding.re.search(rule, path))))
    assert used == {rule for rule, _ in sharding.RULES}


@pytest.mark.parametrize("arch", PRESETS, ids=lambda a: type(a).__name__)
def test_every_parameter_has_one_decay_rule_and_all_under_the_layers_is_known(arch):
    tree, _ = optim.statistics(params(arch))
    decays, found = optim.decays(tree), paths(tree)
    for path, decay in zip(found, jax.tree.leaves(decays), strict=True):
        small = path.endswith(("bias", "scale")) or "relative" in path
        assert decay != small, path
    if isinstance(arch, RESNETS):
        with pytest.raises(ConfigError, match="layer_decay counts a transformer's layers"):
            optim.layers(tree, 0.5, {})
        return
    rates = dict(zip(found, jax.tree.leaves(optim.layers(tree, 0.5, {})), strict=True))
    above = r"/encoder/(final_norm|head|relative)/"
    lowest = {path for path in found if "/encoder/" in path and "/blocks/" not in path and not re.search(above, path)}
    assert lowest and all(rates[path] == 0.5 ** (arch.depth + 1) for path in lowest)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ConfigError, match="towers/text/new/thing"):
        sharding.spec("towers/text/new/thing", (4, 4), sharding.make_mesh(config.Mesh()))


@pytest.mark.parametrize("arch", PRESETS, ids=lambda a: type(a).__name__)
def test_large_matrices_are_split_over_fsdp(arch):
    mesh = sharding.make_mesh(config.Mesh(data=4, fsdp=2))
    for path, found in paths_and_specs(arch, mesh):
        if path.endswith(("kernel", "tokens/embedding")) and path != "loss/Classify/kernel":  # a number a class: small
            assert "fsdp" in jax.tree.leaves(tuple(found)), path
    whole = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    for path, place in paths_and_specs(arch, whole):
        if "blocks" in path and "kernel" in path:
            columns = re.search("query|key|value|up", path)
            wanted = ("fsdp", "tensor") if columns else ("tensor", "fsdp")
            # A pair lies as its product, so that A B needs nothing moved.
            parts = {"a": P(None, wanted[0]), "b": P(None, None, wanted[1])}
            assert place == parts.get(path[-1], P(None, *wanted)), path


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=4, tensor=2))
    assert sharding.spec("towers/text/encoder/tokens/embedding", (10, 12), mesh) == P(None, None)


@pytest.mark.parametrize(
    "sizes", [(3,), (-1, 3), (8, 2), (0,), (1, 0), (1, 8, 0), (4, 1, 4), (-1, 1, 1, 3), (1, 8, 1, 2)], ids=str
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ConfigError, match="mesh"):
        sharding.make_mesh(config.Mesh(*sizes))


def places(mesh):
    return [[device.id for device in row.flat] for row in mesh.devices]


def test_only_data_reaches_from_slice_to_slice():
    mesh = sharding.make_mesh(config.Mesh(data=4, fsdp=2, slices=2))
    assert places(mesh) == [[0, 1], [2, 3], [4, 5], [6, 7]] and mesh.axis_names == ("data", "fsdp", "tensor")
    # Simulated devices have no slice; those of several processes are grouped by process.
    devices = [Device(n, process_index=n % 2) for n in range(8)]
    assert [[d.id for d in part] for part in sharding._slices(devices, 2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [[d.id for d in part] for part in sharding._slices(devices, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    chips = [Device(n, 0, "tpu", slice_index=1 - n // 4) for n in range(8)]
    assert [[d.id for d in part] for part in sharding._slices(chips, 2)] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    with pytest.raises(ConfigError, match="in 2 slices; mesh.slices is 1"):
        sharding._slices(chips, 1)


class Device(NamedTuple):
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "cpu"
    slice_index: int = 0


class Devices(NamedTuple):
    """What `share` asks of a mesh."""

    devices: np.ndarray
    shape: dict


def shares(data, fsdp, tensor, processes):
    devices = np.empty(data * fsdp * tensor, object)
    devices[:] = [Device(n, n * processes // len(devices)) for n in range(len(devices))]
    mesh = Devices(devices.reshape(data, fsdp, tensor), {"data": data, "fsdp": fsdp, "tensor": tensor})
    return [sharding.share(mesh, process) for process in range(processes)]  # type: ignore[arg-type]


def test_each_process_brings_its_share_of_the_rows():
    assert shares(4, 1, 1, 2) == [(0, 2), (1, 2)]
    assert shares(2, 2, 2, 4) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # Where `tensor` reaches over two processes, both bring the same rows.
    assert shares(2, 1, 4, 4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ConfigError, match="cannot be shared between 2 processes"):
        shares(3, 1, 2, 2)


def test_placed_rows_and_parameters_keep_their_values():
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=4))
    batch = sharding.place({"ids": np.arange(32).reshape(16, 2)}, mesh)
    assert batch["ids"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(batch["ids"], np.arange(32).reshape(16, 2))
    table = {"tokens": {"embedding": np.arange(24.0, dtype=np.float32).reshape(3, 8)}}
    placed = sharding.put(table, mesh)["tokens"]["embedding"]
    assert placed.sharding.spec == P(None, ("fsdp", "tensor"))
    np.testing.assert_array_equal(placed, table["tokens"]["embedding"])
