"""Captured tensors as constants of the program: what `compile(..., freeze=True)` does to a traced graph."""

from __future__ import annotations

from ..ir.freeze import bind
from ..ir.graph import Graph
from .tensor import Tensor


def frozen(graph: Graph, captures: dict[int, Tensor], assigns: dict[int, Tensor]) -> tuple[Graph, dict[int, Tensor]]:
    """The graph with the values that captured tensors have now as constants, and the captures that are left.

    A tensor that the graph assigns (a counter, running statistics) stays an input.
    """
    assigned = set(map(id, assigns.values()))
    kept = {*graph.aliases.values(), *(i for i, t in captures.items() if id(t) in assigned)}
    bound = {i: t for i, t in captures.items() if i not in kept}
    made = bind(graph, {i: t.numpy() for i, t in bound.items()})
    left = [i for i in range(len(graph.inputs)) if i not in bound]
    return made, {left.index(i): captures[i] for i in captures if i in kept}
