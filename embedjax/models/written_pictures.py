"""An image tower, alone or beside one of texts -> model folders that others load. As `written.py` it writes no model card, and
a folder appears whole or not at all.

Three formats: Hugging Face's CLIPModel, SiglipModel, their halves, ViT and ResNet; open_clip's; and sentence-transformers',
which is the first of these as one module, or, of towers that none of them joins, a Router that parts pictures and texts (5.4
and later).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedjax.config import ClipText, ImageArchitecture, ImageTower, SiglipText, Tower, Vit
from embedjax.config.errors import ConfigError
from embedjax.models import clip, open_clip, written
from embedjax.models.families import family_of, vit
from embedjax.models.joint import Part, Parts
from embedjax.models.pictures import MODALITIES, PREPROCESSOR, output_of, pixels_to_hf

FORMATS = ("sentence-transformers", "hf", "open-clip")
VERSIONS = written.VERSIONS | {"sentence_transformers": "5.4.0"}  # the oldest that embeds pictures by any model
CLIP_PATH = "0_CLIPModel"
FILLED = {"processing_kwargs": {"text": {"padding": "max_length"}}}
"""How sentence-transformers is told that texts are padded to their longest."""
IMAGE = "image"


class Towers(NamedTuple):
    """What is written: resolved towers with their parameters, one or both, and what is learned of the loss."""

    image: tuple[ImageTower, Mapping[str, Any]] | None = None
    text: written.Part | None = None
    loss: Mapping[str, float] = {}

    @property
    def parts(self) -> Parts:
        """The towers as a file of both has them."""
        return parts_of(self.image and self.image[0], self.text and self.text[0])

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as a file of both has them."""
        towers: dict[str, Any] = {}
        if self.image:
            tower, params = self.image
            towers["image"] = {**params, "encoder": _with_table(tower, params["encoder"])}
        if self.text:
            towers["text"] = self.text[1]
        return {"towers": towers, "loss": self.loss}


def parts_of(image: ImageTower | None, text: Tower | None) -> dict[str, Part]:
    """Towers as a file of both has them. Raises ConfigError for a tower of texts that is none of CLIP's or SigLIP's."""
    found = {}
    if image:
        assert image.arch is not None
        arch = dataclasses.replace(image.arch, positions="learned") if isinstance(image.arch, Vit) else image.arch
        found["image"] = Part(arch, image.dense or ())
    if text:
        if not isinstance(text.arch, ClipText | SiglipText) or text.pooling != clip.POOLING:
            raise ConfigError(
                f"the tower of texts is a {type(text.arch).__name__} pooled by {text.pooling!r}; beside one of pictures this "
                f"format has ClipText or SiglipText pooled by {clip.POOLING!r} alone, sentence-transformers any"
            )
        found["text"] = Part(text.arch, text.dense or ())
    return found


def check(format: str, image: ImageTower, text: Tower | None) -> None:
    """Raises ConfigError, which says which part does not fit, where a format has no model of these resolved towers."""
    assert image.arch is not None and image.pixels is not None
    if format == "open-clip":
        if text is None:
            raise ConfigError(
                "open_clip's models have a tower of texts beside that of pictures; write hf or sentence-transformers"
            )
        open_clip.to_config(parts_of(image, text), {})
        open_clip.from_pixels(image.pixels, image.arch.image)
    elif format == "hf" and text is not None:
        clip.to_hf(parts_of(image, text))
    elif format == "hf" or text is None or not in_one(image, text):
        arch = parts_of(image, None)["image"].arch
        family_of(arch).to_hf(arch)
        if text is not None:
            written.check_tower(text)


def in_one(image: ImageTower, text: Tower) -> bool:
    """Whether sentence-transformers has both towers in one module, a CLIPModel or SiglipModel."""
    try:
        clip.to_hf(parts_of(image, text))
    except ConfigError:
        return False
    return image.normalize == text.normalize


def write_hf(folder: str | Path, towers: Towers, *, replace: bool = False) -> Path:
    """Write a Hugging Face folder: CLIPModel, SiglipModel, one of their halves, ViT or ResNet. Raises as
    `written.write_sentence_transformers` does, ConfigError too where there is no such model."""
    with written.new_folder(Path(folder), replace) as root:
        _write_hf(root, towers)
    return Path(folder)


def write_open_clip(folder: str | Path, towers: Towers, *, replace: bool = False) -> Path:
    """Write a folder that open_clip loads by the name local-dir:FOLDER. Otherwise as above."""
    with written.new_folder(Path(folder), replace) as root:
        if not (towers.image and towers.text):
            raise ConfigError("open_clip's models have a tower of texts and one of pictures")
        (tower, _), text = towers.image, _shortened(towers.text)
        towers = towers._replace(text=text)
        found = towers.parts
        assert tower.arch is not None and tower.pixels is not None
        cfg = open_clip.to_config(found, towers.loss), open_clip.from_pixels(tower.pixels, tower.arch.image)
        written.write_json(root / open_clip.CONFIG, {"model_cfg": cfg[0], "preprocess_cfg": cfg[1]})
        written.write_tensors(root / f"{open_clip.STEM}.safetensors", open_clip.to_tensors(found, towers.params))
        text[2](root)
    return Path(folder)


def write_sentence_transformers(folder: str | Path, towers: Towers, *, replace: bool = False) -> Path:
    """Write a sentence-transformers folder: of a CLIPModel in the spelling that every version reads, of any other image tower
    in that of 5.4 and later. Otherwise as above."""
    with written.new_folder(Path(folder), replace) as root:
        if not towers.image:
            raise ConfigError("there is no image tower to write")
        if not towers.text:
            _write_image(root, *towers.image)
        elif in_one(towers.image[0], towers.text[0]):
            _write_joint(root, towers)
        else:
            for side in ("text", IMAGE):
                (root / side).mkdir()
            chains = {
                "text": written.write_tower(root / "text", *towers.text),
                IMAGE: _write_image(root / IMAGE, *towers.image),
            }
            written.write_routes(root, chains, default="text")
            written.write_prompts(root, towers.text[0], VERSIONS)
    return Path(folder)


def _write_joint(root: Path, towers: Towers) -> None:
    """A CLIPModel or SiglipModel as one module."""
    assert towers.text
    tower = towers.text[0]
    assert tower.arch is not None
    if tower.arch.fills:  # which the class of old models knows nothing of
        modules = [("Transformer", "")]
        _write_hf(root, towers)
        sides = {side: {"method": f"get_{side}_features", "method_output_name": "pooler_output"} for side in clip.SIDES}
        _write_modalities(root, sides, "sentence_embedding", FILLED)
    else:
        modules = [("CLIPModel", CLIP_PATH)]
        (root / CLIP_PATH).mkdir()
        _write_hf(root / CLIP_PATH, towers)
    written.write_head(root, modules, dataclasses.replace(tower, dense=()), {})
    written.write_prompts(root, tower, VERSIONS if tower.arch.fills else written.VERSIONS)


def _write_image(root: Path, tower: ImageTower, params: Mapping[str, Any]) -> written.Modules:
    """An image tower as a model of its own: the kind and path of its modules."""
    bare = dataclasses.replace(tower, dense=())
    _write_hf(root, Towers((bare, {"encoder": params["encoder"]})))
    arch = parts_of(bare, None)["image"].arch
    assert isinstance(arch, ImageArchitecture)
    output, pooling = output_of(arch)
    _write_modalities(
        root,
        {IMAGE: {"method": "forward", "method_output_name": output}},
        "token_embeddings" if pooling else "sentence_embedding",
    )
    modules = [("Transformer", "")]
    if pooling:
        modules.append(("Pooling", "1_Pooling"))
        written.write_pooling(root / "1_Pooling", pooling, arch)
    written.write_head(root, modules, tower, params)
    written.write_settings(root, {}, None, tower, VERSIONS)
    return modules


def _write_modalities(root: Path, sides: Mapping[str, Any], output: str, more: Mapping[str, Any] | None = None) -> None:
    said = {"transformer_task": "feature-extraction", "modality_config": sides, "module_output_name": output}
    written.write_json(root / MODALITIES, said | dict(more or {}))


def _write_hf(root: Path, towers: Towers) -> None:
    found = towers.parts
    config = clip.to_hf(found)
    written.write_json(root / "config.json", config | {"torch_dtype": "float32"})
    written.write_tensors(root / "model.safetensors", clip.to_tensors(found, towers.params))
    if towers.image:
        tower = towers.image[0]
        assert tower.arch is not None and tower.pixels is not None
        kind = config["model_type"].partition("_")[0]
        processor = {"processor_class": {"clip": "CLIPProcessor"}.get(kind, "SiglipProcessor")} if towers.text else {}
        written.write_json(root / PREPROCESSOR, pixels_to_hf(tower.pixels, tower.arch.image, kind) | processor)
    if towers.text:
        towers.text[2](root)


def _shortened(part: written.Part) -> written.Part:
    """A tower of texts with positions for its longest text alone, which is what open_clip pads to."""
    tower, params, write_tokenizer = part
    assert isinstance(tower.arch, ClipText | SiglipText) and tower.max_length is not None
    arch = dataclasses.replace(tower.arch, positions=tower.max_length)
    table = np.asarray(params["encoder"]["positions"]["embedding"])[: tower.max_length]
    encoder = {**params["encoder"], "positions": {"embedding": table}}
    return dataclasses.replace(tower, arch=arch), {**params, "encoder": encoder}, write_tokenizer


def _with_table(tower: ImageTower, encoder: Mapping[str, Any]) -> dict[str, Any]:
    return vit.with_table(tower.arch, encoder)[1] if isinstance(tower.arch, Vit) else dict(encoder)
