"""The mesh, where each parameter lives on it, and how batches are placed. Nothing else knows of devices."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embedjax import config
from embedjax.config.errors import ConfigError

BATCH_AXES = ("data", "fsdp")

# First match wins, every parameter must match. Stacked layers have their layer on axis 0; embedding tables are split over
# the width, since over the vocabulary the gather would be rematerialised.
RULES: tuple[tuple[str, P], ...] = (
    (r"(tokens|positions|types)/embedding$", P(None, "fsdp")),
    (r"relative/embedding$", P()),
    (r"blocks/.*(query|key|value|qkv|up|gate)/kernel$", P(None, "fsdp", None)),
    (r"blocks/.*(out|down)/kernel$", P(None, None, "fsdp")),
    (r"dense/\d+/kernel$", P("fsdp", None)),
    (r"/bias$|norm/scale$", P()),
    (r"loss/(scale|bias)$", P()),
)


def make_mesh(mesh: config.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh, axes `data` and `fsdp`. Raises ConfigError when the devices do not divide."""
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if mesh.fsdp < 1 or (mesh.data < 1 and mesh.data != -1):
        raise ConfigError(f"mesh is data={mesh.data}, fsdp={mesh.fsdp}; sizes are at least 1 (data may be -1)")
    data = count // mesh.fsdp if mesh.data == -1 else mesh.data
    if data * mesh.fsdp != count:
        wanted = f"data={mesh.data}, fsdp={mesh.fsdp}"
        raise ConfigError(f"mesh {wanted} needs {max(data, 1) * mesh.fsdp} devices; {count} are here ({devices[0].platform})")
    # Explicit axes are the newer default, in which plain gathers of a sharded table are refused.
    return jax.make_mesh((data, mesh.fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def path_of(path: tuple) -> str:
    """A tree path as "towers/text/encoder/norm/scale"; fields and indices of optimiser states included."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The first rule that matches, less the axes that do not divide. Raises ConfigError when none matches."""
    if not shape:
        return P()
    for rule, found in RULES:
        if re.search(rule, path):
            fits = (name if name is None or shape[i] % mesh.shape[name] == 0 else None for i, name in enumerate(found))
            return P(*fits)
    raise ConfigError(f"no sharding rule matches parameter {path!r} of shape {shape}")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of parameters, or of a state that holds trees of the same paths."""
    return jax.tree_util.tree_map_with_path(lambda p, x: NamedSharding(mesh, spec(path_of(p), x.shape, mesh)), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over all devices: batches, embeddings, corpora."""
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
