"""Configs as JSON and back, and the differences between two. Unions carry the name of their member under "type"."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from embedjax.config.errors import ConfigError, nearest
from embedjax.config.run import Config

NAMES = {int: "an int", float: "a float", str: "a string", bool: "a bool"}


def to_json(value: Any) -> Any:
    """A config as dicts, lists and scalars; every dataclass says its `type`."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(data: Any, kind: Any = Config, where: str = "config") -> Any:
    """The inverse of `to_json`. Raises ConfigError naming the place of an unknown key or a wrong type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _member(data, arguments, where)
    if origin is typing.Literal:
        if data not in arguments:
            raise ConfigError(f"{where} is {data!r}; it must be one of {', '.join(map(repr, arguments))}")
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass(data, kind, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ConfigError(f"{where} is {_shown(data)}; a list was expected")
        kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(data):
            raise ConfigError(f"{where} has {len(data)} items; {len(kinds)} were expected")
        return tuple(from_json(item, k, f"{where}.{i}") for i, (item, k) in enumerate(zip(data, kinds, strict=True)))
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{where} is {_shown(data)}; an object was expected")
        return {key: from_json(item, arguments[1], f"{where}.{key}") for key, item in data.items()}
    return _scalar(data, kind, where)


def _member(data: Any, kinds: tuple, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    classes = {kind.__name__: kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    if isinstance(data, dict) and classes:
        name = data.get("type", next(iter(classes)) if len(classes) == 1 else None)
        if name not in classes:
            raise ConfigError(f"{where}.type is {name!r}; {nearest(str(name), classes)}")
        return _dataclass(data, classes[name], where)
    others = [kind for kind in kinds if kind is not type(None) and not dataclasses.is_dataclass(kind)]
    if len(others) == 1:
        return from_json(data, others[0], where)
    raise ConfigError(f"{where} is {_shown(data)}; expected one of {', '.join(getattr(k, '__name__', str(k)) for k in kinds)}")


def _dataclass(data: Any, kind: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} is {_shown(data)}; an object of {kind.__name__} was expected")
    if data.get("type", kind.__name__) != kind.__name__:
        raise ConfigError(f"{where}.type is {data['type']!r}; {kind.__name__!r} was expected")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for key in data:
        if key != "type" and key not in known:
            raise ConfigError(f"{where} has no field {key!r}; {nearest(key, known)}")
    return kind(**{key: from_json(data[key], hints[key], f"{where}.{key}") for key in known if key in data})


def _scalar(data: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if type(data) is not kind:
        raise ConfigError(f"{where} is {_shown(data)}; {NAMES[kind]} was expected")
    return data


def _shown(data: Any) -> str:
    """A wrong value, short enough for a line: of an object its class."""
    if isinstance(data, dict) and "type" in data:
        return f"{data['type']}(...)"
    if isinstance(data, list):
        return f"[{', '.join(map(_shown, data[:3]))}{', ...' if len(data) > 3 else ''}]"
    text = repr(data)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read(path: Path) -> Config:
    """The config stored in a run folder. Raises ConfigError when the file is not one."""
    try:
        return from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable config ({error})") from error


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Paths at which two JSON trees differ, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in {**old, **new}:
            found |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = {}
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            found |= differences(a, b, f"{path}.{i}")
        return found
    return {} if old == new else {path: (old, new)}
