"""What the backward pass can compute again for free is not kept.

A step of elementwise arithmetic is limited by memory traffic: to read a kept value costs more than to compute it again
from values that the reading kernel loads anyway. GELU keeps its input, tanh and three products for the backward pass;
all follow from the input. So a value made by elementwise ops is dropped if every kernel that reads it can have it from
what is there, and the bytes read and written become fewer. Matrix products are never repeated, and the kernels of
products read what they read (arithmetic in front of a product would run once per tile).

This is the idea of torch's min-cut partitioner (H. He, "Min-cut optimal recomputation", 2022), as one greedy walk from
the last value to the first. Like `memory_budget`, it comes after every pass that merges equal nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import ConfigError
from ..ir.graph import Graph, Node, Value
from ..ir.pipeline import Pass, PassResult
from ..ir.rewrite import with_operands
from .budget import Kernel, Timeline, timeline

OPS_PER_BYTE = 16  # arithmetic that a byte of memory traffic is worth; about what a core does while it waits for one
CHAIN_NODES = 40   # looked at for one value
Chain = tuple[dict[Node, None], set[Value]]  # nodes to run, and the values that these read


class _Traffic:
    """Which kernel reads which values from memory, as recomputation changes it."""

    def __init__(self, graph: Graph, line: Timeline):
        self.line = line
        self.outputs = set(graph.outputs)
        self.reads: list[set[Value]] = [set() for _ in line.kernels]
        for i, group in enumerate(line.kernels):
            self.reads[i] = {v for node in group for v in node.operands if line.made.get(v, -1) != i}
        self.again: list[dict[Node, None]] = [{} for _ in line.kernels]  # nodes that a kernel runs again
        self.readers: dict[Value, set[int]] = {}
        for i, read in enumerate(self.reads):
            for v in read:
                self.readers.setdefault(v, set()).add(i)

    def chain(self, value: Value, kernel: int) -> Chain | None:
        """How a kernel could compute a value itself; None if it cannot."""
        node = value.producer
        return self._from(node, kernel, {}) if node is not None else None

    def _have(self, value: Value, kernel: int, known: dict[Value, Chain | None]) -> Chain | None:
        """How a kernel comes by an operand: it reads it already, computes it, or reads what others read from memory."""
        node = value.producer
        if node is None or value in self.reads[kernel]:
            return {}, {value}
        if node in self.again[kernel]:
            return {}, set()
        if value not in known:
            known[value] = self._from(node, kernel, known) if len(known) < CHAIN_NODES else None
            if known[value] is None and len(self.readers.get(value, ())) > 1:
                known[value] = {}, {value}
        return known[value]

    def _from(self, node: Node, kernel: int, known: dict[Value, Chain | None]) -> Chain | None:
        if not (node.op.has("constant") or _repeatable(node)):
            return None
        nodes: dict[Node, None] = {node: None}
        sources: set[Value] = set()
        for operand in node.operands:
            found = self._have(operand, kernel, known)
            if found is None:
                return None
            nodes |= found[0]
            sources |= found[1]
        return nodes, sources

    def drop(self, value: Value, chains: dict[int, Chain]) -> None:
        for kernel, (nodes, sources) in chains.items():
            self.reads[kernel] -= {value}
            self.reads[kernel] |= sources
            self.again[kernel].update(nodes)
            for v in sources:
                self.readers.setdefault(v, set()).add(kernel)
        self.readers[value] = set()
        self._retire(self.line.made[value])

    def kept_longer(self, chains: dict[int, Chain]) -> int:
        """Bytes of the values that would have to wait for a later reader than they have now."""
        late = {v for kernel, (_, sources) in chains.items() for v in sources - self.outputs
                if max(self.readers.get(v, ()), default=-1) < kernel}
        return sum(self.line.nbytes.get(v, 0) for v in late)

    def _retire(self, kernel: int) -> None:
        """A kernel whose results nobody reads any more does not run, and reads nothing."""
        made = [v for node in self.line.kernels[kernel] for v in node.results]
        if self.outputs.isdisjoint(made) and not any(self.readers.get(v) for v in made):
            for v in self.reads[kernel]:
                self.readers[v].discard(kernel)
            self.reads[kernel] = set()


def _repeatable(node: Node) -> bool:
    return node.op.has("elementwise") or node.op.name in ("broadcast_to", "reshape")


def _streams(group: Kernel) -> bool:
    """Whether a kernel does elementwise arithmetic or a reduction, into which more of it can be fused."""
    anchor = group[-1]
    return anchor.op.has("elementwise") or anchor.op.has("reduction")


def save_less(graph: Graph) -> PassResult:
    """Drops values that the kernels reading them can compute from what is there, where that saves memory traffic.

    `stats`: dropped (values), bytes (that are no longer written).
    """
    try:
        line = timeline(graph)
    except ConfigError:  # symbolic sizes: nothing is known of the traffic
        return PassResult(graph, False, {"dropped": 0})
    traffic = _Traffic(graph, line)
    dropped: list[Value] = []
    for node in (n for group in reversed(line.kernels) for n in reversed(group)):
        for value in node.results:
            chains = _worthwhile(traffic, value)
            if chains:
                traffic.drop(value, chains)
                dropped.append(value)
    if not dropped:
        return PassResult(graph, False, {"dropped": 0})
    return PassResult(_rebuilt(graph, line, traffic.again), True,
                      {"dropped": len(dropped), "bytes": sum(line.nbytes[v] for v in dropped)})


def _worthwhile(traffic: _Traffic, value: Value) -> dict[int, Chain] | None:
    """For each kernel that reads the value how it computes it instead; None if one cannot or nothing is saved."""
    line, node = traffic.line, value.producer
    kernels = traffic.readers.get(value, set())
    size = line.nbytes.get(value, 0)
    if not size or not kernels or value in traffic.outputs or node is None or not node.op.has("elementwise"):
        return None
    if len(kernels) == 1 and line.made[value] + 1 in kernels:
        return None  # a neighbour: fusing the two is the scheduler's choice
    chains: dict[int, Chain] = {}
    extra = work = 0  # bytes to read instead, operations
    for kernel in kernels:
        found = traffic.chain(value, kernel) if _streams(line.kernels[kernel]) else None
        if found is None:
            return None
        chains[kernel] = found
        extra += sum(_bytes(v) for v in found[1] - traffic.reads[kernel])
        work += sum(n.flops for n in found[0])
    saved = size * (1 + len(kernels)) - extra
    pays = saved > 0 and work <= OPS_PER_BYTE * saved and traffic.kept_longer(chains) <= size
    return chains if pays else None


def _bytes(value: Value) -> int:
    return 0 if value.producer is not None and value.producer.op.has("constant") else int(value.type.nbytes)


def _rebuilt(graph: Graph, line: Timeline, again: Sequence[dict[Node, None]]) -> Graph:
    """The graph in the order of its kernels, what they run again before each."""
    order = {node: i for i, node in enumerate(n for group in line.kernels for n in group)}
    nodes: list[Node] = []
    mapping: dict[Value, Value] = {}
    for group, repeated in zip(line.kernels, again):
        local: dict[Value, Value] = {}
        for node in sorted(repeated, key=order.__getitem__):
            copy = Node(node.op, [local.get(v, mapping.get(v, v)) for v in node.operands], node.attrs,
                        [v.type for v in node.results], node.regions, node.loc)
            local.update(zip(node.results, copy.results))
            nodes.append(copy)
        for node in group:
            fresh = with_operands(node, [local.get(v, mapping.get(v, v)) for v in node.operands])
            if fresh is not node:
                mapping.update(zip(node.results, fresh.results))
            nodes.append(fresh)
    return Graph(graph.name, graph.inputs, graph.roles, nodes, [mapping.get(v, v) for v in graph.outputs],
                 graph.aliases, graph.meta)


SAVE_LESS = Pass("save_less", save_less)
