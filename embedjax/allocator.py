"""Restarts the command with a good memory allocator preloaded. Imports nothing of ours, for it runs before jax is loaded.

XLA on a CPU asks for every output afresh; with glibc's allocator a third to a half of a training step is then page faults.
An allocator must be in the environment before the process starts, so the command executes itself once more.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

GUARD = "EMBEDJAX_ALLOCATOR"
NAMES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libjemalloc.so.2")
FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/opt/conda/lib",
)
GLIBC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
INSTALL = "install libtcmalloc (Debian, Ubuntu: apt-get install libtcmalloc-minimal4; Fedora: dnf install gperftools-libs)"


def find(folders: tuple[str, ...] = FOLDERS) -> Path | None:
    """The best allocator library present, tcmalloc before jemalloc."""
    places = [*folders, str(Path(sys.prefix) / "lib")]
    return next((path for name in NAMES for folder in places if (path := Path(folder) / name).exists()), None)


def environment(library: Path | None) -> dict[str, str]:
    """The variables that select an allocator; without a library, glibc's settings that avoid most page faults."""
    if library is None:
        return {"GLIBC_TUNABLES": GLIBC, GUARD: "glibc with large thresholds"}
    preload = " ".join(part for part in (str(library), os.environ.get("LD_PRELOAD", "")) if part)
    variables = {"LD_PRELOAD": preload, GUARD: library.name}
    if "jemalloc" in library.name:
        variables["MALLOC_CONF"] = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"
    else:
        variables["TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD"] = str(1 << 60)
    return variables


def wanted(variables: Mapping[str, str]) -> bool:
    """Whether to restart: on Linux, once, and not when the user has chosen an allocator or malloc settings."""
    chosen = "malloc" in variables.get("LD_PRELOAD", "") or "GLIBC_TUNABLES" in variables
    return sys.platform == "linux" and GUARD not in variables and not chosen


def restart() -> None:
    """Executes this same command again with the allocator, if that is wanted; else returns."""
    if wanted(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment(find())})


def describe(variables: Mapping[str, str]) -> str:
    """Which allocator this process has, and what to install if it is not a good one."""
    if preload := variables.get("LD_PRELOAD", ""):
        return preload
    if GUARD in variables:
        return f"{variables[GUARD]}; for speed on a CPU {INSTALL}"
    return f"the system's default; for speed on a CPU {INSTALL} and use the command `embedjax`"
