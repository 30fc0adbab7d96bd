"""Portable programs beside an exported folder: what can be written of a model, where it lies, and whether it gives its vectors.

A folder of one tower holds FOLDER/stablehlo and FOLDER/onnx; of two towers each has a folder of its own, FOLDER/query and
FOLDER/document, or FOLDER/text and FOLDER/image.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from embedjax import config as configs
from embedjax.config import ROLES, ImageTower, Tower
from embedjax.config.errors import ConfigError, nearest
from embedjax.export import int8, onnx, stablehlo
from embedjax.export.consumers import BATCH, Tried, Vectors, difference
from embedjax.load import Model, make_images, make_texts
from embedjax.models import folders, pictures
from embedjax.models.weights import flatten

PROGRAMS = ("stablehlo", "onnx")
WEIGHTS = ("float32", "int8")
SHARE = 4
"""One of so many texts and pictures that a folder was compared on is asked of its programs, the longest text among them."""


class Rounded(float):
    """1 - the lowest cosine of a program's vector and the model's, where weights are int8 and no number is the same."""


def check(model: configs.Model, programs: Sequence[str], weights: str, format: str) -> None:
    """Raises ConfigError for unknown programs and weights, and for resolved towers of which there is no such program."""
    for name in programs:
        if name not in PROGRAMS:
            raise ConfigError(f"unknown program {name!r}; {nearest(name, PROGRAMS)}")
    if weights not in WEIGHTS:
        raise ConfigError(f"unknown weights {weights!r}; {nearest(weights, WEIGHTS)}")
    if not programs:
        if weights != "float32":
            raise ConfigError(f"weights of {weights} are those of a program: name one, --program onnx or --program stablehlo")
        return
    if format != "sentence-transformers":
        raise ConfigError(f"programs lie beside a folder of sentence-transformers, not of {format}; leave --format out")
    if model.late:
        raise ConfigError("programs give one vector a text; late interaction has none")
    towers = {name: model.towers[name] for name in model.routes.values()}
    for name, tower in towers.items():
        if isinstance(tower, ImageTower) and ("onnx" in programs or weights != "float32"):
            what = "ONNX program" if "onnx" in programs else f"weights of {weights}"
            raise ConfigError(f"tower {name!r} is of pictures, which has no {what} here; write stablehlo of float32")
    for name, tower in towers.items():
        if isinstance(tower, Tower):
            _check_text(name, tower, programs)


def _check_text(name: str, tower: Tower, programs: Sequence[str]) -> None:
    if tower.include_prompt is False and any((tower.prompts or {}).values()):
        raise ConfigError(
            f"tower {name!r} does not pool the tokens of its prompts (include_prompt), which a program of ids and mask cannot "
            "tell from others"
        )
    if "onnx" in programs:
        onnx.check(tower)


def write(model: Model, folder: Path, programs: Sequence[str], weights: str) -> None:
    """Writes programs of every tower of a model into its exported folder."""
    for name, place in _places(model.config, folder).items():
        tower, texts = model.config.towers[name], model.texts.get(name)
        params = layered(model.params["towers"][name])
        params = int8.rounded(params) if weights == "int8" else params
        if "stablehlo" in programs:
            stablehlo.write(place, tower, params, weights, texts)
        if "onnx" in programs:
            assert isinstance(tower, Tower)
            onnx.write(place, tower, params, weights)


def _places(model: configs.Model, folder: Path) -> dict[str, Path]:
    """The folder of each tower by its name."""
    if len(model.routes) == 1:
        return {model.encoders[0]: folder}
    of_pictures = [isinstance(model.towers[name], ImageTower) for name in model.routes.values()]
    route = lambda role, name: ("image" if isinstance(model.towers[name], ImageTower) else "text") if any(of_pictures) else role
    return {name: folder / route(role, name) for role, name in model.routes.items()}


def layered(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of a tower by path, float32, layers apart: {"encoder/blocks/0/attn/query/kernel": ...}."""
    flat: dict[str, np.ndarray] = {}
    for path, leaf in flatten(params).items():
        value = np.asarray(leaf, np.float32)
        before, blocks, after = path.partition("/blocks/")
        parts = {f"{before}/blocks/{n}/{after}": layer for n, layer in enumerate(value)} if blocks else {path: value}
        flat |= {name: np.ascontiguousarray(part).reshape(part.shape) for name, part in parts.items()}
    return flat


def readers(folder: Path) -> dict[str, Callable[[Tried, Vectors], float | str]]:
    """What runs each kind of program in a folder, by its name."""
    known = {"jax.export": (stablehlo.PLACE, _by_stablehlo), "onnxruntime": (onnx.PLACE, _by_onnx)}
    found = {name: (place, ask) for name, (place, ask) in known.items() if any(_holders(folder, place))}
    return {
        name: (lambda tried, wanted, place=place, ask=ask: _compare(folder, place, ask, tried, wanted))
        for name, (place, ask) in found.items()
    }


def _holders(folder: Path, place: str) -> Iterator[Path]:
    """The folders of towers that hold a program."""
    yield from (part for part in (folder, *(folder / name for name in (*ROLES, "text", "image"))) if (part / place).exists())


def _compare(folder: Path, place: str, ask: Callable, tried: Tried, wanted: Vectors) -> float | str:
    """As a `consumers.Reader`, of a folder's programs of a kind."""
    if place == onnx.PLACE and importlib.util.find_spec("onnxruntime") is None:
        return "not installed"
    few = slice(SHARE - 1, None, SHARE)
    tried, wanted = Tried(tried.texts[few], tried.pictures[few]), {way: vectors[few] for way, vectors in wanted.items()}
    opened: dict[Path, Any] = {}
    found, weights = {}, "float32"
    for way in wanted:
        side = {"texts": "text", "pictures": "image"}.get(way, way)
        part = folder if (folder / place).exists() else folder / side
        if part not in opened:
            opened[part] = (onnx if place == onnx.PLACE else stablehlo).read(part)
        found[way], weights = ask(part, opened[part], tried, way)
    if weights == "float32":
        return difference(wanted, found)
    lengths = {way: np.linalg.norm(wanted[way], axis=1) * np.linalg.norm(found[way], axis=1) for way in wanted}
    cosines = [((wanted[way] * found[way]).sum(1) / np.maximum(lengths[way], 1e-30)).min() for way in wanted]
    return Rounded(1 - min(cosines))


def _prompt(way: str, prompts: Mapping[str, str]) -> str | None:
    """The prompt of a way of asking, None for the default."""
    role = "query" if way == "texts" else way
    return role if role in prompts else None


def _by_stablehlo(folder: Path, program: Any, tried: Tried, way: str) -> tuple[np.ndarray, str]:
    about = program.about
    # Accelerators multiply in less than float32 by default.
    with jax.default_matmul_precision("highest"):
        if "pixels" in about["inputs"]:
            tower = pictures.read_image_tower(folder.parent if folder.name == "image" else folder)
            return program(make_images(tower).encode(tried.decoded)["pixels"]), about["weights"]
        return program.encode(tried.texts, _prompt(way, about["prompts"])), about["weights"]


def _by_onnx(folder: Path, session: Any, tried: Tried, way: str) -> tuple[np.ndarray, str]:
    tower = folders.read_tower(folder)
    texts = make_texts(tower, Path(tower.tokenizer))
    batches = [tried.texts[start : start + BATCH] for start in range(0, len(tried.texts), BATCH)]
    ask = lambda batch: onnx.run(session, texts.encode(batch, prompt=_prompt(way, texts.prompts)))
    return np.concatenate([ask(batch) for batch in batches]), session.get_modelmeta().custom_metadata_map["weights"]
