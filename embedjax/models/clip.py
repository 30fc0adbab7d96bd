"""Hugging Face's models of pictures and texts <-> our towers: CLIPModel and SiglipModel, their halves, ViTs and ResNets.

Speaks of a config.json and of tensors, not of files: a folder is read as

    found = parts(read_json(folder / "config.json"), file=folder)      # {"image": Part, "text": Part}, or one of them
    params = from_tensors(found, load_tensors(folder), file=folder)    # {"towers": {"image": ..., "text": ...}, "loss": ...}

and written from `to_hf(found)` and `to_tensors(found, params)`. A part is what the folder says of a tower: `arch`, and `dense`,
the projections behind its pooling, which for texts is POOLING. Preprocessing and tokenizer lie in files of their own; a
picture of another size is had by `vit.resized`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedjax.config import ClipText, Dense, SiglipText, Vit
from embedjax.config.errors import ConfigError, nearest
from embedjax.config.model import PoolingName
from embedjax.models import joint
from embedjax.models.families import FAMILIES, IMAGE_FAMILIES, described, family_of, names_of
from embedjax.models.joint import Outer, Part, Parts, Scheme

POOLING: PoolingName = "lasttoken"
"""How a text's tokens become its vector: CLIP's last token is the end of the text, SigLIP's the last place."""

PAIRS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
SIDES = {"image": "vision", "text": "text"}
PROJECTED = {"clip_vision_model": False, "clip_text_model": False, "siglip_text_model": True}
"""Which towers have a projection, and whether it has a bias. Without that of CLIP's a folder may do that holds one tower."""
HALVES = (*IMAGE_FAMILIES, "clip_text_model", "siglip_text_model")
LOSS = {
    "clip": {"logit_scale": ("scale", math.log(1 / 0.07))},
    "siglip": {"logit_scale": ("scale", math.log(10)), "logit_bias": ("bias", -10.0)},
}
"""What of the loss a model of two towers holds: our name, and what it starts from (Radford et al. 2021, Zhai et al. 2023)."""


# ---- config.json


def parts(config: Mapping[str, Any], *, file: str | Path) -> dict[str, Part]:
    """The towers that a config.json describes. Raises ConfigError, under the name of `file`, for another kind of model and for
    what the towers do not compute."""
    kind = config.get("model_type")
    if kind in PAIRS:
        halves = {side: (f"{kind}_{theirs}_model", _half(config, theirs, file)) for side, theirs in SIDES.items()}
        return {side: _part(name, half, config, file) for side, (name, half) in halves.items()}
    if kind not in HALVES:
        raise ConfigError(f"{file}: model_type {kind!r} is not supported; {nearest(str(kind), (*PAIRS, *HALVES))}")
    return {"image" if kind in IMAGE_FAMILIES else "text": _part(kind, config, config, file)}


def _half(config: Mapping[str, Any], side: str, file: str | Path) -> Mapping[str, Any]:
    """The config of one tower. Models of 2022 may hold a second one, which is what readers take."""
    half = config.get(f"{side}_config_dict")
    half = config.get(f"{side}_config") if half is None else half
    if half is not None and not isinstance(half, Mapping):
        raise ConfigError(f"{file}: {side}_config is {half!r}; expected an object")
    return half or {}


def _part(kind: str, half: Mapping[str, Any], config: Mapping[str, Any], file: str | Path) -> Part:
    """A tower from its config and that of the whole."""
    arch = described(IMAGE_FAMILIES.get(kind) or FAMILIES[kind], {**half, "model_type": kind}, file=file)
    features = None
    if kind == "siglip_text_model":
        features = half.get("projection_size") or arch.width
    elif config.get("model_type") == "clip" or "WithProjection" in str(config.get("architectures")):
        features = config.get("projection_dim", 512)
    if features is None:
        return Part(arch)
    if type(features) is not int or features < 1:
        raise ConfigError(f"{file}: the projection of a {kind} has {features!r} features; it must have at least 1")
    return Part(arch, (Dense(features, PROJECTED[kind], "identity"),))


def to_hf(found: Parts) -> dict[str, Any]:
    """The config.json of towers. Raises ConfigError when no Hugging Face model is made of them."""
    halves = {side: family_of(part.arch).to_hf(part.arch) for side, part in found.items()}
    features = {side: _features(part, halves[side]["model_type"], alone=len(found) == 1) for side, part in found.items()}
    if len(found) == 1:
        ((side, half),) = halves.items()
        if half["model_type"] == "siglip_text_model":
            return half | {"projection_size": features[side]}
        if features[side]:
            return half | {"architectures": [f"{half['architectures'][0]}WithProjection"], "projection_dim": features[side]}
        return half
    kind, image = _pair(found), found["image"].arch
    pooled = not isinstance(image, Vit) or kind == "clip" or image.pool == "map"
    if halves["image"]["model_type"] != f"{kind}_vision_model" or not pooled:
        raise ConfigError(f"no Hugging Face model joins a {type(found['text'].arch).__name__} with this image tower: {image}")
    widths = {"image": features["image"] or image.width, "text": features["text"]}
    if widths["image"] != widths["text"]:
        raise ConfigError(f"the towers give vectors of {widths['image']} and {widths['text']} numbers; they must be as many")
    whole = {"architectures": [PAIRS[kind]], "model_type": kind}
    if kind == "siglip":
        return whole | {"vision_config": halves["image"], "text_config": halves["text"] | {"projection_size": widths["text"]}}
    shared = {"projection_dim": widths["text"]}
    whole |= {"logit_scale_init_value": 2.6592} | shared
    return whole | {"vision_config": halves["image"] | shared, "text_config": halves["text"] | shared}


def _features(part: Part, kind: str, *, alone: bool) -> int | None:
    """The width of a tower's projection, None without one. Raises ConfigError when its model has another."""
    optional = kind not in PROJECTED or (alone and kind != "siglip_text_model")
    known = (Dense(part.dense[0].features, PROJECTED[kind], "identity"),) if part.dense and kind in PROJECTED else ()
    if part.dense != known or not (known or optional):
        wanted = f"one without activation, bias {PROJECTED[kind]}" if kind in PROJECTED else "none"
        raise ConfigError(f"a {kind} has the projections {part.dense}; Hugging Face's has {wanted}")
    return known[0].features if known else None


def _pair(found: Parts) -> str:
    return "clip" if isinstance(found["text"].arch, ClipText) else "siglip"


# ---- tensors


def from_tensors(found: Parts, tensors: Mapping[str, np.ndarray], *, file: str | Path) -> dict[str, Any]:
    """{"towers": {"image": {"encoder": ..., "dense": {"0": ...}}, "text": ...}, "loss": {"scale": ..., "bias": ...}}, float32;
    "dense" and "loss" as far as the model has them.

    Raises one ConfigError that lists, under the name of `file`, every unknown, missing, doubly set and misshapen tensor.
    """
    return joint.from_tensors(found, tensors, scheme(found), file=file)


def to_tensors(found: Parts, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_tensors`; what is not learned of the loss is written as it starts.

    Raises ConfigError when the tree is not that of the parts.
    """
    return joint.to_tensors(found, params, scheme(found))


def scheme(found: Parts) -> Scheme:
    """The names of all tensors in a file of Hugging Face's."""
    outer, first = {}, {}
    for side, part in found.items():
        name = "visual_projection" if side == "image" else "text_projection"
        name = "text_model.head" if isinstance(part.arch, SiglipText) else name
        for dense in part.dense:
            outer[f"{name}.weight"] = Outer(f"towers/{side}/dense/0/kernel", (dense.features, part.arch.width))
            if dense.bias:
                outer[f"{name}.bias"] = Outer(f"towers/{side}/dense/0/bias", (dense.features,))
    if len(found) == 2:
        shape = (1,) if _pair(found) == "siglip" else ()
        outer |= {name: Outer(f"loss/{ours}", shape) for name, (ours, _) in LOSS[_pair(found)].items()}
        first = {f"loss/{ours}": value for ours, value in LOSS[_pair(found)].values()}
    return Scheme({side: names_of(part.arch) for side, part in found.items()}, outer, first, _bare(found))


def _bare(found: Parts) -> str:
    """The prefix that a file leaves out: that of a single tower, but for CLIP's with a projection."""
    ((_, part), *others) = found.items()
    return "" if others or (part.dense and not isinstance(part.arch, SiglipText)) else names_of(part.arch).prefix
