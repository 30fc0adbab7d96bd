"""A config from a Python file: the one place where a user's code runs."""

import importlib.util
from pathlib import Path

from embedjax.config.errors import ConfigError
from embedjax.config.run import Config
from embedjax.config.serialize import from_json, to_json


def from_file(path: Path) -> Config:
    """What `config()` of a Python file returns, its values checked. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(f"embedjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: a config is a Python file (.py) with a function `config() -> Config`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # whatever the user's file does wrong is told in one line
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: config() returned {type(config).__name__}, not embedjax.config.Config")
    try:
        return from_json(to_json(config))  # the types of all values are checked on the way, lists become tuples
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
