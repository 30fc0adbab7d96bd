"""What could be changed in a config that does not fit, and the largest batch that does. Imports no jax."""

import dataclasses
from collections.abc import Callable, Iterator

from embedjax.config import Config, ImageTower, InBatch, ModifiedResnet, Resnet, Tower

MOST_ROWS = 2**24


def smaller(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
    """(what to say on the command line, the config with that change), the cheapest in time first; none is tried here."""
    remat = _remat(config)
    if remat is not None:
        yield remat
    if chunked := list(_cached(config, devices)):
        yield from chunked[:2]
    yield from _losses(config)
    if sharded := _fsdp(config, devices):
        yield sharded
    # Together, for what is far too large for any of them alone.
    if remat is not None:
        for told, both in list(_cached(remat[1], devices))[1:]:
            yield f"{remat[0]} {told}", both
    else:
        yield from chunked[2:]


def _remat(config: Config) -> tuple[str, Config] | None:
    towers = config.model.towers
    if all(tower.remat for tower in towers.values()):
        return None
    told = " ".join(f"--model.towers.{name}.remat" for name, tower in towers.items() if not tower.remat)
    changed = {name: dataclasses.replace(tower, remat=True) for name, tower in towers.items()}
    return told, dataclasses.replace(config, model=dataclasses.replace(config.model, towers=changed))


def _cached(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
    """GradCache in more chunks, each at least a row a device: four times more at a time."""
    if config.optim.accumulate > 1 or any(_by_batch(tower) for tower in config.model.towers.values()):
        return
    chunks = config.optim.cached * 4
    while config.data.batch_size % (devices * chunks) == 0 and chunks <= 4096:
        yield f"--optim.cached {chunks}", dataclasses.replace(config, optim=dataclasses.replace(config.optim, cached=chunks))
        chunks *= 4


def _by_batch(tower: Tower | ImageTower) -> bool:
    """Whether a tower may normalise by statistics of the batch, which GradCache refuses."""
    return isinstance(tower.arch, ModifiedResnet | Resnet) and not getattr(tower, "freeze_statistics", False)


def _losses(config: Config) -> Iterator[tuple[str, Config]]:
    """The ring form where another was asked for, and tiles of 512 where they are larger, as those of a good size (0) are."""
    sets = config.data.sets
    for field, value, large in (
        ("form", "ring", lambda loss: loss.form in ("dense", "tiled")),
        ("tile", 512, lambda loss: loss.form != "dense" and (loss.tile > 512 or loss.tile == 0)),
    ):
        changed = [i for i, task in enumerate(sets) if isinstance(task.loss, InBatch) and large(task.loss)]
        if changed:
            loss = {i: dataclasses.replace(sets[i].loss, **{field: value}) for i in changed}
            new = tuple(dataclasses.replace(task, loss=loss.get(i, task.loss)) for i, task in enumerate(sets))
            told = " ".join(f"--data.sets.{i}.loss.{field} {value}" for i in changed)
            yield told, dataclasses.replace(config, data=dataclasses.replace(config.data, sets=new))


def _fsdp(config: Config, devices: int) -> tuple[str, Config] | None:
    unit = config.mesh.tensor * config.mesh.slices  # data is a multiple of the slices
    wide = next((n for n in (16, 8, 4, 2) if n > config.mesh.fsdp and devices % (n * unit) == 0), None)
    if wide is None or config.mesh.data != -1:
        return None
    return f"--mesh.fsdp {wide}", dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=wide))


def with_batch(config: Config, rows: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))


def search(fits: Callable[[int], bool], start: int, unit: int) -> int:
    """The largest multiple of `unit` that fits, to an eighth: doubled or halved from `start`, then bisected. 0: none does."""
    low, high = 0, max(unit, start // unit * unit)
    while fits(high):
        low, high = high, 2 * high
        if high > MOST_ROWS:
            return low
    while low == 0 and high > unit:
        half = max(unit, high // 2 // unit * unit)
        if fits(half):
            low = half
        else:
            high = half
    while low and high - low > max(unit, low // 8):
        middle = (low + high) // 2 // unit * unit
        if middle == low:
            break
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
