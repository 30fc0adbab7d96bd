"""A config from a Python file, with typed dotted overrides from the command line (by tyro)."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import tyro

from embedjax.config.errors import ConfigError
from embedjax.config.run import Config


def from_file(path: Path) -> Config:
    """What `config()` of a Python file returns; a config named "run" takes the file's name. Raises ConfigError."""
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
    return config


def override(config: Config, arguments: Sequence[str], command: str) -> Config:
    """`config` with `--data.batch-size 512` and the like; `--help` prints every field. Exits 2 on an unknown field."""
    return tyro.cli(Config, default=config, args=list(arguments), prog=command, config=(tyro.conf.AvoidSubcommands,))
