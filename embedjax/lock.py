"""One process at a time in a run folder. The operating system holds the lock, so a killed process leaves none behind."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from embedjax.config.errors import StorageError


@contextlib.contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Holds a run folder, which is made if missing, until the block ends. Of a run of several processes the first holds it
    for all. Raises StorageError that tells who holds it already."""
    if jax.process_index() > 0:
        yield
        return
    path = Path(folder) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}") from error
    try:
        _take(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
    except BlockingIOError as error:
        raise StorageError(f"{path.parent} is held by {_holder(path)}; wait for it, or give another run folder") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be locked: {error.strerror}") from error


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError):  # taken, and not yet written
        return "another process"
