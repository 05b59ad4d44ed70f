"""Common subexpressions: nodes that compute the same thing are merged into the first.

Two nodes are the same if op, operands, attributes and regions are; operands of commutative ops count as a set.
Random bits are a pure function of their counter, so they merge as well. Never merged: effects, and barriers,
which exist to keep a recomputation apart from the original.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .graph import Graph, Node, Value
from .hashing import node_key
from .pipeline import Pass, PassResult
from .rewrite import Rewriter, result_of, rewrite


def is_pure(node: Node) -> bool:
    """Whether a node may be merged with another, or left out: no effect and no barrier, nested ones included."""
    return not any(n.op.has("effect") or n.op.has("barrier")
                   for n in (node, *(inner for r in node.regions for inner in r.walk())))


class Merger(Rewriter):
    """Takes in only the first of equal nodes."""

    def __init__(self, name: str = "main"):
        super().__init__(name)
        self._numbers: dict[Value, int] = {}
        self._seen: dict[Hashable, tuple[Value, ...]] = {}

    def _number(self, value: Value) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def replace(self, node: Node) -> Sequence[Value] | None:
        if not is_pure(node):
            return None
        key = node_key(node, self._number)
        first = self._seen.setdefault(key, node.results)
        if first is node.results:
            return None
        self.stats["merged"] += 1
        return first


def merge(graph: Graph) -> PassResult:
    """Merges common subexpressions, in regions too (each on its own)."""
    merger = Merger(graph.name)
    return result_of(graph, rewrite(graph, merger), merger.stats)


class Numbering:
    """A number for each value of a graph that is still growing: the same for what is computed in the same way."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._numbers: dict[Value, int] = {}
        self._seen: dict[Hashable, tuple[int, ...]] = {}
        self._done = 0

    def of(self, value: Value) -> int:
        """The number of a value of the graph."""
        for node in self.graph.nodes[self._done:]:
            key = node_key(node, self._number) if is_pure(node) else node
            numbers = self._seen.get(key)
            if numbers is None:
                numbers = self._seen[key] = tuple(map(self._number, node.results))
            self._numbers.update(zip(node.results, numbers))
        self._done = len(self.graph.nodes)
        return self._number(value)

    def _number(self, value: Value) -> int:
        return self._numbers.setdefault(value, len(self._numbers))


CSE = Pass("cse", merge)
