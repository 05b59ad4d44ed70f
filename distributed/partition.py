"""From a graph and its plan to the program of each rank.

The program is one and the same for all ranks (single program, multiple data): where ranks differ it asks for
`axis_index`. Every value may lie in several ways at once; what a node needs in another way is brought there once, by
the cheapest steps from any of the ways it lies already, and kept for later readers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.builder import GraphBuilder
from ..ir.context import emit
from ..ir.dtypes import int64
from ..ir.errors import VerifyError
from ..ir.graph import Graph, Node, Value
from ..ir.ops_collective import COLLECTIVES
from ..ir.text import node_text
from .buckets import message_bytes
from .cost import Cluster, sent_bytes
from .mesh import Mesh
from .propagate import is_view
from .regions import counted, first_operand, operand_shift, outwards, result_shift
from .reshard import Step, filled_with, path, seconds
from .rules import Factors, Local, base
from .sharding import Sharding, blocks_of, dim_of
from .solve import Plan, solve


@dataclass
class Partitioned:
    """A graph's program for each rank of a mesh.

    Attributes:
        graph: what every rank runs, on its parts.
        whole: the graph of one process that it came from.
        inputs, outputs: where each lies.
    """

    graph: Graph
    whole: Graph
    mesh: Mesh
    inputs: list[Sharding]
    outputs: list[Sharding]
    plan: Plan

    def collectives(self) -> Counter[str]:
        """How often a step calls each collective, by `op:axis`."""
        found: Counter[str] = Counter()
        for node, times in counted(self.graph):
            if kind := kind_of(node):
                found[f"{kind}:{node.attrs['axis']}"] += times
        return found

    def traffic(self) -> Counter[str]:
        """Bytes that each rank sends in a step, by `op:axis` (ring algorithms)."""
        found: Counter[str] = Counter()
        for node, times in counted(self.graph):
            if kind := kind_of(node):
                size, whole = node.attrs["size"], sum(float(v.type.nbytes) for v in node.operands)
                if kind in ("all_gather", "all_to_all"):
                    whole *= size
                found[f"{kind}:{node.attrs['axis']}"] += times * int(sent_bytes(kind, size, whole))
        return found

    def under_way(self) -> int:
        """The most bytes of messages at a time that were started and not waited for: what goes and what comes."""
        now = most = 0
        sizes: dict[int, int] = {}
        for node in self.graph.nodes:
            if node.op.name == "start":
                sizes[node.attrs["tag"]] = message_bytes(node)
                now += sizes[node.attrs["tag"]]
                most = max(most, now)
            elif node.op.name == "wait":
                now -= sizes[node.attrs["tag"]]
        return most


def kind_of(node: Node) -> str | None:
    """The collective that a node is, or starts; None for others."""
    if node.op.name == "start":
        return str(node.attrs["kind"])
    return node.op.name if node.op.name in COLLECTIVES else None


def partition(graph: Graph, mesh: Mesh, inputs: Mapping[int, Sharding], outputs: Mapping[int, Sharding] | None = None,
              cluster: Cluster | None = None) -> Partitioned:
    """The program of each rank. Arguments and errors as of `solve`."""
    plan = solve(graph, mesh, inputs, outputs, cluster)
    emitter = _Emitter(plan)
    made = emitter.run(plan.inputs, plan.outputs)
    return Partitioned(made, graph, mesh, plan.inputs, plan.outputs, plan)


class _Emitter:
    """Emits the program. `ways`: for each value of the whole graph the ways in which a rank has it."""

    def __init__(self, plan: Plan, graph: Graph | None = None):
        self.plan, self.mesh, self.cluster = plan, plan.mesh, plan.cluster
        self.graph = graph or plan.graph
        self.builder = GraphBuilder(self.graph.name)
        self.ways: dict[Value, dict[Sharding, Value]] = {}
        self.indices: dict[str, Value] = {}
        self.masks: dict[tuple[Value, str | None], Value] = {}

    def run(self, inputs: Sequence[Sharding], outputs: Sequence[Sharding]) -> Graph:
        """The program."""
        graph = self.graph
        with self.builder as builder:
            for v, role, sharding in zip(graph.inputs, graph.roles, inputs):
                self.ways[v] = {sharding: builder.input(sharding.local(v.type, self.mesh), v.name, role)}
            for node in graph.nodes:
                with builder.at(node.loc):
                    self.node(node)
            output = builder.own_output if graph is self.plan.graph else builder.output
            for i, (v, sharding) in enumerate(zip(graph.outputs, outputs)):
                alias = builder.graph.inputs[graph.aliases[i]] if i in graph.aliases else None
                output(self.need(v, sharding), alias=alias)
        builder.graph.meta.update(graph.meta)
        return builder.graph

    def node(self, node: Node) -> None:
        """One node on a rank's parts."""
        assert self.plan.table is not None
        if node in self.plan.loops:
            self.loop(node)
            return
        if filled_with(node.results[0]) is not None:
            self.ways[node.results[0]] = {}  # made where it is wanted, in the shape that is wanted
            return
        shardings, results = self.under(node, self.plan.strategies.get(node, {}))
        self.results(node, shardings, results)

    def under(self, node: Node, chosen: Mapping[str, Any]) -> tuple[list[Sharding], tuple[Value, ...]]:
        """One node under a strategy for each axis: how its results lie, and they."""
        assert self.plan.table is not None
        factors, shard = self.plan.table.factors[node], self.plan.table.rules[node]
        operands = [self.need(v, Sharding.of(v.rank, {a: factors.operand_placement(s, i) for a, s in chosen.items()}))
                    for i, v in enumerate(node.operands)]
        shardings = [Sharding.of(v.rank, {a: factors.result_placement(s, i) for a, s in chosen.items()})
                     for i, v in enumerate(node.results)]
        types = [s.local(v.type, self.mesh) for v, s in zip(node.results, shardings)]
        axes: dict[Any, list[str]] = {}
        for axis in reversed(self.mesh.names):
            if (label := base(chosen.get(axis))) is not None:
                axes.setdefault(label, []).append(axis)
        operands = self.without_padding(node, factors, axes, operands)
        results = shard.emit(Local(node, self.mesh, axes, types, self.index), operands)
        for label, own in axes.items():
            if label in factors.combined:
                for axis in own:
                    results = self.combined(results, axis, factors.combined[label])
        if [r.type for r in results] != types:
            raise VerifyError(f"the shard rule of {node_text(node)} gives {[str(r.type) for r in results]}, not "
                              f"{list(map(str, types))}, for the strategy {chosen}", node.loc)
        return shardings, results

    def seen_again(self, v: Value, sharding: Sharding) -> Value | None:
        """A view of a value that lies as this view of it is wanted: no way of the view itself has to be moved."""
        if v.producer is None or not is_view(v.producer) or v.producer not in self.plan.strategies:
            return None
        assert self.plan.table is not None
        for source in self.ways[v.producer.operands[0]]:
            chosen = self.plan.table.views(v.producer, {a: source.placement(a) for a in self.mesh.names}, self.mesh)
            if chosen is not None and sharding == Sharding.of(v.rank, {
                    a: self.plan.table.factors[v.producer].result_placement(s, 0) for a, s in chosen.items()}):
                return self.under(v.producer, chosen)[1][0]
        return None

    def without_padding(self, node: Node, factors: Factors, axes: Mapping[Any, Sequence[str]],
                        operands: list[Value]) -> list[Value]:
        """Local operands; what is beyond the end of a padded dimension that is summed, or of which the largest element
        is looked for, is replaced by what does not count.

        Of a product's factors one is enough: parameters, whose padding is finite, stay as they are.
        """
        made = list(operands)
        for label, (axis, *more) in axes.items():
            if more or label in factors.ordered or label not in (*factors.summed, *factors.combined):
                continue
            found = [i for i, labels in enumerate(factors.operands) if label in labels
                     and node.operands[i].shape[labels.index(label)] % self.mesh[axis]]
            if node.op.has("contraction") and (moving := [i for i in found if not is_parameter(node.operands[i])]):
                found = moving
            for i in found:
                dim = factors.operands[i].index(label)
                made[i] = self.masked(made[i], dim, axis, node.operands[i].shape[dim], factors.combined.get(label))
        return made

    def masked(self, x: Value, dim: int, axis: str, size: int, kind: str | None) -> Value:
        """A local value with the neutral element (of "max", "min", sums) beyond the end."""
        if (x, kind) not in self.masks:
            ends = np.iinfo(x.dtype.np) if x.dtype.is_integer else None
            least, most = (ends.min, ends.max) if ends else (-np.inf, np.inf)
            neutral = emit("constant", value=np.asarray({"max": least, "min": most, None: 0}[kind], x.dtype.np))
            each = x.shape[dim]
            places = emit("iota", shape=(each,), axis=0, dtype=int64) + self.index(axis) * each
            inside = emit("lt", places, emit("constant", value=np.asarray(size, np.int64)))
            shape = tuple(each if i == dim else 1 for i in range(x.rank))
            self.masks[x, kind] = emit("where", emit("reshape", inside, shape=shape), x, neutral)
        return self.masks[x, kind]

    def results(self, node: Node, shardings: Sequence[Sharding], results: Sequence[Value]) -> None:
        """Notes how the results of a node lie."""
        for v, sharding, local in zip(node.results, shardings, results):
            local.name = local.name or v.name
            self.ways[v] = {sharding: local}
            self.settle(v, sharding)

    def loop(self, node: Node) -> None:
        """A node with regions: these on a rank's parts."""
        chosen, first, regions = self.plan.loops[node], first_operand(node), []
        for number, region in enumerate(node.regions):
            inputs = [Sharding.of(v.rank, {a: loop.places[first + i] for a, loop in chosen.items()})
                      for i, v in enumerate(region.inputs)]
            outputs = [Sharding.of(v.rank, {a: loop.ends[number][i] for a, loop in chosen.items()})
                       for i, v in enumerate(region.outputs)]
            regions.append(_Emitter(self.plan, region).run(inputs, outputs))
        operands = [self.need(v, Sharding.of(v.rank, {
            a: outwards(loop.places[i], operand_shift(node, i)) for a, loop in chosen.items()}))
            for i, v in enumerate(node.operands)]
        shardings = [Sharding.of(v.rank, {a: outwards(loop.ends[-1][i], result_shift(node, i))
                                          for a, loop in chosen.items()}) for i, v in enumerate(node.results)]
        found = emit(node.op.name, *operands, regions=tuple(regions), **node.attrs)
        self.results(node, shardings, found if isinstance(found, tuple) else (found,))

    def combined(self, values: tuple[Value, ...], axis: str, kind: str) -> tuple[Value, ...]:
        if self.mesh[axis] == 1:
            return values
        found = emit("all_reduce", *values, axis=axis, size=self.mesh[axis], reduce=kind)
        return found if isinstance(found, tuple) else (found,)

    def settle(self, v: Value, sharding: Sharding) -> None:
        """Brings a partial sum where its readers want it, and forgets the sum's parts."""
        target = sharding
        for axis, placement in self.plan.settled.get(v, {}).items():
            target = target.placed(axis, placement)
        if target != sharding:
            self.ways[v] = {target: self.need(v, target)}

    def need(self, v: Value, sharding: Sharding) -> Value:
        """A rank's part of a value under a sharding, brought there if it does not lie so yet."""
        ways = self.ways[v]
        if sharding not in ways and (number := filled_with(v)) is not None:
            own = Sharding(sharding.dims) if number else sharding  # zeros are a partial sum as they are
            scalar = emit("constant", value=np.asarray(number, v.dtype.np))
            ways[own] = emit("broadcast_to", scalar, shape=own.local(v.type, self.mesh).shape)
        if sharding not in ways and (found := self.seen_again(v, sharding)) is not None:
            ways[sharding] = found
        if sharding not in ways:
            start = min(ways, key=lambda s: seconds(v.type, s, sharding, self.mesh, self.cluster))
            local = ways[start]
            for step in path(v.type, start, sharding, self.mesh, self.cluster):
                local = self.step(local, step)
                if local.shape != (shape := step.result.local(v.type, self.mesh).shape):  # what was padded ends
                    local = emit("slice", local, starts=(0,) * v.rank, limits=shape, strides=(1,) * v.rank)
                local.name = local.name or v.name
                ways.setdefault(step.result, local)
        return ways[sharding]

    def index(self, axis: str) -> Value:
        """The rank's place along an axis, asked for once."""
        if axis not in self.indices:
            self.indices[axis] = emit("axis_index", axis=axis, size=self.mesh[axis])
        return self.indices[axis]

    def step(self, x: Value, step: Step) -> Value:
        """Emits one step of a path."""
        axis, ranks = step.axis, self.mesh[step.axis]
        if ranks == 1:  # one process along this axis: it has everything as it is
            return x
        group: dict[str, Any] = {"axis": axis, "size": ranks}
        source, target = dim_of(step.source), dim_of(step.target)
        if step.kind == "cut":
            return cut(x, target, ranks, lambda: self.index(axis), blocks_of(step.target))
        if step.kind == "mask":
            return self.mask(x, axis)
        if step.kind == "reduce_scatter":
            x = regrouped(padded(x, target, ranks), target, blocks_of(step.target), ranks)
        found = {
            "all_reduce": lambda: emit("all_reduce", x, **group, reduce="sum"),
            "all_gather": lambda: emit("all_gather", x, **group, dims=(source,)),
            "reduce_scatter": lambda: emit("reduce_scatter", x, **group, dims=(target,)),
            "all_to_all": lambda: emit("all_to_all", x, **group, split=target, concat=source),
        }[step.kind]()
        made: Value = found[0] if isinstance(found, tuple) else found
        return regrouped(made, source, ranks, blocks_of(step.source)) if step.kind == "all_gather" else made

    def mask(self, x: Value, axis: str) -> Value:
        """A whole value as a partial sum: zeros everywhere but on the first rank. Zeros are that already."""
        if is_zero(x):
            return x
        index = self.index(axis)
        zero = emit("constant", value=np.zeros((), x.dtype.np))
        made: Value = emit("where", emit("eq", index, index * 0), x, zero)
        return made


def is_parameter(v: Value) -> bool:
    """Whether a value is a graph's input, or one as it is seen or cast."""
    while v.producer is not None and (v.producer.op.has("view") or v.producer.op.name in ("cast", "transpose")):
        v = v.producer.operands[0]
    return v.producer is None


def is_zero(x: Value) -> bool:
    """Whether a value is a constant all of whose elements are 0."""
    while x.producer is not None and x.producer.op.name in ("broadcast_to", "reshape"):
        x = x.producer.operands[0]
    return x.producer is not None and x.producer.op.name == "constant" and not np.any(x.producer.attrs["value"])


def padded(x: Value, dim: int, ranks: int) -> Value:
    """The value with zeros behind a dimension that does not divide."""
    high = tuple(-x.shape[i] % ranks if i == dim else 0 for i in range(x.rank))
    made: Value = emit("pad", x, low=(0,) * x.rank, high=high, interior=(0,) * x.rank, value=0.0) if any(high) else x
    return made


def regrouped(x: Value, dim: int, outer: int, inner: int) -> Value:
    """The dimension, which counts (outer, inner, rest), counted (inner, outer, rest)."""
    if outer == 1 or inner == 1:
        return x
    shape = (*x.shape[:dim], outer, inner, x.shape[dim] // (outer * inner), *x.shape[dim + 1:])
    perm = (*range(dim), dim + 1, dim, *range(dim + 2, x.rank + 2))
    made: Value = emit("reshape", emit("transpose", emit("reshape", x, shape=shape), perm=perm), shape=x.shape)
    return made


def cut(x: Value, dim: int, ranks: int, index: Callable[[], Value], blocks: int = 1) -> Value:
    """A rank's part along a dimension (of each of its blocks); of a broadcast value no elements are read."""
    size = -(-x.shape[dim] // ranks)
    shape = (*x.shape[:dim], size, *x.shape[dim + 1:])
    if x.producer is not None and x.producer.op.name == "broadcast_to":
        source = x.producer.operands[0]
        shift = x.rank - source.rank
        if dim < shift or source.shape[dim - shift] == 1:
            made: Value = emit("broadcast_to", source, shape=shape)
            return made
    if blocks > 1:
        x = emit("reshape", x, shape=(*x.shape[:dim], blocks, x.shape[dim] // blocks, *x.shape[dim + 1:]))
        made = emit("reshape", cut(x, dim + 1, ranks, index), shape=shape)
        return made
    x, zero = padded(x, dim, ranks), emit("constant", value=np.zeros((), np.int64))
    starts = [zero] * x.rank
    starts[dim] = index() * size
    made = emit("dynamic_slice", x, *starts, sizes=shape)
    return made
