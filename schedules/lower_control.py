"""Branches and loops: the regions of control-flow ops, lowered to steps of the program.

A scan keeps each carry in two halves of one buffer: step i reads half i % 2 and writes the other, so no step copies
a carry. What is scanned and what is stacked are views of one element. A while loop, whose number of steps is not
known, copies the new carries over the old after each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.graph import Node
from .program import Branch, Buffer, Copy, Loop, LoopVar, Step, Term, View, While, element

Place = Buffer | View  # where a value lies


def _whole(lowering: Any, arg: Place, shape: Sequence[int], dtype: str, steps: list[Step]) -> Buffer:
    """The argument as a buffer: copied if it is a view."""
    if isinstance(arg, Buffer):
        return arg
    buffer = Buffer(f"v{next(lowering.numbers)}", tuple(shape), dtype)
    steps.append(Copy(arg, buffer))
    return buffer


def _cond(lowering: Any, node: Node, operands: Sequence[Place], results: Sequence[Place]) -> list[Step]:
    steps: list[Step] = []
    pred = _whole(lowering, operands[0], (), "bool", steps)
    then, orelse = (lowering.region(region, operands[1:], results) for region in node.regions)
    return [*steps, Branch(pred, then, orelse)]


def _while(lowering: Any, node: Node, operands: Sequence[Place], results: Sequence[Place]) -> list[Step]:
    count = node.attrs["n_carry"]
    condition, body = node.regions
    carries = [lowering.temp(v, "carry") for v in body.outputs]
    fresh = [lowering.temp(v, "next") for v in body.outputs]
    pred = Buffer(f"go{next(lowering.numbers)}", (), "bool")
    inputs = [*carries, *operands[count:]]
    loop = While(LoopVar(f"w{next(lowering.numbers)}"), lowering.region(condition, inputs, [pred]), pred,
                 [*lowering.region(body, inputs, fresh), *map(Copy, fresh, carries)])
    return [*map(Copy, operands[:count], carries), loop, *map(Copy, carries, results)]


def _scan(lowering: Any, node: Node, operands: Sequence[Place], results: Sequence[Place]) -> list[Step]:
    n_carry, n_xs, length = (node.attrs[k] for k in ("n_carry", "n_xs", "length"))
    body = node.regions[0]
    var = LoopVar(f"i{next(lowering.numbers)}")
    reverse = length if node.attrs["reverse"] else None
    before: list[Step] = []
    halves = [Buffer(f"carry{next(lowering.numbers)}", (2, *v.shape), v.dtype) for v in body.outputs[:n_carry]]
    for start, pair in zip(operands, halves):
        before.append(Copy(start, _half(pair, 0)))
    xs = [_whole(lowering, x, v.shape, v.dtype, before)
          for x, v in zip(operands[n_carry:n_carry + n_xs], node.operands[n_carry:n_carry + n_xs])]
    stacks: list[Buffer] = []
    after: list[Step] = []
    for v, result in zip(node.results[n_carry:], results[n_carry:]):
        if isinstance(result, Buffer):
            stack = result
        else:
            stack = Buffer(f"ys{next(lowering.numbers)}", v.shape, v.dtype)
            after.append(Copy(stack, result))
        stacks.append(stack)
    inputs = [*(_turn(pair, var, 0) for pair in halves), *(element(x, var, reverse_length=reverse) for x in xs),
              *operands[n_carry + n_xs:]]
    outputs = [*(_turn(pair, var, 1) for pair in halves), *(element(y, var, reverse_length=reverse) for y in stacks)]
    steps = lowering.region(body, inputs, outputs) if length else []
    final = [Copy(_half(pair, length % 2), result) for pair, result in zip(halves, results)]
    return [*before, *([Loop(var, length, steps)] if length else []), *final, *after]


def _half(pair: Buffer, which: int) -> View:
    size = pair.size // 2
    return View(pair, pair.shape[1:], which * size)


def _turn(pair: Buffer, var: LoopVar, shift: int) -> View:
    """The half that step `var` reads (shift 0) or writes (shift 1)."""
    return View(pair, pair.shape[1:], 0, (Term(var, pair.size // 2, shift, 2),))


CONTROL = {"cond": _cond, "while_loop": _while, "scan": _scan}


def lower_control(lowering: Any, node: Node, operands: Sequence[Place], results: Sequence[Place]) -> list[Step]:
    """The steps of a `cond`, `while_loop` or `scan` node; `lowering` is the `lower.Lowering` of the program."""
    return CONTROL[node.op.name](lowering, node, operands, results)
