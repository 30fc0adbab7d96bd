"""A model -> a folder that others load, with a parity gate."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from embedjax import config as configs
from embedjax.config import Static, Tower
from embedjax.config.errors import ConfigError, StorageError, nearest
from embedjax.data.text import save_tokenizer, save_truncating
from embedjax.export import card, gate
from embedjax.load import Model, adapted
from embedjax.models import written
from embedjax.models.classifier import write_heads
from embedjax.models.embedder import build_embedder

FORMATS = ("sentence-transformers", "hf")


def check_format(model: configs.Model, format: str) -> None:
    """Raises ConfigError for an unknown format, and for towers that it does not hold."""
    if format not in FORMATS:
        raise ConfigError(f"unknown export format {format!r}; {nearest(format, FORMATS)}")
    if model.late:
        raise ConfigError('late interaction is exported in no format yet; set export.format to "none"')
    for name in model.routes.values():
        if name not in model.texts:
            raise ConfigError(f'tower {name!r} is one of pictures, which no format here holds; set export.format to "none"')
        if format == "hf" and isinstance(model.towers[name].arch, Static):
            raise ConfigError(f"tower {name!r} is a static table, which is no Hugging Face model; write sentence-transformers")


def export(
    model: Model,
    folder: Path,
    format: str = "sentence-transformers",
    *,
    texts: Sequence[str] = (),
    scores: Mapping[str, float] | None = None,
    replace: bool = False,
    title: str = "",
    adapter: str = "",
) -> float:
    """Writes the model as a folder and compares it with the model on at least 256 texts, among them `texts`.

    "sentence-transformers" is the legacy spelling every server reads; "hf" the bare encoder, tokenizer and config. Of a query
    and a document tower each is a folder of that kind, FOLDER/query and FOLDER/document; "sentence-transformers" joins them as
    a Router. Class heads go beside it. Of several adapters `adapter` names that which is merged into the kernels. The folder is
    put in place whole, after the gate. Returns the largest difference; raises CheckFailed above 1e-4, StorageError when the
    folder exists (unless `replace`), ConfigError for an unknown format or adapter, or other towers.
    """
    folder = folder.absolute()
    check_format(model.config, format)
    model = _finished(adapted(model, adapter))
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; choose a folder to write, or one that is not there")
    if folder.exists() and not replace and any(folder.iterdir()):
        raise StorageError(f"{folder}: exists and is not empty; choose another folder")
    part = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    towers = {route: _part(model, name) for route, name in model.config.routes.items()}
    if format == "hf":
        for route, tower in towers.items():
            written.write_hf(part if len(towers) == 1 else part / route, *tower[:2], write_tokenizer=tower[2])
    elif len(towers) == 1:
        tower = towers["text"]
        written.write_sentence_transformers(part, *tower[:2], write_tokenizer=tower[2])
    else:
        written.write_router(part, towers)
    shown = _headless(model) if format == "hf" else model
    write_heads(part, shown.heads)
    (part / "README.md").write_text(card.card(shown, title or folder.name, scores, format))
    difference = gate.write(_exact(shown), part, texts)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    return difference


def _part(model: Model, name: str) -> written.Part:
    tower, texts = model.config.texts[name], model.texts[name]

    def write_tokenizer(where: Path) -> None:
        if isinstance(tower.arch, Static):
            save_truncating(texts.tokenizer, where, max_length=texts.max_length)
        else:
            save_tokenizer(texts.tokenizer, where, max_length=texts.max_length, source=model.tokenizers[name])

    return tower, jax.tree.map(np.asarray, model.params["towers"][name]), write_tokenizer


def _finished(model: Model) -> Model:
    """The model without the towers that only guided its training."""
    keep = lambda tree: {name: tree[name] for name in model.config.encoders}
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
    exact = {name: dataclasses.replace(tower, compute="float32") for name, tower in model.config.texts.items()}
    return _with(model, exact)


def _headless(model: Model) -> Model:
    """The model as a reader of bare encoders has it: mean pooling, cosines of length 1, no projection, no prompts."""
    plain = {"prompts": {}, "default_prompt": None, "include_prompt": True}
    head = {"pooling": "mean", "dense": (), "normalize": True, "similarity": "cosine"}
    towers = {name: dataclasses.replace(tower, **head, **plain) for name, tower in model.config.texts.items()}
    params = {name: {"encoder": params["encoder"]} for name, params in model.params["towers"].items()}
    texts = {name: dataclasses.replace(texts, **plain) for name, texts in model.texts.items()}
    return dataclasses.replace(_with(model, towers), params={"towers": params}, texts=texts, heads={})


def _with(model: Model, towers: dict[str, Tower]) -> Model:
    config = dataclasses.replace(model.config, towers=towers)
    return dataclasses.replace(model, config=config, embedders={name: build_embedder(t) for name, t in towers.items()})
