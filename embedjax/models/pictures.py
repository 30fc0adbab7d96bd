"""Folders that hold an image tower, alone or beside one of texts -> what our towers are made of, and the preprocessing of
their pictures both ways. Writes no weights and reads no tokenizer.

Hugging Face's (CLIPModel, SiglipModel, their halves, ViT, ResNet), open_clip's, and those of sentence-transformers around the
former.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from embedjax.config import ImageArchitecture, ImageTower, Pixels, Resnet, Vit
from embedjax.config.errors import ConfigError, nearest
from embedjax.models import clip, open_clip
from embedjax.models.families import IMAGE_FAMILIES, family_of, vit
from embedjax.models.joint import Part, Parts
from embedjax.models.jsonfile import get, read_json
from embedjax.models.layout import is_route, layout, of_side, refuse_code
from embedjax.models.modules import read_dense, read_dense_params, read_pooling, read_settings
from embedjax.models.weights import load_tensors

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
MODALITIES = "sentence_bert_config.json"
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
SHORTER = 0.875
"""ConvNext's and ResNet's share of the scaled picture that is cut out, where a folder does not say."""


class Found(NamedTuple):
    """What a folder says of its towers."""

    parts: Parts
    place: Path
    """Folder of weights, preprocessing and tokenizer."""
    file: Path
    """Config of the towers."""
    normalize: bool = True
    settings: Path | None = None
    """Folder of what holds for the whole model, prompts and similarity; None where nothing is said."""
    dense: tuple[Path, ...] | None = None
    """Folders of the projections, where they are not among the towers' tensors."""

    def params(self) -> dict[str, Any]:
        """{"towers": {"image": {"encoder": ..., "dense": ...}, "text": ...}, "loss": ...}, numpy float32. Raises ConfigError
        for tensors that are not those of the config."""
        if self.file.name == open_clip.CONFIG:
            return open_clip.from_tensors(self.parts, load_tensors(self.place, open_clip.STEM), file=self.place)
        if self.dense is None:
            return clip.from_tensors(self.parts, load_tensors(self.place), file=self.place)
        ((side, part),) = self.parts.items()
        read = clip.from_tensors({side: Part(part.arch)}, load_tensors(self.place), file=self.place)
        read["towers"][side] |= read_dense_params(self.dense, part.dense, part.arch.width)
        return read


def find(folder: Path) -> Found | None:
    """What a folder, or a Router's route, holds of pictures, or of texts as CLIP and SigLIP read them; None for any other.
    Raises ConfigError for what is not ours."""
    if (folder / "modules.json").exists() or is_route(folder):
        return _in_modules(folder)
    file = folder / "config.json"
    if file.exists() and (config := read_json(file)).get("model_type") in (*clip.PAIRS, *clip.HALVES):
        refuse_code(folder)
        return Found(clip.parts(config, file=file), folder, file)
    if (file := folder / open_clip.CONFIG).exists():
        return Found(open_clip.parts(read_json(file), file=file), folder, file)
    return None


def _in_modules(folder: Path) -> Found | None:
    """The same of a sentence-transformers folder."""
    found = layout(folder)
    file = found.encoder / "config.json"
    if found.static or not file.exists():
        return None
    config = read_json(file)
    kind = config.get("model_type")
    if kind in (*clip.PAIRS, *IMAGE_FAMILIES):
        refuse_code(found.encoder)
    if kind in clip.PAIRS:
        if found.pooling or found.dense:
            raise ConfigError(f"{folder}: a {clip.PAIRS[kind]} gives vectors; nothing but Normalize is read behind it")
        return Found(clip.parts(config, file=file), found.encoder, file, found.normalize, found.settings)
    if kind not in IMAGE_FAMILIES:
        return None
    arch = clip.parts(config, file=file)["image"].arch
    assert isinstance(arch, ImageArchitecture)
    output, pooling = output_of(arch)
    pooled = read_pooling(found.pooling, arch.width)["pooling"] if found.pooling else None
    if pooled != pooling:
        raise ConfigError(f"{folder}: pooling is {pooled}; a {kind} of this form is read with {pooling}")
    said = read_json(found.encoder / MODALITIES) if (found.encoder / MODALITIES).exists() else {}
    image = get(get(said, "modality_config", dict, {}, file=file), "image", dict, {}, file=file)
    if (named := image.get("method_output_name", output)) != output:
        raise ConfigError(f"{found.encoder / MODALITIES}: pictures give {named!r}; a {kind} of this form is read by {output!r}")
    parts = {"image": Part(arch, read_dense(found.dense, arch.width))}
    return Found(parts, found.encoder, file, found.normalize, found.settings, found.dense)


def output_of(arch: ImageArchitecture) -> tuple[str, Literal["cls", "mean"] | None]:
    """Which output of Hugging Face's model of a tower holds its vectors, and how that one is pooled; None for as it is."""
    if not isinstance(arch, Vit):
        return "last_hidden_state", "mean"
    if vit.model_type(arch) == "vit":
        return "last_hidden_state", "cls"
    return ("last_hidden_state", "mean") if arch.pool == "mean" else ("pooler_output", None)


def required(folder: Path, side: str) -> Found:
    """What a folder holds of a side, "image" or "text". Raises ConfigError when it is not there."""
    found = find(of_side(folder, side))
    if found is None or side not in found.parts:
        others = ", ".join(found.parts) if found else "texts"
        raise ConfigError(f"{folder} holds no tower of {side}s; it has {others}")
    return found


def read_image_tower(folder: Path) -> ImageTower:
    """The resolved image tower of a folder; `init` is the folder."""
    found = required(folder, "image")
    arch, dense = found.parts["image"]
    assert isinstance(arch, ImageArchitecture)
    if isinstance(arch, Resnet):  # of whose pictures the preprocessing alone tells the size
        arch = dataclasses.replace(arch, image=_side(found.place, arch.image))
    similarity = read_settings(found.settings)["similarity"] if found.settings else "cosine"
    return ImageTower(
        arch, str(folder), pixels_of(found, arch.image), dense=dense, normalize=found.normalize, similarity=similarity
    )


def pixels_of(found: Found, size: int) -> Pixels:
    """The preprocessing of a folder's pictures."""
    if found.file.name == open_clip.CONFIG:
        return open_clip.pixels(get(read_json(found.file), "preprocess_cfg", dict, {}, file=found.file), file=found.file)
    return read_pixels(found.place, size)


def read_params(folder: Path, side: str, arch: Any) -> dict[str, Any]:
    """{"encoder": ..., "dense": {"0": ...}} of one tower of a folder, numpy float32, for pictures of the size of `arch`. Raises
    ConfigError when the folder's tower is another."""
    found = required(folder, side)
    params = found.params()["towers"][side]
    return {**params, "encoder": fitted(params["encoder"], found.parts[side].arch, arch, str(folder))}


def fitted(encoder: dict[str, Any], known: Any, arch: Any, origin: str) -> dict[str, Any]:
    """The parameters of an encoder `known` for `arch`, which may differ in dropout and, of pictures, in their size. Raises
    ConfigError, naming `origin`, where it differs in more."""
    free = [name for name in ("dropout", "attention_dropout", "patch_dropout", "image") if hasattr(arch, name)]
    if type(arch) is not type(known) or dataclasses.replace(arch, **{name: getattr(known, name) for name in free}) != known:
        raise ConfigError(f"{origin} holds the tower {known}, not {arch}")
    resize = isinstance(known, ImageArchitecture) and known != arch
    return family_of(arch).resized(encoder, known, arch) if resize else encoder


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
    file = folder / (PREPROCESSOR if (folder / PREPROCESSOR).exists() else PROCESSOR)
    if not file.exists():
        return Pixels()
    config = read_json(file)
    if file.name == PROCESSOR:  # of transformers 5, which may hold the tokenizer's part too
        config = get(config, "image_processor", dict, {}, file=file)
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
    whole = {"do_center_crop": False, "size": square}
    # CLIP's processor alone can do both; the others know no cut.
    named = {"siglip": "SiglipImageProcessor", "vit": "ViTImageProcessor"}.get(kind, "") if pixels.fit == "squash" else ""
    return {
        "image_processor_type": named or "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": next(number for number, name in FILTERS.items() if name == pixels.interpolation),
        **(cut if pixels.fit == "crop" else whole),
    }
