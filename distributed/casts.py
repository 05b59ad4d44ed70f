"""Narrow copies of parameters, for programs that run for many micro-batches of a step.

In mixed precision a program casts each parameter that it reads. Programs of a pipeline's stage run for every
micro-batch, forwards and backwards; here the casts are taken out of them, and are a program of its own that runs once
for a step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..ir.builder import GraphBuilder
from ..ir.dtypes import DType
from ..ir.graph import Graph, Value
from ..ir.rewrite import with_operands
from ..ir.types import TensorType


def casts_apart(graph: Graph, inputs: Collection[int]) -> tuple[Graph, list[tuple[int, DType]]]:
    """The graph without casts of these inputs to narrower dtypes: their results are further inputs, behind the others.

    Gives it and, of each such input, of which one it is a copy and in what dtype.
    """
    place = {graph.inputs[i]: i for i in inputs}
    copies: dict[tuple[int, DType], Value] = {}
    mapping: dict[Value, Value] = {}
    nodes = []
    for node in graph.nodes:
        source = _unbarred(node.operands[0]) if node.op.name == "cast" else None
        if source in place and node.result.dtype.bits < source.dtype.bits:
            copy = Value(node.result.type, f"{source.name}.{node.result.dtype}")
            mapping[node.result] = copies.setdefault((place[source], node.result.dtype), copy)
            continue
        fresh = with_operands(node, [mapping.get(v, v) for v in node.operands])
        mapping.update(zip(node.results, fresh.results))
        nodes.append(fresh)
    if not copies:
        return graph, []
    return Graph(graph.name, [*graph.inputs, *copies.values()], [*graph.roles, *("parameter" for _ in copies)], nodes,
                 [mapping.get(v, v) for v in graph.outputs], graph.aliases, graph.meta), list(copies)


def _unbarred(value: Value) -> Value:
    """What a value is: barriers, which keep recomputed code apart, pass their operands on."""
    while value.producer is not None and value.producer.op.name == "barrier":
        value = value.producer.operands[value.producer.results.index(value)]
    return value


def casts(kinds: Sequence[tuple[TensorType, TensorType]]) -> Graph:
    """The program that makes the copies, of (type, type of the copy): its inputs are the tensors, then the arrays that
    the copies are written to."""
    with GraphBuilder("casts") as builder:
        tensors = [builder.input(of, f"tensor{i}", "parameter") for i, (of, _) in enumerate(kinds)]
        copies = [builder.input(to, f"copy{i}", "state") for i, (_, to) in enumerate(kinds)]
        for tensor, copy in zip(tensors, copies):
            builder.output(builder.emit("cast", [tensor], {"dtype": copy.dtype})[0], alias=copy)
    return builder.graph
