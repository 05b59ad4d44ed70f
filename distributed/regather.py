"""ZeRO-3: parameters lie in parts and are whole only while a layer reads them.

Two passes. `gather_at_use` works on the graph of one process: every op that reads a parameter, forwards and backwards,
gets a gather of its own, so what it gathered is free again behind it and the backward pass gathers once more
(Rajbhandari et al. 2020, arXiv:1910.02054, section 7.2.2). What a parameter goes through on its way to an op is
treated with it: casts and other arithmetic run on the parts, before the gather (of mixed precision half the bytes
travel), and views are repeated behind each gather.

`in_groups` works on the program of a rank: gathers of small parameters are put together with those of the next
readers, up to the size of a message; no gather waits for more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir.builder import GraphBuilder, make_node
from ..ir.graph import Graph, Node, Value
from ..ir.opdef import op
from ..ir.rewrite import with_operands


def gather_at_use(graph: Graph, parameters: Sequence[Value], *axes: str) -> Graph:
    """Annotates that forward and backward read these inputs whole along some axes; their update reads the parts."""
    return _AtUse(graph, parameters, axes).run()


class _AtUse:
    """One run. `parts`: values that lie as parameters do; `views`: how a value is seen from these."""

    def __init__(self, graph: Graph, parameters: Sequence[Value], axes: tuple[str, ...]):
        self.graph, self.axes = graph, axes
        self.builder = GraphBuilder(graph.name)
        self.mapping: dict[Value, Value] = {v: v for v in graph.inputs}
        self.parts = set(parameters)
        self.views: dict[Value, Node] = {}
        self.still = {v for v, role in zip(graph.inputs, graph.roles) if role in ("parameter", "constant", "scalar")}

    def run(self) -> Graph:
        graph = self.graph
        for node in graph.nodes:
            with self.builder.at(node.loc):
                self.node(node)
        seen: dict[Value, Value] = {}
        outputs = [self.whole(v, seen) if v in self.views else self.mapping[v] for v in graph.outputs]
        return Graph(graph.name, graph.inputs, graph.roles, self.builder.graph.nodes, outputs, graph.aliases,
                     graph.meta)

    def node(self, node: Node) -> None:
        """Takes in a node of the old graph."""
        if all(v in self.still for v in node.operands) and not node.op.has("effect"):
            self.still.update(node.results)
        own = [v for v in node.operands if v in self.parts or v in self.views]
        if node.op.name == "barrier" and own:
            self.barrier(node)
        elif own and node.op.has("view") and len(node.operands) == 1:
            self.views[node.result] = node
        elif not own or self.in_parts(node):
            self.take(node, [self.mapping[v] for v in node.operands])
            if own and all(v in self.still for v in node.operands):
                self.parts.update(node.results)
        else:
            seen: dict[Value, Value] = {}  # of this reader alone
            self.take(node, [self.whole(v, seen) for v in node.operands])

    def take(self, node: Node, operands: Sequence[Value]) -> None:
        fresh = with_operands(node, operands)
        self.builder.take(fresh)
        self.mapping.update(zip(node.results, fresh.results))

    def in_parts(self, node: Node) -> bool:
        """Whether a node computes with a parameter element by element, as its update and its decay do."""
        return node.op.has("elementwise") and self.views.keys().isdisjoint(node.operands) and all(
            v.shape in ((), node.result.shape) for v in node.operands)

    def whole(self, v: Value, seen: dict[Value, Value]) -> Value:
        """A value as a reader sees it: gathered for this reader if it lies in parts."""
        if v not in seen:
            if v in self.views:
                node = self.views[v]
                (seen[v],) = self.builder.emit(node.op.name, [self.whole(x, seen) for x in node.operands], node.attrs)
            elif v in self.parts:
                attrs: dict[str, Any] = {"dims": ("",) * v.rank, "whole": self.axes}
                (seen[v],) = self.builder.emit("annotate", [self.mapping[v]], attrs)
            else:
                return self.mapping[v]
            seen[v].name = v.name
        return seen[v]

    def barrier(self, node: Node) -> None:
        """A recomputation gathers for itself as every reader does: parameters pass its barrier."""
        rest = [i for i, v in enumerate(node.operands) if v not in self.parts and v not in self.views]
        for v, result in zip(node.operands, node.results):
            if v in self.views:
                self.views[result] = self.views[v]
            elif v in self.parts:
                self.parts.add(result)
                self.mapping[result] = self.mapping[v]
        if rest:
            fresh = make_node(op("barrier"), [self.mapping[node.operands[i]] for i in rest], {}, (), node.loc)
            self.builder.take(fresh)
            self.mapping.update((node.results[i], v) for i, v in zip(rest, fresh.results))


@dataclass
class _Group:
    """Gathers that go together."""

    nodes: list[Node] = field(default_factory=list)
    nbytes: int = 0


def in_groups(graph: Graph, most_bytes: int) -> Graph:
    """The program of a rank with the gathers of parameters next to each other, at the first reader of each group.

    A group takes at most `most_bytes` of whole tensors (a single one may be larger).
    """
    still = unvarying(graph)
    groups: dict[Node, _Group] = {}
    current: dict[Any, _Group] = {}
    for node in graph.nodes:
        if node.op.name == "all_gather" and node in still:
            key = node.attrs["axis"], node.operands[0].dtype
            size = sum(int(v.type.nbytes) for v in node.results)
            if key not in current or current[key].nbytes + size > most_bytes:
                current[key] = _Group()
            current[key].nodes.append(node)
            current[key].nbytes += size
            groups[node] = current[key]
    if not groups:
        return graph
    nodes: dict[Node, None] = {}

    def place(node: Node) -> None:
        for v in node.operands:
            if v.producer is not None and v.producer not in nodes:
                place(v.producer)
        nodes[node] = None

    for node in graph.nodes:
        for member in groups[node].nodes if node in groups else [node]:
            if member not in nodes:
                place(member)
    return Graph(graph.name, graph.inputs, graph.roles, list(nodes), graph.outputs, graph.aliases, graph.meta)


def unvarying(graph: Graph) -> set[Node]:
    """Nodes that depend on parameters, constants and numbers of the step alone: they can run at any time."""
    values = {v for v, role in zip(graph.inputs, graph.roles) if role in ("parameter", "constant", "scalar")}
    found = set()
    for node in graph.nodes:
        if all(v in values for v in node.operands):
            found.add(node)
            values.update(node.results)
    return found
