"""Gradient accumulation: a graph for a small batch, run over the parts of a large one.

The parts go through a scan, so memory is that of one part whatever their number. Results are averaged (a mean loss and
its gradients then equal those of the large batch, if every part weighs the same), or stacked; state that the graph
updates (running statistics, a random counter) passes from part to part.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.builder import GraphBuilder, copy_into
from ..ir.context import emit
from ..ir.dtypes import DType, float32
from ..ir.errors import ShapeError
from ..ir.graph import Graph, Value
from ..ir.types import TensorType
from .remat import several
from .reverse import filled


def accumulate(graph: Graph, parts: int, split: Sequence[int], stacked: Sequence[int] = ()) -> Graph:
    """The graph for a batch `parts` times as large.

    Args:
        graph: of one part. An output that takes over an input's storage is state, carried from part to part; every
            other floating output is averaged, an integer one summed.
        parts: how many, at least 1.
        split: numbers of the inputs that hold examples, along their first axis. Others are the same for every part.
        stacked: numbers of the outputs that hold examples too: they are joined along their first axis.

    Raises:
        ShapeError: an input to split or an output to stack is a scalar, or parts is not positive.
    """
    if parts < 1:
        raise ShapeError(f"accumulate over {parts} parts: give 1 or more")
    for value in (*(graph.inputs[i] for i in split), *(graph.outputs[i] for i in stacked)):
        if not value.rank:
            raise ShapeError(f"{value!r} has no axis of examples: it cannot be split into {parts} parts")
    state = dict(graph.aliases)
    summed = [i for i in range(len(graph.outputs)) if i not in state and i not in stacked]
    constants = [i for i in range(len(graph.inputs)) if i not in split and i not in state.values()]
    with GraphBuilder(graph.name) as builder:
        inputs = [builder.input(_times(v, parts) if i in split else v.type, v.name, role)
                  for i, (v, role) in enumerate(zip(graph.inputs, graph.roles))]
        start = [inputs[i] for i in state.values()]
        start += [filled(graph.outputs[i].type.with_dtype(_total_dtype(graph.outputs[i])), 0) for i in summed]
        xs = [emit("reshape", inputs[i], shape=(parts, *graph.inputs[i].shape)) for i in split]
        results = several(emit(
            "scan", *start, *xs, *(inputs[i] for i in constants),
            regions=(_part(graph, state, summed, list(split), constants, list(stacked)),),
            n_carry=len(start), n_xs=len(xs), length=parts))
        final: dict[int, Value] = dict(zip([*state, *summed, *stacked], results))
        for i, out in enumerate(graph.outputs):
            builder.output(_finished(final[i], out, parts, i in summed, i in stacked),
                           alias=inputs[state[i]] if i in state else None)
    return builder.graph


def _times(value: Value, parts: int) -> TensorType:
    return value.type.with_shape((value.shape[0] * parts, *value.shape[1:]))


def _total_dtype(value: Value) -> DType:
    """What a sum over the parts is kept in: a 16-bit float would lose the later parts."""
    return float32 if value.dtype.is_float and value.dtype.bits < 32 else value.dtype


def _part(graph: Graph, state: dict[int, int], summed: list[int], split: list[int], constants: list[int],
          stacked: list[int]) -> Graph:
    """(state, totals; examples; constants) -> (state, totals + results; stacked results)."""
    with GraphBuilder("part") as builder:
        given = {i: builder.input(graph.inputs[i].type, graph.inputs[i].name) for i in state.values()}
        totals = [builder.input(graph.outputs[i].type.with_dtype(_total_dtype(graph.outputs[i]))) for i in summed]
        given |= {i: builder.input(graph.inputs[i].type, graph.inputs[i].name) for i in (*split, *constants)}
        outputs = copy_into(graph, [given[i] for i in range(len(graph.inputs))])
        builder.output(*(outputs[i] for i in state))
        for total, i in zip(totals, summed):
            result = outputs[i]
            builder.output(total + (result if result.dtype == total.dtype else emit("cast", result, dtype=total.dtype)))
        builder.output(*(outputs[i] for i in stacked))
    return builder.graph


def _finished(value: Value, out: Value, parts: int, summed: bool, stacked: bool) -> Value:
    if stacked:
        return emit("reshape", value, shape=(out.shape[0] * parts, *out.shape[1:]))
    if summed and out.dtype.is_float:
        value = value * (1.0 / parts)
        return value if value.dtype == out.dtype else emit("cast", value, dtype=out.dtype)
    return value
