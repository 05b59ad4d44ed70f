"""What a group with reductions computes: its axes, which of them are reduced, and in which order things become known.

The domain is the shape of what is reduced. A value of that many elements is *full*; a value with one element for each
position of the kept axes is a *row* value. A group is one kernel if every reduction folds the same axes and every
row value is read at its own row only. Then the kernel goes through its rows once for each level of
reductions that depend on each other: softmax has two (maximum, sum), then writes. Nothing here knows softmax: layer
norm, their gradients, losses and column statistics come out of the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.graph import Node, Value
from ..ir.opdef import rule
from .loops import collapse, linear, refine
from .loops_eval import Idx, NotAligned, Recorder
from .loops_index import Axis, Index, flatten, unflatten
from .lower_slots import Reduce

EXPENSIVE = 8.0  # operations per element from which a value is kept for a later pass instead of computed again


def is_reduction(node: Node) -> bool:
    return isinstance(node.op.slots.get("lower"), Reduce)


@dataclass
class RowDomain:
    """The analysis of one group; see the module's text."""

    nodes: Sequence[Node]
    outputs: Sequence[Value]
    axes: list[Axis]
    reduced: frozenset[Axis]
    levels: dict[Value, int]
    recorder: Recorder

    @property
    def size(self) -> Any:
        return math.prod([a.extent for a in self.axes])

    @property
    def kept(self) -> list[Axis]:
        return [a for a in self.axes if a not in self.reduced]

    @property
    def rows(self) -> Any:
        return math.prod([a.extent for a in self.kept])

    @property
    def passes(self) -> int:
        """Levels of reductions that depend on each other."""
        return max((self.levels[n.result] for n in self.nodes if is_reduction(n)), default=0)

    def is_row(self, v: Value) -> bool:
        return v.type.size == self.rows

    def is_full(self, v: Value) -> bool:
        return v.type.size == self.size and not self.is_row(v)

    def index(self, v: Value) -> Idx:
        """Where a full or row value has its element of the current position."""
        return self.row_index(v) if self.is_row(v) else self.full_index(v)

    def full_index(self, v: Value) -> Idx:
        return unflatten(flatten([Index.of(a) for a in self.axes], [a.extent for a in self.axes]), v.shape)

    def row_index(self, v: Value) -> Idx:
        kept = self.kept
        return unflatten(flatten([Index.of(a) for a in kept], [a.extent for a in kept]), v.shape)

    def reductions(self, level: int) -> list[Node]:
        return [n for n in self.nodes if is_reduction(n) and self.levels[n.result] == level]

    def loops(self) -> list[Axis]:
        """The axes, neighbours collapsed where all accesses allow it and both are kept or both reduced."""
        seen = [linear(access.position) for access in self.recorder.accesses]
        for v in self.outputs:
            seen.append(linear(flatten(self.index(v), v.shape)))
        fixed = frozenset(self.recorder.exposed).union(*(other for _, other in seen))
        own = linear(flatten([Index.of(a) for a in self.axes], [a.extent for a in self.axes]))[0]
        reduced = self.reduced
        return collapse(self.axes, [s for s, _ in seen] + [own], fixed,
                        lambda a, b: (a in reduced) == (b in reduced))


def levels_of(nodes: Sequence[Node]) -> dict[Value, int]:
    """How many dependent reductions stand before each value (a reduction counts itself)."""
    levels: dict[Value, int] = {}
    for node in nodes:
        level = max((levels.get(v, 0) for v in node.operands), default=0) + is_reduction(node)
        for v in node.results:
            levels[v] = level
    return levels


def _axes_of(nodes: Sequence[Node]) -> list[Axis]:
    reductions = [n for n in nodes if is_reduction(n)]
    shapes = [n.operands[0].shape for n in reductions]
    size = math.prod(shapes[0])
    if any(math.prod(s) != size for s in shapes):
        raise NotAligned("reductions over different numbers of elements")
    shapes += [v.shape for n in nodes for v in n.results if v.type.size == size]
    return [Axis(n, f"i{k}") for k, n in enumerate(refine(shapes))]


def _reduced_axes(node: Node, full: Idx, axes: Sequence[Axis]) -> frozenset[Axis]:
    """The domain axes that a reduction folds."""
    folded: set[Axis] = set()
    kept: set[Axis] = set()
    if node.operands[0].type.size == 0:  # empty axes are in no index
        if node.operands[0].shape != tuple(a.extent for a in axes):
            raise NotAligned("empty operands of different shapes")
        return frozenset(axes[k] for k in node.attrs["axes"])
    for k, i in enumerate(full):
        (folded if k in node.attrs["axes"] else kept).update(i.axes)
    if folded & kept or any(not isinstance(a, Axis) for i in full for a in i.terms):
        raise NotAligned(f"{node!r} folds half an axis")
    return frozenset(folded)


def analyse(nodes: Sequence[Node], outputs: Sequence[Value]) -> RowDomain:
    """The domain of a group that holds at least one reduction.

    Raises:
        NotAligned: the group cannot be one kernel.
    """
    domain = RowDomain(nodes, outputs, _axes_of(nodes), frozenset(), levels_of(nodes), Recorder(nodes, {}))
    reductions = [n for n in nodes if is_reduction(n)]
    sets = {_reduced_axes(n, domain.full_index(n.operands[0]), domain.axes) for n in reductions}
    # Axes of extent 1 are in no index; they count as reduced or kept as it suits.
    if len(sets) != 1:
        raise NotAligned("reductions over different axes")
    domain.reduced = sets.pop()
    recorder = domain.recorder
    recorder.rows = {n.result: domain.row_index(n.result) for n in reductions}
    for n in reductions:
        recorder.value(n.operands[0], domain.full_index(n.operands[0]))
    for v in outputs:
        if v.producer in reductions:
            continue
        if v.type.size not in (domain.size, domain.rows):
            raise NotAligned(f"{v!r} has neither the elements of the domain nor its rows")
        recorder.value(v, domain.index(v))
    return domain


def cost_of(node: Node) -> float:
    lowering = rule("lower", node.op, node.loc)
    return 1.0 if isinstance(lowering, Reduce) else float(lowering.cost)


__all__: list[Any] = ["EXPENSIVE", "RowDomain", "analyse", "cost_of", "is_reduction", "levels_of"]
