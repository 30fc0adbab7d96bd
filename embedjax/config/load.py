"""A config from a Python file: the one place where a user's code runs.

A file may hold several, such as the sizes of one recipe: `FILE.py` means what its function `config()` returns, and
`FILE.py:NAME` what `NAME()` does.
"""

import dataclasses
import importlib.util
import inspect
import re
import traceback
import types
from collections.abc import Callable
from pathlib import Path

from embedjax import config as names
from embedjax.config.errors import ConfigError, nearest
from embedjax.config.run import Config
from embedjax.config.serialize import from_json, to_json


def from_file(path: Path) -> Config:
    """What `config()`, or the function after the colon, of a Python file returns, its values checked. Raises ConfigError."""
    path, wanted = function_of(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(f"embedjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: a config is a Python file (.py) with a function `config() -> Config`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, wanted) if wanted == "config" else _named(module, wanted)
        config = made()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # whatever the user's file does wrong is told in one line
        raise ConfigError(f"{path}: {_diagnosis(error) or f'{type(error).__name__}: {error}'}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: {wanted}() returned {type(config).__name__}, not embedjax.config.Config")
    try:
        return from_json(to_json(config))  # the types of all values are checked on the way, lists become tuples
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def function_of(path: Path) -> tuple[Path, str]:
    """(the file, the function) that FILE.py or FILE.py:NAME means."""
    found = re.fullmatch(r"(.+\.py):(\w+)", str(path))
    return (Path(found[1]), found[2]) if found else (path, "config")


def _named(module: types.ModuleType, name: str) -> Callable[[], Config]:
    """A function of the file's own that takes no argument. Raises ConfigError, naming those there are."""
    own = {key: value for key, value in vars(module).items() if isinstance(value, types.FunctionType) and key[0] != "_"}
    own = {key: f for key, f in own.items() if f.__module__ == module.__name__ and not inspect.signature(f).parameters}
    if name not in own:
        raise ConfigError(f"no function {name!r}; {nearest(name, own)}")
    return own[name]


def _diagnosis(error: Exception) -> str:
    """The mistake in a config class that Python's own words do not name; nothing for any other."""
    if unknown := re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        kind = getattr(names, unknown[1], None)
        if dataclasses.is_dataclass(kind):
            fields = [field.name for field in dataclasses.fields(kind)]
            return f"{unknown[1]} has no field {unknown[2]!r}; {nearest(unknown[2], fields)}"
    # A value of a wrong type trips the checks that classes make of their own values, before the types are looked at.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if dataclasses.is_dataclass(made) and frame.f_globals["__name__"].startswith("embedjax.config"):
            try:
                from_json(to_json(made), type(made), type(made).__name__)
            except ConfigError as found:
                return str(found)
            except Exception:  # the error itself once more: its types are right
                return ""
    return ""
