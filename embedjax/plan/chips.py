"""What is known of the chips a plan may be for, and the topology a user names. Imports no jax."""

import dataclasses
import math
import os
import re

from embedjax.config.errors import ConfigError, nearest
from embedjax.metrics.pace import peak_flops

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as its maker's data sheet has it. Bandwidths are bytes a second and one way."""

    kind: str
    """How jax names it, at least the beginning: `metrics.pace` knows its peak in bfloat16."""
    platform: str
    """tpu or gpu."""
    memory: float
    """Bytes of memory."""
    bandwidth: float
    """Between the chip and its memory."""
    float32: float
    """Peak FLOP/s of float32 products at jax's default precision: one bfloat16 pass on a TPU, TF32 on a GPU."""
    exact: float
    """The same at the highest precision: six bfloat16 passes on a TPU, no tensor cores on a GPU."""
    links: int
    """Links to other chips of the island; a ring of neighbours uses one of them, a collective of the whole island all."""
    link: float
    """Bandwidth of one link."""
    island: int
    """Chips joined by such links; 0: the whole slice."""
    outside: float
    """A chip's share of the network between islands."""
    usable: float
    """Share of the memory that a program can have."""

    @property
    def bfloat16(self) -> float:
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak


def _tpu(kind: str, memory: float, bandwidth: float, peak: float, links: int, link: float, outside: float) -> Chip:
    # The compiler keeps 0.25 GiB of 16 for itself (its out-of-memory message says 15.75 GiB).
    return Chip(kind, "tpu", memory, bandwidth, peak, peak / 6, links, link, 0, outside, 0.984)


def _gpu(kind: str, memory: float, bandwidth: float, tf32: float, float32: float, link: float, outside: float) -> Chip:
    # Of a GPU jax takes three quarters when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    return Chip(kind, "gpu", memory, bandwidth, tf32, float32, 1, link, 8, outside, 0.75)


# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e}, "System architecture": HBM, HBM bandwidth, peak compute, bidirectional ICI
# bandwidth a chip (400, 1200 and 800 GB/s, here divided by two directions and the ports: 4, 6 and 4), data center network
# (6.4 Tbps a v5e pod of 256, 50 Gbps a v5p chip, 25.6 Tbps a v6e pod of 256).
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200: memory, its bandwidth, TF32 and FP32 peak
# (without sparsity), NVLink (600, 900, 900 and 1800 GB/s both ways, here one). Between nodes of eight: one network card a
# GPU, of 200 Gbps in a DGX A100, 400 in a DGX H100, H200 and B200.
CHIPS: dict[str, Chip] = {
    "v5e": _tpu("TPU v5 lite", 16 * GIB, 819 * GB, 197e12, 4, 50 * GB, 3.1 * GB),
    "v5p": _tpu("TPU v5", 95 * GIB, 2765 * GB, 459e12, 6, 100 * GB, 6.25 * GB),
    "v6e": _tpu("TPU v6 lite", 32 * GIB, 1640 * GB, 918e12, 4, 100 * GB, 12.5 * GB),
    "a100": _gpu("NVIDIA A100", 80 * GIB, 2039 * GB, 156e12, 19.5e12, 300 * GB, 25 * GB),
    "h100": _gpu("NVIDIA H100", 80 * GIB, 3350 * GB, 495e12, 67e12, 450 * GB, 50 * GB),
    "h200": _gpu("NVIDIA H200", 141 * GB, 4800 * GB, 495e12, 67e12, 450 * GB, 50 * GB),
    "b200": _gpu("NVIDIA B200", 180 * GB, 7700 * GB, 1100e12, 75e12, 900 * GB, 50 * GB),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """How many of which device: v5e:16x16, v6e:16x16*2 (two slices), h100:64 (nodes of eight), cpu:8."""

    text: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def chip(self) -> Chip | None:
        return CHIPS.get(self.kind)

    @property
    def platform(self) -> str:
        return self.chip.platform if self.chip else "cpu"

    @property
    def island(self) -> int:
        """Devices joined by fast links."""
        return (self.chip.island if self.chip else 0) or self.devices // self.slices

    def memory(self, limit: float | None) -> float | None:
        """Bytes a program may use on one device: `limit` GiB if given, None where nothing is known."""
        if limit is not None:
            return limit * GIB
        if self.chip is None:
            return None
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "") if self.platform == "gpu" else ""
        return self.chip.memory * (float(share) if share else self.chip.usable)


def parse(text: str) -> Topology:
    """The topology of `--topology`. Raises ConfigError."""
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?", text.strip().lower())
    if not found:
        raise ConfigError(f"--topology is {text!r}; it must be like v5e:16x16, v6e:16x16*2 (two slices), h100:64 or cpu:8")
    kind, shape, slices = found[1], tuple(int(n) for n in found[2].split("x")), int(found[3] or 1)
    if kind not in CHIPS and kind != "cpu":
        raise ConfigError(f"--topology is {text!r}: no chip {kind!r}; {nearest(kind, [*CHIPS, 'cpu'])}")
    if min(*shape, slices) < 1:
        raise ConfigError(f"--topology is {text!r}; sizes are at least 1")
    tpu = kind in CHIPS and CHIPS[kind].platform == "tpu"
    axes = 3 if kind == "v5p" else 2
    if tpu and len(shape) != axes:
        raise ConfigError(f"--topology is {text!r}; a {kind} slice has {axes} sizes, such as {kind}:{'x'.join('4' * axes)}")
    if not tpu and (len(shape) > 1 or slices > 1):
        raise ConfigError(f"--topology is {text!r}; of {kind} it is a number of devices, such as {kind}:8")
    return Topology(text.strip().lower(), kind, shape, slices)
