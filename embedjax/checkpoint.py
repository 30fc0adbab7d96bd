"""Saves (state, data position, config) of a run through Orbax, asynchronously, and gives back only what is whole.

Knows neither towers nor optimisers: a state is any tree of arrays, addressed by path. A save is a folder:

    <step>/state/                    Orbax, OCDBT; all processes write into it, and it appears by one rename
    <step>/meta.json                 position, config, metrics; path, shape and type of every array
    <step>/manifest-0-of-2.json      size and SHA-256 of this process's share of the files above; written last
    <step>/metrics.json              scores of the step, in place of those of meta.json, and their SHA-256: a save does not wait
                                     for them, so that an evaluation that fails costs no training

A save counts once the manifests of all its processes are there. Nothing is removed before its successor counts, so a kill
at any moment loses the save in flight and no other.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from embedjax.config.errors import EmbedjaxError, StorageError
from embedjax.distributed import gather
from embedjax.sharding import path_of

METRICS = "metrics.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """What is saved beside the arrays."""

    step: int
    position: int
    """Where the data order goes on."""
    config: dict[str, Any]
    metrics: dict[str, float]
    arrays: dict[str, dict[str, Any]]
    """Shape and type by path."""


class Checkpoints:
    """The saves of one run, in a folder made by the first of them.

    `keep` latest ones stay, and the one whose metric `best` is highest. One process (of each rank) writes at a time; any
    number may read meanwhile. In a run of several processes all of them make each call, on a file system they share, and wait
    at most `limit` seconds for each other; an error of one is raised there, and Elsewhere on the others.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, best: str | None = None, limit: float = 1800):
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._metric = best
        self._limit = limit
        # Compressing weights saves 8 % of the bytes for 8 times the time, on cores that train.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        logging.getLogger("absl").addFilter(_told_once)
        self._thread: threading.Thread | None = None
        self._error: StorageError | None = None
        self._damaged: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and jax.process_count() > 1 and not isinstance(error, EmbedjaxError):
            return  # not agreed on: the others do not come to wait for what is in flight
        try:
            self.close()
        except StorageError as second:
            if error is None:
                raise
            logging.error("%s", second)  # the first error is the one to tell

    def save(
        self, step: int, state: Any, *, position: int, config: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Starts a save and returns as soon as the arrays may change; waits for the one before it. False if `step` is saved.

        Metrics that are not finite are left out. Raises StorageError, also for what went wrong in the save before.
        """
        self.wait()
        if self._agreed("a save", int(step in self.steps())):
            return False
        flat = _flat(state)
        record = Record(step, position, dict(config), _finite(metrics or {}), {path: _described(x) for path, x in flat.items()})
        folder = self._folder / str(step)
        self._begin(folder, record)
        try:
            tree = traverse_util.unflatten_dict(flat, sep="/")
            self._orbax.save(folder / "state", args=ocp.args.PyTreeSave(tree))
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            raise _failed(folder, error) from error
        self._thread = threading.Thread(target=self._finish, args=(folder,), name="manifest")
        self._thread.start()
        return True

    def annotate(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Gives a save the scores of its step, in place of those it had; waits for the save in flight. False if `step` is not
        saved. Metrics that are not finite are left out. Raises StorageError."""
        self.wait()
        if not self._agreed("the scores of a save", int(step in self.steps())):
            return False
        error = None
        if jax.process_index() == 0:
            scores = _finite(metrics)
            try:
                _write_json(self._folder / str(step) / METRICS, {"metrics": scores, "sha256": _digest_of(scores)})
                self._prune()  # the best may be another one now
            except OSError as found:
                error = _failed(self._folder / str(step) / METRICS, found)
        gather("the end of the scores of a save", error=error, limit=self._limit)
        return True

    def restore(self, step: int | None, abstract: Any) -> tuple[Any, Record]:
        """The state of a step, or of the newest whole one for None, as `abstract` describes it, and its record.

        Leaves of `abstract` with a sharding come back as such arrays, on any number of devices and processes; others in
        numpy. A damaged save is passed over with a warning. Raises StorageError when none is whole or `step` is damaged,
        or when the paths, shapes or types are not those saved.
        """
        step = self._verified(step, self.latest)
        record = self.record(step)
        flat = _flat(abstract)
        self._require_fit(record, {path: _described(x) for path, x in flat.items()})
        read = self._read(step, flat)
        leaves = [read[path] for path in flat]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), record

    def params_only(self, step: int | None = None, parts: Sequence[Sequence[str]] = (("params",),)) -> tuple[dict, int]:
        """The parameters as nested dicts of numpy arrays, and their step: that asked for, else the best whole one, else the
        newest. They are the first of `parts` that the save holds: of several trees the first decides, and the others, as far as
        it has them, are put into it. Raises as `restore` does."""
        step = self._verified(step, lambda: self.latest() if (best := self.best()) is None else best)
        arrays = self.record(step).arrays
        part = next(part for part in parts if any(path.startswith(f"{part[0]}/") for path in arrays))
        trees = {path: tree for path in arrays for tree in part if path.startswith(f"{tree}/")}
        read = self._read(step, {path: _abstract(arrays[path]) for path in trees})
        return traverse_util.unflatten_dict(
            {path.removeprefix(f"{trees[path]}/"): x for path, x in read.items()}, sep="/"
        ), step

    def steps(self) -> list[int]:
        """The steps that are saved: every manifest is there. What they say is verified when a save is read."""
        return sorted(step for step in self._folders() if step not in self._damaged and _complete(self._folder / str(step)))

    def latest(self) -> int | None:
        """The newest saved step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The saved step with the highest metric, the newest of equals; None if no save has the metric."""
        scores = [(score, step) for step in self.steps() if (score := self._score(step)) is not None]
        return max(scores)[1] if scores else None

    def record(self, step: int) -> Record:
        """What was saved beside the arrays of a step. Raises StorageError if it cannot be read."""
        file = self._folder / str(step) / "meta.json"
        try:
            record = Record(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{file} cannot be read: {_line(error)}") from error
        scores = _scores(file.with_name(METRICS))
        return record if scores is None else dataclasses.replace(record, metrics=scores)

    def wait(self) -> None:
        """Returns when the save in flight counts, on all processes. Raises StorageError if it failed on any."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        gather("the end of a save", error=error, limit=self._limit)
        if jax.process_index() == 0:
            self._prune()
        # Nobody looks at the shared folder before what goes is gone.
        gather("the removal of old saves", limit=self._limit)

    def close(self) -> None:
        """Waits, then frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _begin(self, folder: Path, record: Record) -> None:
        """The first process makes the step's folder, in place of one that a kill left unfinished or that is damaged."""
        error = None
        if jax.process_index() == 0:
            try:
                _remove(folder)
                folder.mkdir(parents=True)
                (folder / "meta.json").write_text(json.dumps(dataclasses.asdict(record)))
            except OSError as found:
                error = _failed(folder, found)
        gather("the start of a save", error=error, limit=self._limit)
        self._damaged.discard(record.step)

    def _finish(self, folder: Path) -> None:
        """In a thread: Orbax's commit, then the manifest of this process's share."""
        try:
            self._orbax.wait_until_finished()  # returns, on every process, after the rename
            _write_manifest(folder)
        except Exception as error:  # whatever it is, the next call must tell of it
            self._error = _failed(folder, error)

    def _agreed(self, name: str, number: int) -> int:
        """The first process's number, on all processes: each sees the shared folder at another moment."""
        return int(gather(name, number, limit=self._limit)[0])

    def _folders(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return [int(entry.name) for entry in self._folder.iterdir() if entry.name.isdecimal()]

    def _score(self, step: int) -> float | None:
        try:
            return self.record(step).metrics.get(self._metric or "")
        except StorageError:
            return None

    def _prune(self) -> None:
        """Removes all but the latest saves and the best. Nothing is in flight here: an unfinished folder is a killed one's."""
        steps = self.steps()
        for step in set(self._folders()) - set(steps[-self._keep :]) - {self.best()}:
            if step not in steps:
                logging.warning("removing %s: it is damaged or was not saved to the end", self._folder / str(step))
            try:
                _remove(self._folder / str(step))
            except OSError as error:  # another process may be reading it; the next save tries again
                logging.warning("%s cannot be removed: %s", self._folder / str(step), _line(error))

    def _verified(self, step: int | None, choose: Callable[[], int | None]) -> int:
        """`step`, or for None the first whole one of those `choose` offers, verified by all processes together."""
        self.wait()
        if step is not None:
            if step not in self.steps():
                raise StorageError(f"{self._folder} holds no save of step {step}; saved: {self.steps() or 'none'}")
            if problem := _damage(self._folder / str(step), self._limit):
                raise StorageError(f"step {step}: {problem}")
            return step
        while (offered := self._agreed("a restore", -1 if (chosen := choose()) is None else chosen)) >= 0:
            problem = _damage(self._folder / str(offered), self._limit)
            if problem is None:
                return offered
            logging.warning("step %d cannot be used, going back to another save: %s", offered, problem)
            self._damaged.add(offered)
        damaged = f"; damaged: {sorted(self._damaged)}" if self._damaged else ""
        raise StorageError(f"{self._folder} holds no whole save{damaged}")

    def _require_fit(self, record: Record, wanted: dict[str, dict]) -> None:
        saved = record.arrays
        wrong = [
            f"{path}: saved {_shown(saved.get(path))}, expected {_shown(wanted.get(path))}"
            for path in sorted(saved.keys() | wanted.keys())
            if saved.get(path) != wanted.get(path)
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise StorageError(f"{self._folder / str(record.step)} does not fit this run: {'; '.join(wrong[:3])}{more}")

    def _read(self, step: int, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of these paths, placed as the leaves say."""
        tree = traverse_util.unflatten_dict(dict(flat), sep="/")
        how = jax.tree.map(_restore_args, tree)
        folder = self._folder / str(step) / "state"
        try:
            args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)
            return traverse_util.flatten_dict(self._orbax.restore(folder, args=args), sep="/")
        except (OSError, ValueError, KeyError, jax.errors.JaxRuntimeError) as error:
            raise StorageError(f"{folder} cannot be read: {_line(error)}") from error


def _flat(tree: Any) -> dict[str, Any]:
    return {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _described(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _abstract(described: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(described["shape"], jnp.dtype(described["dtype"]))


def _shown(described: dict[str, Any] | None) -> str:
    return f"{described['dtype']} {described['shape']}" if described else "nothing"


def _restore_args(x: Any) -> ocp.RestoreArgs:
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=x.shape, dtype=x.dtype)


def _complete(folder: Path) -> bool:
    found = [file.stem.split("-of-") for file in folder.glob("manifest-*-of-*.json")]
    return bool(found) and len(found) == int(found[0][1])


def _write_manifest(folder: Path) -> None:
    """Hashes every nth file of a finished save, n processes, and writes this process's manifest."""
    index, count = jax.process_index(), jax.process_count()
    names = _names(folder)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names[index::count]}
    _write_json(folder / f"manifest-{index}-of-{count}.json", {"total": len(names), "files": files})


def _write_json(file: Path, value: Any) -> None:
    """Into a folder of a save, in one rename, and on the disk when it returns."""
    temporary, folder = file.with_suffix(".tmp"), file.parent
    with temporary.open("w") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(file)
    for parent in (folder, folder.parent):  # the renames themselves
        descriptor = os.open(parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _scores(file: Path) -> dict[str, float] | None:
    """What `annotate` wrote, None if nothing. Raises StorageError for what has changed since."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        scores, wanted = content["metrics"], content["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{file} cannot be read: {_line(error)}") from error
    if _digest_of(scores) != wanted:
        raise StorageError(f"{file} has changed: its SHA-256 is not the one saved")
    return scores


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _names(folder: Path) -> list[str]:
    """The files a manifest lists, in an order all processes share."""
    return ["meta.json", *sorted(str(file.relative_to(folder)) for file in (folder / "state").rglob("*") if file.is_file())]


def _damage(folder: Path, limit: float = 1800) -> str | None:
    """What is wrong with a save, None if nothing: its files against its manifests, every nth read by each of n processes."""
    problem = next(_problems(folder), None)
    if gather("the check of a save", int(problem is not None), limit=limit).any():
        return problem or f"{folder}: another process found it damaged"
    return None


def _problems(folder: Path) -> Iterator[str]:
    listed: dict[str, dict] = {}
    totals = set()
    for manifest in sorted(folder.glob("manifest-*-of-*.json")):
        try:
            content = json.loads(manifest.read_text())
            listed.update(content["files"])
            totals.add(content["total"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{manifest} cannot be read: {_line(error)}"
    if totals != {len(listed)}:
        yield f"{folder}: the manifests list {len(listed)} files of {sorted(totals)}"
    for name in sorted(listed)[jax.process_index() :: jax.process_count()]:
        file, wanted = folder / name, listed[name]
        try:
            size = file.stat().st_size
            if size != wanted["bytes"]:
                yield f"{file} has {size} bytes, {wanted['bytes']} were saved"
            elif _digest(file) != wanted["sha256"]:
                yield f"{file} has changed: its SHA-256 is not the one saved"
        except (OSError, KeyError, TypeError) as error:
            yield f"{file} cannot be read: {_line(error)}"
    try:
        _scores(folder / METRICS)
    except StorageError as error:
        yield str(error)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _remove(folder: Path) -> None:
    """The manifests go first: half removed is not saved."""
    for manifest in folder.glob("manifest-*"):
        manifest.unlink()
    if folder.exists():
        shutil.rmtree(folder)


def _failed(folder: Path, error: Exception | str) -> StorageError:
    return StorageError(f"{folder} cannot be saved: {_line(error)}")


def _told_once(record: logging.LogRecord) -> bool:
    """Drops the pages Orbax logs of a save that failed in the background: the next call raises it in one line."""
    return not any(mark in str(record.msg) for mark in ("in background save thread", "_SignalingThread.run() raised"))


def _line(error: Exception | str) -> str:
    """An error in one line; the libraries below write longer ones, with the cause at the end."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:80]} ... {line[-200:]}"
