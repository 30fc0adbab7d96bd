"""Reads compiled HLO text: which collectives there are, what they move, between whom, and whether a loop holds them."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# %all-reduce.3 = (f32[2,4]{1,0}, f32[8]{0}) all-reduce(...), channel_id=1, replica_groups={{0,1},{2,3}}, ...
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>\([^=]*?\)|\S+) (?P<op>[\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=(%?[\w.\-]+)|(?:branch|called)_computations=\{([^}]*)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Newer programs name axes of a mesh of their own: mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_AXIS = re.compile(r"'([\w.]+)'(?::\((\d+)\)(\d+))?")


class Collective(NamedTuple):
    """One collective of a compiled program."""

    kind: str
    """all-reduce, all-gather, reduce-scatter, collective-permute or all-to-all."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its results on one device; several where XLA has combined several."""
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    """Places in the mesh (devices in its order) that exchange with each other."""
    computation: str
    in_loop: bool
    """Whether it is run by the body of a while loop, or by what that calls."""

    def axes(self, mesh) -> set[str]:
        """The mesh axes along which it moves data."""
        groups = self.groups or (tuple(range(mesh.size)),)
        places = [np.array(np.unravel_index(group, mesh.devices.shape)) for group in groups]
        moved = np.any([(place != place[:, :1]).any(1) for place in places], axis=0)
        return {axis for axis, differs in zip(mesh.axis_names, moved, strict=True) if differs}


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, `jax.jit(f).lower(...).compile().as_text()`."""
    looped, found = _in_loops(text), []
    for name, line in _lines(text):
        match = _INSTRUCTION.match(line)
        kind = match and match["op"].removesuffix("-start")
        if match and kind in KINDS:
            results = list(_arrays(match["type"]))
            if match["op"].endswith("-start") and kind in ("all-gather", "collective-permute"):
                results = results[len(results) // 2 :][: max(1, len(results) // 2)]  # operands stand before results
            size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in results)
            shapes = tuple(shape for _, shape in results)
            found.append(Collective(kind, shapes, size, _groups(line), name, name in looped))
    return found


def shapes(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays a program makes, on one device."""
    matches = (_INSTRUCTION.match(line) for _, line in _lines(text))
    return {shape for match in matches if match for _, shape in _arrays(match["type"])}


def _arrays(type: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for dtype, dims in _ARRAY.findall(type):
        yield dtype, tuple(int(d) for d in dims.split(",") if d)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(computation, line) of every instruction."""
    name = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if " = " not in line and (match := _COMPUTATION.match(line)):
            name = match["name"]
        elif " = " in line:
            yield name, line


def _in_loops(text: str) -> set[str]:
    """The computations that a loop's body or condition runs, directly or by calls."""
    calls: dict[str, set[str]] = {}
    reached = set()
    for name, line in _lines(text):
        called = {part.strip().lstrip("%") for both in _CALLED.findall(line) for part in ",".join(both).split(",")} - {""}
        calls.setdefault(name, set()).update(called)
        if re.search(r" while\(", line):
            reached |= called
    frontier = set(reached)
    while frontier:
        frontier = {called for name in frontier for called in calls.get(name, ())} - reached
        reached |= frontier
    return reached


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    if match := _LISTED.search(line):
        return tuple(tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := _COUNTED.search(line):
        return _rows(_counted(match[2], match[3]).reshape(_numbers(match[1])))
    if match := _NAMED.search(line):
        return _along(match)
    return ()


def _along(match: re.Match) -> tuple[tuple[int, ...], ...]:
    """The devices that differ in the named axes alone; `'a':(2)4` is the part of axis a of size 4 after one of size 2."""
    sizes = dict((name, int(size)) for name, size in re.findall(r"'([\w.]+)'=(\d+)", match[1]))
    named = {name: (int(before), int(size)) for name, before, size in _AXIS.findall(match[4]) if size}
    whole = {name for name, _, size in _AXIS.findall(match[4]) if not size}
    shape, moved = [], []
    for name, size in sizes.items():
        before, part = named.get(name, (1, size))
        moved += [len(shape) + 1] if name in named or name in whole else []
        shape += [before, part, size // before // part]
    ids = _counted(match[2], match[3]) if match[2] else np.arange(math.prod(shape))
    ids = np.moveaxis(ids.reshape(shape), moved, range(-len(moved), 0))
    return _rows(ids.reshape(-1, math.prod(shape[axis] for axis in moved)))


def _counted(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in ids.tolist())
