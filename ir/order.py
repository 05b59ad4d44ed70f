"""The order of nodes, for memory.

A traced training step computes all gradients and then updates all parameters, so every gradient waits for the end.
`hoist_updates` moves each update to where its gradient is ready: the gradient's memory is free again at once. An
update overwrites its parameter, so it stays behind the last other reader of it.
"""

from __future__ import annotations

from .dce import has_effect
from .graph import Graph, Node, Value
from .pipeline import Pass, PassResult


def hoist_updates(graph: Graph) -> PassResult:
    """Moves elementwise updates of aliased inputs to the earliest place at which they can run in place."""
    front = _scalars(graph)
    groups = _updates(graph, front)
    order = [*(n for n in graph.nodes if n in front), *(n for n in graph.nodes if n not in front)]
    member = {node: i for i, group in enumerate(groups) for node in group}
    position = {node: i for i, node in enumerate(order)}
    placed: dict[int, list[list[Node]]] = {}
    readers, taken = graph.uses(), _taken(graph)
    for group in groups:
        placed.setdefault(_ready(group, taken, readers, position), []).append(group)
    nodes: list[Node] = [node for group in placed.get(-1, ()) for node in group]
    for i, node in enumerate(order):
        if node not in member:
            nodes.append(node)
        for group in placed.get(i, ()):
            nodes.extend(group)
    if nodes == graph.nodes:
        return PassResult(graph, False, {"moved": 0})
    moved = Graph(graph.name, graph.inputs, graph.roles, nodes, graph.outputs, graph.aliases, graph.meta)
    return PassResult(moved, True, {"moved": len(groups)})


def _scalars(graph: Graph) -> set[Node]:
    """Nodes of scalar results that depend on scalars only: step counts, learning rates. They can all come first."""
    early = {v for v in graph.inputs if v.rank == 0}
    found: set[Node] = set()
    for node in graph.nodes:
        if all(v in early for v in node.operands) and all(v.rank == 0 for v in node.results) and not has_effect(node):
            found.add(node)
            early.update(node.results)
    return found


def _updates(graph: Graph, front: set[Node]) -> list[list[Node]]:
    """Connected groups of elementwise nodes that only serve outputs which take over an input's storage.

    Nodes are connected if one reads the other's result, or what the other overwrites.
    """
    readers, taken = graph.uses(), _taken(graph)
    returned = {v for i, v in enumerate(graph.outputs) if i not in graph.aliases}
    members: dict[Node, None] = {}
    for node in reversed(graph.nodes):
        reading = [n for v in node.results for n in readers.get(v, ())]
        serves = (reading or any(v in taken for v in node.results)) and returned.isdisjoint(node.results)
        if serves and node.op.has("elementwise") and node not in front and all(n in members for n in reading):
            members[node] = None
    leader = {node: node for node in members}

    def find(node: Node) -> Node:
        while leader[node] is not node:
            leader[node] = node = leader[leader[node]]
        return node

    for node in members:
        touched = [*node.results, *(taken[v] for v in node.results if v in taken)]
        for other in (n for v in touched for n in readers.get(v, ()) if n in members):
            leader[find(other)] = find(node)
    groups: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node in members:
            groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _taken(graph: Graph) -> dict[Value, Value]:
    """Output -> the input whose storage it takes over."""
    return {graph.outputs[i]: graph.inputs[source] for i, source in graph.aliases.items()}


def _ready(group: list[Node], taken: dict[Value, Value], readers: dict[Value, list[Node]],
           position: dict[Node, int]) -> int:
    """The position after which the operands of a group are there, and what it overwrites is not read any more."""
    inside = set(group)
    overwritten = [taken[v] for node in group for v in node.results if v in taken]
    before = [v.producer for node in group for v in node.operands if v.producer is not None]
    before += [n for v in overwritten for n in readers.get(v, ())]
    return max((position[n] for n in before if n not in inside), default=-1)


HOIST_UPDATES = Pass("hoist_updates", hoist_updates)
