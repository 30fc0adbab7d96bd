"""`embedjax launch`: starts a config with one of the files of launch/, or prints what would run. Imports no jax."""

import dataclasses
import json
import os
import shlex
import string
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from embedjax.config.errors import ConfigError, nearest
from embedjax.config.load import function_of
from embedjax.config.run import run_folder

Settings = Mapping[str, str]

MOUNT = "/runs"
"""Where machines that this starts mount the file system they share."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What a target comes down to: a command, what is added to its environment, and what it reads on standard input."""

    argv: list[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    text: str = ""
    folder: Path | None = None
    """Where it runs, if not here."""

    def lines(self) -> list[str]:
        """As a person would type it, and what it reads."""
        added = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        there = [f"cd {shlex.quote(str(self.folder))} &&"] if self.folder else []
        return [" ".join([*there, *added, shlex.join(self.argv)]), *self.text.splitlines()]


def main(arguments: Sequence[str]) -> int:
    """The verb: TARGET CONFIG [--with NAME=VALUE ...] [--dry-run] and what `embedjax train` takes. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: embedjax launch {'|'.join(TARGETS)} CONFIG [--with NAME=VALUE ...] [--dry-run] [what train takes]")
        print("--dry-run prints what would run; launch/README.md lists the settings of --with.")
        return 0
    target, rest, settings, dry = arguments[0], [], {}, False
    words = iter(arguments[1:])
    for word in words:
        if word == "--with":
            name, sign, value = next(words, "").partition("=")
            if not (name and sign):
                raise ConfigError(f"--with holds {name!r}; it must be NAME=VALUE")
            settings[name] = value
        elif word == "--dry-run":
            dry = True
        else:
            rest.append(word)
    command = prepare(target, rest, settings)
    if dry:
        print("\n".join(command.lines()))
        return 0
    return run(command)


def folder() -> Path:
    """The folder launch/ of the checkout. Raises ConfigError when embedjax is not run from one."""
    found = Path(__file__).resolve().parents[1] / "launch"
    if not (found / "slurm.sbatch").is_file():
        raise ConfigError(
            f"{found}: no such folder; the launch files are in embedjax's repository, not in the installed package: "
            "clone it and install it with pip install -e"
        )
    return found


def prepare(target: str, arguments: Sequence[str], settings: Settings) -> Command:
    """The command of a target: `arguments` go to `embedjax train`, `settings` fill the target's own parameters."""
    if target not in TARGETS:
        raise ConfigError(f"unknown target {target!r}; {nearest(target, TARGETS)}")
    if not arguments:
        raise ConfigError(f"launch needs a config file: embedjax launch {target} CONFIG.py [--with NAME=VALUE ...]")
    return TARGETS[target](folder(), list(arguments), settings)


def run(command: Command) -> int:
    """Runs it in place of this process, so that it gets the signals, unless it reads a text; then returns its exit code. Raises
    ConfigError when the program is not installed."""
    variables = {**os.environ, **command.environment}
    try:
        if not command.text:
            sys.stdout.flush()
            os.chdir(command.folder or ".")
            os.execvpe(command.argv[0], command.argv, variables)
        process = subprocess.run(command.argv, env=variables, input=command.text, text=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{command.argv[0]} is not installed here; --dry-run prints what would run") from error
    return process.returncode


def _local(files: Path, arguments: list[str], settings: Settings) -> Command:
    known = _settings("local", settings, {"processes": "2"})
    return Command([sys.executable, str(files / "local.py"), known["processes"], *arguments])


def _slurm(files: Path, arguments: list[str], settings: Settings) -> Command:
    """Settings are sbatch's options: nodes=4 is --nodes=4."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return Command(["sbatch", *options, str(files / "slurm.sbatch"), *arguments])


def _tpu_vm(files: Path, arguments: list[str], settings: Settings) -> Command:
    optional = dict.fromkeys(("nfs", "bucket", "project", "runtime", "spot", "source", "restarts", "poll", "keep"), "")
    known = _settings("tpu-vm", settings, {"zone": None, "accelerator": None, "run_dir": None, "name": "embedjax", **optional})
    if bool(known["nfs"]) == bool(known["bucket"]):
        raise ConfigError(f"launch tpu-vm needs one of --with nfs=HOST:/SHARE and --with bucket=NAME, to mount at {MOUNT}")
    environment = {name.upper(): value for name, value in known.items() if value}
    arguments = arguments if known["source"] else _of_checkout("tpu-vm", files, arguments)
    return Command(["bash", str(files / "tpu_vm.sh"), *arguments], environment)


def _jobset(file: str, target: str, defaults: dict[str, str | None]) -> Callable[[Path, list[str], Settings], Command]:
    def make(files: Path, arguments: list[str], settings: Settings) -> Command:
        common = {"image": None, "claim": None, "run_dir": None, "name": "embedjax", "restarts": "20"}
        known = _settings(target, settings, {**common, **defaults})
        values = {name.upper(): value for name, value in known.items()}
        values["ARGS"] = json.dumps(["train", *arguments, "--run-dir", known["run_dir"]])
        return Command(["kubectl", "apply", "-f", "-"], text=string.Template((files / file).read_text()).substitute(values))

    return make


def _sky(files: Path, arguments: list[str], settings: Settings) -> Command:
    """Settings are variables of sky.yaml in small letters, but for `gpus` and `nodes`."""
    known = _settings(
        "sky", settings, {"volume": None, "run_dir": None, "name": "embedjax", "gpus": "", "nodes": "", "extra": ""}
    )
    arguments = _of_checkout("sky", files, arguments)
    argv = ["sky", "jobs", "launch", "--yes", "-n", known["name"]]
    argv += ["--gpus", known["gpus"]] if known["gpus"] else []
    argv += ["--num-nodes", known["nodes"]] if known["nodes"] else []
    variables = {
        "CONFIG": arguments[0],
        "ARGS": shlex.join(arguments[1:]),
        "RUN_DIR": known["run_dir"],
        "VOLUME": known["volume"],
    }
    variables |= {"EXTRA": known["extra"]} if known["extra"] else {}
    for name, value in variables.items():
        argv += ["--env", f"{name}={value}"]
    return Command([*argv, str(files / "sky.yaml")], folder=files.parent)  # its workdir is the folder it is called in


def _of_checkout(target: str, files: Path, arguments: list[str]) -> list[str]:
    """The arguments, the config as a path from the checkout, which is what the machines get. Raises ConfigError for another."""
    root, (given, _) = files.parent, function_of(Path(arguments[0]))
    place = (given if given.exists() else root / given).resolve()
    if not (place.is_file() and place.is_relative_to(root)):
        raise ConfigError(f"{given}: no file of {root}, which launch {target} copies to the machines: put the config there")
    return [f"{place.relative_to(root)}{arguments[0].removeprefix(str(given))}", *arguments[1:]]


def _settings(target: str, given: Settings, known: Mapping[str, str | None]) -> dict[str, str]:
    """The settings of a target, its defaults filled in; None marks one that has to be given. A run folder is under MOUNT."""
    for name in given.keys() - known.keys():
        raise ConfigError(f"launch {target} has no setting {name!r}; {nearest(name, known)}")
    if missing := [name for name, default in known.items() if default is None and not given.get(name)]:
        raise ConfigError(f"launch {target} needs {' '.join(f'--with {name}=...' for name in missing)}")
    if "run_dir" in known:
        place = PurePosixPath(run_folder(given["run_dir"]))
        if place.parts[:2] != ("/", MOUNT[1:]) or len(place.parts) < 3 or ".." in place.parts:
            raise ConfigError(f"run_dir is {given['run_dir']!r}; it must be {MOUNT}/..., where {target} mounts what is shared")
    return {name: given.get(name, default or "") for name, default in known.items()}


TARGETS: dict[str, Callable[[Path, list[str], Settings], Command]] = {
    "local": _local,
    "slurm": _slurm,
    "tpu-vm": _tpu_vm,
    "jobset-tpu": _jobset(
        "jobset-tpu.yaml",
        "jobset-tpu",
        {"accelerator": "tpu-v5-lite-podslice", "topology": "4x4", "hosts": "4", "chips": "4", "slices": "1"},
    ),
    "jobset-gpu": _jobset("jobset-gpu.yaml", "jobset-gpu", {"accelerator": "nvidia-h100-80gb", "hosts": "1", "chips": "8"}),
    "sky": _sky,
}
