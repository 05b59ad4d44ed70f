"""Rewrites big ops into simpler ones, by the rules in their `decompose` slot.

Which ops is the caller's choice: a backend decomposes those it has no kernel for, a test all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import decompose_rules as _rules  # noqa: F401  (fills the slots)
from .graph import Graph, Node, Value
from .opdef import rule
from .pipeline import Pass, PassResult
from .rewrite import Rewriter, result_of, rewrite

Predicate = Callable[[Node], bool]


def has_decomposition(node: Node) -> bool:
    return "decompose" in node.op.slots


class Decomposer(Rewriter):
    """Replaces every node that the predicate names, those that a rule emits included."""

    def __init__(self, name: str = "main", predicate: Predicate = has_decomposition):
        super().__init__(name)
        self.predicate = predicate

    def fresh(self, name: str) -> Decomposer:
        inner = Decomposer(name, self.predicate)
        inner.stats = self.stats
        return inner

    def replace(self, node: Node) -> Sequence[Value] | None:
        if not self.predicate(node):
            return None
        extra = {"regions": node.regions} if node.op.has("regions") else {}
        results = rule("decompose", node.op, node.loc)(*node.operands, **node.attrs, **extra)
        self.stats[node.op.name] += 1
        return (results,) if isinstance(results, Value) else tuple(results)


def decompose(graph: Graph, predicate: Predicate = has_decomposition) -> PassResult:
    """Decomposes the nodes that the predicate names, in regions too.

    Raises:
        MissingRuleError: the predicate names a node whose op has no decomposition.
    """
    decomposer = Decomposer(graph.name, predicate)
    return result_of(graph, rewrite(graph, decomposer), decomposer.stats)


def decomposing(predicate: Predicate = has_decomposition, name: str = "decompose") -> Pass:
    """The pass that decomposes the nodes that the predicate names."""
    return Pass(name, lambda graph: decompose(graph, predicate))


# Once gradients are taken, a recomputed region is ordinary code.
INLINE = decomposing(lambda node: node.op.name == "remat", "inline")

MARKERS = frozenset({"identity", "stop_gradient", "barrier"})


class _Eraser(Rewriter):
    def replace(self, node: Node) -> Sequence[Value] | None:
        if node.op.name not in MARKERS:
            return None
        self.stats[node.op.name] += 1
        return node.operands


def erase(graph: Graph) -> PassResult:
    """Removes ops that only mean something to earlier passes: stop_gradient, barrier, identity.

    No pass that merges nodes may run afterwards: it would undo recomputations.
    """
    eraser = _Eraser(graph.name)
    return result_of(graph, rewrite(graph, eraser), eraser.stats)


ERASE = Pass("erase", erase)
