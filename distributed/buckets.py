"""Buckets: collectives of one kind are joined into few messages.

A run of collectives along one axis, of one kind, none of which needs another's result, waits until the first reader
of any of them (or until the bucket is full) and goes as one. What reads a reduced gradient and leads to no heavy op
any more (the optimizer's update) is put behind the backward pass first, so that the gradients become few messages,
each sent as soon as it is full.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ..ir.builder import make_node
from ..ir.graph import Graph, Node, Value
from ..ir.ops_collective import COLLECTIVES
from ..ir.rewrite import with_operands

JOINED = ("all_reduce", "all_gather", "reduce_scatter")


def updates_last(graph: Graph) -> list[Node]:
    """The nodes, those that read a collective's result and that no heavy op needs at the end, by how many collectives
    they wait for."""
    readers, leads = graph.uses(), set()
    for node in reversed(graph.nodes):
        if _heavy(node) or any(n in leads for v in node.results for n in readers.get(v, ())):
            leads.add(node)
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        if node in leads:
            depth[node] = 0
            continue
        sources = [v.producer for v in node.operands if v.producer is not None]
        depth[node] = max((depth[n] + (n.op.name in COLLECTIVES and n not in leads) for n in sources), default=0)
    return sorted(graph.nodes, key=depth.__getitem__)


def _heavy(node: Node) -> bool:
    return node.op.has("contraction") or node.op.has("regions") or node.op.name == "attention"


@dataclass
class _Bucket:
    nodes: list[Node] = field(default_factory=list)
    nbytes: int = 0

    @property
    def results(self) -> set[Value]:
        return {v for node in self.nodes for v in node.results}


def _key(node: Node) -> tuple[Any, ...]:
    return (node.op.name, node.attrs["axis"], node.attrs.get("reduce"), str(node.operands[0].dtype))


def bucket(graph: Graph, most_bytes: int, keep: Collection[str] = ()) -> Graph:
    """The graph with collectives joined, each message at most `most_bytes` (a single tensor may be larger).

    Only operations that are next to each other in need are joined: a collective is delayed no further than to the first
    reader of any result of its bucket, so nothing that waits for it waits longer. Along the axes `keep` ranks run other
    programs: there nothing is joined.
    """
    made: list[Node] = []
    mapping: dict[Value, Value] = {}
    open_buckets: dict[tuple[Any, ...], _Bucket] = {}

    def close(key: tuple[Any, ...]) -> None:
        made.append(_join(open_buckets.pop(key).nodes, mapping))

    for node in updates_last(graph):
        for key, waiting in list(open_buckets.items()):
            if not waiting.results.isdisjoint(node.operands):
                close(key)
        if node.op.name in JOINED and node.operands and node.attrs["axis"] not in keep:
            key, size = _key(node), sum(int(max(a.type.nbytes, b.type.nbytes))
                                        for a, b in zip(node.operands, node.results))
            if key in open_buckets and open_buckets[key].nbytes + size > most_bytes:
                close(key)
            waiting = open_buckets.setdefault(key, _Bucket())
            waiting.nodes.append(node)
            waiting.nbytes += size
            continue
        fresh = with_operands(node, [mapping.get(v, v) for v in node.operands])
        mapping.update(zip(node.results, fresh.results))
        made.append(fresh)
    for key in list(open_buckets):
        close(key)
    outputs = [mapping.get(v, v) for v in graph.outputs]
    return Graph(graph.name, graph.inputs, graph.roles, made, outputs, graph.aliases, graph.meta)


def _join(nodes: list[Node], mapping: dict[Value, Value]) -> Node:
    """One node for all, in the order in which they stood."""
    attrs = dict(nodes[0].attrs)
    if "dims" in attrs:
        attrs["dims"] = tuple(d for node in nodes for d in node.attrs["dims"])
    operands = [mapping.get(v, v) for node in nodes for v in node.operands]
    joined = make_node(nodes[0].op, operands, attrs, (), nodes[0].loc)
    old = [v for node in nodes for v in node.results]
    for v, fresh in zip(old, joined.results):
        fresh.name = v.name
    mapping.update(zip(old, joined.results))
    return joined
