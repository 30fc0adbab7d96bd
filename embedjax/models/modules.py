"""What the modules of a sentence-transformers folder say: pooling, projections, and the settings of the whole model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from embedjax.config import Dense
from embedjax.config.errors import ConfigError, nearest
from embedjax.config.model import PoolingName, Similarity
from embedjax.models import pylate
from embedjax.models.jsonfile import get, read_json
from embedjax.models.layout import SETTINGS
from embedjax.models.weights import load_tensors

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


def read_settings(folder: Path, late: bool = False) -> dict[str, Any]:
    """What the folder says of the whole model: prompts and similarity; and by PyLate how late interaction makes texts."""
    file = folder / SETTINGS
    config = read_json(file) if file.exists() else {}
    expected = pylate.MODEL_TYPE if late else "SentenceTransformer"
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
    if late:
        found = pylate.read_late(config, file=file)
        longest = max(found.query_length, found.document_length)
        return {"prompts": prompts, "default_prompt": default, "similarity": "cosine", "late": found, "max_length": longest}
    similarity = get(config, "similarity_fn_name", str, "cosine", file=file)
    if similarity not in get_args(Similarity):
        expected = ", ".join(get_args(Similarity))
        raise ConfigError(f"{file}: similarity_fn_name {similarity!r} is not supported; expected one of {expected}")
    return {"prompts": prompts, "default_prompt": default, "similarity": similarity}


def read_dense(folders: Sequence[Path], width: int) -> tuple[Dense, ...]:
    """The projections in a chain of folders, of vectors of a width."""
    specs = []
    for folder in folders:
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


def read_dense_params(folders: Sequence[Path], specs: Sequence[Dense], width: int) -> dict[str, Any]:
    """{"dense": {"0": {"kernel", "bias"}, ...}} of a chain of folders, {} without any."""
    params: dict[str, Any] = {}
    for n, (folder, spec) in enumerate(zip(folders, specs, strict=True)):
        params.setdefault("dense", {})[str(n)] = _dense_weights(folder, spec, width)
        width = spec.features
    return params


def _dense_weights(folder: Path, spec: Dense, width: int) -> dict[str, np.ndarray]:
    tensors = load_tensors(folder)
    expected = {"linear.weight": (spec.features, width)} | ({"linear.bias": (spec.features,)} if spec.bias else {})
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected or any(tensor.dtype != np.float32 for tensor in tensors.values()):
        raise ConfigError(f"{folder} holds the tensors {found}; expected floating-point {expected}")
    kernel = {"kernel": np.ascontiguousarray(tensors["linear.weight"].T)}
    return kernel | ({"bias": tensors["linear.bias"]} if spec.bias else {})
