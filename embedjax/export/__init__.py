"""A model -> a folder that others load, with a parity gate."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from embedjax import config as configs
from embedjax.config import ClipText, ImageTower, SiglipText, Static, Tower
from embedjax.config.errors import ConfigError, StorageError, nearest
from embedjax.data.tokenizer import save_tokenizer, save_truncating, with_special
from embedjax.export import card, classes, gate
from embedjax.export import programs as portable
from embedjax.export.usage import program_usage
from embedjax.load import Model, adapted
from embedjax.models import clip, multi_vector, written, written_classifier, written_late, written_pictures
from embedjax.models.classifier import write_heads
from embedjax.models.embedder import build_embedder
from embedjax.models.joint import Part

FORMATS = (*written_pictures.FORMATS, "pylate", classes.FORMAT)
LATE_FORMATS = ("sentence-transformers", "pylate")
"""Those that hold late interaction."""
Kind = TypeVar("Kind", Tower, ImageTower)


def check_format(model: configs.Model, format: str) -> None:
    """Raises ConfigError for an unknown format, and for resolved towers that it does not hold."""
    if format not in FORMATS:
        raise ConfigError(f"unknown export format {format!r}; {nearest(format, FORMATS)}")
    if model.late != (format == "pylate") and not (model.late and format in LATE_FORMATS):
        known = " or ".join(f'"{name}"' for name in LATE_FORMATS)
        raise ConfigError(
            f"export.format is {format!r}; "
            + (f"late interaction is exported as {known}" if model.late else '"pylate" is for late interaction')
        )
    if model.late and len(model.routes) > 1:
        raise ConfigError(
            "models of late interaction have one tower for queries and documents in other libraries; set export.format to "
            '"none"'
        )
    if model.late and format == "sentence-transformers":
        multi_vector.marked_prompts(next(iter(model.texts.values())))  # raises for prompts that have no place there
    if format == classes.FORMAT:
        classes.check(model)
    towers = [model.towers[name] for name in model.routes.values()]
    images = [tower for tower in towers if isinstance(tower, ImageTower)]
    texts = [tower for tower in towers if isinstance(tower, Tower)]
    if len(images) > 1:
        raise ConfigError("the model has two image towers, which no format here holds")
    if images:
        written_pictures.check(format, images[0], texts[0] if texts else None)
    elif format == "open-clip":
        raise ConfigError("open_clip's models have a tower of pictures beside that of texts; write hf or sentence-transformers")
    elif format == "sentence-transformers":
        for tower in texts:
            written.check_tower(tower)
        written.shared_prompts({route: tower for route, tower in zip(model.routes, towers, strict=True) if tower in texts})
    elif format == "hf":
        for name in model.routes.values():
            arch = model.towers[name].arch
            if isinstance(arch, SiglipText):
                clip.to_hf({"text": Part(arch, model.towers[name].dense or ())})
            if isinstance(arch, Static):
                raise ConfigError(
                    f"tower {name!r} is a static table, which is no Hugging Face model; write sentence-transformers"
                )


def export(
    model: Model,
    folder: Path,
    format: str = "sentence-transformers",
    *,
    texts: Sequence[str] = (),
    pictures: Sequence[bytes] = (),
    scores: Mapping[str, float] | None = None,
    replace: bool = False,
    title: str = "",
    adapter: str = "",
    head: str = "",
    programs: Sequence[str] = (),
    weights: str = "float32",
) -> float:
    """Writes the model as a folder and compares it with the model on at least 256 texts and 64 pictures, as far as it takes
    them, among them `texts` and `pictures` (encoded).

    "sentence-transformers" is the legacy spelling every server reads, or for late interaction what its MultiVectorEncoder
    loads; "hf" the bare encoder, tokenizer and config; "open-clip" what open_clip loads; "pylate" late interaction as PyLate
    has it, which MultiVectorEncoder loads too. Late interaction is compared on 64 texts. Of a query and a document tower each
    is a folder of that kind, FOLDER/query and FOLDER/document;
    "sentence-transformers" joins them as a Router. A tower of pictures and one of texts are one CLIPModel or SiglipModel where
    they can be; else "sentence-transformers" has a Router, FOLDER/text and FOLDER/image. Class heads go beside it;
    "classifier" has one of them, of several that called `head`, in the model, which AutoModelForSequenceClassification loads.
    Of several adapters `adapter` names that which is merged into the kernels. `programs` are "stablehlo" and "onnx", written
    beside a folder of sentence-transformers, with `weights` of float32 or int8. The folder is put in place whole, after the
    gate. Returns the largest difference; raises CheckFailed above 1e-4, StorageError when the folder exists (unless `replace`),
    ConfigError for an unknown format, program or adapter, or other towers.
    """
    folder = folder.absolute()
    check_format(model.config, format)
    portable.check(model.config, programs, weights, format)
    if head and format != classes.FORMAT:
        raise ConfigError(f"a head is named for the classifier format; {format} has all of them beside the model, or none")
    model = _finished(adapted(model, adapter))
    model = classes.with_head(model, head) if format == classes.FORMAT else model
    if folder.is_symlink():
        raise StorageError(f"{folder} is a link; name the folder that is to be written")
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; choose a folder to write, or one that is not there")
    if folder.exists() and not replace and any(folder.iterdir()):
        raise StorageError(f"{folder}: exists and is not empty; choose another folder")
    part = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    _write(model, part, format)
    shown = model if format in ("sentence-transformers", "pylate", classes.FORMAT) else _headless(model)
    if format != classes.FORMAT:
        write_heads(part, shown.heads)
    portable.write(_exact(shown), part, programs, weights)
    (part / "README.md").write_text(card.card(shown, title or folder.name, scores, format) + program_usage(programs, weights))
    difference = gate.write(_exact(shown), part, texts, pictures)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    return difference


def _write(model: Model, folder: Path, format: str) -> None:
    """The folder without its card."""
    towers = {route: _text(model, name, format) for route, name in model.config.routes.items() if name in model.texts}
    if name := next((name for name in model.config.routes.values() if name not in model.texts), None):
        image, params = model.config.towers[name], _host(model.params["towers"][name])
        assert isinstance(image, ImageTower)
        if format == "hf" and not towers:
            image = _bare(image)
            params = params if image.dense else {"encoder": params["encoder"]}
        both = written_pictures.Towers((image, params), next(iter(towers.values()), None), model.details.get("loss", {}))
        write = {"hf": written_pictures.write_hf, "open-clip": written_pictures.write_open_clip}
        write.get(format, written_pictures.write_sentence_transformers)(folder, both)
    elif format == "hf":
        for route, part in towers.items():
            place = folder if len(towers) == 1 else folder / route
            if isinstance(part[0].arch, ClipText | SiglipText):
                bare = _bare(part[0])
                params = part[1] if bare.dense else {"encoder": part[1]["encoder"]}
                written_pictures.write_hf(place, written_pictures.Towers(text=(bare, params, part[2])))
            else:
                written.write_hf(place, *part[:2], write_tokenizer=part[2])
    elif format == classes.FORMAT:
        tower, ((name, head),) = towers["text"], model.heads.items()
        written_classifier.write_classifier(folder, *tower[:2], name, head, write_tokenizer=tower[2])
    elif model.config.late:
        tower = towers["text"]
        write_late = written_late.write_pylate if format == "pylate" else written_late.write_multi_vector
        write_late(folder, *tower[:2], write_tokenizer=tower[2])
    elif len(towers) == 1:
        tower = towers["text"]
        written.write_sentence_transformers(folder, *tower[:2], write_tokenizer=tower[2])
    else:
        written.write_router(folder, towers)


def _text(model: Model, name: str, format: str) -> written.Part:
    tower, texts = model.config.texts[name], model.texts[name]
    if tower.late:  # PyLate takes a word that the tokenizer lacks for the unknown token, and skips that
        known = tuple(word for word in tower.late.skip if texts.tokenizer.token_to_id(word) is not None)
        tower = dataclasses.replace(tower, late=dataclasses.replace(tower.late, skip=known))

    def write_tokenizer(where: Path) -> None:
        if tower.late and format == "sentence-transformers":
            marked = with_special(texts.tokenizer, (tower.late.query_marker, tower.late.document_marker))
            save_tokenizer(marked, where, max_length=texts.max_length, source=model.tokenizers[name])
        elif isinstance(tower.arch, Static):
            save_truncating(texts.tokenizer, where, max_length=texts.max_length)
        else:
            source = model.tokenizers[name]
            save_tokenizer(texts.tokenizer, where, max_length=texts.max_length, source=source, fills=texts.fills)

    return tower, _host(model.params["towers"][name]), write_tokenizer


def _host(params: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(np.asarray, dict(params))


def _finished(model: Model) -> Model:
    """The model without the towers that only guided its training."""
    keep = lambda tree: {name: tree[name] for name in model.config.encoders if name in tree}
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, towers=keep(model.config.towers)),
        embedders=keep(model.embedders),
        params={"towers": keep(model.params["towers"])},
        texts=keep(model.texts),
        tokenizers=keep(model.tokenizers),
    )


def _exact(model: Model) -> Model:
    """The model computing in float32: the gate judges the weights written, not the type they were trained in."""
    return _with(model, {name: dataclasses.replace(tower, compute="float32") for name, tower in model.config.towers.items()})


def _headless(model: Model) -> Model:
    """The model as a reader of bare encoders has it, or of towers of texts and pictures: cosines of length 1, no prompts."""
    joined = len({type(model.config.towers[name]) for name in model.config.routes.values()}) > 1
    towers: dict[str, Tower | ImageTower] = {}
    for name, tower in model.config.towers.items():
        towers[name] = _bare(tower, joined=joined) if isinstance(tower, Tower) else _bare(tower, joined=joined)
    params = {
        name: params if towers[name].dense else {"encoder": params["encoder"]}
        for name, params in model.params["towers"].items()
    }
    plain = {"prompts": {}, "default_prompt": None, "include_prompt": True}
    texts = {name: dataclasses.replace(texts, **plain) for name, texts in model.texts.items()}
    return dataclasses.replace(_with(model, towers), params={"towers": params}, texts=texts, heads={})


def _bare(tower: Kind, *, joined: bool = False) -> Kind:
    """A tower as its reader has it: without projections, and texts pooled by the mean, where its kind, or that of the two
    `joined`, has none of its own."""
    changes: dict[str, Any] = {"normalize": True, "similarity": "cosine"}
    if isinstance(tower, Tower):
        own = isinstance(tower.arch, ClipText | SiglipText)
        changes |= {"prompts": {}, "default_prompt": None, "include_prompt": True, "pooling": clip.POOLING if own else "mean"}
    return dataclasses.replace(tower, **changes, dense=tower.dense if joined or _holds(tower) else ())


def _holds(tower: Tower | ImageTower) -> bool:
    """Whether Hugging Face's model of a tower alone has its projections."""
    try:
        clip.to_hf(written_pictures.parts_of(*(tower, None) if isinstance(tower, ImageTower) else (None, tower)))
    except ConfigError:
        return False
    return True


def _with(model: Model, towers: dict[str, Tower | ImageTower]) -> Model:
    config = dataclasses.replace(model.config, towers=towers)
    return dataclasses.replace(model, config=config, embedders={name: build_embedder(t) for name, t in towers.items()})
