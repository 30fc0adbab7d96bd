"""A model -> a folder that others load, with a parity gate."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from embedjax.config import Tower
from embedjax.config.errors import ConfigError, StorageError, nearest
from embedjax.data.text import save_tokenizer
from embedjax.export import card, gate
from embedjax.load import Model
from embedjax.models import written
from embedjax.models.embedder import build_embedder

FORMATS = {"sentence-transformers": written.write_sentence_transformers, "hf": written.write_hf}


def export(
    model: Model,
    folder: Path,
    format: str = "sentence-transformers",
    *,
    texts: Sequence[str] = (),
    scores: Mapping[str, float] | None = None,
    replace: bool = False,
    title: str = "",
) -> float:
    """Writes the model's tower as a folder and compares it with the model on at least 256 texts, among them `texts`.

    "sentence-transformers" is the legacy spelling every server reads; "hf" the bare encoder, tokenizer and config. The folder
    is put in place whole, after the gate. Returns the largest difference; raises CheckFailed above 1e-4, StorageError when the
    folder exists (unless `replace`), ConfigError for an unknown format or a model of several towers.
    """
    folder = folder.absolute()
    if format not in FORMATS:
        raise ConfigError(f"unknown export format {format!r}; {nearest(format, FORMATS)}")
    model = _alone(model, format)
    if folder.exists() and not replace and any(folder.iterdir()):
        raise StorageError(f"{folder}: exists and is not empty; choose another folder")
    (name, tower), part = next(iter(model.config.towers.items())), folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    params = jax.tree.map(np.asarray, model.params["towers"][name])
    write_tokenizer = lambda where: save_tokenizer(
        model.texts[name].tokenizer, where, max_length=model.texts[name].max_length, source=model.tokenizers[name]
    )
    FORMATS[format](part, tower, params, write_tokenizer=write_tokenizer)
    shown = _headless(model) if format == "hf" else model
    (part / "README.md").write_text(card.card(shown, title or folder.name, scores))
    difference = gate.write(_exact(shown), part, texts)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    return difference


def _alone(model: Model, format: str) -> Model:
    """The model with the one tower that encodes, without those that only guided its training."""
    names = model.config.encoders
    if len(names) != 1:
        raise ConfigError(f"{format} holds one tower; this model has {list(names)}")
    keep = lambda tree: {name: tree[name] for name in names}
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
    (name, tower) = next(iter(model.config.towers.items()))
    return _with(model, name, dataclasses.replace(tower, compute="float32"))


def _headless(model: Model) -> Model:
    """The model as a reader of a bare encoder has it: mean pooling, length 1, no projection, no prompts."""
    (name, tower), params = next(iter(model.config.towers.items())), dict(model.params["towers"])
    plain = dataclasses.replace(
        tower, pooling="mean", dense=(), normalize=True, prompts={}, default_prompt=None, include_prompt=True
    )
    params[name] = {"encoder": params[name]["encoder"]}
    texts = {name: dataclasses.replace(model.texts[name], prompts={}, default_prompt=None, include_prompt=True)}
    return dataclasses.replace(_with(model, name, plain), params={"towers": params}, texts=texts)


def _with(model: Model, name: str, tower: Tower) -> Model:
    config = dataclasses.replace(model.config, towers={name: tower})
    return dataclasses.replace(model, config=config, embedders={name: build_embedder(tower)})
