"""Model folders that others wrote -> a resolved Tower and its parameters. Reads no tokenizer and runs no code of the folder.

Two kinds: plain Hugging Face folders (config.json, model.safetensors) and sentence-transformers folders (modules.json
besides), in the legacy spelling (classes under sentence_transformers.models, pooling by booleans, max_seq_length) and in
that of 5.4 and later (other class paths, `pooling_mode`, the tokenizer's model_max_length). Of a Router each route is read as
a folder of its own, FOLDER/query and FOLDER/document. Late interaction is kept in three ways: `pylate.py`, `multi_vector.py`,
`stanford.py`; class heads in the model in one, `sequence_classification.py`. Texts of CLIP's and SigLIP's models are found by
`pictures.py`.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from embedjax.config import Architecture, ClipText, SiglipText, Static, Tower
from embedjax.config.errors import ConfigError, nearest
from embedjax.models import classifier, multi_vector, open_clip, pictures, sequence_classification, stanford
from embedjax.models.classifier import Head
from embedjax.models.clip import POOLING
from embedjax.models.families import FAMILIES, described, family_of
from embedjax.models.families.static import LONGEST, from_model2vec
from embedjax.models.jsonfile import get, read_json
from embedjax.models.layout import is_route, layout, of_side, refuse_code
from embedjax.models.modules import (
    encoder_config,
    read_dense,
    read_dense_params,
    read_multi_vector,
    read_pooling,
    read_settings,
)
from embedjax.models.weights import from_tensors, load_tensors

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", stanford.METADATA]  # what is fetched from the hub; never code
UNUSED = ["onnx/*", "openvino/*", "*/onnx/*", "stablehlo/*", "*/stablehlo/*", "*.onnx*", "flax_model*"]
PLAIN = {"prompts": {}, "default_prompt": None, "similarity": "cosine"}  # of a folder that says nothing of them
MODEL2VEC_LENGTH = 512


def resolve(name_or_path: str | Path) -> Path:
    """The local folder of a model: a folder that exists, else the snapshot of a hub id such as "org/name".

    Fetches safetensors, JSON and tokenizer text only. Raises ConfigError when the model cannot be had.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if name and (path.is_dir() or is_route(path)):
        return path
    if name and path.exists():
        raise ConfigError(f"{path} is a file; expected a model folder or a hub id")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ConfigError(f"the model folder {name!r} does not exist (and is no hub id of the form org/name)")
    import huggingface_hub  # costs a third of a second, and only hub ids need it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, ignore_patterns=UNUSED))
    except Exception as error:  # whatever HTTP library the hub's client uses has its own errors
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{name!r} is no local folder and could not be fetched from the hub: {type(error).__name__}: {reason}"
        ) from error


def read_tower(folder: str | Path) -> Tower:
    """The fully resolved Tower of a folder, or of a Router's route; its `init` is the folder and its `tokenizer` where the
    tokenizer's files are.

    A plain Hugging Face folder pools by the mean and normalises, also one with a class head that we did not write. Raises
    ConfigError for an architecture, module or option that is not supported, for code of the folder's own, and for files that
    are missing, malformed or contradictory.
    """
    place = of_side(Path(folder), "text")
    if (joint := pictures.find(place)) is not None:
        return _read_text_side(Path(folder), joint)
    found = layout(place)
    if found.static:
        arch, _, unstated = _read_static(found.encoder)
        max_length = _read_truncation(found.encoder, unstated)
    else:
        arch = read_arch(found.encoder)
        max_length = _read_max_length(found.encoder, arch, bool(found.late))
    pooling: dict[str, Any] = {"pooling": "mean", "include_prompt": True}
    if found.pooling:
        pooling = read_pooling(found.pooling, arch.width)
    elif found.settings and not found.static and not found.late:
        raise ConfigError(f"{folder} lists a Transformer and no Pooling; it is read with one")
    settings: dict[str, Any] = {"max_length": max_length, **PLAIN}
    settings |= read_settings(found.settings, found.late) if found.settings else {}
    if found.late == "multi-vector":
        settings = read_multi_vector(found, settings, longest=max_length)
    if found.late == "stanford":
        late, projection = stanford.read_late(found.encoder)
        dense, settings["late"] = (projection,), late
        settings["max_length"] = max(late.query_length, late.document_length)
    else:
        dense = read_dense(found.dense, arch.width, found.late)
    if found.late and settings["max_length"] > (most := family_of(arch).longest(arch)):
        raise ConfigError(f"{folder}: texts are of up to {settings['max_length']} tokens; the encoder has positions for {most}")
    head = {"dense": dense, "normalize": found.normalize, **pooling}
    if found.head is not None:
        head |= sequence_classification.read_settings(found.encoder, arch)
    return Tower(arch=arch, init=str(folder), tokenizer=str(found.encoder), **settings | head)


def read_params(folder: str | Path, tower: Tower) -> dict[str, Any]:
    """The parameters {"encoder": ..., "dense": {"0": ...}} of a folder for a tower, numpy float32.

    "dense" is there only when the folder has projections. Raises ConfigError when encoder or projections are not the tower's.
    """
    place = of_side(Path(folder), "text")
    if pictures.find(place) is not None:
        return pictures.read_params(place, "text", tower.arch)
    found = layout(place)
    if tower.arch is None:
        raise ConfigError(f"the tower of {folder} has no architecture; it must be resolved before its weights are read")
    if found.static != isinstance(tower.arch, Static):
        raise ConfigError(
            f"{folder} holds a {'static table' if found.static else 'transformer'}, not a {type(tower.arch).__name__}"
        )
    if found.late == "stanford":
        return stanford.read_params(found.encoder, tower.arch)
    tensors = _read_static(found.encoder)[1] if found.static else load_tensors(found.encoder)
    encoder = from_tensors(tower.arch, tensors, file=found.encoder)
    if found.head is not None and not tower.late:
        return {"encoder": encoder, **sequence_classification.read_dense(found.encoder, tower.arch)}
    if tower.late and not found.late:
        return {"encoder": encoder}  # its projections, if any, are those of a pooled vector
    specs = read_dense(found.dense, tower.arch.width, found.late)
    if specs and specs != tower.dense:
        raise ConfigError(f"{folder} has the projections {specs}, the tower {tower.dense}")
    return {"encoder": encoder, **read_dense_params(found.dense, specs, tower.arch.width)}


def read_heads(folder: Path) -> dict[str, Head]:
    """The class heads of a folder by name: those beside the model, or the one in it. Raises ConfigError for damaged ones."""
    name = sequence_classification.head_name(folder)
    beside = classifier.read_heads(folder)
    return beside if name is None else {name: sequence_classification.read_head(folder, read_arch(folder))}


def _read_text_side(folder: Path, found: pictures.Found) -> Tower:
    """The tower of texts as CLIP and SigLIP have it, alone or beside one of pictures."""
    arch, dense = pictures.required(folder, "text").parts["text"]
    assert isinstance(arch, ClipText | SiglipText)
    by_positions = found.file.name == open_clip.CONFIG  # which its tokenizer pads to
    return Tower(
        arch=arch,
        init=str(folder),
        tokenizer=str(found.place),
        pooling=POOLING,
        dense=dense,
        normalize=found.normalize,
        include_prompt=True,
        max_length=arch.positions if by_positions else _read_max_length(found.place, arch),
        **(read_settings(found.settings) if found.settings else PLAIN),
    )


def read_arch(folder: Path) -> Architecture:
    """The architecture in a folder's config.json."""
    file = folder / "config.json"
    config = read_json(file)
    refuse_code(folder)
    kind = get(config, "model_type", str, "", file=file)
    if kind not in FAMILIES:
        raise ConfigError(f"{file}: model_type {kind!r} is not supported; {nearest(kind, FAMILIES)}")
    return described(FAMILIES[kind], config, file=file)


def _read_static(folder: Path) -> tuple[Static, dict[str, np.ndarray], int]:
    """A table's architecture and tensors, and the longest text where its tokenizer states none: it has no config, its sizes are
    those of its one tensor. model2vec cuts texts, sentence-transformers does not."""
    stored = load_tensors(folder)
    tensors = from_model2vec(stored, file=folder)
    table = tensors.get("embedding.weight")
    if table is None or table.ndim != 2 or 0 in table.shape:
        raise ConfigError(f"{folder} holds the tensors {sorted(tensors)}; expected a table `embedding.weight`")
    return Static(*table.shape), tensors, MODEL2VEC_LENGTH if "embeddings" in stored else LONGEST


def _read_truncation(folder: Path, unstated: int) -> int:
    """The limit in tokens that a table's tokenizer.json states."""
    file = folder / "tokenizer.json"
    truncation = get(read_json(file), "truncation", dict, {}, file=file)
    stated = min(get(truncation, "max_length", int, unstated, file=file), LONGEST)
    if stated < 1:
        raise ConfigError(f"{file}: the longest text is {stated} tokens; it must be at least 1")
    return stated


def _read_max_length(folder: Path, arch: Architecture, late: bool = False) -> int:
    """The folder's own limit in tokens if it states one, never more than the encoder has positions for."""
    config_file, config = encoder_config(folder)
    if not late and (odd := [key for key in multi_vector.SETTINGS if config.get(key) is not None]):
        raise ConfigError(f"{config_file}: {odd[0]} is not supported where texts have one vector; remove it")
    task = get(config, "transformer_task", str, "feature-extraction", file=config_file)
    if task != "feature-extraction":
        raise ConfigError(f"{config_file}: transformer_task {task!r} is not supported; expected 'feature-extraction'")
    if get(config, "do_lower_case", bool, False, file=config_file) and not _lowercases(folder):
        raise ConfigError(f"{config_file} asks to lowercase texts (do_lower_case), but tokenizer.json's normalizer does not")
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer = read_json(tokenizer_file) if tokenizer_file.exists() else {}
    most = family_of(arch).longest(arch)
    stated = get(config, "max_seq_length", int, None, file=config_file)
    if stated is None:
        stated = get(tokenizer, "model_max_length", int, most, file=tokenizer_file)
    if stated < 1:
        raise ConfigError(f"{folder}: the longest text is {stated} tokens; it must be at least 1")
    return min(stated, most)


def _lowercases(folder: Path) -> bool:
    """Whether the tokenizer lowercases by itself; a folder without tokenizer.json is left to the tokenizer's own loader."""
    file = folder / "tokenizer.json"
    normalizer = (read_json(file).get("normalizer") or {}) if file.exists() else {"type": "Lowercase"}
    steps = [normalizer, *normalizer.get("normalizers", [])]
    return any(step.get("type") == "Lowercase" or step.get("lowercase") is True for step in steps)
