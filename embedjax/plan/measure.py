"""One config on one topology: the step is compiled, and its memory, FLOPs, traffic and time are told. Runs in the process of
`worker.py`, whose devices are those of the topology."""

import functools
import math
import re
from typing import Any

import jax

from embedjax import build, sharding
from embedjax.config import Config
from embedjax.config.errors import ConfigError
from embedjax.metrics.pace import train_flops
from embedjax.models.ops import PLATFORM
from embedjax.plan.chips import Chip, Topology
from embedjax.plan.flops import Flops, flops
from embedjax.plan.shapes import shapes
from embedjax.plan.traffic import Collective, traffic

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@functools.cache
def devices(topology: Topology) -> tuple[Any, ...]:
    """The devices to compile for: a TPU slice that is not here, else simulated ones."""
    if topology.platform != "tpu":
        return tuple(jax.devices())
    from jax.experimental import topologies

    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology {name}: the TPU compiler knows no such slice ({str(error).splitlines()[0]})") from None


def measure(config: Config, topology: Topology, limit: float | None) -> list[dict[str, Any]]:
    """A dict a step: one for each data set, at its largest bucket. `limit` is the bytes a device has, None when not known."""
    PLATFORM.set(topology.platform)
    mesh = sharding.make_mesh(config.mesh, devices(topology))
    parts = build.parts(config, mesh)
    largest = {task: columns for task, columns in shapes(config)}  # the table of buckets ends with the largest
    return [_step(config, topology, limit, parts, mesh, task, columns) for task, columns in largest.items()]


def _step(config: Config, topology: Topology, limit: float | None, parts: build.Parts, mesh, task: str, columns) -> dict:
    batch = build.placed(columns, mesh)
    extra = parts.abstract.extra
    params, optimizer = parts.abstract.params, (parts.abstract.opt_state, extra.get("ema"), extra.get("stats"))
    found: dict[str, Any] = {
        "step": build.shape_name(task, columns),
        "batch": config.data.batch_size,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "parameter_bytes": held(params),
        "constant_bytes": held(parts.constants),
        "optimizer_bytes": held(optimizer),
        "batch_bytes": held(batch),
        "limit_bytes": limit,
        "model_flops": sum(
            train_flops(arch := _arch(config, name), *build.column_size(arch, columns[name]))
            for name in build.ENCODED & columns.keys()
        ),
    }
    traced = parts.steps[task].trace(parts.abstract, parts.constants, batch)
    counted = flops(traced.jaxpr)
    found |= {"flops": counted.total, "unbounded_loops": counted.unbounded}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"fits": False, "needed_bytes": needed(str(error))}
    return found | _compiled(compiled, counted, topology, limit, found)


def _compiled(compiled: jax.stages.Compiled, counted: Flops, topology: Topology, limit: float | None, known: dict) -> dict:
    memory = compiled.memory_analysis()
    assert memory is not None
    out = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + out + memory.generated_code_size_in_bytes
    moved = traffic(compiled.as_text() or "", topology.island)
    found = {
        "fits": limit is None or total <= limit,
        "needed_bytes": total,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": {kind: {"calls": calls, "bytes": size} for kind, (calls, size) in sorted(moved.by_kind().items())},
        "traffic_bytes": moved.memory,
        "unbounded_loops": known["unbounded_loops"] + moved.unbounded,
    }
    if topology.chip is None:
        return found
    times = roofline(topology.chip, topology.devices, counted, moved.memory, moved.collectives)
    step = max(times.values())
    return found | {
        "seconds": times | {"step": step},
        "pairs_per_second": known["batch"] / step,
        "utilization": known["model_flops"] / (step * topology.devices * topology.chip.bfloat16),
    }


def roofline(chip: Chip, count: int, counted: Flops, memory: float, collectives: tuple[Collective, ...]) -> dict[str, float]:
    """Seconds a step takes of each resource, if that one were used to the full and never waited for another."""
    compute = counted.bfloat16 / chip.bfloat16 + counted.float32 / chip.float32 + counted.exact / chip.exact
    wires = {True: chip.outside, False: chip.link * chip.links}
    sent = sum(c.wire / (chip.link if _neighbours(c) else wires[c.outside]) for c in collectives)
    return {"compute": compute / count, "memory": memory / chip.bandwidth, "communication": sent}


def _neighbours(collective: Collective) -> bool:
    return collective.kind == "collective-permute" and not collective.outside


def held(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def needed(message: str) -> float | None:
    """Bytes that a compiler out of memory says it would need: the largest amount in its message."""
    amounts = [float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", message)]
    return max(amounts, default=None)


def _arch(config: Config, column: str):
    arch = config.model.towers[config.model.tower_of(column)].arch
    assert arch is not None
    return arch
