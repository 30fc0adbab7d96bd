"""JSON objects from files that others wrote: whatever is wrong with one is a ConfigError that names the file."""

import json
from pathlib import Path
from typing import Any

from embedjax.config.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    value = read_any(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_list(path: Path) -> list[dict[str, Any]]:
    """The JSON list of objects in a file."""
    value = read_any(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}; expected a list of objects")
    return value


def read_any(path: Path) -> Any:
    """Any JSON value; also ConfigError when the file is missing, not UTF-8, malformed or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON: {' '.join(str(error).split())}") from error


def get(config: dict[str, Any], key: str, kind: type, default: Any, *, file: Path) -> Any:
    """`config[key]` if it is of the given kind, the default if the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if kind is int and isinstance(value, float) and value.is_integer():  # model_max_length is often written as 1e30
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{file}: {key!r} is {value!r}; expected {kind.__name__}")
    return value
