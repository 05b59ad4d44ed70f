"""The static memory plan: where in the arena each temporary lives.

Every step has a position in program order. A temp is live from the first step that touches it to the last,
both included; two temps may share bytes only if those intervals do not meet. A loop body runs many times, so:

* a temp that each iteration first writes in full lives and dies within the iteration;
* any other temp touched in a loop (a carry, a stack filled element by element, something that was made before
  the loop) is live throughout the loop, and so on outwards for nested loops.

Offsets are then found by `arena.py`. No plan can be below the largest sum of live temps (`lower_bound`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir.dims import evaluate
from .abi import aligned
from .arena import lower_bound, place
from .program import (
    Buffer,
    Copy,
    HostCall,
    KernelCall,
    Loop,
    Program,
    Step,
    While,
    accesses,
    children,
    runs,
    storage,
    written,
)


@dataclass
class Interval:
    """The life of one temp: positions of its first and last step, both included."""

    buffer: Buffer
    first: int
    last: int

    @property
    def nbytes(self) -> Any:
        return aligned(self.buffer.nbytes)

    def meets(self, other: Interval) -> bool:
        """Whether the two are ever live at once."""
        return self.first <= other.last and other.first <= self.last


@dataclass
class MemoryPlan:
    """Arena offsets (bytes, multiples of 64) of the temps, and what the whole program needs.

    `arena_bytes` is the arena's size, `lower_bound` what no plan can beat, `input_bytes`, `output_bytes` (without those
    that take over an input) and `constant_bytes` what the caller and the executable own beside it.
    """

    offsets: dict[int, int] = field(repr=False)
    intervals: list[Interval] = field(repr=False)
    arena_bytes: int = 0
    lower_bound: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    constant_bytes: int = 0

    def offset(self, buffer: Buffer) -> int:
        """The arena offset of a temp's storage."""
        root = buffer.root
        if root.nbytes == 0:  # an empty one lies anywhere
            return self.offsets.get(id(root), 0)
        return self.offsets[id(root)]

    @property
    def peak_bytes(self) -> int:
        """Everything that exists during a call."""
        return self.arena_bytes + self.input_bytes + self.output_bytes + self.constant_bytes

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes of temps by what they are for (`ir/subjects.py`), where most are live at once. Of static programs."""
        ends = [(i.first, i.nbytes, i) for i in self.intervals] + [(i.last + 1, -i.nbytes, i) for i in self.intervals]
        live: dict[str, int] = {}
        peak: dict[str, int] = {}
        for _, change, interval in sorted(ends, key=lambda end: end[:2]):  # what ends at a place ends first
            subject = interval.buffer.subject or "activations"
            live[subject] = live.get(subject, 0) + change
            if sum(live.values()) > sum(peak.values()):
                peak = dict(live)
        return peak


@dataclass(eq=False)
class _Scope:
    """A loop body or one arm of a branch: something whose steps may run several times, or not at all."""

    is_loop: bool
    first: int
    last: int = -1


@dataclass
class _Use:
    position: int
    path: tuple[_Scope, ...]  # enclosing scopes, outermost first
    defines: bool  # writes the whole storage and does not read it


def plan_memory(program: Program, sizes: Mapping[str, int] | None = None) -> MemoryPlan:
    """Plan the arena of a program, for these values of its symbolic sizes (1 by default).

    The plan is deterministic: the same program gets the same offsets.
    """
    sizes = {name: (sizes or {}).get(name, 1) for name in program.sizes}
    intervals = live_intervals(program)
    lives = [(evaluate(i.nbytes, sizes), i.first, i.last) for i in intervals]
    found, arena = place(lives)
    offsets = {id(i.buffer): offset for i, offset in zip(intervals, found)}
    kinds = [(b.kind, evaluate(b.nbytes, sizes)) for b in program.buffers]
    owned = (sum(nbytes for k, nbytes in kinds if k == kind) for kind in ("input", "output", "constant"))
    return MemoryPlan(offsets, intervals, arena, lower_bound(lives), *owned)


def live_intervals(program: Program) -> list[Interval]:
    """The life of every temp that has bytes, in order of birth."""
    intervals = []
    for buffer, uses in _collect(program.steps):
        first, last = uses[0].position, uses[-1].position
        for loop in {scope: None for use in uses for scope in use.path if scope.is_loop}:
            inside = [use for use in uses if loop in use.path]
            if not _made_anew(inside, inside[0].path.index(loop)):
                first, last = min(first, loop.first), max(last, loop.last)
        intervals.append(Interval(buffer, first, last))
    return sorted(intervals, key=lambda i: (i.first, -i.nbytes if isinstance(i.nbytes, int) else 0))


def _made_anew(uses: list[_Use], depth: int) -> bool:
    """Whether each run of the scope at `depth` of the uses' paths writes the temp in full before it reads it."""
    first = uses[0]
    if len(first.path) == depth + 1:
        return first.defines
    inner = first.path[depth + 1]
    return all(inner in use.path for use in uses) and _made_anew(uses, depth + 1)


def _collect(steps: list[Step]) -> list[tuple[Buffer, list[_Use]]]:
    """Every root temp that has bytes, with its uses in program order."""
    uses: dict[int, tuple[Buffer, list[_Use]]] = {}
    positions = itertools.count()

    def note(step: Step, path: tuple[_Scope, ...]) -> None:
        position = next(positions)
        for buffer, mode in accesses(step):
            root = buffer.root
            if root.kind == "temp" and root.nbytes != 0:
                use = _Use(position, path, mode == "w" and _covers(step, root))
                uses.setdefault(id(root), (root, []))[1].append(use)

    def visit(steps: list[Step], path: tuple[_Scope, ...]) -> None:
        for step in steps:
            if isinstance(step, (Loop, While)):
                scope = _Scope(True, next(positions))
                if isinstance(step, While):
                    visit(step.condition, (*path, scope))
                    note(step, (*path, scope))
                visit(step.body, (*path, scope))
                scope.last = next(positions)
            elif runs(step):
                note(step, path)
                for arm in children(step):
                    visit(arm, (*path, _Scope(False, next(positions))))

    visit(steps, ())
    return list(uses.values())


def _covers(step: Step, root: Buffer) -> bool:
    """Whether the step's writes to a root fill all of it (and the step does not read it as well)."""
    if isinstance(step, Copy):
        targets = [step.dst]
    elif isinstance(step, (KernelCall, HostCall)):
        if any(buffer.root is root and "r" in mode for buffer, mode in accesses(step)):
            return False
        targets = written(step)
    else:
        return False
    return any(storage(arg).root is root and arg.nbytes == root.nbytes for arg in targets)


@dataclass(frozen=True)
class Slots:
    """Where the addresses stand in the pointer table: [arena, inputs, outputs, constants, numbers of host functions,
    their records, profile]. A program with symbolic sizes has their values and the offsets of its temps there too,
    before the profile."""

    index: dict[int, int]
    count: int
    sizes: dict[str, int] = field(default_factory=dict)
    temps: dict[int, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(program: Program) -> Slots:
        inputs = {id(b) for b in program.inputs}
        owned = [
            *program.inputs,
            *(b for b in program.outputs if id(b.root) not in inputs),
            *program.constants,
        ]
        index = {id(b.root): 1 + i for i, b in enumerate(owned)}
        functions = {name: 1 + len(owned) + i for i, name in enumerate(program.host_functions)}
        first = 1 + len(owned) + len(functions)
        records = {name: first + i for i, name in enumerate(program.recorded)}
        first += len(records)
        if not program.sizes:
            return Slots(index, first + 1, functions=functions, records=records)
        sizes = {name: first + i for i, name in enumerate(program.sizes)}
        first += len(sizes)
        temps = {id(life.buffer): first + i for i, life in enumerate(live_intervals(program))}
        return Slots(index, first + len(temps) + 1, sizes, temps, functions, records)

    @property
    def profile(self) -> int:
        return self.count - 1
