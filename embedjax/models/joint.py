"""The tensors of one file that holds towers of pictures and texts <-> their parameters, by whatever names the file has for
them: `clip.py` knows Hugging Face's, `open_clip.py` those of open_clip."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedjax.config import ClipText, Dense, ImageArchitecture, SiglipText
from embedjax.config.errors import ConfigError
from embedjax.models import weights
from embedjax.models.names import Names


class Part(NamedTuple):
    """One tower of a folder."""

    arch: ImageArchitecture | ClipText | SiglipText
    dense: tuple[Dense, ...] = ()


Parts = Mapping[str, Part]
"""Towers by "image" and "text", one or both."""


class Outer(NamedTuple):
    """A tensor that is no encoder's."""

    ours: str
    """Our path, such as "towers/text/dense/0/kernel"."""
    shape: tuple[int, ...]
    """Its shape in the file."""
    turned: bool = True
    """Whether a matrix is the transpose of ours."""

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Its value as we hold it; numbers of the loss have no axes."""
        return x.reshape(()) if self.ours.startswith("loss/") else x.T if self.turned else x

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """The inverse."""
        return np.asarray(x.reshape(self.shape) if x.ndim == 0 else x.T if self.turned else x, order="C")


class Scheme(NamedTuple):
    """How a file names the tensors of some towers."""

    names: Mapping[str, Names]
    """The table of each tower, with the prefix of its names."""
    outer: Mapping[str, Outer]
    """All other tensors, by their names."""
    first: Mapping[str, float] = {}
    """What is written for a path that the parameters do not hold."""
    bare: str = ""
    """A prefix that is left out of a file we write."""


def from_tensors(found: Parts, tensors: Mapping[str, np.ndarray], scheme: Scheme, *, file: str | Path) -> dict[str, Any]:
    """{"towers": {"image": {"encoder": ..., "dense": {"0": ...}}, "text": ...}, "loss": {"scale": ..., "bias": ...}}, float32;
    "dense" and "loss" as far as the model has them.

    Raises one ConfigError that lists, under the name of `file`, every unknown, missing, doubly set and misshapen tensor.
    """
    own, complaints = _by_tower(tensors, scheme)
    complaints["missing"] = [name for name in scheme.outer if name not in own[""]]
    complaints["misshapen"] = [
        told for name, x in own[""].items() if (told := weights.misfit(name, x, scheme.outer[name].shape))
    ]
    encoders = {}
    for side, part in found.items():
        names = scheme.names[side]
        encoders[side], more = weights.sort_out(part.arch, own[side], file=file, names=names)
        for kind, told in more.items():
            prefix = names.prefix if kind in ("missing", "misshapen") else ""
            complaints[kind] += [prefix + name for name in told]
    weights.refuse(complaints, " and ".join(type(part.arch).__name__ for part in found.values()), file=file)
    params: dict[str, Any] = {"towers": {}}
    for side, part in found.items():
        params["towers"][side] = {"encoder": weights.assemble(part.arch, encoders[side], scheme.names[side])}
    for name, x in own[""].items():
        weights.put(params, scheme.outer[name].ours, scheme.outer[name].to_ours(x))
    return params


def to_tensors(found: Parts, params: Mapping[str, Any], scheme: Scheme) -> dict[str, np.ndarray]:
    """The inverse of `from_tensors`. Raises ConfigError when the tree is not that of the parts."""
    tensors = {}
    for side, part in found.items():
        names = scheme.names[side]
        named = weights.to_tensors(part.arch, params["towers"][side]["encoder"], names)
        tensors |= {names.prefix + name: x for name, x in named.items()}
    dense = {side: {"dense": params["towers"][side].get("dense", {})} for side in found}
    values = {**scheme.first, **weights.flatten({"towers": dense, "loss": params.get("loss", {})})}
    for name, outer in scheme.outer.items():
        if outer.ours not in values:
            raise ConfigError(f"the parameters hold no {outer.ours}")
        tensors[name] = outer.to_theirs(np.asarray(values.pop(outer.ours), np.float32))
        if tensors[name].shape != outer.shape:
            raise ConfigError(
                f"{outer.ours} gives the tensor {name} as {list(tensors[name].shape)}, expected {list(outer.shape)}"
            )
    if odd := [path for path in values if path.startswith("towers/")]:
        raise ConfigError(f"the parameters hold projections that the towers have not: {', '.join(odd)}")
    return {name.removeprefix(scheme.bare): x for name, x in tensors.items()}


def _by_tower(tensors: Mapping[str, np.ndarray], scheme: Scheme) -> tuple[dict[str, dict[str, np.ndarray]], weights.Complaints]:
    """The tensors of each tower, and under "" the outer ones. In a file of one tower its prefix may be left out."""
    prefixes = {side: names.prefix for side, names in scheme.names.items()}
    own: dict[str, dict[str, np.ndarray]] = {"": {}, **{side: {} for side in prefixes}}
    complaints: weights.Complaints = {"unknown": [], "missing": [], "doubly set": [], "misshapen": []}
    for name, tensor in tensors.items():
        full = name
        if len(prefixes) == 1 and name not in scheme.outer:
            (prefix,) = prefixes.values()
            full = prefix + name.removeprefix(prefix)
        inside = next((side for side, prefix in prefixes.items() if full.startswith(prefix)), None)
        side = "" if full in scheme.outer else inside
        if side is None:
            complaints["unknown"].append(name)
        elif full in own[side]:
            complaints["doubly set"].append(name)
        else:
            own[side][full] = tensor
    return own, complaints
