"""How fast a run goes: pairs a second, waiting for data, and the share of the chip's peak."""

import collections
import statistics
import time

from embedjax.config import (
    Architecture,
    ClipText,
    ImageArchitecture,
    ModernBert,
    ModifiedResnet,
    Resnet,
    SiglipText,
    Static,
    Vit,
)

# Dense bfloat16 FLOP/s of a chip, by the start of its `device_kind`; makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, None when it is not known (a CPU)."""
    return next((peak for start, peak in PEAK_FLOPS.items() if device_kind.startswith(start)), None)


def train_flops(arch: Architecture | ImageArchitecture, rows: int, length: int) -> float:
    """FLOPs of a forward and backward pass over `rows` texts of `length` tokens, or pictures of so many patches: three times
    the forward's products. A static table has none."""
    if isinstance(arch, Static):
        return 0.0
    if isinstance(arch, ModifiedResnet | Resnet):
        return 3.0 * 2 * rows * arch.products
    d, f = arch.width, arch.mlp
    inner = 3 * d * f if isinstance(arch, ModernBert) else 2 * d * f
    per_token = 2 * (4 * d * d + inner) + 4 * length * d
    patches = 2 * 3 * arch.patch**2 * d if isinstance(arch, Vit) else 0
    # Where one token is pooled the last layer makes that one; of the others it takes keys and values.
    alone = isinstance(arch, ClipText | SiglipText) or (isinstance(arch, Vit) and arch.pool == "cls")
    layers = arch.depth * per_token - alone * (per_token - 2 * 2 * d * d)
    return 3.0 * rows * length * (layers + patches)


class Pace:
    """Rates of the training loop: pairs a second and the share of time spent waiting for data, both over the recent past."""

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.last = clock()
        self.seconds = self.waited = self.pairs = self.flops = 0.0
        self.durations: collections.deque[float] = collections.deque(maxlen=101)

    def step(self, pairs: int, flops: float, waited: float) -> None:
        """A step is done: its pairs, its FLOPs, and the seconds of it that were spent waiting for data."""
        now = self.clock()
        self.durations.append(now - self.last)
        # Exponential forgetting over some 20 steps, so that the rates follow a change of bucket.
        for field, new in (("seconds", now - self.last), ("pairs", pairs), ("flops", flops), ("waited", waited)):
            setattr(self, field, 0.95 * getattr(self, field) + new)
        self.last = now

    def usual(self) -> float:
        """The median seconds of the last hundred steps; 0 before the first."""
        return statistics.median(self.durations) if self.durations else 0.0

    def restart(self) -> None:
        """Leaves out the time since the last step: an evaluation or a compilation stood there."""
        self.last = self.clock()

    def rates(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {"pairs_per_second": self.pairs / seconds, "data_wait": min(1.0, self.waited / seconds)}

    def utilization(self, peak: float | None) -> float | None:
        return None if peak is None else self.flops / max(self.seconds, 1e-9) / peak
