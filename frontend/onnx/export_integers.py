"""Export of division, remainders, bits and shifts.

Treadle defines what a runtime may trap on: division by zero gives 0, shifts by too much shift everything out, the
smallest integer divided by -1 wraps. Guards for these are written only where the divisor or shift is not a constant
that needs none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.dtypes import as_dtype
from ...ir.graph import Node
from .export_math import both, float_remainder
from .export_rules import exports, in_f32
from .export_writer import BOOL, Ref, Writer


def harmless(out: Writer, y: Ref) -> bool:
    """Whether a divisor is a constant without 0 and -1."""
    array = out.array_of(y)
    return array is not None and not np.isin(array.astype(object), [0, -1]).any()


def wide(out: Writer, *refs: Ref) -> tuple[Ref, ...]:
    """Small integers as i32, so that one chain of nodes computes in one dtype."""
    return tuple(out.cast(r, "int32") if r.dtype.bits < 32 else r for r in refs)


def quotient(out: Writer, x: Ref, y: Ref) -> Ref:
    """floor(x / y) of integers whose divisor is neither 0 nor -1."""
    q = out.op("Div", x, y)
    if x.dtype.is_unsigned:
        return q
    zero = out.like(0, x)
    rest = out.op("Sub", x, out.op("Mul", q, y))
    uneven = out.op("And", out.op("Not", out.op("Equal", rest, zero)),
                    out.op("Xor", out.op("Less", rest, zero), out.op("Less", y, zero)))
    return out.op("Sub", q, out.cast(uneven, x.dtype))


def guarded(out: Writer, x: Ref, y: Ref, divide: Any, by_zero: Ref, by_minus_one: Ref) -> Ref:
    """`divide(x, y)`, with what to give where y is 0 or -1."""
    if harmless(out, y):
        return divide(out, x, y)
    zero = both(out, "Equal", y, 0)
    if y.dtype.is_unsigned:
        return out.op("Where", zero, by_zero, divide(out, x, out.op("Where", zero, out.like(1, y), y)))
    minus = both(out, "Equal", y, -1)
    safe = out.op("Where", out.op("Or", zero, minus), out.like(1, y), y)
    made = out.op("Where", zero, by_zero, out.op("Where", minus, by_minus_one, divide(out, x, safe)))
    return made


@exports("floor_divide")
def floor_divide(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    dtype = x.dtype
    if dtype.is_float:
        return float_floor_divide(out, node, x, y)
    x, y = wide(out, x, y)
    zero = out.like(0, x)
    return out.cast(guarded(out, x, y, quotient, zero, out.op("Sub", zero, x)), dtype)


@in_f32
def float_floor_divide(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    """(x - fmod(x, y)) / y is whole up to rounding, so a quotient that rounds up does no harm."""
    rest, wrong = float_remainder(out, x, y)
    whole = out.op("Round", out.op("Div", out.op("Sub", x, rest), y))
    return out.op("Sub", whole, out.cast(wrong, x.dtype))


@exports("remainder")
def remainder(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    if x.dtype.is_float:
        return float_remainder_rule(out, node, x, y)
    return integer_remainder(out, x, y, lambda out, a, b: out.op("Mod", a, b))


@in_f32
def float_remainder_rule(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    rest, wrong = float_remainder(out, x, y)
    return out.op("Where", wrong, out.op("Add", rest, y), rest)


@exports("fmod")
def fmod(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    if x.dtype.is_float:
        return float_fmod(out, node, x, y)
    return integer_remainder(out, x, y, remaining)


@in_f32
def float_fmod(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    return out.op("Mod", x, y, fmod=1)


def remaining(out: Writer, x: Ref, y: Ref) -> Ref:
    """x - trunc(x / y) * y: Mod with fmod=1 is computed in floats, which do not hold 64 bits."""
    return out.op("Sub", x, out.op("Mul", out.op("Div", x, y), y))


def integer_remainder(out: Writer, x: Ref, y: Ref, rest: Any) -> Ref:
    """A remainder, with 0 where y is 0 or -1."""
    dtype = x.dtype
    x, y = wide(out, x, y)
    zero = out.like(0, x)
    return out.cast(guarded(out, x, y, rest, zero, zero), dtype)


# Bits ------------------------------------------------------------------------------------------------------------

def bitwise(name: str, kind: str, of_bools: str) -> None:
    """Declares an op on bits, which ONNX has since opset 18."""
    @exports(name)
    def rule(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
        if x.dtype == BOOL:
            return out.op(of_bools, x, y)
        out.needs(18, f"{name} of {x.dtype}")
        made = out.op(kind, x, y)
        return made


bitwise("bitwise_and", "BitwiseAnd", "And")
bitwise("bitwise_or", "BitwiseOr", "Or")
bitwise("bitwise_xor", "BitwiseXor", "Xor")


@exports("bitwise_not")
def bitwise_not(out: Writer, node: Node, x: Ref) -> Ref:
    """Before opset 18 as -1 - x, which wraps to the same."""
    if x.dtype == BOOL:
        made = out.op("Not", x)
    elif out.opset >= 18:
        made = out.op("BitwiseNot", x)
    else:
        ones = np.array(-1).astype(x.dtype.np) if not x.dtype.is_unsigned else np.iinfo(x.dtype.np).max
        made = out.op("Sub", out.like(ones, x), x)
    return made


def shift(out: Writer, x: Ref, y: Ref, direction: str) -> Ref:
    """x shifted by y in [0, bits), as unsigned integers."""
    unsigned = as_dtype(f"uint{x.dtype.bits}")
    made = out.op("BitShift", out.cast(x, unsigned), out.cast(y, unsigned), direction=direction)
    return out.cast(made, x.dtype)


def outside(out: Writer, y: Ref) -> Ref | None:
    """Where a shift is negative or at least the number of bits; None if it is a constant that is not."""
    array, bits = out.array_of(y), y.dtype.bits
    if array is not None and ((array.astype(np.int64) >= 0) & (array.astype(np.uint64) < bits)).all():
        return None
    beyond = out.op("Not", both(out, "Less", y, bits))
    if y.dtype.is_unsigned:
        return beyond
    made = out.op("Or", beyond, both(out, "Less", y, 0))
    return made


@exports("left_shift")
def left_shift(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    lost = outside(out, y)
    if lost is None:
        return shift(out, x, y, "LEFT")
    safe = out.op("Where", lost, out.like(0, y), y)
    made = out.op("Where", lost, out.like(0, x), shift(out, x, safe, "LEFT"))
    return made


@exports("right_shift")
def right_shift(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    """Of a negative number the complement is shifted: its sign bits come in."""
    lost = outside(out, y)
    most = out.like(x.dtype.bits - 1, y)
    safe = y if lost is None else out.op("Where", lost, most, y)
    if x.dtype.is_unsigned:
        moved = shift(out, x, safe, "RIGHT")
        made = moved if lost is None else out.op("Where", lost, out.like(0, x), moved)
        return made
    negative = both(out, "Less", x, 0)
    ones = out.like(-1, x)
    moved = shift(out, out.op("Where", negative, out.op("Sub", ones, x), x), safe, "RIGHT")
    made = out.op("Where", negative, out.op("Sub", ones, moved), moved)
    return made
