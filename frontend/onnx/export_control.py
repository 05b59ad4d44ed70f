"""Export of branches and loops: If, Loop and Scan.

Regions of the IR are closed: what they need is an operand. Subgraphs of ONNX see what surrounds them, so constants of a
loop are read where they stand, and only what changes from step to step is passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...ir.dtypes import DType
from ...ir.graph import Graph, Node
from ...ir.types import TensorType
from .export_rules import exports, write_graph
from .export_shape import filled, scalar_size, take_slice
from .export_writer import BOOL, FAR, INT64, Ref, Subgraph, Writer

SCALAR_INT, SCALAR_BOOL = TensorType((), INT64), TensorType((), BOOL)


def own(inside: Writer, refs: Sequence[Ref]) -> list[Ref]:
    """Results that the scope itself makes, each under a name of its own: what a subgraph may give."""
    made = {name for record in inside.records for name in record.outputs}
    listed = []
    for ref in refs:
        if ref.name not in made:
            (ref,) = inside.node_of("Identity", [ref], [ref.dtype], {})
        made.discard(ref.name)
        listed.append(ref)
    return listed


def subgraph(inside: Writer, name: str, inputs: Sequence[tuple[Ref, TensorType]],
             outputs: Sequence[tuple[Ref, TensorType]]) -> Subgraph:
    """The scope as an attribute of its node."""
    refs = own(inside, [r for r, _ in outputs])
    return Subgraph(inside.model.unique(name), [(r.name, t) for r, t in inputs],
                    [(r.name, t) for r, (_, t) in zip(refs, outputs)], inside.records)


def fresh(out: Writer, stem: str, kind: TensorType) -> tuple[Ref, TensorType]:
    """An input of a subgraph."""
    return Ref(out.model.unique(stem), kind.dtype), kind


def dtypes(types: Sequence[TensorType]) -> list[DType]:
    return [t.dtype for t in types]


@exports("cond")
def cond(out: Writer, node: Node, pred: Ref, *refs: Ref) -> tuple[Ref, ...]:
    branches = []
    for name, region in zip(("then", "else"), node.regions):
        inside = out.inner()
        results = write_graph(inside, region, refs)
        branches.append(subgraph(inside, name, (), list(zip(results, region.output_types))))
    made = out.node_of("If", [pred], dtypes([v.type for v in node.results]),
                       {"then_branch": branches[0], "else_branch": branches[1]})
    return tuple(made)


@exports("while_loop")
def while_loop(out: Writer, node: Node, *refs: Ref) -> tuple[Ref, ...]:
    """The condition is computed in front of the loop, and again at the end of each step."""
    count = node.attrs["n_carry"]
    condition, body = node.regions
    carries, consts = refs[:count], refs[count:]
    types = [v.type for v in node.results]
    (start,) = write_graph(out, condition, refs)
    inside = out.inner()
    step, going = fresh(out, "step", SCALAR_INT), fresh(out, "going", SCALAR_BOOL)
    inputs = [fresh(out, "carry", t) for t in types]
    results = write_graph(inside, body, [*(r for r, _ in inputs), *consts])
    (again,) = write_graph(inside, condition, [*results, *consts])
    graph = subgraph(inside, "body", [step, going, *inputs], [(again, SCALAR_BOOL), *zip(results, types)])
    return tuple(out.node_of("Loop", [None, start, *carries], dtypes(types), {"body": graph}))


@exports("scan")
def scan(out: Writer, node: Node, *refs: Ref) -> tuple[Ref, ...]:
    n_carry, n_xs, length, backwards = (node.attrs[k] for k in ("n_carry", "n_xs", "length", "reverse"))
    (body,) = node.regions
    carries, xs, consts = refs[:n_carry], refs[n_carry:n_carry + n_xs], refs[n_carry + n_xs:]
    if isinstance(length, int) and length == 0:
        return (*carries, *(filled(out, 0, v.shape, v.dtype) for v in node.results[n_carry:]))
    inside = out.inner()
    inputs = [fresh(out, stem, v.type) for stem, v in
              zip([*["carry"] * n_carry, *["element"] * n_xs], body.inputs)]
    results = list(zip(write_graph(inside, body, [*(r for r, _ in inputs), *consts]), body.output_types))
    if n_xs:
        graph = subgraph(inside, "body", inputs, results)
        stacked = len(results) - n_carry
        return tuple(out.node_of("Scan", [*carries, *xs], dtypes([v.type for v in node.results]), {
            "body": graph, "num_scan_inputs": n_xs,
            "scan_input_directions": [1] * n_xs if backwards else None,
            "scan_output_directions": [1] * stacked if backwards and stacked else None}))
    return counted_loop(out, node, carries, inside, inputs, results)


def counted_loop(out: Writer, node: Node, carries: Sequence[Ref], inside: Writer,
                 inputs: Sequence[tuple[Ref, TensorType]], results: list[tuple[Ref, TensorType]]) -> tuple[Ref, ...]:
    """A scan over nothing but a number of steps."""
    step, going = fresh(out, "step", SCALAR_INT), fresh(out, "going", SCALAR_BOOL)
    graph = subgraph(inside, "body", [step, going, *inputs], [(going[0], SCALAR_BOOL), *results])
    trips = scalar_size(out, node.attrs["length"])
    yes = out.const(np.array(True))
    made = out.node_of("Loop", [trips, yes, *carries], dtypes([v.type for v in node.results]), {"body": graph})
    if not node.attrs["reverse"]:
        return tuple(made)
    turned = [take_slice(out, y, [0], out.ints(-1), out.ints(-FAR), [-1]) for y in made[len(carries):]]
    return (*made[:len(carries)], *turned)


def loop_over(out: Writer, step: Callable[[Writer, Ref, Ref], tuple[Ref, Ref]], start: Ref, x: Ref,
              shape: Sequence[Any], axis: int, backwards: bool) -> Ref:
    """The stacked results of `step(total, element) -> (total, result)` over the elements, of a shape, along an axis."""
    inside = out.inner()
    kind = TensorType(tuple(shape), x.dtype)
    total, element = fresh(out, "carry", kind), fresh(out, "element", kind)
    results = step(inside, total[0], element[0])
    graph = subgraph(inside, "body", [total, element], [(r, kind) for r in results])
    made = out.node_of("Scan", [start, x], [x.dtype, x.dtype], {
        "body": graph, "num_scan_inputs": 1, "scan_input_axes": [axis], "scan_output_axes": [axis],
        "scan_input_directions": [int(backwards)], "scan_output_directions": [int(backwards)]})
    return made[1]


__all__ = ["Graph", "fresh", "loop_over", "subgraph"]
