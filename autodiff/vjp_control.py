"""Derivatives of control flow.

`cond` becomes a cond over the branches' gradients; each runs its branch again, as only one of the two was taken.

`scan` becomes a scan in the other direction, whose carries are the cotangents. What its body needs of the forward
step is kept: the forward scan is emitted once more with these residuals as further stacked results, and the pass
`merge_scans` (ir/loops.py) replaces both by one, so that a compiled forward pass runs once. Not kept is what the
backward step can have for less: operands, what depends on constants only, views of something kept.

`while_loop` has no gradient: how many steps it takes, and so what to keep, is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ir.builder import GraphBuilder, copy_into, replay
from ..ir.context import emit
from ..ir.graph import Graph, Node, Value
from ..ir.opdef import fill
from .reverse import Cotangents, backward, zeros_like

# --- cond ------------------------------------------------------------------------------------------------


def _branch_vjp(branch: Graph, wrt: Sequence[int], arriving: Sequence[int]) -> Graph:
    """(*operands, *cotangents of the outputs numbered in `arriving`) -> gradients of the operands numbered in `wrt`."""
    with GraphBuilder(f"{branch.name}_vjp") as builder:
        inputs = [builder.input(t) for t in branch.input_types]
        outputs = copy_into(branch, inputs)
        cts = [builder.input(branch.outputs[i].type) for i in arriving]
        grads = backward([outputs[i] for i in arriving], cts, [inputs[i] for i in wrt])
        builder.output(*(zeros_like(inputs[i]) if g is None else g for i, g in zip(wrt, grads)))
    return builder.graph


def _cond(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    pred, *operands = node.operands
    wrt = [i for i, wanted in enumerate(needed[1:]) if wanted]
    arriving = [i for i, ct in enumerate(cotangents) if ct is not None]
    cts = [ct for ct in cotangents if ct is not None]
    branches = tuple(_branch_vjp(r, wrt, arriving) for r in node.regions)
    found = _several(emit("cond", pred, *operands, *cts, regions=branches))
    grads: list[Value | None] = [None] * len(node.operands)
    for i, g in zip(wrt, found):
        grads[i + 1] = g
    return grads


def _several(results: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    return (results,) if isinstance(results, Value) else results


# --- scan ------------------------------------------------------------------------------------------------

Numbered = list[tuple[int, Value]]  # values with the numbers of the operands they belong to


@dataclass
class _Step:
    """One step of a scan, forward and backward, in one scratch graph."""

    inputs: list[Value]            # of the body: carries, slices of xs, constants
    outputs: list[Value]           # of the body: carries, ys
    forward: list[Node]
    backward: list[Node]
    flowing: list[int]             # numbers of the carries that have a cotangent
    carry_cts: list[Value]         # the cotangents that arrive: of the carries in `flowing`...
    y_cts: list[Value]             # ... and of those ys that have one
    carry_grads: list[Value | None]
    x_grads: Numbered
    const_grads: Numbered

    @property
    def grads(self) -> list[Value]:
        return [g for g in (*self.carry_grads, *(g for _, g in (*self.x_grads, *self.const_grads))) if g is not None]


def _flowing_carries(body: Graph, n_carry: int, needed: tuple[bool, ...]) -> list[int]:
    """Carries that depend, within any number of steps, on an operand that needs a gradient."""
    active = {v for v, wanted in zip(body.inputs, needed) if wanted}
    while True:
        reached = set(active)
        for node in body.nodes:
            if any(v in reached for v in node.operands):
                reached.update(r for r in node.results if r.dtype.is_float)
        more = {body.inputs[i] for i in range(n_carry) if body.outputs[i] in reached} - active
        if not more:
            return [i for i in range(n_carry) if body.inputs[i] in active]
        active |= more


def _differentiated_step(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> _Step:
    body, n_carry, n_xs = node.regions[0], node.attrs["n_carry"], node.attrs["n_xs"]
    flowing = _flowing_carries(body, n_carry, needed)
    ys = [i for i in range(n_carry, len(cotangents)) if cotangents[i] is not None]
    wrt = [i for i in range(n_carry, len(needed)) if needed[i]]
    with GraphBuilder(f"{body.name}_vjp") as builder:
        inputs = [builder.input(t) for t in body.input_types]
        outputs = copy_into(body, inputs)
        count = len(builder.graph.nodes)
        carry_cts, y_cts = ([builder.input(outputs[i].type) for i in some] for some in (flowing, ys))
        grads = backward([outputs[i] for i in (*flowing, *ys)], [*carry_cts, *y_cts],
                         [inputs[i] for i in (*flowing, *wrt)])
    found = [(i, g) for i, g in zip(wrt, grads[len(flowing):]) if g is not None]
    nodes = builder.graph.nodes
    return _Step(inputs, outputs, nodes[:count], nodes[count:], flowing, carry_cts, y_cts, grads[:len(flowing)],
                 [(i, g) for i, g in found if i < n_carry + n_xs], [(i, g) for i, g in found if i >= n_carry + n_xs])


def _residuals(step: _Step, constants: set[Value], free: set[Value]) -> tuple[list[Value], list[Node]]:
    """What the backward nodes read of the forward step: the values to keep, and the forward nodes to run again.

    `free` are values that the backward scan has anyway, `constants` those that are the same in every step.
    """
    constants = set(constants)
    for node in step.forward:
        if all(v in constants for v in node.operands):
            constants.update(node.results)
    producers = set(step.forward)
    kept: dict[Value, None] = {}
    again: set[Node] = set()
    wanted = [v for node in step.backward for v in node.operands] + step.grads
    while wanted:
        value = wanted.pop()
        producer = value.producer
        if value in free or producer in again or (producer is not None and producer not in producers):
            continue
        if producer is not None and (value in constants or producer.op.has("view")):
            again.add(producer)
            wanted.extend(producer.operands)
        else:
            kept[value] = None
    return [v for v in _in_order(step) if v in kept], [node for node in step.forward if node in again]


def _in_order(step: _Step) -> list[Value]:
    return [*step.inputs, *(v for node in step.forward for v in node.results)]


def _stacked(node: Node, step: _Step, kept: list[Value]) -> list[Value]:
    """The kept values of all steps: results of the scan if it gives them already, else of a wider copy of it."""
    n_carry = node.attrs["n_carry"]
    found = dict(zip(step.outputs[n_carry:], node.results[n_carry:]))
    missing = [v for v in kept if v not in found]
    if missing:
        body = Graph(node.regions[0].name, step.inputs, None, step.forward, [*step.outputs, *missing])
        wider = _several(emit("scan", *node.operands, regions=(body,), **node.attrs))
        found.update(zip(missing, wider[len(step.outputs):]))
    return [found[v] for v in kept]


def _scan(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    n_carry, n_xs, body = node.attrs["n_carry"], node.attrs["n_xs"], node.regions[0]
    step = _differentiated_step(node, cotangents, needed)
    # A carry that no step changes is a constant.
    fixed = [i for i in range(n_carry) if body.outputs[i] is body.inputs[i]]
    constants = [*fixed, *range(n_carry + n_xs, len(step.inputs))]
    scanned = list(range(n_carry, n_carry + n_xs))
    kept, again = _residuals(step, {step.inputs[i] for i in constants},
                             {*(step.inputs[i] for i in (*constants, *scanned)), *step.carry_cts, *step.y_cts})
    read = {v for n in (*again, *step.backward) for v in n.operands} | set(step.grads)
    constants = [i for i in constants if step.inputs[i] in read]
    scanned = [i for i in scanned if step.inputs[i] in read]
    start = [zeros_like(node.operands[i]) if (ct := cotangents[i]) is None else ct for i in step.flowing]
    start += [zeros_like(node.operands[i]) for i, _ in step.const_grads]
    xs = [*(node.operands[i] for i in scanned), *_stacked(node, step, kept),
          *(ct for ct in cotangents[n_carry:] if ct is not None)]
    results = _several(emit(
        "scan", *start, *xs, *(node.operands[i] for i in constants),
        regions=(_backward_body(step, again, kept, scanned, constants),),
        n_carry=len(start), n_xs=len(xs), length=node.attrs["length"], reverse=not node.attrs["reverse"]))
    grads: list[Value | None] = [None] * len(node.operands)
    numbers = [*step.flowing, *(i for i, _ in (*step.const_grads, *step.x_grads))]
    for i, value in zip(numbers, results):
        grads[i] = value
    return grads


def _backward_body(step: _Step, again: list[Node], kept: list[Value], scanned: list[int],
                   constants: list[int]) -> Graph:
    """Carries: cotangents of the carries, sums of the constants' gradients. Scanned: xs, kept values, cotangents of ys.
    Gives the carries, then the gradients of the xs."""
    with GraphBuilder("backward") as builder:
        def receive(values: Iterable[Value]) -> None:
            mapping.update((v, builder.input(v.type, v.name)) for v in values)

        mapping: dict[Value, Value] = {}
        receive(step.carry_cts)
        sums = [builder.input(step.inputs[i].type) for i, _ in step.const_grads]
        receive([*(step.inputs[i] for i in scanned), *kept, *step.y_cts, *(step.inputs[i] for i in constants)])
        replay([*again, *step.backward], mapping, builder)
        for i, g in zip(step.flowing, step.carry_grads):
            builder.output(zeros_like(step.inputs[i]) if g is None else mapping[g])
        for total, (_, g) in zip(sums, step.const_grads):
            builder.output(total + mapping[g])
        builder.output(*(mapping[g] for _, g in step.x_grads))
    return builder.graph


fill("vjp", "cond", _cond)
fill("vjp", "scan", _scan)
