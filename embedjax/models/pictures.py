"""Hugging Face folders that hold an image tower, alone or beside one of texts (CLIPModel, SiglipModel, ViT, ResNet) -> what our
towers are made of, and the preprocessing of their pictures both ways. Writes no weights and reads no tokenizer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from embedjax.config import ImageArchitecture, ImageTower, Pixels, Resnet
from embedjax.config.errors import ConfigError, nearest
from embedjax.models import clip
from embedjax.models.families import IMAGE_FAMILIES, family_of
from embedjax.models.jsonfile import get, read_json
from embedjax.models.weights import load_tensors

PREPROCESSOR = "preprocessor_config.json"
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
SHORTER = 0.875
"""ConvNext's and ResNet's share of the scaled picture that is cut out, where a folder does not say."""


def sides(folder: Path) -> tuple[str, ...]:
    """("image", "text") of a folder of both, ("image",) of one of pictures alone, () of any other."""
    file = folder / "config.json"
    if (folder / "modules.json").exists() or not file.exists():
        return ()
    kind = read_json(file).get("model_type")
    return tuple(clip.SIDES) if kind in clip.PAIRS else ("image",) if kind in IMAGE_FAMILIES else ()


def part(folder: Path, side: str) -> clip.Part:
    """One tower of a folder. Raises ConfigError when it is not there, or not one of ours."""
    file = folder / "config.json"
    found = clip.parts(read_json(file), file=file)
    if side not in found:
        raise ConfigError(f"{folder} holds no tower of {side}s; it has {', '.join(found)}")
    return found[side]


def read_image_tower(folder: Path) -> ImageTower:
    """The resolved image tower of a folder; `init` is the folder."""
    arch, dense = part(folder, "image")
    assert isinstance(arch, ImageArchitecture)
    if isinstance(arch, Resnet):  # of whose pictures the preprocessing alone tells the size
        arch = dataclasses.replace(arch, image=_side(folder, arch.image))
    return ImageTower(arch, str(folder), read_pixels(folder, arch.image), dense=dense, normalize=True, similarity="cosine")


def read_params(folder: Path, side: str, arch: Any) -> dict[str, Any]:
    """{"encoder": ..., "dense": {"0": ...}} of one tower of a folder, numpy float32, for pictures of the size of `arch`. Raises
    ConfigError when the folder's tower is another."""
    file = folder / "config.json"
    found = clip.parts(read_json(file), file=file)
    known = part(folder, side).arch
    params = clip.from_tensors(found, load_tensors(folder), file=folder)["towers"][side]
    if isinstance(arch, ImageArchitecture) and known != arch:
        free = ("image", "dropout", "attention_dropout", "patch_dropout")
        like = {name: getattr(known, name) for name in free if hasattr(known, name)}
        if type(arch) is not type(known) or dataclasses.replace(arch, **like) != known:
            raise ConfigError(f"{folder} holds the image tower {known}, not {arch}")
        params["encoder"] = family_of(arch).resized(params["encoder"], known, arch)
    return params


def _side(folder: Path, default: int) -> int:
    """The side of the pictures that preprocessor_config.json makes."""
    file = folder / PREPROCESSOR
    if not file.exists():
        return default
    config = read_json(file)
    wanted = config.get("crop_size") if config.get("do_center_crop") else None
    wanted = config.get("size", default) if wanted is None else wanted
    sides = set(wanted.values()) if isinstance(wanted, dict) else {wanted}
    if len(sides) != 1 or type(side := sides.pop()) is not int or side < 1:
        raise ConfigError(f"{file}: pictures are made {wanted!r}; they are squares here")
    return side


def read_pixels(folder: Path, size: int) -> Pixels:
    """What preprocessor_config.json says of pictures of `size`, else CLIP's or ViT's default. Raises ConfigError for steps that
    are not ours."""
    file = folder / PREPROCESSOR
    if not file.exists():
        return Pixels()
    config = read_json(file)
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(name) is False:
            raise ConfigError(f"{file}: {name} is false; pictures are always scaled and normalised here")
    if abs(get(config, "rescale_factor", float, 1 / 255, file=file) - 1 / 255) > 1e-6:
        raise ConfigError(f"{file}: rescale_factor is {config['rescale_factor']}; expected 1/255")
    resample = config.get("resample", 3)
    if resample not in FILTERS:
        raise ConfigError(f"{file}: resample is {resample!r}; {nearest(str(resample), map(str, FILTERS))}")
    three = lambda name: cast(tuple[float, float, float], tuple(map(float, config.get(name, getattr(Pixels(), name[6:])))))
    if len(three("image_mean")) != 3 or len(three("image_std")) != 3:
        raise ConfigError(f"{file}: image_mean and image_std must be three numbers each")
    fit, shorter = _fit(config, size, file)
    how = cast(Literal["bicubic", "bilinear", "lanczos", "nearest"], FILTERS[resample])
    return Pixels(three("image_mean"), three("image_std"), fit, shorter, how)


def _fit(config: Mapping[str, Any], size: int, file: Path) -> tuple[Literal["crop", "squash"], int]:
    """How the picture is made square, and what its shorter side is scaled to before the middle is cut out."""
    wanted = config.get("size", size)
    if isinstance(wanted, int):
        wanted = {"shortest_edge": wanted} if config.get("do_center_crop") else {"height": wanted, "width": wanted}
    if {"height", "width"} <= wanted.keys():
        return "squash", 0
    if "shortest_edge" not in wanted:
        raise ConfigError(f"{file}: size is {wanted!r}; expected shortest_edge, or height and width")
    shorter = int(wanted["shortest_edge"])
    if "crop_pct" in config or "ConvNext" in str(config.get("image_processor_type")):
        shorter = int(shorter / (config.get("crop_pct") or SHORTER))
    elif not config.get("do_center_crop", True):
        raise ConfigError(f"{file}: the shorter side is scaled and nothing cut out, so pictures would have many shapes")
    return "crop", 0 if shorter == size else shorter


def pixels_to_hf(pixels: Pixels, size: int, kind: str) -> dict[str, Any]:
    """The preprocessor_config.json of pictures of `size` for a model of a kind ("clip", "siglip", "vit")."""
    square = {"height": size, "width": size}
    cut = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": pixels.shorter or size}}
    return {
        "image_processor_type": {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}.get(kind, "ViTImageProcessor"),
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": next(number for number, name in FILTERS.items() if name == pixels.interpolation),
        **(cut if pixels.fit == "crop" else {"size": square}),
    }
