"""safetensors files and a family's table of names -> parameters, and back. Knows no module, pooling or tokenizer.

Tensors keep their Hugging Face names and layouts up to here; what comes out is the parameter tree of the tower, layers
stacked on axis 0. A table refuses surprises: every tensor is either named in it or left out on purpose.
"""

import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from embedjax.config import Architecture, ImageArchitecture
from embedjax.config.errors import ConfigError
from embedjax.models.families import family_of, names_of
from embedjax.models.jsonfile import read_json
from embedjax.models.names import Names, Row

FLOATS = ("F64", "F32", "F16", "BF16")
Complaints = dict[str, list[str]]
"""Kind -> names of tensors: "unknown", "missing", "doubly set", "misshapen"."""

INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def load_tensors(folder: str | Path, stem: str = "model", only: Container[str] | None = None) -> dict[str, np.ndarray]:
    """All tensors of a folder's `model.safetensors`, or of the shards its `model.safetensors.index.json` lists, by name; or
    `only` those of these names, as far as there are such.

    Floating-point tensors of any width come as float32. Raises ConfigError, naming the file, when it is missing, truncated
    or corrupt, when an index points outside the folder, and when there are only pickled weights, which are never read.
    """
    folder = Path(folder)
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return _read_file(single, only)
    if index.exists():
        return _read_shards(index, only)
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise ConfigError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code; only safetensors is read: convert with "
            f"transformers' AutoModel.from_pretrained(folder).save_pretrained(folder)"
        )
    raise ConfigError(f"{folder} holds no weights: expected {single.name} or {index.name}")


def _read_file(path: Path, only: Container[str] | None) -> dict[str, np.ndarray]:
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                if only is not None and name not in only:
                    continue
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATS + INTEGERS:
                    raise ConfigError(f"{path}: tensor {name!r} has type {kind}; expected one of {', '.join(FLOATS)}")
                tensor = file.get_tensor(name)
                tensors[name] = tensor.astype(np.float32) if kind in FLOATS else tensor
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors (truncated or corrupt?): {_line(error)}") from error
    return tensors


def _read_shards(index: Path, only: Container[str] | None) -> dict[str, np.ndarray]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ConfigError(f"{index}: expected a `weight_map` from tensor names to file names")
    places = {name: shard for name, shard in places.items() if only is None or name in only}
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ConfigError(f"{index} lists the shard {shard!r}; expected the name of a .safetensors file beside it")
        found = _read_file(index.parent / shard, only)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ConfigError(f"{index.parent / shard} holds tensors that another shard holds too: {_some(twice)}")
        tensors |= found
    if absent := sorted(places.keys() - tensors.keys()):
        raise ConfigError(f"{index} lists tensors that no shard holds: {_some(absent)}")
    return tensors


def from_tensors(
    arch: Architecture | ImageArchitecture, tensors: Mapping[str, np.ndarray], *, file: str | Path
) -> dict[str, Any]:
    """The parameters of an encoder from Hugging Face tensors, float32, layers stacked on axis 0.

    Raises one ConfigError that lists, under the name of `file`, every unknown, missing, doubly set and misshapen tensor.
    """
    found, complaints = sort_out(arch, tensors, file=file)
    refuse(complaints, type(arch).__name__, file=file)
    return assemble(arch, found)


def sort_out(
    arch: Architecture | ImageArchitecture, tensors: Mapping[str, np.ndarray], *, file: str | Path, names: Names | None = None
) -> tuple[dict[str, np.ndarray], Complaints]:
    """The tensors that are an encoder's, by the names of its table, and what is wrong with all of them. `names` is another
    table than the family's own."""
    names = names or names_of(arch)
    if len(tensors) < arch.depth:  # before names are made for each layer: a damaged config may speak of any number
        raise ConfigError(f"{file} holds {len(tensors)} tensors, fewer than the {arch.depth} layers of its config")
    found, twice, unknown = _by_name(names, tensors, arch.depth)
    missing, misshapen = [], []
    for name, shape in _expected(arch, names).items():
        if name not in found:
            missing.append(name)
        elif told := misfit(name, found[name], shape):
            misshapen.append(told)
    return found, {"unknown": unknown, "missing": missing, "doubly set": twice, "misshapen": misshapen}


def misfit(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor, "" if nothing."""
    if tensor.shape != shape:
        return f"{name} is {list(tensor.shape)}, expected {list(shape)}"
    return "" if tensor.dtype == np.float32 else f"{name} holds {tensor.dtype}, expected floating-point numbers"


def refuse(complaints: Complaints, what: str, *, file: str | Path) -> None:
    """Raises one ConfigError of all complaints, if there are any."""
    if told := "; ".join(f"{kind}: {_some(names)}" for kind, names in complaints.items() if names):
        raise ConfigError(f"{file} does not hold the tensors of {what}: {told}")


def assemble(
    arch: Architecture | ImageArchitecture, found: Mapping[str, np.ndarray], names: Names | None = None
) -> dict[str, Any]:
    """The parameters of an encoder from what `sort_out` found, without complaints."""
    params: dict[str, Any] = {}
    for row in (names or names_of(arch)).rows:
        layers = [found.get(row.theirs.format(layer=n)) for n in (range(arch.depth) if row.stacked else [0])]
        parts = [_to_ours(row, np.ones(arch.width, np.float32) if layer is None else layer) for layer in layers]
        for path, values in zip(_paths(row), zip(*parts, strict=True), strict=True):
            put(params, path, np.stack(values) if row.stacked else values[0])
    return params


def to_tensors(
    arch: Architecture | ImageArchitecture, params: Mapping[str, Any], names: Names | None = None
) -> dict[str, np.ndarray]:
    """An encoder's parameters as Hugging Face tensors, or those of another table, float32, contiguous: the inverse of
    `from_tensors`.

    Raises ConfigError when the tree does not hold exactly the paths and shapes of the family's table.
    """
    names = names or names_of(arch)
    rows, shapes, ours = names.rows, _expected(arch, names), flatten(params)
    known = {path for row in rows for path in _paths(row)}
    if odd := sorted(known ^ ours.keys()):
        raise ConfigError(f"the parameters are not those of {type(arch).__name__}: unknown or missing {_some(odd)}")
    tensors = {}
    for row in rows:
        values = [np.asarray(ours[path], np.float32) for path in _paths(row)]
        for n in range(arch.depth) if row.stacked else [0]:
            if n or row.first:
                layer = [value[n] if row.stacked else value for value in values]
                name = row.theirs.format(layer=n)
                tensors[name] = _to_theirs(row, layer, shapes[name])
    wrong = [(name, shape) for name, shape in shapes.items() if tensors[name].shape != shape]
    if odd := [f"{name} is {list(tensors[name].shape)}, expected {list(shape)}" for name, shape in wrong]:
        raise ConfigError(f"the parameters are not those of {type(arch).__name__}: {_some(odd)}")
    return tensors


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict by path: {"blocks/attn/query/kernel": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _by_name(names: Names, tensors: Mapping[str, np.ndarray], depth: int) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """The tensors of the table by its names, the names set twice, and the names that are neither in it nor left out."""
    known = {row.theirs.format(layer=n) for row in names.rows for n in (range(depth) if row.stacked else [0])}
    found: dict[str, np.ndarray] = {}
    twice, unknown = [], []
    for full, tensor in tensors.items():
        # Checkpoints from before 2019 call a layer norm's scale and shift gamma and beta.
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", full.removeprefix(names.prefix)))
        if name in found:
            twice.append(full)
        elif name in known:
            found[name] = tensor
        elif not any(re.fullmatch(pattern, name) for pattern in names.left_out):
            unknown.append(full)
    return found, twice, unknown


def _expected(arch: Architecture | ImageArchitecture, names: Names) -> dict[str, tuple[int, ...]]:
    """Every tensor of the table and its shape."""
    shapes, sizes = {}, family_of(arch).sizes(arch)
    for row in names.rows:
        shape = tuple(int(axis[:-1] or 1) * sizes[axis[-1]] for axis in row.shape.split())
        for n in range(arch.depth) if row.stacked else [0]:
            if n or row.first:
                shapes[row.theirs.format(layer=n)] = shape
    return shapes


def _paths(row: Row) -> tuple[str, ...]:
    return (row.ours,) if isinstance(row.ours, str) else row.ours


def _to_ours(row: Row, tensor: np.ndarray) -> list[np.ndarray]:
    paths = _paths(row)
    if row.form == "conv":
        return [tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])]
    if row.form == "rows":
        return [tensor.reshape(-1, tensor.shape[-1])]
    return [part.T if path.endswith("kernel") else part for path, part in zip(paths, np.split(tensor, len(paths)), strict=True)]


def _to_theirs(row: Row, parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    if row.form and parts[0].shape != _ours_of(row, shape):
        return parts[0]  # of a wrong size, which is told with the others
    if row.form == "conv":
        out, channels, *patch = shape
        return np.ascontiguousarray(parts[0].reshape(*patch, channels, out).transpose(3, 2, 0, 1))
    if row.form == "rows":
        return np.ascontiguousarray(parts[0].reshape(shape))
    turned = [part.T if path.endswith("kernel") else part for path, part in zip(_paths(row), parts, strict=True)]
    return np.ascontiguousarray(np.concatenate(turned))  # safetensors writes the buffer as it lies, strides ignored


def _ours_of(row: Row, shape: tuple[int, ...]) -> tuple[int, int]:
    """Our shape of a tensor that has another form."""
    last = shape[0] if row.form == "conv" else shape[-1]
    return math.prod(shape) // last, last


def put(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    """Sets a leaf of nested dicts by its path, contiguous."""
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = np.asarray(value, order="C")  # unlike ascontiguousarray it leaves scalars be


def _some(names: Iterable[str], most: int = 12) -> str:
    """The first few names and how many more there are: the error stays one line for a wholly foreign checkpoint."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
