"""Annotations spread through a graph, until nothing changes.

From what is annotated, along one mesh axis, splits follow the labels of the ops' rules: first forwards, from operands
to results, as far as that goes; then backwards, from results to operands that have none; and again. Where operands
ask for different labels an annotated one wins, else the larger: moving it would cost more. What is annotated never
changes, and a hint is only that: `solve.py` decides, and knows what following it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..ir.graph import Graph, Node, Value
from ..ir.opdef import rule
from .mesh import Mesh
from .regions import LOOPS, circles, ends, inwards, links, outwards
from .rules import Blocked, Factors, Label, Linear, Shard, Strategy, base
from .sharding import PARTIAL, WHOLE, blocks_of, dim_of, divides

Hints = dict[Value, int]  # value -> the placement of what is split


class RuleTable:
    """The rules of a graph's nodes, each asked once."""

    def __init__(self, graph: Graph):
        self.rules: dict[Node, Shard] = {n: rule("shard", n.op, n.loc) for n in graph.walk()}
        self.factors: dict[Node, Factors] = {n: r.factors(n) for n, r in self.rules.items()}
        self.limits: dict[Node, dict[Label, int]] = {n: f.splittable(n) for n, f in self.factors.items()}

    def fits(self, node: Node, strategy: Strategy, ranks: int) -> bool:
        """Whether what a strategy of a node splits can be split over so many ranks."""
        limit = self.limits[node].get(base(strategy), 1)
        blocks = strategy.blocks if isinstance(strategy, Blocked) else 1
        return limit > 0 and (limit % (blocks * ranks) == 0 or blocks == 1 and self.pads(node, strategy, ranks))

    def pads(self, node: Node, label: Label, ranks: int) -> bool:
        """Whether a label can be split with padding: all its dimensions are as large."""
        factors = self.factors[node]
        if label in factors.limits or label in factors.views:
            return False
        sizes = {v.shape[labels.index(label)] for labels, v in zip((*factors.operands, *factors.results),
                                                                   (*node.operands, *node.results)) if label in labels}
        return len(sizes) == 1 and isinstance(size := sizes.pop(), int) and size > ranks


    def views(self, node: Node, places: Mapping[str, int], mesh: Mesh) -> dict[str, Strategy] | None:
        """The strategies of a view of a value that lies so along each axis; None: it cannot be seen so."""
        chosen: dict[str, Strategy] = {}
        for axis, place in places.items():
            found = self.view(node, place, mesh[axis])
            if found is None:
                return None
            chosen[axis] = found[0]
        return chosen if self.agree(node, chosen) else None

    def agree(self, node: Node, chosen: Mapping[str, Strategy]) -> bool:
        """Whether axes that split the same dimension of an operand or result split the same label: only then do they
        cut what lies there in the same order on both sides."""
        factors = self.factors[node]
        for placement, count in ((factors.operand_placement, len(node.operands)),
                                 (factors.result_placement, len(node.results))):
            for i in range(count):
                labels: dict[int, Label] = {}
                for strategy in chosen.values():
                    place = placement(strategy, i)
                    if place >= 0 and labels.setdefault(dim_of(place), base(strategy)) != base(strategy):
                        return False
        return True

    def view(self, node: Node, place: int, ranks: int) -> tuple[Strategy] | None:
        """The strategy of a view of a value that lies so along an axis, if there is one."""
        factors = self.factors[node]
        if place == PARTIAL:
            return (Linear(0),) if factors.linear else None
        found = [None] if place == WHOLE else [x for x in factors.strategies(0, 0, place) if self.fits(node, x, ranks)]
        return (found[0],) if found else None


def is_view(node: Node) -> bool:
    """Whether a node shows its operand's elements in another shape or order, which costs nothing."""
    return len(node.operands) == 1 and node.op.name in ("reshape", "transpose")


class Propagation:
    """Spreads hints along one axis. `refused(value, dim)`: other axes leave nothing to split of the dimension."""

    def __init__(self, graph: Graph, table: RuleTable, ranks: int, fixed: Mapping[Value, int],
                 links: Sequence[tuple[Value, Value]], refused: Callable[[Value, int], bool]):
        self.graph, self.table, self.ranks, self.fixed = graph, table, ranks, fixed
        self.links, self.refused = links, refused
        self.hints: Hints = {v: p for v, p in fixed.items() if p >= 0}
        self.firm = set(fixed)  # what is annotated, and what it is called within loops
        self.whole = {v for v, p in fixed.items() if p == WHOLE}  # of that, what stays whole

    def run(self) -> Hints:
        """The hints, annotated splits included."""
        while True:
            while self.sweep(self.graph.nodes, forwards=True):
                pass
            if not self.sweep(list(reversed(self.graph.nodes)), forwards=False):
                return self.hints

    def sweep(self, nodes: Sequence[Node], forwards: bool) -> bool:
        """One pass over the nodes; whether a hint was added."""
        before = len(self.hints)
        for node in nodes:
            factors = self.table.factors[node]
            sources, targets, side = (node.operands, node.results, 0) if forwards else (node.results, node.operands, 1)
            strategy = self.strongest(node, sources, side)
            if strategy is not None:
                for i, value in enumerate(targets):
                    self.add(value, (factors.result_placement if forwards else factors.operand_placement)(strategy, i))
            if node.op.name in LOOPS:
                self.through(node, forwards)
        for one, other in self.links:  # an output that takes over an input's storage lies as the input does
            for a, b in ((one, other), (other, one)):
                if a in self.hints:
                    self.add(b, self.hints[a])
        return len(self.hints) > before

    def through(self, node: Node, forwards: bool) -> None:
        """One pass over the regions of a node: what its operands say of them, and they of its results; or back."""
        into, out = list(links(node)), list(ends(node))
        moving = {v for _, v in circles(node)}
        self.firm |= {inner for outer, inner, _ in into if outer in self.firm}
        self.whole |= {inner for outer, inner, _ in into if outer in self.whole and inner not in moving}
        for outer, inner, shift in into if forwards else out:
            self.pass_on(outer, inner, inwards(self.hints.get(outer, WHOLE), shift))
        for region in node.regions:
            self.sweep(region.nodes if forwards else list(reversed(region.nodes)), forwards)
        for one, other in circles(node):
            for a, b in ((one, other), (other, one)):
                self.pass_on(a, b, self.hints.get(a, WHOLE))
        for outer, inner, shift in out if forwards else into:
            self.pass_on(inner, outer, outwards(self.hints.get(inner, WHOLE), shift))

    def pass_on(self, source: Value, target: Value, place: int) -> None:
        """A hint of one value for another."""
        if source in self.hints:
            self.add(target, place)

    def strongest(self, node: Node, sources: Sequence[Value], side: int) -> Strategy:
        """The strategy under which the weightiest of some values lies as it does."""
        best, most = None, (False, -1)
        for i, value in enumerate(sources):
            place = self.hints.get(value)
            for strategy in () if place is None else self.table.factors[node].strategies(side, i, place):
                weight = (value in self.firm, int(value.type.nbytes))
                if self.table.fits(node, strategy, self.ranks) and weight > most:
                    best, most = strategy, weight
        return best

    def add(self, value: Value, place: int) -> None:
        """A hint for a value that has none, if the dimension can be split."""
        if place < 0 or value in self.hints or value in self.whole or self.refused(value, dim_of(place)):
            return
        size, blocks = value.shape[dim_of(place)], blocks_of(place)
        if isinstance(size, int) and size and (blocks == 1 or divides(size, [(blocks, self.ranks)])):
            self.hints[value] = place


# A big op that would have to be whole along a dimension that lies split is decomposed: its parts can be split there.
UNFOLDED = frozenset({"softmax", "log_softmax", "logsumexp", "cross_entropy", "layer_norm", "rms_norm", "batch_norm"})


def to_unfold(table: RuleTable, hints: Hints, ranks: int) -> set[Node]:
    """Nodes to decompose."""
    found = set()
    for node, factors in table.factors.items():
        if node.op.name in UNFOLDED:
            for labels, value in zip(factors.operands, node.operands):
                place = hints.get(value)
                if place is not None and labels[dim_of(place)] is None:
                    found.add(node)
    return found
