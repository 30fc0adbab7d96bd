"""The bytes a compiled program moves, read from its HLO text: collectives by kind, and through the device's memory.

Counts the body of a loop as often as it runs. Memory is counted at the boundaries of fusions, each operand read and each
result written once; what the compiler keeps in a TPU's on-chip memory, "S(1)" in a layout, is free.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota"}
FREE |= {"opt-barrier", "copy-done", "slice-done", "async-done", "async-update"}
SLICES = {"dynamic-slice", "gather", "slice"}
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128, "u4": 4, "s4": 4}
ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction: its result's type as text, what stands in its parentheses, and the rest of the line."""

    name: str
    type: str
    code: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one device puts into a collective in a step: `times` calls of `bytes` each, among the `group` it is in.

    `bytes` is the array that is reduced, gathered (whole), scattered (whole) or sent on. `outside`: some groups span islands.
    """

    kind: str
    bytes: int
    times: int
    group: int
    outside: bool = False

    @property
    def wire(self) -> float:
        """Bytes a device sends, in the ring algorithms: twice for an all-reduce, which scatters and gathers."""
        share = (self.group - 1) / self.group
        factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.times * self.bytes * factors.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device in one step. `unbounded` loops were counted once, for lack of a length."""

    memory: float
    collectives: tuple[Collective, ...]
    unbounded: int = 0

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """kind -> (calls, bytes)."""
        found: dict[str, tuple[int, int]] = {}
        for each in self.collectives:
            calls, size = found.get(each.kind, (0, 0))
            found[each.kind] = calls + each.times, size + each.times * each.bytes
        return found


def traffic(text: str, island: int) -> Traffic:
    """The traffic of a compiled module; devices `island` apart in their numbering are joined by the slower network."""
    walk = _Walk(parse(text), island)
    walk.visit(walk.entry, 1)
    return Traffic(walk.memory, tuple(walk.collectives.values()), walk.unbounded)


def parse(text: str) -> dict[str, list[Op]]:
    """Computation -> its instructions; the entry computation is also under ""."""
    found: dict[str, list[Op]] = {}
    current: list[Op] | None = None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and "->" in line:
                current = found[head[2]] = []
                if head[1]:
                    found[""] = current
        elif op := _op(line):
            current.append(op)
    return found


def _op(line: str) -> Op | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    kind = line[head.end() : at]
    code = re.match(r"\s*([\w\-]+)\(", line[at:])
    if not code:
        return None
    start = at + code.end() - 1
    end = _closing(line, start)
    return Op(head[1], kind, code[1], line[start + 1 : end - 1], line[end:])


def _closing(line: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return place + 1
    return len(line)


def sizes(type: str, *, on_chip: bool = True) -> list[int]:
    """Bytes of each array of a type; without `on_chip`, what lives in on-chip memory counts nothing."""
    result = []
    for element, dims, layout in ARRAY.findall(type):
        digits = re.search(r"\d+", element)
        bits = BITS.get(element, int(digits[0]) if digits else 0)
        count = math.prod(int(n) for n in dims.split(",") if n)
        result.append(0 if "S(" in layout and not on_chip else (count * bits + 7) // 8)
    return result


class _Walk:
    """One pass over the computations, from the entry on, with how often each runs."""

    def __init__(self, computations: Mapping[str, list[Op]], island: int):
        self.computations, self.entry, self.island = computations, computations[""], island
        self.memory, self.unbounded = 0.0, 0
        self.collectives: dict[object, Collective] = {}

    def visit(self, ops: Sequence[Op], times: int, *, fused: bool = False) -> None:
        types = {op.name: op.type for op in ops}
        for op in ops:
            called = self._called(op)
            kind = op.code.removesuffix("-start")
            if kind in KINDS:
                self._collective(op, kind, types, times, fused)
            if op.code == "while":
                turns = self._turns(op)
                self.visit(self.computations.get(op.attribute("body") or "", []), times * turns)
            elif op.code in ("call", "conditional", "async-start"):
                for each in called:
                    self.visit(each, times, fused=fused)
            else:
                for each in called if op.code == "fusion" else ():
                    self.visit(each, times, fused=True)  # for the collectives that are fused with what they feed
                if not fused and op.code not in FREE and not op.code.endswith("-done"):
                    self.memory += times * self._moved(op, types)

    def _called(self, op: Op) -> list[list[Op]]:
        names = [op.attribute(key) or "" for key in ("calls", "to_apply", "true_computation", "false_computation")]
        if branches := re.search(r"branch_computations=\{([^}]*)\}", op.rest):
            names += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return [self.computations[name] for name in names if name and name in self.computations]

    def _turns(self, op: Op) -> int:
        """How often a loop runs: as the compiler notes it, or the constant its counter, from 0 on, is compared with."""
        if noted := re.search(r"known_trip_count\W+n\W+(\d+)", op.rest):
            return int(noted[1])
        condition = self.computations.get(op.attribute("condition") or "", [])
        constants = [op.arguments for op in condition if op.code == "constant" and op.arguments.isdecimal()]
        if len(constants) == 1 and any("direction=LT" in op.rest for op in condition):
            return int(constants[0])
        self.unbounded += 1
        return 1

    def _collective(self, op: Op, kind: str, types: Mapping[str, str], times: int, fused: bool) -> None:
        size = sum(sum(sizes(types.get(name, ""))) for name in op.operands)
        groups = _groups(op.rest)
        group = max(map(len, groups), default=1)
        outside = any(len({device // self.island for device in each}) > 1 for each in groups)
        if kind == "all-gather":
            size *= group
        # A collective spread over several fusions, some of them inside a loop it overlaps with, has one channel.
        channel = re.search(r"channel_id=(\d+)", op.rest) if fused else None
        key = (kind, channel[1]) if channel else len(self.collectives)
        known = self.collectives.get(key)
        if group > 1 and (known is None or times < known.times):
            self.collectives[key] = Collective(kind, size, times, group, outside)

    def _moved(self, op: Op, types: Mapping[str, str]) -> float:
        """Bytes an instruction reads and writes in the device's memory."""
        outside = lambda type: sum(sizes(type, on_chip=False))
        operands = [types.get(name, "") for name in op.operands]
        if op.code == "copy-start":
            return sum(sizes(op.type, on_chip=False)[:2])
        if op.code == "slice-start":
            return 2 * min(sizes(op.type)[1:2] + [outside(operands[0])]) if operands else 0
        if op.code in SLICES:
            return 2 * outside(op.type)
        if op.code == "custom-call" and "AllocateBuffer" in op.rest:
            return 0
        if op.code in ("dynamic-update-slice", "scatter"):
            return 2 * sum(map(outside, operands[1 if op.code == "dynamic-update-slice" else 2 :][:1]))
        read, written = sum(map(outside, operands)), outside(op.type)
        inner = self.computations.get(op.attribute("calls") or "") if op.code == "fusion" else None
        if not inner:
            return read + written
        return _fusion(self.computations, inner, [outside(type) for type in operands], written)


def _fusion(computations: Mapping[str, list[Op]], ops: Sequence[Op], operands: Sequence[int], written: int) -> float:
    """Bytes a fusion reads and writes. An operand it only takes slices of is read that far; one it updates in place is read
    and written no further than the update."""
    read, saved = 0.0, 0.0
    for number, whole in enumerate(operands):
        part, update = _touched(computations, ops, number, whole)
        read += min(part, whole)
        saved += whole - update if update is not None and update < whole else 0
    return read + max(0.0, written - saved)


def _touched(computations: Mapping[str, list[Op]], ops: Sequence[Op], number: int, whole: int) -> tuple[float, float | None]:
    """Of a computation's parameter: the bytes that are read, and those that are written if it is updated in place."""
    types = {op.name: op.type for op in ops}
    same = {op.name for op in ops if op.code == "parameter" and op.arguments == str(number)}
    read, update = 0.0, None
    for op in ops:
        for place, name in enumerate(op.operands):
            if name not in same:
                continue
            inner = computations.get(op.attribute("calls") or "") if op.code == "fusion" else None
            if op.code == "bitcast":
                same.add(op.name)
            elif op.code in SLICES and place == 0:
                read += sum(sizes(op.type))
            elif op.code == "dynamic-update-slice" and place == 0:
                update = (update or 0) + sum(sizes(types[op.operands[1]]))
            elif inner:
                more, written = _touched(computations, inner, place, whole)
                read += more
                update = update if written is None else (update or 0) + written
            else:
                read += whole
    return read, update


def _groups(rest: str) -> list[tuple[int, ...]]:
    """The groups of devices of a collective, in any of the ways HLO writes them; pairs of a permute are groups too."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", rest):
        return _listed(listed[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        named = re.findall(r"'(\w+)'", mesh[2])
        dims, order = list(axes.values()), [i for i, name in enumerate(axes) if name not in named]
        order += [i for i, name in enumerate(axes) if name in named]
        return _numbered(dims, order, math.prod(axes[name] for name in named))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        return _numbered(dims, order, int(iota[2]))
    return []


def _listed(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text)]


def _numbered(dims: Sequence[int], order: Sequence[int], size: int) -> list[tuple[int, ...]]:
    numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, size)
    return [tuple(map(int, group)) for group in numbers]
