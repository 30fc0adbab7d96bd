"""A tower and its parameters -> model folders that others load. Writes no tokenizer and no model card: the caller does.

sentence-transformers folders are in the legacy spelling (classes under sentence_transformers.models, pooling by booleans,
max_seq_length), which sentence-transformers 2 to 6 and the embedding servers all read; the spelling of 5.4 and later is not
read by all. A folder appears whole or not at all: it is written beside its place and renamed.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from embedjax.config import ROLES, Architecture, ImageArchitecture, ImageTower, SiglipText, Static, Tower
from embedjax.config.errors import ConfigError, StorageError
from embedjax.models.families import family_of
from embedjax.models.layout import ROUTER_CONFIG, SETTINGS
from embedjax.models.modules import ACTIVATIONS, BOOLEANS
from embedjax.models.weights import to_tensors

VERSIONS = {
    "sentence_transformers": "3.0.0",
    "transformers": "4.41.0",
    "pytorch": "2.3.0",
}  # the oldest that read such a folder
MODULE = "sentence_transformers.models."

Modules = list[tuple[str, str]]
"""Kind and path of each module of a chain."""

Part = tuple[Tower, Mapping[str, Any], Callable[[Path], object]]
"""A resolved tower, its parameters, and what writes its tokenizer."""


def write_sentence_transformers(
    folder: str | Path,
    tower: Tower,
    params: Mapping[str, Any],
    *,
    write_tokenizer: Callable[[Path], object],
    replace: bool = False,
) -> Path:
    """Write a sentence-transformers folder of a resolved tower and its parameters {"encoder", "dense"}; returns the folder.

    `write_tokenizer` is called with the folder to put tokenizer files in. Raises StorageError when the destination is not empty
    (unless `replace`) or cannot be written, ConfigError when the parameters are not the tower's; then nothing is left behind.
    """
    with new_folder(Path(folder), replace) as root:
        write_tower(root, tower, params, write_tokenizer)
    return Path(folder)


def write_router(folder: str | Path, towers: Mapping[str, Part], *, replace: bool = False) -> Path:
    """Write a sentence-transformers Router (5.0 and later) of a query and a document tower: {"query": (tower, parameters,
    write_tokenizer), "document": ...}. FOLDER/query and FOLDER/document are model folders of their own besides, for servers
    that know no Router. Otherwise as above; ConfigError too for prompts of one name that differ.
    """
    with new_folder(Path(folder), replace) as root:
        chains = {}
        for route, part in towers.items():
            (root / route).mkdir()
            chains[route] = write_tower(root / route, *part)
        write_routes(root, chains, default="document")
        model = {route: tower for route, (tower, *_) in towers.items()}
        prompts, versions = shared_prompts(model), VERSIONS | {"sentence_transformers": "5.0.0"}
        write_settings(root, prompts, "document" if prompts["document"] else None, model["document"], versions)
    return Path(folder)


def write_routes(root: Path, chains: Mapping[str, Modules], *, default: str) -> None:
    """Writes the Router of the model folders root/ROUTE, whose modules are given; it takes the route `default` where none is
    asked for."""
    named = {
        route: {f"{route}/{path}".rstrip("/"): MODULE + kind for kind, path in modules} for route, modules in chains.items()
    }
    write_modules(root, [("Router", "")])
    types = {name: kind for modules in named.values() for name, kind in modules.items()}
    structure = {route: list(modules) for route, modules in named.items()}
    parameters = {"default_route": default, "allow_empty_key": True}
    write_json(root / ROUTER_CONFIG, {"types": types, "structure": structure, "parameters": parameters})


def write_hf(
    folder: str | Path,
    tower: Tower,
    params: Mapping[str, Any],
    *,
    write_tokenizer: Callable[[Path], object],
    replace: bool = False,
) -> Path:
    """Write a plain Hugging Face folder: the encoder alone, without pooling and projections, which a static table cannot be.
    Otherwise as above."""
    if isinstance(tower.arch, Static):
        raise ConfigError("a static table is no Hugging Face model; write it as a sentence-transformers folder")
    with new_folder(Path(folder), replace) as root:
        write_encoder(root, tower, params, write_tokenizer)
    return Path(folder)


def write_tower(root: Path, tower: Tower, params: Mapping[str, Any], write_tokenizer: Callable[[Path], object]) -> Modules:
    """Writes a whole model folder into an empty one; returns the kind and path of its modules."""
    check_tower(tower)
    modules = [("StaticEmbedding", "")] if isinstance(tower.arch, Static) else [("Transformer", ""), ("Pooling", "1_Pooling")]
    write_encoder(root, tower, params, write_tokenizer)
    if tower.arch is not None and not isinstance(tower.arch, Static):
        write_pooling(root / "1_Pooling", tower.pooling, tower.arch, include_prompt=bool(tower.include_prompt))
        write_length(root, tower)
    write_head(root, modules, tower, params)
    write_prompts(root, tower, VERSIONS)
    return modules


def check_tower(tower: Tower) -> None:
    """Raises ConfigError for a tower that no module of sentence-transformers' reads."""
    if isinstance(tower.arch, SiglipText):
        raise ConfigError(
            "a SiglipText without SigLIP's tower of pictures is no model of sentence-transformers, for transformers' AutoModel "
            "knows it not and readers pad its texts otherwise; write hf"
        )


def write_head(root: Path, modules: Modules, tower: Tower | ImageTower, params: Mapping[str, Any]) -> None:
    """Writes a tower's projections and what scales to length 1 behind the modules so far, adds them, and writes the list."""
    write_projections(root, modules, tower, params)
    if tower.normalize:
        path = f"{len(modules)}_Normalize"
        modules.append(("Normalize", path))
        (root / path).mkdir()
    write_modules(root, modules)


def write_projections(
    root: Path, modules: Modules, tower: Tower | ImageTower, params: Mapping[str, Any], kind: str = "Dense", **more: str
) -> None:
    """Writes a tower's projections behind the modules so far and adds them; `more` goes into the config of each."""
    for n, own in enumerate(_dense_params(tower, params)):
        path = f"{len(modules)}_Dense"
        modules.append((kind, path))
        _write_dense(root / path, tower, n, own, more)


def write_prompts(root: Path, tower: Tower, versions: Mapping[str, str]) -> None:
    """Writes the settings of a model that reads texts by one tower."""
    write_settings(root, prompts_of(tower), tower.default_prompt or None, tower, versions)


def prompts_of(tower: Tower) -> dict[str, str]:
    """A tower's prompts; the default one is that of queries and documents too, which other readers ask for by their names."""
    prompts = dict(tower.prompts or {})
    return dict.fromkeys(ROLES, prompts[tower.default_prompt]) | prompts if tower.default_prompt else prompts


def write_modules(root: Path, modules: Modules) -> None:
    """Writes modules.json of kinds and paths; a kind with a dot is the whole name of a class."""
    named = lambda kind: kind if "." in kind else MODULE + kind
    entries = [{"idx": n, "name": str(n), "path": path, "type": named(kind)} for n, (kind, path) in enumerate(modules)]
    write_json(root / "modules.json", entries)


def write_settings(
    root: Path, prompts: Mapping[str, str], default: str | None, tower: Tower | ImageTower, versions: Mapping[str, str]
) -> None:
    """Writes what holds for the whole model: prompts and similarity."""
    settings = {
        "__version__": versions,
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity_fn_name": tower.similarity or "cosine",
    }
    write_json(root / SETTINGS, settings)


def shared_prompts(towers: Mapping[str, Tower]) -> dict[str, str]:
    """The prompts of several towers as those of one model: each route's own under its name, which is what is asked for. Raises
    ConfigError for prompts of one name that differ."""
    shared: dict[str, str] = {}
    for route, tower in towers.items():
        for name, text in (tower.prompts or {}).items():
            if name not in towers and shared.setdefault(name, text) != text:
                raise ConfigError(f"prompt {name!r} differs between the towers, and a Router has one of a name: {text!r}")
        chosen = tower.prompt_for(route)
        shared[route] = (tower.prompts or {}).get(chosen, "") if chosen else ""
    return shared


@contextlib.contextmanager
def new_folder(destination: Path, replace: bool) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place at the end, or vanishes when the body raises."""
    try:
        if destination.exists() and not destination.is_dir():
            raise StorageError(f"{destination} is a file; expected a folder to write, or none")
        if not replace and destination.is_dir() and any(destination.iterdir()):
            raise StorageError(f"{destination} is not empty; choose another folder or ask to replace it")
        destination = destination.resolve()
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            new.mkdir()
            yield new
            if destination.exists():
                destination.rename(old)
            new.rename(destination)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(f"{destination} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def write_encoder(root: Path, tower: Tower, params: Mapping[str, Any], write_tokenizer: Callable[[Path], object]) -> None:
    """Writes a tower's encoder and tokenizer."""
    config, tensors = encoder_files(tower, params)
    if config:
        write_json(root / "config.json", config)
    write_tensors(root / "model.safetensors", tensors)
    write_tokenizer(root)


def encoder_files(tower: Tower, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What config.json, {} for a static table, and model.safetensors hold of a tower's encoder. Raises ConfigError for a tower
    that is not resolved or longer than its positions, and for parameters that are not its."""
    if tower.arch is None or tower.max_length is None:
        raise ConfigError("the tower to write is not resolved: arch or max_length is None")
    family = family_of(tower.arch)
    if tower.max_length > (most := family.longest(tower.arch)):
        raise ConfigError(f"max_length is {tower.max_length}, but the encoder has positions for {most} tokens")
    tensors = to_tensors(tower.arch, params["encoder"])
    return {} if isinstance(tower.arch, Static) else family.to_hf(tower.arch) | {"torch_dtype": "float32"}, tensors


def write_length(root: Path, tower: Tower) -> None:
    """Writes the longest text where sentence-transformers and text-embeddings-inference look for it."""
    write_json(root / "sentence_bert_config.json", {"max_seq_length": tower.max_length, "do_lower_case": False})


def write_pooling(
    folder: Path, pooling: str | None, arch: Architecture | ImageArchitecture, *, include_prompt: bool = True
) -> None:
    """Writes the folder of a pooling module, in the legacy spelling."""
    folder.mkdir()
    booleans = {key: mode == pooling for key, mode in BOOLEANS.items()}
    write_json(folder / "config.json", {"word_embedding_dimension": arch.width} | booleans | {"include_prompt": include_prompt})


def _dense_params(tower: Tower | ImageTower, params: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters of each projection, checked against the tower's list of them."""
    specs, found = tower.dense or (), params.get("dense", {})
    if sorted(found) != sorted(str(n) for n in range(len(specs))):
        raise ConfigError(f"the parameters hold the projections {sorted(found)}; the tower has {len(specs)}")
    return [found[str(n)] for n in range(len(specs))]


def _write_dense(folder: Path, tower: Tower | ImageTower, n: int, params: Mapping[str, Any], more: Mapping[str, str]) -> None:
    spec = (tower.dense or ())[n]
    tensors = {"linear.weight": np.asarray(params["kernel"], np.float32).T}
    if spec.bias:
        tensors["linear.bias"] = np.asarray(params["bias"], np.float32)
    if residual := params.get("residual"):
        tensors["residual.weight"] = np.asarray(residual["kernel"], np.float32).T
    found = tensors["linear.weight"].shape
    if found[0] != spec.features:
        raise ConfigError(f"projection {n} gives {found[0]} features; the tower says {spec.features}")
    folder.mkdir()
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == spec.activation)
    config = {"in_features": found[1], "out_features": found[0], "bias": spec.bias, "activation_function": activation}
    residual = {"use_residual": True} if spec.residual else {}  # a key that older readers do not know
    write_json(folder / "config.json", {**config, **more, **residual})
    write_tensors(folder / "model.safetensors", tensors)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    # safetensors writes the buffer as it lies, strides ignored; transformers refuses a file that does not say its format.
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, path, metadata={"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
