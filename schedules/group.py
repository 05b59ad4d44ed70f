"""Groups of nodes that become one kernel, and what a kernel of a group would be like.

A `Group` is a set of nodes in graph order. *Free* nodes (views, counters, scalar constants, what is computed of
these alone) belong to no group: every group that reads one computes it on the way, so a broadcast or a
reshape never touches memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.graph import Graph, Node, Value
from .loops import domain_of, refine, vectorizable
from .loops_eval import NotAligned, Recorder
from .loops_index import Axis, Index, flatten, unflatten
from .lower_shape import is_immediate
from .lower_slots import Anchor, Pointwise, Reduce
from .rows_domain import RowDomain, analyse, is_reduction
from .sizes import hint

VIEWS = frozenset({"reshape", "broadcast_to", "slice", "reverse", "transpose"})
CHEAP = 2.0            # operations per element that are better repeated than stored
MOST_NODES = 96        # of a group: bounds registers and compile time
MOST_PARAMS = 40
ALONE = 65_536         # elements from which a group of few rows is better split than kept together


def is_pointwise(node: Node) -> bool:
    return isinstance(node.op.slots.get("lower"), Pointwise)


def is_anchor(node: Node) -> bool:
    return isinstance(node.op.slots.get("lower"), Anchor)


def fusible(node: Node) -> bool:
    """Whether the node may share a kernel with others."""
    return isinstance(node.op.slots.get("lower"), (Pointwise, Reduce)) and not node.op.has("barrier") \
        and not node.op.has("effect") and not (node.op.name == "constant" and not is_immediate(node))


@dataclass(eq=False)
class Group:
    """Nodes of one kernel. `position`: where its last node stands in the graph."""

    nodes: list[Node]
    position: int
    anchor: Node | None = None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    packed: dict[Value, np.ndarray] = field(default_factory=dict)  # constants in the layout that the kernel reads

    @property
    def has_reduction(self) -> bool:
        return any(is_reduction(n) for n in self.nodes)

    @property
    def label(self) -> str:
        """What profiles call the kernel: its ops, the anchor first."""
        names = [n.op.name for n in self.nodes if n.op.name not in VIEWS and not is_immediate(n)]
        if self.anchor is not None:
            names = [self.anchor.op.name, *(n for n in names if n != self.anchor.op.name)]
        names = names or [self.nodes[-1].op.name]
        return "+".join(names[:6]) + ("..." if len(names) > 6 else "")


class Facts:
    """What fusion asks about a graph: order, readers, which nodes are free."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.readers = graph.uses()
        self.wanted = set(graph.outputs)
        self.free: set[Node] = set()
        for node in graph.nodes:
            if self._is_free(node):
                self.free.add(node)

    def _is_free(self, node: Node) -> bool:
        if not fusible(node) or not is_pointwise(node):
            return False
        if is_immediate(node) or node.op.name in ("iota", "size"):
            return True
        if node.op.name == "transpose":
            return len(self.readers.get(node.result, ())) <= 1
        if node.op.name in VIEWS:
            return True
        computed = node.operands and all(v.producer in self.free and not self._reaches_memory(v)
                                         for v in node.operands)
        return bool(computed) and node.op.slots["lower"].cost <= CHEAP

    def _reaches_memory(self, v: Value) -> bool:
        node = v.producer
        return node is None or node not in self.free or any(self._reaches_memory(x) for x in node.operands)

    def closure(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes and every free node that they read through, in graph order."""
        found: set[Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if fusible(node):  # what a kernel of its own reads lies in memory
                stack.extend(v.producer for v in node.operands if v.producer in self.free)
        return sorted(found, key=self.position.__getitem__)

    def boundary(self, nodes: Sequence[Node]) -> tuple[list[Value], list[Value]]:
        """(values read from outside, values that others or the graph need; free ones are computed where needed)."""
        inside = set(nodes)
        inputs = dict.fromkeys(v for n in nodes for v in n.operands if v.producer not in inside)
        # a view that the graph gives is read outside, even where the group reads through it as well
        outputs = [v for n in nodes if n not in self.free for v in n.results
                   if v in self.wanted or any(r not in inside or r in self.free for r in self.outside_readers(v))]
        return list(inputs), outputs

    def outside_readers(self, v: Value) -> list[Node]:
        """The nodes that read a value, directly or through free nodes."""
        found: list[Node] = []
        seen: set[Value] = set()
        stack = [v]
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            for node in self.readers.get(value, ()):
                if node in self.free:
                    stack.extend(node.results)
                    if any(r in self.wanted for r in node.results):
                        found.append(node)
                else:
                    found.append(node)
        return found


def repeats_work(recorder: Recorder, size: Any, rows: Any = 0) -> bool:
    """Whether something costly is computed at several places, or for more elements than it has (values of each of
    `rows` rows are computed once for the row)."""
    for v, times in recorder.computed.items():
        assert v.producer is not None
        cost = v.producer.op.slots["lower"].cost
        if cost > CHEAP and times > 1 or times > 3 and cost >= 1:
            return True
        if cost > CHEAP and hint(v.type.size) * 4 < hint(size) and v.type.size not in (1, rows):
            return True
    return False


def check_loop(nodes: Sequence[Node], outputs: Sequence[Value]) -> None:
    """Raises NotAligned unless pointwise nodes with these outputs are one good kernel."""
    size = outputs[0].type.size
    if any(v.type.size != size for v in outputs):
        raise NotAligned("outputs of different sizes")
    shape = refine([v.shape for v in outputs])
    if size and math.prod(shape) != size:
        raise NotAligned("shapes without a common refinement")
    recorder = Recorder(nodes, {})
    domain = domain_of(shape, nodes, outputs, recorder)
    if repeats_work(recorder, size):
        raise NotAligned("work would be repeated")
    for v in outputs:
        if recorder.computed.get(v, 1) > 1 and len(domain.loops) > 1:
            raise NotAligned(f"{v!r} is read at other places as well")


def check_rows(nodes: Sequence[Node], outputs: Sequence[Value], threads: int) -> RowDomain:
    """The domain of a group with reductions, if it is one good kernel (else NotAligned)."""
    domain = analyse(nodes, outputs)
    if repeats_work(domain.recorder, domain.size, domain.rows):
        raise NotAligned("work would be repeated")
    together = domain.passes > 1 or any(domain.is_full(v) for v in outputs)
    if together and hint(domain.size) > ALONE and hint(domain.rows) < 2 * threads:
        raise NotAligned("too few rows to share among threads")
    return domain


def check_epilogue(anchor: Node, nodes: Sequence[Node], outputs: Sequence[Value]) -> None:
    """Raises NotAligned unless the nodes follow the anchor element by element."""
    result = anchor.result
    axes = anchor_axes(result)
    position = flatten(axes, result.shape)
    recorder = Recorder([n for n in nodes if n is not anchor], {result: axes})
    if not vectorizable(recorder.nodes):
        raise NotAligned("a function without a vector form")
    for v in outputs:
        if v.type.size != result.type.size:
            raise NotAligned(f"{v!r} has not the elements of {result!r}")
        if v is not result:
            at = unflatten(position, v.shape)
            if any(not i.plain for i in at):
                raise NotAligned(f"{v!r} has no common axes with {result!r}")
            recorder.value(v, at)
    if repeats_work(recorder, result.type.size):
        raise NotAligned("work would be repeated")


def anchor_axes(result: Value) -> tuple[Index, ...]:
    """An axis for each dimension of an anchor's result."""
    return tuple(Index.of(Axis(n, f"a{k}")) for k, n in enumerate(result.shape))
