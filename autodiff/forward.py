"""Forward mode by reverse mode twice.

The cotangent u of `outputs` gives g(u) = Jᵀ u, which is linear in u; the VJP of g with the cotangent v is therefore
J v, whatever u was. So every op has a JVP because its VJP rule emits differentiable nodes; what was computed with u is
dead afterwards and is removed by the passes. (J. Townsend, "A new trick for calculating Jacobian vector products",
2017.)
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.builder import GraphBuilder, copy_into
from ..ir.errors import GradientError
from ..ir.graph import Graph, Value
from .reverse import backward, zeros_like


def forward(outputs: Sequence[Value], wrt: Sequence[Value], tangents: Sequence[Value]) -> list[Value | None]:
    """The tangents of `outputs`, given those of `wrt`; emitted into the current builder.

    Returns:
        For each output its tangent, of its shape and dtype, or None where it does not depend on `wrt` or is not
        of a floating dtype.

    Raises:
        GradientError: a tangent does not fit its value, or as `backward` does.
    """
    if [v.type for v in wrt] != [t.type for t in tangents]:
        raise GradientError(f"the tangents {list(tangents)} do not fit the values {list(wrt)}: "
                            "one each, of the same shape and dtype")
    floats = [v for v in outputs if v.dtype.is_float]
    seeds = [zeros_like(v) for v in floats]
    pulled = backward(floats, seeds, wrt)
    reached = [(g, t) for g, t in zip(pulled, tangents) if g is not None]
    pushed = dict(zip(floats, backward([g for g, _ in reached], [t for _, t in reached], seeds)))
    return [pushed.get(v) for v in outputs]


def jvp_graph(graph: Graph, wrt: Sequence[int]) -> Graph:
    """The graph `(*inputs, *tangents of the inputs in wrt) -> (*outputs, *tangents of the floating outputs)`."""
    with GraphBuilder(f"{graph.name}_jvp") as builder:
        inputs = [builder.input(v.type, v.name, role) for v, role in zip(graph.inputs, graph.roles)]
        tangents = [builder.input(inputs[i].type, f"t{i}") for i in wrt]
        outputs = copy_into(graph, inputs)
        pushed = forward(outputs, [inputs[i] for i in wrt], tangents)
        builder.output(*outputs)
        builder.output(*(zeros_like(v) if t is None else t for v, t in zip(outputs, pushed) if v.dtype.is_float))
    return builder.graph
