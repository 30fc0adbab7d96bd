"""The export step that makes quantization portable: the ranges of a folder's vectors, taken once and saved in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh as DeviceMesh

from embedjax import calibration
from embedjax.calibration import Calibrated
from embedjax.config import Export, Source
from embedjax.config.errors import ConfigError
from embedjax.evaluate.calibrate import calibrate
from embedjax.evaluate.tasks import TaskData
from embedjax.export import retained
from embedjax.export.retention import retention, scorable
from embedjax.load import is_run, load

SIDES = ("query", "document", "text", "image")


def save_ranges(
    folder: Path,
    sets: Sequence[tuple[str, str | Source]],
    dims: Sequence[int] = (),
    *,
    column: str | None = None,
    mesh: DeviceMesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mapping[str, Calibrated]:
    """Takes ranges from each (side, calibration set), of whole vectors and of their first `dims` numbers, and saves them in an
    exported folder. "" for a side is what `embedjax encode` takes the rows for. Returns them by tower; those of towers without
    a set stay. Raises ConfigError for a run, whose weights may still change, and for late interaction."""
    if is_run(folder):
        raise ConfigError(f"{folder} is a run; ranges are saved with an exported folder: embedjax export {folder} FOLDER ...")
    model, found = load(folder), {}
    for side, source in sets:
        tower, ranges = calibrate(
            model, source, (None, *dims), column=column, as_column=side or None, mesh=mesh, progress=progress
        )
        found[tower] = ranges
    calibration.write(folder, found)
    return found


def sets_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """FILE or SIDE=FILE -> (side, file)."""
    parts = [word.partition("=") for word in words]
    return [(side, file) if sign and side in SIDES else ("", f"{side}{sign}{file}") for side, sign, file in parts]


def told(found: Mapping[str, Calibrated]) -> list[str]:
    """A line for each tower whose ranges were saved."""
    few = lambda rows: f" (at least {calibration.ENOUGH:,} are advised)" if rows < calibration.ENOUGH else ""
    return [
        f"ranges of {tower}: {', '.join(map(str, each.ranges))} dimensions, from {each.rows:,} rows{few(each.rows)}"
        for tower, each in found.items()
    ]


def at_the_end(folder: Path, asked: Export, tasks: Sequence[TaskData]) -> Iterator[str]:
    """What a run does with the folder it exported, where its config names rows to calibrate by: saves the ranges, and measures
    what each dimension and precision keeps of its tasks of retrieval and STS. Lines that tell of it."""
    if asked.calibrate is None:
        return
    yield from told(save_ranges(folder, [("", asked.calibrate)], asked.dims, column=asked.calibrate_column or None))
    model = load(folder)
    if scored := [task for task in tasks if scorable(model, task)]:
        yield from retained.table(retained.keep(folder, *retention(model, scored, asked.dims)))
