"""What is done to a step's graph so that loops can be split: short scans are written out.

The rules split nodes, not loops. A scan of few steps (gradient accumulation) becomes its steps one after the other:
then what it adds up stays a partial sum through all of them and is reduced once, at the end. Its kernels are the same
for every step, and compiled once. A longer scan, and the other loops and branches, run whole on every rank.

Of a batch that is cut into micro-batches, each rank takes its part of every micro-batch: the graph is changed to take
the batch as (micro-batches, examples, ...), with the examples split.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.builder import GraphBuilder, copy_into, replay
from ..ir.context import emit
from ..ir.graph import Graph, Node, Value
from ..ir.ops_control import split
from ..ir.rewrite import Rewriter, rewrite

MOST_STEPS = 32
MOST_NODES = 40_000  # of all steps of a scan together


class _Unroller(Rewriter):
    def replace(self, node: Node) -> Sequence[Value] | None:
        if node.op.name != "scan" or not isinstance(node.attrs["length"], int) or not node.attrs["length"]:
            return None
        if node.attrs["length"] > MOST_STEPS or node.attrs["length"] * len(node.regions[0].nodes) > MOST_NODES:
            return None
        self.stats["unrolled"] += 1
        return written_out(node)


def written_out(node: Node) -> list[Value]:
    """Emits the steps of a scan; gives its results."""
    n_carry, length = node.attrs["n_carry"], node.attrs["length"]
    carries, xs, constants = split(node.operands, n_carry, node.attrs["n_xs"])
    stacked: list[list[Value]] = [[] for _ in node.results[n_carry:]]
    carries = list(carries)
    for i in reversed(range(length)) if node.attrs["reverse"] else range(length):
        found = copy_into(node.regions[0], [*carries, *(row(x, i) for x in xs), *constants])
        carries = found[:n_carry]
        for rows, y in zip(stacked, found[n_carry:]):
            rows.append(emit("reshape", y, shape=(1, *y.shape)))
    ordered = [rows[::-1] if node.attrs["reverse"] else rows for rows in stacked]
    return [*carries, *(rows[0] if length == 1 else emit("concat", *rows, axis=0) for rows in ordered)]


def row(x: Value, i: int) -> Value:
    """x[i]."""
    starts = (i, *(0,) * (x.rank - 1))
    limits = (i + 1, *x.shape[1:])
    cut = emit("slice", x, starts=starts, limits=limits, strides=(1,) * x.rank)
    made: Value = emit("reshape", cut, shape=x.shape[1:])
    return made


def unroll(graph: Graph) -> Graph:
    """The graph with short scans written out; those of regions stay."""
    return rewrite(graph, _Unroller(graph.name))


def micro_batches(graph: Graph, inputs: Sequence[int]) -> tuple[Graph, dict[int, tuple[int, ...]]]:
    """The graph that takes batches as (micro-batches, examples, ...), where all it does with them is to cut them so.

    Returns it, and the new shapes by the number of the input.
    """
    readers, shapes = graph.uses(), {}
    for i in inputs:
        v = graph.inputs[i]
        found = {n.attrs["shape"] if n.op.name == "reshape" else () for n in readers.get(v, ())}
        shape: tuple[int, ...] = found.pop() if len(found) == 1 else ()
        if v.rank and v not in graph.outputs and len(shape) == v.rank + 1 and shape[2:] == v.shape[1:] \
                and shape[0] * shape[1] == v.shape[0]:
            shapes[i] = shape
    if not shapes:
        return graph, {}
    with GraphBuilder(graph.name) as builder:
        mapping: dict[Value, Value] = {}
        for i, (v, role) in enumerate(zip(graph.inputs, graph.roles)):
            mapping[v] = builder.input(v.type.with_shape(shapes.get(i, v.shape)), v.name, role)
        taken = {graph.inputs[i] for i in shapes}
        for node in graph.nodes:
            if node.op.name == "reshape" and node.operands[0] in taken:
                mapping[node.result] = mapping[node.operands[0]]
            else:
                replay([node], mapping, builder)
        for number, v in enumerate(graph.outputs):
            alias = graph.aliases.get(number)
            builder.output(mapping[v], alias=None if alias is None else builder.graph.inputs[alias])
    builder.graph.meta.update(graph.meta)
    return builder.graph, shapes
