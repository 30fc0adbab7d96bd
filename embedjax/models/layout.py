"""Where the parts of a model folder are: modules.json, and router_config.json where queries and documents, or texts and
pictures, part ways.

Knows names and places only; `folders.py` reads what lies there. Code of a folder is never run.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from embedjax.config.errors import ConfigError, nearest
from embedjax.config.model import ROLES
from embedjax.models import sequence_classification, stanford
from embedjax.models.jsonfile import get, read_json, read_list

KINDS = ("Transformer", "Pooling", "Dense", "Normalize", "StaticEmbedding", "CLIPModel", "Router", "MultiVectorMask")
TOKEN_DENSE = re.compile(r"pylate\.models\.Dense(?:\.Dense)?")
"""PyLate's projection, of every token, as its folders name it."""
ROOMS = r"models|base\.modules|sentence_transformer\.modules|multi_vector_encoder\.modules"
CLASS = re.compile(rf"sentence_transformers\.(?:{ROOMS})(?:\.\w+)?\.(\w+)")
ROUTER_CONFIG = "router_config.json"
SETTINGS = "config_sentence_transformers.json"
ROUTES = (tuple(ROLES), ("text", "image"))
"""Where a Router may part ways: by task, or by what is to be embedded."""
NAMES = tuple(name for names in ROUTES for name in names)

Modules = list[tuple[str, Path]]
"""Kind and folder of each module of a chain."""


class Layout(NamedTuple):
    """Where the parts of one tower are."""

    encoder: Path
    """Folder of config.json, weights and tokenizer."""
    pooling: Path | None
    """Folder of the pooling's config; None for a plain folder, a static table, and an encoder that gives one vector."""
    dense: tuple[Path, ...] = ()
    """Folders of the projections, in order."""
    normalize: bool = True
    """Whether vectors are scaled to length 1."""
    static: bool = False
    """Whether the encoder is a table of token vectors, without config.json."""
    late: Literal["", "pylate", "multi-vector", "stanford"] = ""
    """Who keeps late interaction so, where the projections are of every token; multi-vector is sentence-transformers."""
    mask: Path | None = None
    """Folder of what says which tokens are compared, of a multi-vector folder."""
    scale: Path | None = None
    """Folder of what scales to length 1."""
    head: str | None = None
    """The name of the class head in the model, of a folder of `sequence_classification.py`."""
    settings: Path | None = None
    """Folder of what holds for the whole model, prompts and similarity; None for a plain folder."""


def layout(folder: Path) -> Layout:
    """The layout of a model folder, or of a Router's route, named as a folder in it: FOLDER/query."""
    if routed := _routed(folder):
        own = (folder / SETTINGS).exists()  # a Router that we wrote: its root has but one default prompt
        return _chain(routed[folder.name], folder if own else folder.parent, folder.parent / ROUTER_CONFIG)
    file = folder / "modules.json"
    if not file.exists():
        head = sequence_classification.head_name(folder)
        return Layout(folder, None, late="stanford" if stanford.is_stanford(folder) else "", head=head)
    if found := _router(folder):
        sides = {"query": "queries", "document": "documents", "text": "texts", "image": "pictures"}
        first, second = (sides[name] for name in found)
        raise ConfigError(f"{folder} has a tower of {first} and one of {second}; name one: {folder / next(iter(found))}")
    return _chain(_modules(folder, file), folder, file)


def routes(folder: Path) -> dict[str, Path]:
    """{"query": FOLDER/query, "document": FOLDER/document} for a Router and for a folder of two models; {"text": FOLDER/text,
    "image": FOLDER/image} for a Router of texts and pictures; {} for one model."""
    if found := _router(folder):
        return {route: folder / route for route in found}
    parts = {role: folder / role for role in ROLES}
    here = any((folder / name).exists() for name in ("modules.json", "config.json"))
    model = lambda part: any((part / name).exists() for name in ("modules.json", "config.json"))
    return parts if not here and all(map(model, parts.values())) else {}


def of_side(folder: Path, side: str) -> Path:
    """Where the tower of a side ("text", "image") is: the route of a Router that parts these, else the folder itself."""
    return routes(folder).get(side, folder)


def is_route(folder: Path) -> bool:
    """Whether a path names a route of a Router; there need not be a folder of its name."""
    return _routed(folder) is not None


def _routed(folder: Path) -> dict[str, Modules] | None:
    """The routes of the Router that a path names one of, None for other paths."""
    found = _router(folder.parent) if folder.name in NAMES else None
    return found if found and folder.name in found else None


def _router(folder: Path) -> dict[str, Modules] | None:
    """The modules of each route of a Router, with those that follow it; None for other folders."""
    file = folder / "modules.json"
    modules = _modules(folder, file) if file.exists() else []
    if not modules or modules[0][0] != "Router":
        return None
    place = modules[0][1]
    file = place / ROUTER_CONFIG
    config = read_json(file)
    types, structure = (get(config, key, dict, {}, file=file) for key in ("types", "structure"))
    if not any(set(structure) == set(names) for names in ROUTES):
        expected = " or ".join(map(str, map(sorted, ROUTES)))
        raise ConfigError(f"{file} has the routes {sorted(structure)}; expected {expected}")
    if get(config, "parameters", dict, {}, file=file).get("route_mappings"):
        raise ConfigError(f"{file}: route_mappings are not supported; routes are chosen by their names")
    chains: dict[str, Modules] = {}
    for route, names in sorted(structure.items(), key=lambda item: NAMES.index(item[0])):
        if not isinstance(names, list) or not all(name in types for name in names):
            raise ConfigError(f"{file}: route {route!r} is {names!r}; expected names among {sorted(types)}")
        parts = [{"type": types[name], "path": name} for name in names]
        chains[route] = [(_kind(part, file), _inside(place, part, file)) for part in parts] + modules[1:]
    return chains


def _chain(modules: Modules, settings: Path, file: Path) -> Layout:
    order = " ".join(kind for kind, _ in modules)
    if not re.fullmatch(
        r"(Transformer( Pooling)?|StaticEmbedding)( Dense)*( Normalize)?|CLIPModel( Normalize)?|Transformer( TokenDense)+|"
        r"Transformer( Dense)*( MultiVectorMask Normalize| Normalize MultiVectorMask)",
        order,
    ):
        raise ConfigError(
            f"{file} lists the modules {order or 'none'}; expected Transformer Pooling, or StaticEmbedding, then [Dense ...] "
            "[Normalize], or CLIPModel [Normalize], or late interaction: Transformer [Dense ...] MultiVectorMask Normalize, or "
            "PyLate's Transformer Dense"
        )
    places = dict(modules)  # of several projections the last, which is not asked for here
    return Layout(
        encoder=modules[0][1],
        pooling=places.get("Pooling"),
        dense=tuple(path for kind, path in modules if kind in ("Dense", "TokenDense")),
        normalize="Normalize" in places or "TokenDense" in places,
        late="pylate" if "TokenDense" in places else "multi-vector" if "MultiVectorMask" in places else "",
        mask=places.get("MultiVectorMask"),
        scale=places.get("Normalize"),
        static=modules[0][0] == "StaticEmbedding",
        settings=settings,
    )


def _modules(folder: Path, file: Path) -> Modules:
    return [(_kind(module, file), _inside(folder, module, file)) for module in read_list(file)]


def _kind(module: dict[str, Any], file: Path) -> str:
    name = get(module, "type", str, "", file=file)
    if TOKEN_DENSE.fullmatch(name):
        return "TokenDense"
    match = CLASS.fullmatch(name)
    if not match:
        raise ConfigError(f"{file}: module {name!r} is not one of sentence-transformers' own; code of a folder is never run")
    if match[1] not in KINDS:
        raise ConfigError(f"{file}: module {name!r} is not supported; {nearest(match[1], KINDS)}")
    return match[1]


def _inside(folder: Path, module: dict[str, Any], file: Path) -> Path:
    """The folder of a module. It must lie inside the model's folder, links followed."""
    text = get(module, "path", str, "", file=file)
    path = PurePosixPath(text)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in text and "\0" not in text
    if not inside or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{file}: module path {text!r} leaves the folder")
    return folder / path


def refuse_code(folder: Path) -> None:
    """Raises ConfigError for a model or tokenizer that asks for Python code of its own."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.exists() and read_json(file).get("auto_map"):
            raise ConfigError(f"{file} asks for code of its own (auto_map); code from a model folder is never run")
