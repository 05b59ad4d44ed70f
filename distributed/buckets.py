"""Buckets: collectives of one kind are joined into few messages.

A run of collectives along one axis, of one kind, none of which needs another's result, waits until the first reader
of any of them (or until the bucket is full) and goes as one. What reads a reduced gradient and leads to no heavy op
any more (the optimizer's update) is put behind the backward pass first, so that the gradients become few messages,
each sent as soon as it is full.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir.builder import make_node
from ..ir.graph import Graph, Node, Value
from ..ir.opdef import op
from ..ir.ops_collective import COLLECTIVES
from ..ir.rewrite import with_operands
from .regather import unvarying

JOINED = ("all_reduce", "all_gather", "reduce_scatter")
SUMS = ("all_reduce", "reduce_scatter")


def updates_last(graph: Graph) -> tuple[list[Node], set[Node]]:
    """The nodes, those that read a collective's result and that no heavy op needs at the end, by how many collectives
    they wait for; and those that a heavy op needs."""
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
    return sorted(graph.nodes, key=depth.__getitem__), leads


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


def message_bytes(node: Node) -> int:
    """Bytes that a collective takes while it is under way: a copy of what is sent, and what comes."""
    kind, ranks = node.attrs.get("kind", node.op.name), node.attrs["size"]
    sent = sum(int(v.type.nbytes) for v in node.operands)
    return sent + {"all_reduce": sent, "reduce_scatter": sent // ranks}.get(kind, sent * ranks)


UNDER_WAY = 2  # messages on their way at a time: each holds a copy of what it sends


def bucket(graph: Graph, most_bytes: int, keep: Collection[str] = (), overlap: Collection[str] = (),
           under_way: int = UNDER_WAY) -> Graph:
    """The graph with collectives joined, each message at most `most_bytes` (a single tensor may be larger).

    Only operations that are next to each other in need are joined: a collective is delayed no further than to the first
    reader of any result of its bucket, so nothing that waits for it waits longer. Along the axes `keep` ranks run other
    programs: there nothing is joined. Along the axes `overlap` sums that nothing heavy waits for are only started where
    they stand, and waited for by their first reader, or before the next but `under_way` is started.
    """
    made: list[Node] = []
    mapping: dict[Value, Value] = {}
    open_buckets: dict[tuple[Any, ...], _Bucket] = {}

    tags = itertools.count()
    started: dict[Value, Node] = {}  # a result that is on its way -> its start
    order, leads = updates_last(graph)

    def close(key: tuple[Any, ...]) -> None:
        early = key[1] in overlap and key[0] in SUMS and key[2] in ("sum", None) and key[-1]
        if early and len(set(started.values())) >= under_way:
            arrive([next(iter(started))])
        joined = _join(open_buckets.pop(key).nodes, mapping, next(tags) if early else None)
        made.append(joined[0])
        started.update(dict.fromkeys(joined[1], joined[0]))

    def arrive(values: Sequence[Value]) -> None:
        for v in values:
            if v in started:
                together = [x for x, n in started.items() if n is started[v]]
                made.append(_wait(started[v], together, mapping))
                for x in together:
                    del started[x]

    for node in order:
        for key, waiting in list(open_buckets.items()):
            if not waiting.results.isdisjoint(node.operands):
                close(key)
        if node.op.name in JOINED and node.operands and node.attrs["axis"] not in keep:
            arrive(node.operands)
            key, size = (*_key(node), node not in leads), sum(int(max(a.type.nbytes, b.type.nbytes))
                                        for a, b in zip(node.operands, node.results))
            if key in open_buckets and open_buckets[key].nbytes + size > most_bytes:
                close(key)
            waiting = open_buckets.setdefault(key, _Bucket())
            waiting.nodes.append(node)
            waiting.nbytes += size
            if waiting.nbytes >= most_bytes:
                close(key)
            continue
        arrive(node.operands)
        fresh = with_operands(node, [mapping.get(v, v) for v in node.operands])
        mapping.update(zip(node.results, fresh.results))
        made.append(fresh)
    for key in list(open_buckets):
        close(key)
    arrive(graph.outputs)
    outputs = [mapping.get(v, v) for v in graph.outputs]
    return Graph(graph.name, graph.inputs, graph.roles, made, outputs, graph.aliases, graph.meta)


def ahead(graph: Graph, axes: Collection[str]) -> Graph:
    """The program of a rank with gathers of parameters along these axes started one heavy op ahead: when what one op
    reads has arrived, the gathers for the next are started, and travel while that one computes.

    What is under way then takes no more memory than two of the largest messages: for that sums may have to arrive.
    """
    sets = _gathers(graph, axes)
    return _Ahead(graph, sets).run() if sets else graph


class _Ahead:
    """One run. `under_way`: bytes of what was started, the oldest first, by tag."""

    def __init__(self, graph: Graph, sets: list[list[Node]]):
        self.graph, self.sets = graph, sets
        self.tags = itertools.count(1 + max((n.attrs["tag"] for n in graph.nodes if n.op.name == "start"), default=-1))
        self.waits = {n.attrs["tag"]: n for n in graph.nodes if n.op.name == "wait"}
        started = [n for n in graph.nodes if n.op.name == "start"]
        self.most = 2 * max(message_bytes(n) for n in (*started, *(n for own in sets for n in own)))
        self.under_way: dict[int, int] = {}
        self.made: list[Node] = []
        self.mapping: dict[Value, Value] = {}
        self.started: dict[Node, Node] = {}
        self.done: set[Node] = set()

    def run(self) -> Graph:
        """The program."""
        graph, following = self.graph, {one[-1]: other for one, other in zip(self.sets, self.sets[1:])}
        self.begin(self.sets[0])
        for node in graph.nodes:
            if node in self.started:
                self.done.add(node)
                self.add(_wait(self.started[node], node.results, self.mapping))
                self.begin(following.get(node, ()))
            else:
                self.take(node)
        outputs = [self.mapping.get(v, v) for v in graph.outputs]
        return Graph(graph.name, graph.inputs, graph.roles, self.made, outputs, graph.aliases, graph.meta)

    def add(self, node: Node) -> None:
        self.made.append(node)
        if node.op.name == "start":
            self.under_way[node.attrs["tag"]] = message_bytes(node)
        elif node.op.name == "wait":
            del self.under_way[node.attrs["tag"]]

    def take(self, node: Node) -> None:
        """A node, after those that it needs."""
        if node in self.done:
            return
        self.done.add(node)
        for v in node.operands:
            if v.producer is not None:
                self.take(v.producer)
        if node.op.name == "start":
            self.make_room(node)
        fresh = with_operands(node, [self.mapping.get(v, v) for v in node.operands])
        self.mapping.update(zip(node.results, fresh.results))
        self.add(fresh)

    def make_room(self, node: Node) -> None:
        """The oldest sums arrive until there is memory for what is to be started."""
        for tag in list(self.under_way):
            if tag in self.waits and sum(self.under_way.values()) + message_bytes(node) > self.most:
                self.take(self.waits[tag])

    def begin(self, gathers: Sequence[Node]) -> None:
        """Starts the gathers for a reader."""
        for node in gathers:
            for v in node.operands:
                if v.producer is not None:
                    self.take(v.producer)
            self.make_room(node)
            self.started[node] = _join([node], self.mapping, next(self.tags))[0]
            self.add(self.started[node])


def _gathers(graph: Graph, axes: Collection[str]) -> list[list[Node]]:
    """Gathers of parameters along these axes, those together between which there is no heavy op, up to the largest."""
    still, sets, heavy = unvarying(graph), list[list[Node]](), True
    gathers = {n: message_bytes(n) for n in graph.nodes
               if n.op.name == "all_gather" and n in still and n.attrs["axis"] in axes}
    for node in graph.nodes:
        if node in gathers:
            if heavy or any(v.producer in sets[-1] for v in node.operands) or \
                    sum(gathers[n] for n in (*sets[-1], node)) > max(gathers.values()):
                sets.append([])
            sets[-1].append(node)
            heavy = False
        heavy = heavy or _heavy(node)
    return sets


def _join(nodes: list[Node], mapping: dict[Value, Value], tag: int | None) -> tuple[Node, list[Value]]:
    """One node for all, in the order in which they stood; and the values that it only starts on their way."""
    attrs = dict(nodes[0].attrs)
    if "dims" in attrs:
        attrs["dims"] = tuple(d for node in nodes for d in node.attrs["dims"])
    operands = [mapping.get(v, v) for node in nodes for v in node.operands]
    old = [v for node in nodes for v in node.results]
    if tag is not None:
        own = {"kind": nodes[0].op.name, "axis": attrs["axis"], "size": attrs["size"], "dims": attrs.get("dims", ()),
               "tag": tag}
        return make_node(op("start"), operands, own, (), nodes[0].loc), old
    joined = make_node(nodes[0].op, operands, attrs, (), nodes[0].loc)
    for v, fresh in zip(old, joined.results):
        fresh.name = v.name
    mapping.update(zip(old, joined.results))
    return joined, []


def _wait(start: Node, values: Sequence[Value], mapping: dict[Value, Value]) -> Node:
    """The node that takes in what was started."""
    attrs = {"axis": start.attrs["axis"], "size": start.attrs["size"], "tag": start.attrs["tag"],
             "shapes": tuple(v.shape for v in values), "dtype": values[0].dtype}
    made = make_node(op("wait"), start.results, attrs, (), start.loc)
    for v, fresh in zip(values, made.results):
        fresh.name = v.name
    mapping.update(zip(values, made.results))
    return made
