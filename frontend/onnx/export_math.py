"""Export of the elementwise ops on floats, and of those that serve all dtypes.

ONNX lacks some functions (expm1, log1p, cbrt, atan2...). They are composed so that they keep their accuracy where the
plain formula loses it: near zero, and beyond the range of the exponential.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...ir.graph import Node
from .dtypes import number_of
from .export_rules import exports, in_f32
from .export_writer import BOOL, Ref, Writer

# Ops that ONNX has under a name of its own, with the same meaning.
SAME = {
    "abs": "Abs", "sign": "Sign", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin",
    "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf", "sigmoid": "Sigmoid", "sqrt": "Sqrt",
    "reciprocal": "Reciprocal", "floor": "Floor", "ceil": "Ceil", "round": "Round", "isnan": "IsNaN",
    "isinf": "IsInf", "logical_not": "Not", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div",
    "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor", "eq": "Equal", "lt": "Less", "gt": "Greater",
    "where": "Where",
}

# erfc(x) = t exp(-x*x + P(t)), t = 1 / (1 + x/2), for x >= 0; relative error below 1.2e-7 (W. H. Press et al.,
# "Numerical Recipes", section 6.2). Highest power first.
ERFC = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
        1.00002368, -1.26551223)


def rename(name: str, kind: str) -> None:
    """Declares an op that is one ONNX node."""
    @exports(name)
    def rule(out: Writer, node: Node, *xs: Ref) -> Ref:
        return out.op(kind, *xs)


for _name, _kind in SAME.items():
    rename(_name, _kind)


def both(out: Writer, kind: str, x: Ref, number: Any) -> Ref:
    """`kind(x, number)`, the number in the dtype of x."""
    return out.op(kind, x, out.like(number, x))


@exports("neg")
def neg(out: Writer, node: Node, x: Ref) -> Ref:
    return out.op("Sub", out.like(0, x), x) if x.dtype.is_unsigned else out.op("Neg", x)


@exports("relu")
def relu(out: Writer, node: Node, x: Ref) -> Ref:
    """Of integers that Relu does not take, the larger of x and 0."""
    return out.op("Relu", x) if x.dtype.is_float or out.takes("Relu", x.dtype) else both(out, "Max", x, 0)


@exports("square")
def square(out: Writer, node: Node, x: Ref) -> Ref:
    return out.op("Mul", x, x)


@exports("exp2")
@in_f32
def exp2(out: Writer, node: Node, x: Ref) -> Ref:
    return out.op("Pow", out.like(2, x), x)


@exports("expm1")
@in_f32
def expm1(out: Writer, node: Node, x: Ref) -> Ref:
    """2 tanh(x/2) / (1 - tanh(x/2)) near zero, where the subtraction of 1 would cancel."""
    t = out.op("Tanh", both(out, "Mul", x, 0.5))
    small = out.op("Div", both(out, "Mul", t, 2), out.op("Sub", out.like(1, t), t))
    plain = both(out, "Sub", out.op("Exp", x), 1)
    return out.op("Where", both(out, "Less", out.op("Abs", x), 1), small, plain)


@exports("log1p")
@in_f32
def log1p(out: Writer, node: Node, x: Ref) -> Ref:
    """log(u) x / (u - 1) with u = 1 + x as it was rounded (Goldberg 1991, theorem 4)."""
    u = both(out, "Add", x, 1)
    less = both(out, "Sub", u, 1)
    scaled = out.op("Div", out.op("Mul", out.op("Log", u), x), less)
    plain = out.op("Or", both(out, "Equal", less, 0), both(out, "Equal", u, np.inf))
    return out.op("Where", plain, x, scaled)


def log_to_base(name: str, base: float) -> None:
    """Declares a logarithm as the natural one, scaled."""
    @exports(name)
    @in_f32
    def rule(out: Writer, node: Node, x: Ref) -> Ref:
        return both(out, "Mul", out.op("Log", x), 1 / math.log(base))


log_to_base("log2", 2)
log_to_base("log10", 10)


@exports("cbrt")
@in_f32
def cbrt(out: Writer, node: Node, x: Ref) -> Ref:
    return out.op("Mul", out.op("Sign", x), both(out, "Pow", out.op("Abs", x), 1 / 3))


@exports("rsqrt")
@in_f32
def rsqrt(out: Writer, node: Node, x: Ref) -> Ref:
    return out.op("Reciprocal", out.op("Sqrt", x))


@exports("erfc")
@in_f32
def erfc(out: Writer, node: Node, x: Ref) -> Ref:
    """In f32 accurate in its small values too; in f64 1 - erf(x)."""
    below = out.op("Sub", out.like(1, x), out.op("Erf", x))
    if x.dtype == "float64":
        return below
    z = out.op("Abs", x)
    t = out.op("Reciprocal", both(out, "Add", both(out, "Mul", z, 0.5), 1))
    total = out.like(ERFC[0], x)
    for coefficient in ERFC[1:]:
        total = both(out, "Add", out.op("Mul", total, t), coefficient)
    tail = out.op("Mul", t, out.op("Exp", out.op("Sub", total, out.op("Mul", z, z))))
    return out.op("Where", both(out, "Less", x, 0.5), below, tail)


@exports("softplus")
def softplus(out: Writer, node: Node, x: Ref) -> Ref:
    if x.dtype != "float64":
        return out.op("Softplus", x)
    inner = log1p(out, node, out.op("Exp", out.op("Neg", out.op("Abs", x))))
    return out.op("Add", out.op("Max", x, out.like(0, x)), inner)


@exports("trunc")
@in_f32
def trunc(out: Writer, node: Node, x: Ref) -> Ref:
    return out.op("Mul", out.op("Sign", x), out.op("Floor", out.op("Abs", x)))


@exports("isfinite")
def isfinite(out: Writer, node: Node, x: Ref) -> Ref:
    return both(out, "Less", out.op("Abs", x), np.inf)


@exports("ne")
def ne(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    return out.op("Not", out.op("Equal", x, y))


def or_equal(name: str, kind: str, strict: str) -> None:
    """Declares <= or >=, an op of its own since opset 12."""
    @exports(name)
    def rule(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
        return out.op(kind, x, y) if out.opset >= 12 else \
            out.op("Or", out.op(strict, x, y), out.op("Equal", x, y))


or_equal("le", "LessOrEqual", "Less")
or_equal("ge", "GreaterOrEqual", "Greater")


def extreme(name: str, kind: str, of_bools: str) -> None:
    """Declares maximum or minimum."""
    @exports(name)
    def rule(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
        return out.op(of_bools if x.dtype == BOOL else kind, x, y)


extreme("maximum", "Max", "Or")
extreme("minimum", "Min", "And")


@exports("clip")
def clip(out: Writer, node: Node, x: Ref) -> Ref:
    lo, hi = node.attrs["lo"], node.attrs["hi"]
    if lo is None and hi is None:
        return x
    low, high = (None if b is None else out.like(b, x) for b in (lo, hi))
    return out.op("Clip", x, low, high)


@exports("bitcast")
def bitcast(out: Writer, node: Node, x: Ref) -> Ref:
    out.needs(26, "reinterpreting bits")
    return out.op("BitCast", x, to=number_of(node.result.dtype), dtype=node.result.dtype)


@exports("pow")
def power(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    """Integers: 0 to a negative power is 0, where a runtime divides by zero."""
    if x.dtype.is_float:
        if x.dtype.bits < 32:
            return in_f32(power)(out, node, x, y)
        return out.op("Pow", x, y)
    if x.dtype.is_unsigned:
        wide = out.cast(x, "int64"), out.cast(y, "int64")
        return out.cast(out.op("Pow", *wide), x.dtype)
    hidden = out.op("And", both(out, "Equal", x, 0), both(out, "Less", y, 0))
    base = out.op("Where", hidden, out.like(1, x), x)
    return out.op("Where", hidden, x, out.op("Pow", base, y))


@exports("atan2")
@in_f32
def atan2(out: Writer, node: Node, y: Ref, x: Ref) -> Ref:
    """atan(y / x), moved by pi into the left half plane; +-pi/2 on the axis."""
    zero = out.like(0, x)
    turn = out.op("Where", out.op("Less", y, zero), out.like(-math.pi, x), out.like(math.pi, x))
    angle = out.op("Atan", out.op("Div", y, x))
    angle = out.op("Where", out.op("Less", x, zero), out.op("Add", angle, turn), angle)
    upright = both(out, "Mul", out.op("Sign", y), math.pi / 2)
    return out.op("Where", out.op("Equal", x, zero), upright, angle)


@exports("hypot")
@in_f32
def hypot(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    """m sqrt(1 + (n/m)**2) with the larger m and the smaller n."""
    x, y = out.op("Abs", x), out.op("Abs", y)
    large, small = out.op("Max", x, y), out.op("Min", x, y)
    ratio = out.op("Div", small, large)
    length = out.op("Mul", large, out.op("Sqrt", both(out, "Add", out.op("Mul", ratio, ratio), 1)))
    plain = out.op("Or", both(out, "Equal", large, 0), both(out, "Equal", large, np.inf))
    return out.op("Where", plain, large, length)


def float_remainder(out: Writer, x: Ref, y: Ref) -> tuple[Ref, Ref]:
    """fmod(x, y), and where its sign is not that of y."""
    rest = out.op("Mod", x, y, fmod=1)
    zero = out.like(0, x)
    wrong = out.op("And", out.op("Not", out.op("Equal", rest, zero)),
                   out.op("Xor", out.op("Less", rest, zero), out.op("Less", y, zero)))
    return rest, wrong
