"""A plan as lines a person reads."""

from collections.abc import Iterator
from typing import Any

from embedjax.plan import chips

NOTES = {
    "tpu": "compiled by the TPU's own compiler.",
    "gpu": "compiled for simulated CPU devices: memory and memory traffic are the CPU compiler's estimate, not a GPU's.",
    "cpu": "compiled for simulated CPU devices; without a chip there is no estimate of time.",
}
OMITTED = (
    "The time is the longest of the three, as if they overlapped fully and each ran at its peak; left out: the products' own "
    "efficiency (50-70 % of the peak is usual), vector work, launches, latency of collectives, input and checkpoints."
)


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The whole report."""
    topology = chips.parse(plan["topology"])
    yield f"{plan['topology']}: {plan['devices']} devices, {NOTES[topology.platform]}"
    if topology.slices > 1:
        yield "the TPU's compiler leaves the sums between slices to its runtime: they are not among the collectives or the time"
    for step in plan["steps"]:
        yield from _step(step, topology)
    if "largest_batch" in plan:
        tried = ", ".join(f"{rows} {'fits' if well else 'does not'}" for rows, well in plan["tried_batches"].items())
        yield f"largest batch that fits: {plan['largest_batch'] or 'none'} ({tried})"
    for change in plan.get("changes", ()):
        verdict = "fits" if change["fits"] else "does not fit"
        yield f"  {change['change']}: {verdict}, {_bytes(change['needed_bytes'])} a device"


def _step(step: dict[str, Any], topology: chips.Topology) -> Iterator[str]:
    yield f"step [{step['step']}], batch {step['batch']}, {step['batch'] / topology.devices:g} rows a device"
    yield (
        f"  parameters {step['parameters'] / 1e6:.1f}M; a device holds parameters {_bytes(step['parameter_bytes'])}, "
        f"frozen {_bytes(step['constant_bytes'])}, optimiser {_bytes(step['optimizer_bytes'])}, "
        f"batch {_bytes(step['batch_bytes'])}"
    )
    limit = f" of {_bytes(step['limit_bytes'])}" if step["limit_bytes"] else ", limit not known"
    verdict = "fits" if step["fits"] else "DOES NOT FIT"
    if "temp_bytes" in step:
        yield (
            f"  arguments {_bytes(step['argument_bytes'])}, outputs {_bytes(step['output_bytes'])} "
            f"({_bytes(step['alias_bytes'])} in the arguments' place), activations and scratch {_bytes(step['temp_bytes'])}"
        )
    yield f"  {verdict}: {_bytes(step['needed_bytes'])}{limit} a device"
    yield f"  FLOPs a step {step['flops']:.3g}, {step['model_flops']:.3g} of them the model's forward and backward"
    for kind, each in step.get("collectives", {}).items():
        yield f"  {kind}: {each['calls']} calls, {_bytes(each['bytes'])} a device"
    if step.get("unbounded_loops"):
        yield f"  {step['unbounded_loops']} loops of unknown length were counted once: FLOPs and traffic are lower bounds"
    if times := step.get("seconds"):
        yield (
            f"  time {1e3 * times['step']:.1f} ms: compute {1e3 * times['compute']:.1f}, memory {1e3 * times['memory']:.1f}, "
            f"communication {1e3 * times['communication']:.1f}; {step['pairs_per_second']:.0f} pairs/s, "
            f"utilisation {step['utilization']:.0%}"
        )
        yield f"  {OMITTED}"


def _bytes(size: float | None) -> str:
    if size is None:
        return "unknown"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
