"""`embedjax doctor`: what this machine offers and whether folders can be used."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from embedjax import allocator
from embedjax.runs import PACKAGES

EXTRAS = {"tensorboardX": "embedjax[tensorboard]", "wandb": "embedjax[wandb]", "sentence_transformers": "embedjax[reference]"}


def report(folders: list[Path]) -> Iterator[tuple[str, str, bool]]:
    """Rows of (what, finding, whether it is well)."""
    import jax

    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores", True
    for name in PACKAGES:
        yield name, importlib.metadata.version(name), True
    for name, extra in EXTRAS.items():
        found = importlib.util.find_spec(name) is not None
        yield name, "installed" if found else f"not installed (optional: pip install '{extra}')", True
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    yield "devices", f"{len(devices)} x {devices[0].platform} ({', '.join(kinds)}), {jax.process_count()} process(es)", True
    good = "tcmalloc" in os.environ.get("LD_PRELOAD", "") or "jemalloc" in os.environ.get("LD_PRELOAD", "")
    yield "allocator", allocator.describe(os.environ), good or devices[0].platform != "cpu"
    for folder in folders:
        yield f"folder {folder}", *usable(folder)


def usable(folder: Path) -> tuple[str, bool]:
    """Whether a folder can be read and written, and the space left; a missing one is judged by its nearest parent.

    One that can only be read will do for data."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder", False
    if not os.access(place, os.R_OK | os.X_OK):
        return "cannot be read", False
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        return f"readable, not writable ({error.strerror}): for data only", place == folder
    free = shutil.disk_usage(place).free
    note = "" if place == folder else f" (will be made in {place})"
    return f"readable and writable, {free / 2**30:.0f} GiB free{note}", free > 2**30
