"""What the modules of a sentence-transformers folder say: pooling, projections, and the settings of the whole model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from embedjax.config import ROLES, Dense
from embedjax.config.errors import ConfigError, nearest
from embedjax.config.model import PoolingName, Similarity
from embedjax.models import multi_vector, pylate
from embedjax.models.jsonfile import get, read_json
from embedjax.models.layout import SETTINGS, Layout
from embedjax.models.weights import load_tensors

BOOLEANS = {  # the legacy spelling's key of each pooling
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ENCODER_CONFIGS = tuple(f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "xlm-roberta"))
MODEL_TYPES = {"": "SentenceTransformer", "pylate": pylate.MODEL_TYPE, "multi-vector": multi_vector.MODEL_TYPE}
"""What a folder's settings call the model, by who keeps its late interaction so."""
ACTIVATIONS: dict[str, Literal["tanh", "relu", "identity"]] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.linear.Identity": "identity",
}


def read_pooling(folder: Path, width: int) -> dict[str, Any]:
    """{"pooling", "include_prompt"} of a module that pools vectors of a width."""
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


def encoder_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of an encoder's settings, and what it holds; nothing where it is not there."""
    file = next((folder / name for name in ENCODER_CONFIGS if (folder / name).exists()), folder / ENCODER_CONFIGS[0])
    return file, read_json(file) if file.exists() else {}


def read_settings(folder: Path, late: str = "") -> dict[str, Any]:
    """What the folder says of the whole model: prompts and similarity; and by PyLate how late interaction makes texts. `late`
    is the layout's."""
    file = folder / SETTINGS
    config = read_json(file) if file.exists() else {}
    expected = MODEL_TYPES[late]
    kind = get(config, "model_type", str, expected, file=file)
    if kind != expected:
        raise ConfigError(f"{file}: model_type {kind!r} is not supported; expected {expected!r}")
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
    if late == "multi-vector":
        expected = multi_vector.SIMILARITY
        if (similarity := get(config, "similarity_fn_name", str, expected, file=file)) != expected:
            raise ConfigError(f"{file}: similarity_fn_name {similarity!r} is not supported; late interaction has {expected!r}")
        return {"prompts": prompts, "default_prompt": default, "similarity": "cosine"}
    if late:
        found = pylate.read_late(config, file=file)
        longest = max(found.query_length, found.document_length)
        return {"prompts": prompts, "default_prompt": default, "similarity": "cosine", "late": found, "max_length": longest}
    similarity = get(config, "similarity_fn_name", str, "cosine", file=file)
    if similarity not in get_args(Similarity):
        expected = ", ".join(get_args(Similarity))
        raise ConfigError(f"{file}: similarity_fn_name {similarity!r} is not supported; expected one of {expected}")
    return {"prompts": prompts, "default_prompt": default, "similarity": similarity}


def read_multi_vector(found: Layout, settings: dict[str, Any], *, longest: int) -> dict[str, Any]:
    """`settings`, and how late interaction makes texts, of a multi-vector folder of sentence-transformers. Texts are of at most
    `longest` tokens where it says nothing."""
    assert found.mask is not None and found.scale is not None
    multi_vector.check_scale(found.scale)
    file, encoder = encoder_config(found.encoder)
    late = multi_vector.read_late(encoder, longest=longest, skip=multi_vector.read_skip(found.mask), file=file)
    prompts, markers = multi_vector.split_prompts(settings["prompts"], found.encoder)
    late = dataclasses.replace(late, query_marker=markers["query"], document_marker=markers["document"])
    if settings["default_prompt"]:  # which is of no side here
        prompts = dict.fromkeys(ROLES, "") | prompts
    else:
        prompts = {name: text for name, text in prompts.items() if text or name not in ROLES}
    return {**settings, "prompts": prompts, "late": late, "max_length": max(late.query_length, late.document_length)}


def read_dense(folders: Sequence[Path], width: int, late: str = "") -> tuple[Dense, ...]:
    """The projections in a chain of folders, of vectors of a width; of pooled ones, or of tokens. `late` is the layout's."""
    pooled, tokens = "sentence_embedding", multi_vector.TOKENS
    # PyLate's is of tokens whatever it says.
    known = {"": (pooled,), "pylate": (tokens, pooled), "multi-vector": (tokens,)}[late]
    specs = []
    for folder in folders:
        file = folder / "config.json"
        config = read_json(file)
        before = get(config, "module_input_name", str, known[0], file=file)
        if before not in known or get(config, "module_output_name", str, before, file=file) != before:
            raise ConfigError(f"{file}: a projection of {before!r} is not supported here; expected {known[0]!r}, in and out")
        activation = get(config, "activation_function", str, "torch.nn.modules.activation.Tanh", file=file)
        if activation not in ACTIVATIONS:
            raise ConfigError(f"{file}: activation {activation!r} is not supported; {nearest(activation, ACTIVATIONS)}")
        if (found := get(config, "in_features", int, 0, file=file)) != width:
            raise ConfigError(f"{file}: in_features is {found}, but the vectors before it have width {width}")
        width = get(config, "out_features", int, 0, file=file)
        if width < 1:
            raise ConfigError(f"{file}: out_features is {width}; it must be at least 1")
        flags = {key: get(config, key, bool, default, file=file) for key, default in (("bias", True), ("use_residual", False))}
        specs.append(Dense(width, flags["bias"], ACTIVATIONS[activation], flags["use_residual"]))
    return tuple(specs)


def read_dense_params(folders: Sequence[Path], specs: Sequence[Dense], width: int) -> dict[str, Any]:
    """{"dense": {"0": {"kernel", "bias", "residual"}, ...}} of a chain of folders, {} without any."""
    params: dict[str, Any] = {}
    for n, (folder, spec) in enumerate(zip(folders, specs, strict=True)):
        params.setdefault("dense", {})[str(n)] = _dense_weights(folder, spec, width)
        width = spec.features
    return params


def _dense_weights(folder: Path, spec: Dense, width: int) -> dict[str, Any]:
    tensors = load_tensors(folder)
    expected = {"linear.weight": (spec.features, width)} | ({"linear.bias": (spec.features,)} if spec.bias else {})
    if spec.residual and width != spec.features:
        expected["residual.weight"] = (spec.features, width)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected or any(tensor.dtype != np.float32 for tensor in tensors.values()):
        raise ConfigError(f"{folder} holds the tensors {found}; expected floating-point {expected}")
    params: dict[str, Any] = {"kernel": np.ascontiguousarray(tensors["linear.weight"].T)}
    if "residual.weight" in tensors:
        params["residual"] = {"kernel": np.ascontiguousarray(tensors["residual.weight"].T)}
    return params | ({"bias": tensors["linear.bias"]} if spec.bias else {})
