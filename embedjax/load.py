"""MODEL -> embedders, parameters and tokenizers: a run folder, an exported or Hugging Face folder, or a hub id."""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from embedjax import config as configs
from embedjax import saves
from embedjax.config import ROLES, TOKEN_FEATURES, ClipText, Dense, ImageTower, Pixels, Static, Tower, serialize
from embedjax.config.errors import ConfigError, StorageError
from embedjax.data.image import Images
from embedjax.data.image import check as check_images
from embedjax.data.text import Texts
from embedjax.data.tokenizer import add_tokens, load_tokenizer
from embedjax.models import folders, layout, lora, pictures
from embedjax.models.classifier import Head
from embedjax.models.embedder import Embedder, build_embedder
from embedjax.models.families import family_of
from embedjax.models.image import ImageEmbedder
from embedjax.objective import combine
from embedjax.objective.inbatch import first_scale

_log = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=Tower | ImageTower)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to encode.

    `params` is `{"towers": {name: ...}}` on the host or on devices; `texts` turns strings into ids, and `tokenizers` are the
    folders of their files, for each tower of texts; `origin` says where it came from, `details` what is known of its training;
    `heads` tell classes, each by the name of the set that trained it.
    """

    config: configs.Model
    embedders: Mapping[str, Embedder | ImageEmbedder]
    params: Mapping[str, Any]
    texts: Mapping[str, Texts]
    tokenizers: Mapping[str, Path]
    origin: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, Head] = dataclasses.field(default_factory=dict)


def load(name: str | Path) -> Model:
    """The model of a run folder (its newest save; RUN@best, RUN@500, ... as `saves` reads them), of an exported,
    sentence-transformers, Hugging Face or open_clip folder, or of a hub id. A Router, and a folder of two models `query` and
    `document`, give two towers; a model of pictures and texts two that search pictures by texts. Raises ConfigError when it is
    none of these."""
    if found := run_of(str(name)):
        return _from_run(*found)
    folder = folders.resolve(str(name))
    routes = layout.routes(folder)
    found = None if routes else pictures.find(folder)
    parts = routes or dict.fromkeys(found.parts if found else ("text",), folder)
    towers = {side: _read_side(part, side) for side, part in parts.items()}
    params = found.params() if found else {"towers": {side: _read_params(tower) for side, tower in towers.items()}}
    tokenizers = {side: Path(tower.tokenizer) for side, tower in towers.items() if isinstance(tower, Tower)}
    texts = {side: make_texts(tower, tokenizers[side]) for side, tower in towers.items() if isinstance(tower, Tower)}
    sides = {"anchor": "text", "positive": "image"} if "image" in parts else {column: role for role, column in ROLES.items()}
    model = configs.Model({**towers}, sides if len(parts) > 1 else {})
    details = {"loss": params["loss"]} if "loss" in params else {}
    return assemble(model, params, texts, tokenizers, str(name), details, heads=folders.read_heads(folder))


def _read_side(folder: Path, side: str) -> Tower | ImageTower:
    found = pictures.find(folder) if side in ROLES else None
    image = side == "image" or (found is not None and "text" not in found.parts)
    return pictures.read_image_tower(folder) if image else folders.read_tower(folder)


def _read_params(tower: Tower | ImageTower) -> dict[str, Any]:
    if isinstance(tower, ImageTower):
        return pictures.read_params(Path(tower.init), "image", tower.arch)
    return folders.read_params(tower.init, tower)


def assemble(
    model: configs.Model,
    params: Mapping,
    texts: Mapping[str, Texts],
    tokenizers: Mapping[str, Path],
    origin: str,
    details: Mapping[str, Any] | None = None,
    heads: Mapping[str, Head] | None = None,
) -> Model:
    """A Model from resolved towers, their parameters and what tokenizes for them."""
    embedders = {name: build_embedder(tower) for name, tower in model.towers.items()}
    return Model(model, embedders, {"towers": params["towers"]}, texts, tokenizers, origin, details or {}, heads or {})


def adapted(model: Model, name: str = "") -> Model:
    """The model with one adapter in its kernels and no other left, nor heads of others; without adapters simply the model.

    The name may be left out where there is one adapter or one is called "default". Raises ConfigError for one it has not.
    """
    towers = model.config.towers
    if not any(tower.lora for tower in towers.values()):
        if name:
            raise ConfigError(f"{model.origin} has no adapters; it was asked for {name!r}")
        return model
    plain, params = dict(towers), dict(model.params["towers"])
    for key, tower in towers.items():
        if tower.lora:
            plain[key] = dataclasses.replace(tower, lora={})
            params[key] = plain_params(model, key, name)
    chosen = adapter_of(model.config, name)
    heads = {key: dataclasses.replace(head, adapter="") for key, head in model.heads.items() if head.adapter == chosen}
    config = dataclasses.replace(model.config, towers=plain)
    return dataclasses.replace(model, config=config, params={"towers": params}, heads=heads)


def adapter_of(model: configs.Model, name: str = "") -> str:
    """The adapter that a name, or none, means to the towers that encode; empty where there is none, or it differs by tower.
    Raises ConfigError as `adapted` does."""
    found = {lora.chosen(model.towers[tower].lora, name) for tower in model.encoders} - {None}
    return str(found.pop()) if len(found) == 1 else ""


def plain_params(model: Model, tower: str, adapter: str = "") -> dict[str, Any]:
    """The parameters of one tower with one adapter in its kernels and no other left. Raises ConfigError as `adapted` does."""
    adapters = model.config.towers[tower].lora
    return lora.merged(model.params["towers"][tower], adapters, lora.chosen(adapters, adapter))


def make_texts(tower: Tower, tokenizer: Path) -> Texts:
    """What turns strings into the inputs of a resolved tower. Raises ConfigError when the tokenizer outgrows its table."""
    loaded = load_tokenizer(tokenizer)
    assert tower.arch is not None and tower.max_length is not None
    if isinstance(tower.arch, Static):
        loaded.post_processor = None  # which puts the special tokens around a text
    if tower.late:
        add_tokens(loaded, (tower.late.query_marker, tower.late.document_marker), tower.arch.vocab_size)
    size = loaded.get_vocab_size()
    if size > tower.arch.vocab_size:
        raise ConfigError(f"{tokenizer}: the tokenizer has {size} tokens; the tower's vocab_size is {tower.arch.vocab_size}")
    if isinstance(tower.arch, ClipText) and (last := loaded.encode("").ids[-1:]) != [tower.arch.eos_id]:
        raise ConfigError(
            f"{tokenizer}: the tokenizer ends a text with token {last[0] if last else 'none'}; ClipText.eos_id is "
            f"{tower.arch.eos_id}, where other readers would pool"
        )
    return Texts(
        tokenizer=loaded,
        max_length=tower.max_length,
        prompts=tower.prompts or {},
        default_prompt=tower.default_prompt or None,
        include_prompt=tower.include_prompt is not False,
        pad_id=tower.arch.pad_id,
        fills=tower.arch.fills,
        late=tower.late,
    )


def make_images(tower: ImageTower) -> Images:
    """What turns pictures into the inputs of a resolved tower. Raises ConfigError when its sizes do not fit."""
    assert tower.arch is not None and tower.pixels is not None
    made = Images(tower.arch.image, tower.pixels, tower.augment)
    check_images(made)
    return made


def resolve_image_tower(tower: ImageTower, known: ImageTower | None = None) -> ImageTower:
    """An image tower without None, as `resolve_tower` makes one of texts."""
    if known is not None and known.init == tower.init:
        base = known
    elif tower.init:
        base = _start(tower.init, ImageTower)
    else:
        base = ImageTower(tower.arch, pixels=Pixels(), dense=(), normalize=True, similarity="cosine")
    given = {f.name: getattr(tower, f.name) for f in dataclasses.fields(tower)}
    chosen = {key: value for key, value in given.items() if value is not None}
    if tower.similarity == "dot":
        chosen.setdefault("normalize", False)
    return dataclasses.replace(base, **chosen)


def resolve_tower(tower: Tower | ImageTower, known: Tower | ImageTower | None = None) -> Tower | ImageTower:
    """A tower without None: what it leaves open comes from the folder of `init`, else from the defaults.

    `known` is the same tower as a run resolved it earlier; then the folder is not asked and need no longer be there.
    """
    if isinstance(tower, ImageTower):
        return resolve_image_tower(tower, known if isinstance(known, ImageTower) else None)
    return resolve_text_tower(tower, known if isinstance(known, Tower) else None)


def resolve_text_tower(tower: Tower, known: Tower | None = None) -> Tower:
    """`resolve_tower` of a tower of texts."""
    if known is not None and known.init == tower.init:
        base = known
    elif tower.init:
        base = _start(tower.init, Tower)
    else:
        base = Tower(
            arch=tower.arch,
            pooling="mean",
            dense=(),
            normalize=True,
            similarity="cosine",
            max_length=128,
            prompts={},
            include_prompt=True,
        )
    given = {f.name: getattr(tower, f.name) for f in dataclasses.fields(tower)}
    named = {"init", "tokenizer", "compute", "remat", "layers", "lowercase"}
    chosen = {key: value for key, value in given.items() if key in named or value is not None}
    if not tower.tokenizer and base.tokenizer != base.init:
        chosen["tokenizer"] = base.tokenizer  # it is beside the encoder, which is not at the top of every folder
    if tower.similarity == "dot":
        chosen.setdefault("normalize", False)  # or the product would be a cosine again
    if tower.late or base.late:
        chosen |= _late(tower, base)
    resolved = dataclasses.replace(base, **chosen)
    assert resolved.arch is not None and resolved.max_length is not None
    if resolved.max_length > (most := family_of(resolved.arch).longest(resolved.arch)):
        raise ConfigError(f"max_length {resolved.max_length} is above the {most} tokens the architecture has positions for")
    if isinstance(resolved.arch, Static) and (resolved.pooling, resolved.include_prompt) != ("mean", True):
        raise ConfigError("a static tower is the mean over all tokens; leave `pooling` and `include_prompt` as they are")
    if resolved.default_prompt and resolved.default_prompt not in (resolved.prompts or {}):
        raise ConfigError(
            f"default_prompt {resolved.default_prompt!r} is not among the prompts {sorted(resolved.prompts or {})}; "
            'name one of them, or "" for none'
        )
    return resolved


def _late(tower: Tower, base: Tower) -> dict[str, Any]:
    """What late interaction decides of a tower that resolves over `base`."""
    late = tower.late or base.late
    assert late is not None and base.arch is not None
    if isinstance(base.arch, Static) or base.arch.fills:
        raise ConfigError(f"{type(base.arch).__name__} has no late interaction: it knows no context of a token, or no padding")
    longest = max(late.query_length, late.document_length)
    if tower.max_length not in (None, longest):
        raise ConfigError(
            f"max_length is {tower.max_length}; late interaction has Late.query_length and Late.document_length instead"
        )
    if base.late and (
        other := [f.name for f in dataclasses.fields(late) if getattr(late, f.name) != getattr(base.late, f.name)]
    ):
        told = "; ".join(f"{name} {getattr(late, name)!r}, there {getattr(base.late, name)!r}" for name in other)
        _log.warning("the tower's `late` is not that of %s, whose model may expect its own: %s", tower.init, told)
    found: dict[str, Any] = {"late": late, "max_length": longest}
    if tower.dense is None and not base.late:  # its projections, if any, are those of a pooled vector
        found["dense"] = (Dense(TOKEN_FEATURES, bias=False, activation="identity"),)
    return found


def read_start(tower: Tower | ImageTower) -> dict[str, Any]:
    """The parameters that a resolved tower starts from, numpy float32: those of its `init`, a folder, hub id or run. Late
    interaction projects tokens, so that it leaves out the projections of a pooled vector. Raises ConfigError where they are of
    another tower."""
    kind = ImageTower if isinstance(tower, ImageTower) else Tower
    known = _start(tower.init, kind)
    anew = isinstance(tower, Tower) and isinstance(known, Tower) and bool(tower.late) and not known.late
    if known.dense and known.dense != tower.dense and not anew:
        raise ConfigError(f"{tower.init} has the projections {known.dense}, the tower {tower.dense}")
    if run := run_of(tower.init):
        model = _from_run(*run)
        params = plain_params(model, _only(model.config, kind, tower.init))
        params = {name: jax.tree.map(np.asarray, part) for name, part in params.items() if not (anew and name == "dense")}
        return {**params, "encoder": pictures.fitted(params["encoder"], known.arch, tower.arch, tower.init)}
    folder = folders.resolve(tower.init)
    if isinstance(tower, ImageTower):
        return pictures.read_params(folder, "image", tower.arch)
    return folders.read_params(folder, tower)


def _start(init: str, kind: type[Kind]) -> Kind:
    """The resolved tower of a folder, hub id or run, of one kind."""
    if run := run_of(init):
        model = serialize.read(run[0] / "config.json").model
        name = _only(model, kind, init)
        tower = dataclasses.replace(model.towers[name], init=init, lora={}, freeze_layers=0)
        if isinstance(tower, Tower):
            tower = dataclasses.replace(tower, tokenizer=str(tokenizer_folders(run[0], model)[name]))
    else:
        folder = folders.resolve(init)
        tower = pictures.read_image_tower(folder) if kind is ImageTower else folders.read_tower(folder)
    assert isinstance(tower, kind)
    return tower


def _only(model: configs.Model, kind: type, init: str) -> str:
    """The name of a run's one tower of a kind."""
    names = [name for name in model.encoders if isinstance(model.towers[name], kind)]
    if len(names) != 1:
        what = "pictures" if kind is ImageTower else "texts"
        raise ConfigError(f"a tower's init is the run {init}, which has {len(names)} towers of {what} ({names}); one is needed")
    return names[0]


def run_of(name: str) -> tuple[Path, str] | None:
    """(run folder, which of its saves) that RUN or RUN@WHICH means; None for a name of something else."""
    run, _, which = (name, "", "") if is_run(Path(name)) else name.rpartition("@")
    return (Path(run), which) if run and is_run(Path(run)) else None


def is_run(path: Path) -> bool:
    """Whether a folder is a run: its config.json is ours, not a Hugging Face one."""
    file = path / "config.json"
    try:
        return file.is_file() and json.loads(file.read_text()).get("type") == "Config"
    except (ValueError, AttributeError, OSError):
        return False


def tokenizer_folders(run: Path, model: configs.Model) -> dict[str, Path]:
    """Where a run keeps the tokenizer of each tower of texts."""
    return {name: run / "tokenizer" / name for name, tower in model.towers.items() if isinstance(tower, Tower)}


def best_metric(config: configs.Config) -> str | None:
    """The metric that chooses the best save: the config's, else the main one of the first task."""
    tasks = config.evaluate.tasks
    return config.evaluate.best or (tasks[0].main_metric if tasks else None)


def _from_run(path: Path, which: str) -> Model:
    config = serialize.read(path / "config.json")
    params, step = saves.read(path, which, best_metric(config))
    params = combine(params, read_constants(path))
    tokenizers = tokenizer_folders(path, config.model)
    texts = {
        name: make_texts(tower, tokenizers[name]) for name, tower in config.model.towers.items() if isinstance(tower, Tower)
    }
    details = {"config": config, "step": step, "run": str(path), "loss": scale_and_bias(config, params)}
    return assemble(config.model, params, texts, tokenizers, str(path), details, heads_of(config, params))


def scale_and_bias(config: configs.Config, params: Mapping) -> dict[str, float]:
    """The logarithm of the factor on a run's cosines, and what is added to them: {"scale", "bias"}, as the first in-batch loss
    has or has learned them; {} without one."""
    losses = [loss for task in config.data.sets for loss in (task.loss, *getattr(task.loss, "losses", ()))]
    first = next((loss for loss in losses if isinstance(loss, configs.InBatch)), None)
    if first is None:
        return {}
    found = {"scale": math.log(first_scale(first, config.model))}
    found |= {"bias": first.bias} if isinstance(first, configs.Siglip) else {}
    learned = params.get("loss", {})
    return found | {name: float(np.asarray(learned[name])) for name in ("scale", "bias") if name in learned}


def heads_of(config: configs.Config, params: Mapping) -> dict[str, Head]:
    """The class heads among a run's parameters, by set."""
    heads = {}
    for task in config.data.tasks:
        for loss in task.loss.losses if isinstance(task.loss, configs.Sum) else (task.loss,):
            if isinstance(loss, configs.ClassHead):
                kernel, bias = (np.asarray(params["loss"][task.name][leaf]) for leaf in ("kernel", "bias"))
                labels = task.labels or tuple(map(str, range(len(bias))))
                pair, adapter = isinstance(loss, configs.ClassifyPair), adapter_of(config.model, task.adapter)
                heads[task.name] = Head(labels, pair, loss.criterion, kernel, bias, adapter)
    return heads


def write_constants(run: Path, constants: Mapping) -> None:
    """Saves what a run does not train, once, with its SHA-256 beside it."""
    if not constants:
        return
    file = run / "constants.safetensors"
    save_file(dict(_flat(constants)), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (run / "constants.sha256").write_text(f"{digest}  {file.name}\n")


def read_constants(run: Path) -> dict:
    """What `write_constants` saved, {} if nothing. Raises StorageError when the bytes have changed."""
    file = run / "constants.safetensors"
    if not file.exists():
        return {}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    wanted = (run / "constants.sha256").read_text().split()[0]
    if digest != wanted:
        raise StorageError(f"{file}: SHA-256 is {digest[:12]}..., {wanted[:12]}... was saved; the file is damaged")
    tree: dict = {}
    for path, array in load_file(file).items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def _flat(tree: Mapping, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value)
