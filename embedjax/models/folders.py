"""Model folders that others wrote -> a resolved Tower and its parameters. Reads no tokenizer and runs no code of the folder.

Two kinds: plain Hugging Face folders (config.json, model.safetensors) and sentence-transformers folders (modules.json
besides), in the legacy spelling (classes under sentence_transformers.models, pooling by booleans, max_seq_length) and in
that of 5.4 and later (other class paths, `pooling_mode`, the tokenizer's model_max_length). Of a Router each route is read as
a folder of its own, FOLDER/query and FOLDER/document.
"""

import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from embedjax.config import Architecture, Dense, Static, Tower
from embedjax.config.errors import ConfigError, nearest
from embedjax.config.model import PoolingName, Similarity
from embedjax.models import pictures
from embedjax.models.clip import POOLING
from embedjax.models.families import FAMILIES, described, family_of
from embedjax.models.families.static import LONGEST, from_model2vec
from embedjax.models.jsonfile import get, read_json
from embedjax.models.layout import SETTINGS, Layout, is_route, layout
from embedjax.models.weights import from_tensors, load_tensors

FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]  # what is fetched from the hub; never code
UNUSED = ["onnx/*", "openvino/*", "*/onnx/*", "*.onnx*", "flax_model*"]
BOOLEANS = {  # the legacy spelling's key of each pooling
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS: dict[str, Literal["tanh", "identity"]] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}
PLAIN = {"prompts": {}, "default_prompt": None, "similarity": "cosine"}  # of a folder that says nothing of them
MODEL2VEC_LENGTH = 512
ENCODER_CONFIGS = tuple(f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "xlm-roberta"))


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

    A plain Hugging Face folder pools by the mean and normalises. Raises ConfigError for an architecture, module or option
    that is not supported, for code of the folder's own, and for files that are missing, malformed or contradictory.
    """
    folder = Path(folder)
    if "text" in pictures.sides(folder):
        return _read_text_side(folder)
    found = layout(folder)
    if found.static:
        arch, _, unstated = _read_static(found.encoder)
        max_length = _read_truncation(found.encoder, unstated)
    else:
        arch = read_arch(found.encoder)
        max_length = _read_max_length(found.encoder, arch)
    pooling: dict[str, Any] = {"pooling": "mean", "include_prompt": True}
    if found.pooling:
        pooling = _read_pooling(found.pooling, arch.width)
    return Tower(
        arch=arch,
        init=str(folder),
        tokenizer=str(found.encoder),
        dense=_read_dense(found, arch.width),
        normalize=found.normalize,
        max_length=max_length,
        **pooling,
        **(_read_settings(found.settings) if found.settings else PLAIN),
    )


def read_params(folder: str | Path, tower: Tower) -> dict[str, Any]:
    """The parameters {"encoder": ..., "dense": {"0": ...}} of a folder for a tower, numpy float32.

    "dense" is there only when the folder has projections. Raises ConfigError when encoder or projections are not the tower's.
    """
    if "text" in pictures.sides(Path(folder)):
        return pictures.read_params(Path(folder), "text", tower.arch)
    found = layout(Path(folder))
    if tower.arch is None:
        raise ConfigError(f"the tower of {folder} has no architecture; it must be resolved before its weights are read")
    if found.static != isinstance(tower.arch, Static):
        raise ConfigError(
            f"{folder} holds a {'static table' if found.static else 'transformer'}, not a {type(tower.arch).__name__}"
        )
    tensors = _read_static(found.encoder)[1] if found.static else load_tensors(found.encoder)
    params: dict[str, Any] = {"encoder": from_tensors(tower.arch, tensors, file=found.encoder)}
    specs = _read_dense(found, tower.arch.width)
    if specs and specs != tower.dense:
        raise ConfigError(f"{folder} has the projections {specs}, the tower {tower.dense}")
    width = tower.arch.width
    for n, (path, spec) in enumerate(zip(found.dense, specs, strict=True)):
        params.setdefault("dense", {})[str(n)] = _read_dense_weights(path, spec, width)
        width = spec.features
    return params


def _read_text_side(folder: Path) -> Tower:
    """The tower of texts of a model of pictures and texts."""
    arch, dense = pictures.part(folder, "text")
    assert isinstance(arch, Architecture)
    return Tower(
        arch=arch,
        init=str(folder),
        tokenizer=str(folder),
        pooling=POOLING,
        dense=dense,
        normalize=True,
        include_prompt=True,
        max_length=_read_max_length(folder, arch),
        **PLAIN,
    )


def read_arch(folder: Path) -> Architecture:
    """The architecture in a folder's config.json."""
    file = folder / "config.json"
    config = read_json(file)
    tokenizer = folder / "tokenizer_config.json"
    for place in (file, tokenizer) if tokenizer.exists() else (file,):
        if read_json(place).get("auto_map"):
            raise ConfigError(f"{place} asks for code of its own (auto_map); code from a model folder is never run")
    kind = get(config, "model_type", str, "", file=file)
    if kind not in FAMILIES:
        raise ConfigError(f"{file}: model_type {kind!r} is not supported; {nearest(kind, FAMILIES)}")
    return described(FAMILIES[kind], config, file=file)


def _read_pooling(folder: Path, width: int) -> dict[str, Any]:
    file = folder / "config.json"
    config = read_json(file)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in BOOLEANS.items() if get(config, key, bool, False, file=file)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in get_args(PoolingName):
        raise ConfigError(f"{file}: pooling {modes} is not supported; expected one of {', '.join(get_args(PoolingName))}")
    found = get(config, "embedding_dimension", int, get(config, "word_embedding_dimension", int, width, file=file), file=file)
    if found != width:
        raise ConfigError(f"{file}: pools vectors of width {found}, but the encoder's width is {width}")
    return {"pooling": modes[0], "include_prompt": get(config, "include_prompt", bool, True, file=file)}


def _read_settings(folder: Path) -> dict[str, Any]:
    """What the folder says of the whole model: prompts and similarity."""
    file = folder / SETTINGS
    config = read_json(file) if file.exists() else {}
    kind = get(config, "model_type", str, "SentenceTransformer", file=file)
    if kind != "SentenceTransformer":
        raise ConfigError(f"{file}: model_type {kind!r} is not supported; expected 'SentenceTransformer'")
    if config.get("truncate_dim") is not None:
        raise ConfigError(
            f"{file}: truncate_dim {config['truncate_dim']!r} is not supported; remove it to read the whole vectors"
        )
    prompts = get(config, "prompts", dict, {}, file=file)
    for name, prompt in prompts.items():
        if not isinstance(prompt, str):
            raise ConfigError(f"{file}: prompt {name!r} is {prompt!r}; expected text")
    default = get(config, "default_prompt_name", str, None, file=file)
    if default is not None and default not in prompts:
        raise ConfigError(f"{file}: default_prompt_name {default!r} is no prompt; {nearest(default, prompts)}")
    similarity = get(config, "similarity_fn_name", str, "cosine", file=file)
    if similarity not in get_args(Similarity):
        expected = ", ".join(get_args(Similarity))
        raise ConfigError(f"{file}: similarity_fn_name {similarity!r} is not supported; expected one of {expected}")
    return {"prompts": prompts, "default_prompt": default, "similarity": similarity}


def _read_dense(found: Layout, width: int) -> tuple[Dense, ...]:
    specs = []
    for folder in found.dense:
        file = folder / "config.json"
        config = read_json(file)
        where = {get(config, f"module_{end}_name", str, "sentence_embedding", file=file) for end in ("input", "output")}
        if where != {"sentence_embedding"} or get(config, "use_residual", bool, False, file=file):
            raise ConfigError(f"{file}: only projections of the pooled vector without a residual are supported")
        activation = get(config, "activation_function", str, "torch.nn.modules.activation.Tanh", file=file)
        if activation not in ACTIVATIONS:
            raise ConfigError(f"{file}: activation {activation!r} is not supported; {nearest(activation, ACTIVATIONS)}")
        if (found := get(config, "in_features", int, 0, file=file)) != width:
            raise ConfigError(f"{file}: in_features is {found}, but the vectors before it have width {width}")
        width = get(config, "out_features", int, 0, file=file)
        if width < 1:
            raise ConfigError(f"{file}: out_features is {width}; it must be at least 1")
        specs.append(Dense(width, get(config, "bias", bool, True, file=file), ACTIVATIONS[activation]))
    return tuple(specs)


def _read_dense_weights(folder: Path, spec: Dense, width: int) -> dict[str, np.ndarray]:
    tensors = load_tensors(folder)
    expected = {"linear.weight": (spec.features, width)} | ({"linear.bias": (spec.features,)} if spec.bias else {})
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected or any(tensor.dtype != np.float32 for tensor in tensors.values()):
        raise ConfigError(f"{folder} holds the tensors {found}; expected floating-point {expected}")
    kernel = {"kernel": np.ascontiguousarray(tensors["linear.weight"].T)}
    return kernel | ({"bias": tensors["linear.bias"]} if spec.bias else {})


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


def _read_max_length(folder: Path, arch: Architecture) -> int:
    """The folder's own limit in tokens if it states one, never more than the encoder has positions for."""
    config_file = next((folder / name for name in ENCODER_CONFIGS if (folder / name).exists()), folder / ENCODER_CONFIGS[0])
    config = read_json(config_file) if config_file.exists() else {}
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
