"""From nodes to scalar expressions: the value of any node of a group at any index.

The value at an index is written by following operands back to what is in memory: inputs of the group, and
whatever the kernel has put aside (row statistics, row buffers). Values with several readers are bound to
a variable once per loop body. The same walk without writing anything (`record`) tells which elements a group
reads, from which loops are chosen, and whether its nodes fit together at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..ir.graph import Node, Value
from ..ir.opdef import rule
from .loops_index import Axis, Index, flatten
from .lower_slots import Pointwise, Reduce, compute_dtype, let, read, recording, written

Idx = tuple[Index, ...]


class NotAligned(Exception):
    """A reduction is asked for at elements other than the one its row computes: the group is not one kernel."""


class Place(Protocol):
    """Where a value lies while a kernel runs."""

    def load(self, idx: Idx) -> Any: ...


@dataclass
class InMemory:
    """A parameter of the kernel: a flat buffer, row-major over `shape`."""

    value: Value
    buffer: Any
    wide: bool = False

    def load(self, idx: Idx) -> Any:
        return read(self.buffer[self.offset(idx)], self.value.dtype)

    def offset(self, idx: Idx) -> Any:
        return as_offset(flatten(idx, self.value.shape), self.wide)

    def store(self, idx: Idx, value: Any) -> None:
        T.buffer_store(self.buffer, written(value, self.value.dtype), [self.offset(idx)])


def as_offset(position: Index, wide: bool) -> Any:
    offset = position.expr()
    if isinstance(offset, int):
        return tirx.const(offset, "int64" if wide else "int32")
    return offset


def operand_index(idx: Idx, operand: Value) -> Idx:
    """The index of an elementwise operand, broadcast by NumPy's rules to a result read at `idx`."""
    aligned = idx[len(idx) - operand.rank:]
    return tuple(Index({}, 0) if size == 1 else i for i, size in zip(aligned, operand.shape))


@dataclass
class Evaluator:
    """Writes expressions for values of `nodes`; `places` holds the values that are loaded, not computed."""

    nodes: frozenset[Node]
    places: dict[Any, Any]
    uses: dict[Value, int] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    def fresh(self) -> None:
        """Starts another loop body: what was bound in the last one is out of scope."""
        self.memo.clear()

    def value(self, v: Value, idx: Idx) -> Any:
        key = (v, idx)
        found = self.memo.get(key)
        if found is None:
            place = self.places.get(v)
            found = place.load(idx) if place is not None else self.compute(v, idx)
            if place is not None or self.uses.get(v, 2) > 1:
                found = let(found)
            self.memo[key] = found
        return found

    def compute(self, v: Value, idx: Idx) -> Any:
        node = v.producer
        assert node is not None and node in self.nodes, f"{v!r} is not part of the kernel"
        lowering = rule("lower", node.op, node.loc)
        if isinstance(lowering, Reduce):
            raise NotAligned(f"{v!r} is reduced elsewhere")
        if lowering.elementwise:
            return lowering.fn(node, *(self.value(x, operand_index(idx, x)) for x in node.operands))
        return lowering.fn(node, idx, lambda k, at: self.value(node.operands[k], at))


@dataclass
class Access:
    """One read of a group input: the flat position, affine where it can be."""

    value: Value
    position: Index


class Recorder(Evaluator):
    """The same walk, noting what is read and how often nodes are computed; expressions are placeholders.

    `rows`: reduction results -> the only index that they may be read at.
    """

    def __init__(self, nodes: Iterable[Node], rows: dict[Value, Idx]):
        super().__init__(frozenset(nodes), {})
        self.rows = rows
        self.accesses: list[Access] = []
        self.computed: dict[Value, int] = {}
        self.row_reads: set[Value] = set()
        self.exposed: set[Axis] = set()

    def value(self, v: Value, idx: Idx) -> Any:
        key = (v, idx)
        if key not in self.memo:
            self.memo[key] = tirx.Var("t", compute_dtype(v.dtype))
            if v in self.rows:
                if self.rows[v] != idx:
                    raise NotAligned(f"{v!r} at {idx}")
                self.row_reads.add(v)
            elif v.producer is None or v.producer not in self.nodes:
                self.accesses.append(Access(v, flatten(idx, v.shape)))
            else:
                self.computed[v] = self.computed.get(v, 0) + 1
                self.follow(v.producer, idx)
        return self.memo[key]

    def follow(self, node: Node, idx: Idx) -> None:
        lowering = rule("lower", node.op, node.loc)
        if not isinstance(lowering, Pointwise):
            raise NotAligned(f"{node!r} is not computed element by element")
        if lowering.elementwise:
            for x in node.operands:
                self.value(x, operand_index(idx, x))
        else:
            if lowering.exposes:
                self.exposed.update(*(i.axes for i in idx))
            with recording():
                lowering.fn(node, idx, lambda k, at: self.value(node.operands[k], at))


def count_uses(nodes: Sequence[Node], outputs: Iterable[Value]) -> dict[Value, int]:
    """How many readers inside a group each value has (being an output counts)."""
    uses: dict[Value, int] = dict.fromkeys(outputs, 1)
    for node in nodes:
        for v in node.operands:
            uses[v] = uses.get(v, 0) + 1
    return uses
