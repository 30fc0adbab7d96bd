"""The mesh, where each parameter lives on it, and how batches are placed. Nothing else knows of devices."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embedjax import config
from embedjax.config.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# First match wins, every parameter must match. Stacked layers have their layer on axis 0; embedding tables are split over
# the width, since over the vocabulary the gather would be rematerialised. Over `tensor` the heads and the hidden units are
# split: columns on the way in, rows on the way out, one sum over `tensor` a block (Shoeybi et al. 2019, section 3).
RULES: tuple[tuple[str, P], ...] = (
    (r"(tokens|positions|types)/embedding$", P(None, ("fsdp", "tensor"))),
    (r"(relative|class|registers|probe)/embedding$", P()),
    (r"patches/kernel$", P(None, "fsdp")),
    (r"encoder/(stem|stage\d+)/.*kernel$", P(None, "fsdp")),  # convolutions, whose channels `tensor` does not split
    (r"blocks/.*(query|key|value|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/.*(out|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/.*(query|key|value|up)/bias$", P(None, "tensor")),
    (r"head/.*(query|key|value|up)/kernel$", P("fsdp", "tensor")),  # of pictures: one layer, so not stacked
    (r"head/.*(out|down)/kernel$", P("tensor", "fsdp")),
    (r"head/.*(query|key|value|up)/bias$", P("tensor")),
    (r"dense/\d+/(residual/)?kernel$", P("fsdp", None)),
    (r"/lora/[^/]+/(head|patches|stem|stage\d+)/.*/[ab]$", P()),
    # A pair of low rank lies as its product does: no pair is moved to make it.
    (r"/lora/.*(query|key|value|up)/kernel/a$", P(None, "fsdp")),
    (r"/lora/.*(query|key|value|up)/kernel/b$", P(None, None, "tensor")),
    (r"/lora/.*(out|down)/kernel/a$", P(None, "tensor")),
    (r"/lora/.*(out|down)/kernel/b$", P(None, None, "fsdp")),
    (r"loss/[^/]+/transform/kernel$", P("fsdp", None)),
    (r"loss/[^/]+/kernel$", P()),
    (r"/bias$|norm/(scale|mean|var)$", P()),
    (r"loss/(scale|bias)$", P()),
)


def make_mesh(mesh: config.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh, axes `data`, `fsdp` and `tensor`; of several slices only `data` reaches from one to the next.

    Raises ConfigError when the devices do not divide."""
    devices = jax.devices() if devices is None else devices
    within = mesh.fsdp * mesh.tensor
    told = ", ".join(f"{name}={getattr(mesh, name)}" for name in (*AXES, "slices"))
    if min(mesh.fsdp, mesh.tensor, mesh.slices) < 1 or (mesh.data < 1 and mesh.data != -1):
        raise ConfigError(f"mesh is {told}; sizes are at least 1 (data may be -1)")
    data = len(devices) // within if mesh.data == -1 else mesh.data
    if data * within != len(devices):
        here = f"{len(devices)} are here ({devices[0].platform})"
        raise ConfigError(f"mesh {told} needs {max(data, 1) * within} devices; {here}")
    if data % mesh.slices:
        raise ConfigError(f"mesh {told}: data must be a multiple of slices; it is {data}")
    shape = (data // mesh.slices, mesh.fsdp, mesh.tensor)
    # Explicit axes are the newer default, in which plain gathers of a sharded table are refused.
    auto = (AxisType.Auto,) * len(AXES)
    parts = [jax.make_mesh(shape, AXES, axis_types=auto, devices=part).devices for part in _slices(devices, mesh.slices)]
    return Mesh(np.concatenate(parts), AXES, axis_types=auto)


def _slices(devices: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """The devices of each slice: by the hardware's numbers, else by process, else (simulated ones) equal runs of them."""
    for name in ("slice_index", "process_index"):
        groups: dict[Any, list] = {}
        for device in devices:
            groups.setdefault(getattr(device, name, None), []).append(device)
        if len(groups) == count:
            return [groups[key] for key in sorted(groups)]
        if name == "slice_index" and len(groups) > 1 and devices[0].platform == "tpu":
            raise ConfigError(f"the devices are in {len(groups)} slices; mesh.slices is {count}")
    each = len(devices) // count
    return [devices[i * each : (i + 1) * each] for i in range(count)]


def share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(which, of how many): the equal part of each global batch that a process, by default this one, has to bring.

    Processes that the batch is not split between, since `tensor` reaches over them, bring the same part.
    """
    process = jax.process_index() if process is None else process
    held: dict[int, set[int]] = {}
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if sum(map(len, parts)) != len(rows) or len({len(part) for part in parts}) > 1:
        raise ConfigError(f"mesh {dict(mesh.shape)} cannot be shared between {len(held)} processes; let tensor divide theirs")
    return parts.index(tuple(sorted(held[process]))), len(parts)


def path_of(path: tuple) -> str:
    """A tree path as "towers/text/encoder/norm/scale"; fields and indices of optimiser states included."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The first rule that matches, less the axes that do not divide. Raises ConfigError when none matches."""
    if not shape:
        return P()
    for rule, found in RULES:
        if re.search(rule, path):
            return P(*(_fitting(names, size, mesh) for names, size in zip(found, shape, strict=False)))
    raise ConfigError(f"no sharding rule matches parameter {path!r} of shape {shape}")


def _fitting(names: Any, size: int, mesh: Mesh) -> Any:
    """The axes that divide a dimension, all that a rule names or none."""
    axes = (names,) if isinstance(names, str) else names or ()
    return names if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of parameters, or of a state that holds trees of the same paths."""
    return jax.tree_util.tree_map_with_path(lambda p, x: NamedSharding(mesh, spec(path_of(p), x.shape, mesh)), tree)


def in_sight(mesh: Mesh, function: Callable) -> Callable:
    """The function, traced with the mesh in sight: the towers then say where their activations lie."""

    @functools.wraps(function)
    def seeing(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return seeing


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over `data` and `fsdp`: batches, embeddings, corpora."""
    return NamedSharding(mesh, P(BATCH_AXES))


def place(columns: Any, mesh: Mesh) -> Any:
    """This host's rows of each leaf as a part of one global array split over the mesh."""
    sharding = rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), columns)


def put(tree: Any, mesh: Mesh) -> Any:
    """A tree of host arrays, the same on every host, placed by the path table."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), tree, shardings(tree, mesh)
    )
