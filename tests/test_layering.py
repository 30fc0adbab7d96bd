"""Imports point one way: a file may import only rooms of a lower level, and files of its own folder."""

import ast
from pathlib import Path

import pytest

import embedjax

PACKAGE = Path(embedjax.__file__).parent
LEVELS = (
    ("config", "allocator", "supervise"),
    ("data", "models", "losses", "sharding", "metrics", "quantize", "distributed", "watchdog"),
    ("optim", "objective", "lock", "checkpoint"),
    ("saves",),
    ("step", "load", "runs", "calibration"),
    ("evaluate", "token_prefix"),
    ("export", "mine"),
    ("build",),
    ("train", "preview", "search", "doctor", "survey", "plan", "launch"),
    ("commands",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FORBIDDEN = {
    "config": {"jax", "flax", "numpy"},
    "data": {"jax", "flax"},
    "losses": {"flax", "embedjax.config", "embedjax.models"},
    "allocator": {"jax", "numpy", "embedjax"},
    "launch": {"jax", "numpy"},
    "quantize": {"jax", "flax"},
    "supervise": {"jax", "numpy", "embedjax"},
}
# Grain imports jax, which data/ may not: one file of it does.
GRAIN = "data/batches.py"


def imported(source: str):
    """Absolute names a file imports: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path: str, source: str):
    room = path.split("/")[0].removesuffix(".py")
    if room == "__init__":
        return
    if room not in LEVEL:
        yield f"{path}: {room!r} has no level; give it one"
        return
    for name in imported(source):
        top, *rest = name.split(".")
        if any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN.get(room, ())):
            yield f"{path} imports {name}, which {room} may not"
        if top == "grain" and path != GRAIN:
            yield f"{path} imports grain; only {GRAIN} may"
        if top == "embedjax" and rest and rest[0] in LEVEL and rest[0] != room and LEVEL[rest[0]] >= LEVEL[room]:
            yield f"{path} imports {name}: {room} may not depend on {rest[0]}"


def test_imports_point_one_way():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    found = [line for path in files for line in violations(path.relative_to(PACKAGE).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("losses/contrastive.py", "from embedjax.models import layers"),
        ("data/sources.py", "import jax.numpy"),
        ("data/text.py", "import grain"),
        ("step.py", "from embedjax import train"),
        ("newroom.py", "import os"),
        ("config/run.py", "import numpy as np"),
    ],
)
def test_the_rule_sees_violations(path, source):
    assert list(violations(path, source))
