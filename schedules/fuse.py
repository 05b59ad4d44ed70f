"""Fusion: which nodes share a kernel.

Nodes are taken in graph order. Each starts as a group of its own and joins the groups of what it reads, one after the
other, as long as the result is one kernel of a kind that the schedules write well (`group.check_*`) and no cycle
arises. Then groups that read the same large value side by side (two sums over one gradient) are joined too.
There are no rules per op: what fits together follows from the index maps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any

from ..ir.graph import Graph, Node, Value
from .group import (
    MOST_NODES,
    MOST_PARAMS,
    Facts,
    Group,
    check_epilogue,
    check_loop,
    check_rows,
    fusible,
    is_anchor,
    is_immediate,
)
from .loops_eval import NotAligned
from .rows_domain import is_reduction
from .sizes import hint

SHARED_BYTES = 1 << 14  # a common input from which reading it once pays for joining two groups


class Fuser:
    """The state of one fusion. `owner`: the group of each node that is not free."""

    def __init__(self, graph: Graph, threads: int):
        self.facts = Facts(graph)
        self.threads = threads
        self.owner: dict[Node, Group] = {}
        self.anchors = [i for i, node in enumerate(graph.nodes) if is_anchor(node)]

    def run(self) -> list[Group]:
        facts = self.facts
        for node in facts.graph.nodes:
            if node in facts.free or is_immediate(node):
                continue
            group = Group([node], facts.position[node], node if is_anchor(node) else None)
            self.owner[node] = group
            if fusible(node):
                for source in self.sources(group):
                    if source is not self.owner[node]:
                        self.join(source, self.owner[node])
        self.join_siblings()
        groups = list(dict.fromkeys(self.owner.values()))
        groups += self.materialised(groups)
        for group in groups:
            group.nodes = facts.closure(group.nodes)
            group.inputs, group.outputs = facts.boundary(group.nodes)
            if group.nodes[-1] in facts.free:
                group.outputs = list(group.nodes[-1].results)
        return groups

    def sources(self, group: Group) -> list[Group]:
        """The groups that a group reads from, the nearest first."""
        return sorted(self.read_by(group.nodes) - {group}, key=lambda g: -g.position)

    def read_by(self, nodes: Iterable[Node]) -> set[Group]:
        """The groups that compute what some nodes read, themselves or through views."""
        found: set[Group] = set()
        stack, seen = list(nodes), set(nodes)
        while stack:
            for v in stack.pop().operands:
                if v.producer in self.owner:
                    found.add(self.owner[v.producer])
                elif v.producer in self.facts.free and v.producer not in seen:
                    stack.append(v.producer)
                    seen.add(v.producer)
        return found

    def join(self, first: Group, second: Group) -> bool:
        """Joins two groups if that is one good kernel."""
        if not self.compatible(first, second) or self.across(first, second):
            return False
        nodes = self.facts.closure([*first.nodes, *second.nodes])
        inputs, outputs = self.facts.boundary(nodes)
        if len(nodes) > MOST_NODES or len(inputs) + len(outputs) > MOST_PARAMS:
            return False
        anchor = first.anchor or second.anchor
        try:
            if anchor is not None:
                check_epilogue(anchor, nodes, outputs)
            elif any(is_reduction(n) for n in nodes):
                check_rows(nodes, outputs, self.threads)
            else:
                check_loop(nodes, outputs)
        except NotAligned:
            return False
        if self.between(first, second) or self.between(second, first):
            return False
        kept = [n for n in nodes if n not in self.facts.free]
        merged = Group(kept, max(first.position, second.position), anchor)
        for node in kept:
            self.owner[node] = merged
        return True

    def compatible(self, first: Group, second: Group) -> bool:
        """A quick look before the analysis."""
        if first.anchor is not None and second.anchor is not None:
            return False
        if not all(fusible(n) or is_anchor(n) for g in (first, second) for n in g.nodes):
            return False
        if first.anchor is not None:
            return not second.has_reduction
        if second.anchor is not None:  # beside the anchor (a decayed parameter, say), not before it
            return not first.has_reduction and first not in self.read_by([second.anchor])
        return True

    def across(self, first: Group, second: Group) -> bool:
        """Whether joining would move the second group ahead of an anchor that the graph has between the two.

        Arithmetic of the backward pass on a value of the forward pass belongs where its result is used: pulled
        forward, that result would be written early and wait in memory for the whole time between.
        """
        last = max(self.facts.position[n] for n in first.nodes)
        start = min(self.facts.position[n] for n in second.nodes)
        return bisect_right(self.anchors, last) < bisect_left(self.anchors, start)

    def between(self, first: Group, second: Group) -> bool:
        """Whether something outside both must run after `first` and before `second`."""
        lowest = min(self.facts.position[n] for n in first.nodes)
        seen: set[Group] = {first, second}
        stack = [g for g in self.sources(second) if g is not first]
        while stack:
            group = stack.pop()
            if group in seen or group.position < lowest:
                continue
            seen.add(group)
            above = self.sources(group)
            if first in above:
                return True
            stack.extend(above)
        return False

    def join_siblings(self) -> None:
        """Joins groups of reductions that read a large value in common."""
        readers: dict[Value, list[Group]] = {}
        for group in dict.fromkeys(self.owner.values()):
            if group.has_reduction:
                for v in self.facts.boundary(self.facts.closure(group.nodes))[0]:
                    if hint(v.type.nbytes) >= SHARED_BYTES:
                        readers.setdefault(v, []).append(group)
        for groups in readers.values():
            for group in groups[1:]:
                first, second = self.owner[groups[0].nodes[0]], self.owner[group.nodes[0]]
                if first is not second:
                    self.join(first, second)

    def materialised(self, groups: Iterable[Group]) -> list[Group]:
        """Groups for free nodes that must lie in memory: graph outputs, operands of kernels of their own."""
        facts = self.facts
        needed: dict[Value, None] = dict.fromkeys(facts.wanted)
        for group in groups:
            for node in group.nodes:
                if not fusible(node):
                    needed.update(dict.fromkeys(node.operands))
        return [Group([v.producer], facts.position[v.producer]) for v in needed
                if v.producer is not None and v.producer in facts.free]


def fuse(graph: Graph, target: Any) -> list[Group]:
    """The groups of a graph whose nodes all have a lowering, in no particular order.

    Every node belongs to exactly one group, but for free nodes, which any number of groups hold.
    """
    return Fuser(graph, target.threads).run()
