"""The FLOPs of the products of a step, read from its jaxpr: loops count as often as they run, recomputation counts too.

The compiler's own analysis counts the body of a loop once. Only products are counted: they are what a peak is stated for.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


@dataclasses.dataclass
class Flops:
    """FLOPs of all devices together, by what units do them; `unbounded` loops were counted once, for lack of a length."""

    bfloat16: float = 0.0
    float32: float = 0.0
    exact: float = 0.0
    unbounded: int = 0

    @property
    def total(self) -> float:
        return self.bfloat16 + self.float32 + self.exact


def flops(jaxpr: ClosedJaxpr) -> Flops:
    """What a traced function costs."""
    total = Flops()
    _add(jaxpr.jaxpr, 1.0, total)
    return total


def _add(jaxpr: Jaxpr, times: float, total: Flops) -> None:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            unit = _unit(eqn)
            setattr(total, unit, getattr(total, unit) + times * _product(eqn))
        elif name == "conv_general_dilated":
            unit = _unit(eqn)
            setattr(total, unit, getattr(total, unit) + times * _convolution(eqn))
        elif name == "cond":
            branches = [Flops() for _ in eqn.params["branches"]]
            for branch, found in zip(eqn.params["branches"], branches, strict=True):
                _add(branch.jaxpr, times, found)
            _merge(total, max(branches, key=lambda found: found.total))
        else:
            inner = times * _repeats(eqn)
            if name == "while":
                total.unbounded += 1
            for part in _inside(eqn.params):
                _add(part, inner, total)


def _merge(total: Flops, more: Flops) -> None:
    for field in dataclasses.fields(Flops):
        setattr(total, field.name, getattr(total, field.name) + getattr(more, field.name))


def _repeats(eqn: Any) -> float:
    """How often an equation's body runs: once a turn of a loop, and once a device of the axes a shard_map is over."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        shape = dict(eqn.params["mesh"].shape)
        return math.prod(shape[axis] for axis in eqn.params.get("manual_axes", shape))
    return 1


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def _product(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
    """As if no weight met a border. Numbers between which zeros are put, in the gradient of a stride, count for themselves."""
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    _, inputs, *square = eqn.params["dimension_numbers"].rhs_spec
    met = math.prod(kernel.shape[axis] for axis in (inputs, *square))
    return 2.0 * math.prod(out.shape) * met / math.prod(eqn.params["lhs_dilation"])


def _unit(eqn: Any) -> str:
    if all(np.dtype(x.aval.dtype).itemsize <= 2 for x in eqn.invars):
        return "bfloat16"
    highest = jax.lax.Precision.HIGHEST
    precision = eqn.params["precision"]
    exact = precision == highest or (isinstance(precision, tuple) and highest in precision)
    return "exact" if exact else "float32"
