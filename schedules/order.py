"""The order in which groups run."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from ..ir.graph import Graph, Node, Value
from .group import Group


def in_order(groups: Sequence[Group], graph: Graph, owned: Mapping[Value, Value]) -> tuple[list[Group], list[Value]]:
    """(groups in an order in which they can run, outputs that may not take over their input after all).

    `owned` maps an output to the input it takes over: the group that writes it must run after every other reader of
    that input. Where this contradicts the flow of data, the output is given up.
    """
    maker = {v: g for g in groups for v in g.outputs}
    before: dict[Group, set[Group]] = {g: {maker[v] for v in g.inputs if v in maker} - {g} for g in groups}
    for g in groups:  # views of values: the group that makes what is viewed
        before[g] |= {maker[s] for v in g.inputs for s in sources_of(v) if s in maker} - {g}
    refused = []
    for output, source in owned.items():
        writer = maker[output]
        readers = {g for g in groups if g is not writer and any(source in (v, *sources_of(v)) for v in g.inputs)}
        if any(_reaches(before, reader, writer) for reader in readers):
            refused.append(output)
        else:
            before[writer] |= readers
    return _sorted(groups, before), refused


def is_other_name(node: Node) -> bool:
    """A view whose elements lie together in its operand's memory: a reshape, or a slice of whole rows."""
    if node.op.name == "reshape":
        return True
    if node.op.name != "slice" or any(s != 1 for s in node.attrs["strides"]):
        return False
    seen_part = False
    for size, whole in zip(reversed(node.result.shape), reversed(node.operands[0].shape)):
        if seen_part and size != 1:
            return False
        seen_part = seen_part or size != whole
    return node.result.type.size != 0


def sources_of(v: Value) -> list[Value]:
    """What a view is another name for."""
    found = []
    while v.producer is not None and is_other_name(v.producer):
        v = v.producer.operands[0]
        found.append(v)
    return found


def _reaches(before: Mapping[Group, set[Group]], group: Group, target: Group) -> bool:
    """Whether `target` must run before `group`."""
    stack, seen = [group], set()
    while stack:
        g = stack.pop()
        if g is target:
            return True
        if g not in seen:
            seen.add(g)
            stack.extend(before[g])
    return False


def _sorted(groups: Sequence[Group], before: Mapping[Group, set[Group]]) -> list[Group]:
    """A topological order that stays as close to the graph's as it can."""
    after: dict[Group, list[Group]] = {g: [] for g in groups}
    missing = {g: len(before[g]) for g in groups}
    for g, sources in before.items():
        for source in sources:
            after[source].append(g)
    number = {g: i for i, g in enumerate(groups)}
    ready = [(g.position, number[g]) for g in groups if not missing[g]]
    heapq.heapify(ready)
    result = []
    while ready:
        g = groups[heapq.heappop(ready)[1]]
        result.append(g)
        for later in after[g]:
            missing[later] -= 1
            if not missing[later]:
                heapq.heappush(ready, (later.position, number[later]))
    assert len(result) == len(groups), "fusion made a cycle"
    return result
