"""Gradients summed in 16 bits: `Plan(reduce_dtype="bfloat16")`.

On the program of a rank: what reduces a gradient gets it rounded, and what comes is widened again, so half the bytes
travel. The order of sums and of roundings is that of the transport; sums along other axes, and of what is no gradient
(activations, the loss, norms), stay as they are.
"""

from __future__ import annotations

from ..ir.builder import make_node
from ..ir.dtypes import DType
from ..ir.graph import Graph, Node, Value
from ..ir.opdef import op
from ..ir.rewrite import with_operands
from ..ir.subjects import subjects

REDUCING = ("all_reduce", "reduce_scatter")


def narrow_sums(graph: Graph, axis: str, dtype: DType) -> Graph:
    """The program with gradients reduced along an axis in a narrower dtype."""
    holds = subjects(graph)
    mapping: dict[Value, Value] = {}
    nodes: list[Node] = []

    def cast(v: Value, to: DType) -> Value:
        nodes.append(make_node(op("cast"), [v], {"dtype": to}))
        return nodes[-1].result

    for node in graph.nodes:
        operands = [mapping.get(v, v) for v in node.operands]
        if node.op.name not in REDUCING or node.attrs["axis"] != axis or node.attrs.get("reduce", "sum") != "sum" \
                or not all(_wide_gradient(v, holds, dtype) for v in node.operands):
            nodes.append(with_operands(node, operands))
            mapping.update(zip(node.results, nodes[-1].results))
            continue
        nodes.append(make_node(node.op, [cast(v, dtype) for v in operands], node.attrs, (), node.loc))
        for old, new in zip(node.results, nodes[-1].results):
            mapping[old] = cast(new, old.dtype)
            mapping[old].name = old.name
    outputs = [mapping.get(v, v) for v in graph.outputs]
    return Graph(graph.name, graph.inputs, graph.roles, nodes, outputs, graph.aliases, graph.meta)


def _wide_gradient(v: Value, holds: dict[Value, str], dtype: DType) -> bool:
    return holds[v] == "gradients" and v.rank > 0 and v.dtype.is_float and v.dtype.bits > dtype.bits
