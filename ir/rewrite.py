"""The engine under the passes: a builder that looks at every node before it takes it in.

A pass replays a graph into a `Rewriter`. Each node arrives with operands that are rewritten already; `replace`
answers with the values to use instead, or None to keep the node. What a replacement emits comes through the
same builder, so it is rewritten in turn, and one walk settles a whole chain of rules.

Nodes that nothing changed are shared between the old graph and the new one: nodes are immutable, and sharing
makes an idle pass cheap.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .builder import GraphBuilder, make_node
from .errors import VerifyError
from .graph import Graph, Node, Value
from .location import user_location
from .opdef import op
from .pipeline import PassResult
from .text import node_text


class Rewriter(GraphBuilder):
    """Base of passes that replace nodes one at a time. `stats` counts what was done, by rule."""

    def __init__(self, name: str = "main"):
        super().__init__(name)
        self.stats: Counter[str] = Counter()

    def replace(self, node: Node) -> Sequence[Value] | None:
        """The values that stand for the node's results, or None to keep the node."""
        return None

    def fresh(self, name: str) -> Rewriter:
        """A rewriter of the same kind for a region; it shares the statistics."""
        inner = type(self)(name)
        inner.stats = self.stats
        return inner

    def emit(self, name: str, operands: Sequence[Value], attrs: Mapping[str, Any],
             regions: Sequence[Graph] = ()) -> tuple[Value, ...]:
        loc = self._locations[-1] if self._locations else user_location()
        return self.admit(make_node(op(name), operands, attrs, regions, loc))

    def admit(self, node: Node) -> tuple[Value, ...]:
        """Takes a node in, or what replaces it."""
        count = len(self.graph.nodes)
        found = self.replace(node)
        if found is None:
            self.take(node)
            return node.results
        if tuple(v.type for v in found) != tuple(v.type for v in node.results):
            raise VerifyError(f"a rewrite of {node_text(node)} gives other types: {list(found)}", node.loc)
        made = set(self.graph.nodes[count:])  # values that stood there before keep their names
        for old, new in zip(node.results, found):
            if new.producer in made:
                new.name = new.name or old.name
        return tuple(found)


def rewrite(graph: Graph, rewriter: Rewriter) -> Graph:
    """The graph replayed into the rewriter. The same object if no node was replaced or changed."""
    mapping: dict[Value, Value] = {}
    with rewriter:
        for node in graph.nodes:
            fresh = with_operands(node, [mapping.get(v, v) for v in node.operands],
                                  [rewrite(r, rewriter.fresh(r.name)) for r in node.regions])
            with rewriter.at(node.loc):
                results = rewriter.admit(fresh)
            if results is not node.results:
                mapping.update(zip(node.results, results))
    if rewriter.graph.nodes == graph.nodes:
        return graph
    return Graph(graph.name, graph.inputs, graph.roles, rewriter.graph.nodes,
                 [mapping.get(v, v) for v in graph.outputs], graph.aliases, graph.meta)


def with_operands(node: Node, operands: Sequence[Value], regions: Sequence[Graph] | None = None) -> Node:
    """The node with other operands of the same types; the node itself if they are the same values."""
    regions = node.regions if regions is None else tuple(regions)
    # values and graphs compare by identity or by text: `is`, in one pass, is what is meant here
    if all(map(operator.is_, operands, node.operands)) and all(map(operator.is_, regions, node.regions)):
        return node
    fresh = Node(node.op, operands, node.attrs, [v.type for v in node.results], regions, node.loc)
    for old, new in zip(node.results, fresh.results):
        new.name = old.name
    return fresh


def result_of(before: Graph, after: Graph, stats: Mapping[str, Any]) -> PassResult:
    return PassResult(after, after is not before, dict(stats))
