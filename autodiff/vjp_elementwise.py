"""Derivatives of the elementwise ops: one table of mathematics.

`ct` is the cotangent of the result `out`. Where a function has a kink, the convention is torch's:
`maximum` and `minimum` split the cotangent evenly between equal operands, `abs` has 0 at 0, `clip` passes
the cotangent on its bounds, `pow` has 0 by its base where the exponent is 0, and 0 by its exponent where
the base is 0 and the exponent not negative.
"""

from __future__ import annotations

import math
from typing import Any

from ..ir.context import as_value, emit
from ..ir.graph import Value
from ..ir.opdef import fill
from .reverse import no_gradient, vjp

LN2, LN10 = math.log(2.0), math.log(10.0)
TWO_OVER_SQRT_PI = 2.0 / math.sqrt(math.pi)


def where(condition: Value, x: Any, y: Any) -> Value:
    """`x` where the condition holds, else `y`; one of the two may be a Python number."""
    dtype = x.dtype if isinstance(x, Value) else y.dtype
    return emit("where", condition, as_value(x, dtype), as_value(y, dtype))


def compare(name: str, x: Value, y: Any) -> Value:
    return emit(name, x, as_value(y, x.dtype))


# --- unary -----------------------------------------------------------------------------------------------

vjp("neg", lambda ct, out, x: -ct)
vjp("abs", lambda ct, out, x: ct * emit("sign", x))
vjp("exp", lambda ct, out, x: ct * out)
vjp("exp2", lambda ct, out, x: ct * out * LN2)
vjp("expm1", lambda ct, out, x: ct * (out + 1.0))
vjp("log", lambda ct, out, x: ct / x)
vjp("log2", lambda ct, out, x: ct / (x * LN2))
vjp("log10", lambda ct, out, x: ct / (x * LN10))
vjp("log1p", lambda ct, out, x: ct / (x + 1.0))
vjp("sqrt", lambda ct, out, x: ct / (out * 2.0))
vjp("rsqrt", lambda ct, out, x: ct * out * (out * out) * -0.5)
vjp("cbrt", lambda ct, out, x: ct / (out * out * 3.0))
vjp("reciprocal", lambda ct, out, x: -ct * (out * out))
vjp("square", lambda ct, out, x: ct * (x * 2.0))
vjp("sin", lambda ct, out, x: ct * emit("cos", x))
vjp("cos", lambda ct, out, x: -ct * emit("sin", x))
vjp("tan", lambda ct, out, x: ct * (out * out + 1.0))
vjp("asin", lambda ct, out, x: ct * emit("rsqrt", 1.0 - x * x))
vjp("acos", lambda ct, out, x: -ct * emit("rsqrt", 1.0 - x * x))
vjp("atan", lambda ct, out, x: ct / (x * x + 1.0))
vjp("sinh", lambda ct, out, x: ct * emit("cosh", x))
vjp("cosh", lambda ct, out, x: ct * emit("sinh", x))
vjp("tanh", lambda ct, out, x: ct * (1.0 - out * out))
vjp("asinh", lambda ct, out, x: ct * emit("rsqrt", x * x + 1.0))
vjp("acosh", lambda ct, out, x: ct * emit("rsqrt", x * x - 1.0))
vjp("atanh", lambda ct, out, x: ct / (1.0 - x * x))
vjp("erf", lambda ct, out, x: ct * emit("exp", -(x * x)) * TWO_OVER_SQRT_PI)
vjp("erfc", lambda ct, out, x: ct * emit("exp", -(x * x)) * -TWO_OVER_SQRT_PI)
vjp("sigmoid", lambda ct, out, x: ct * (out * (1.0 - out)))
vjp("softplus", lambda ct, out, x: ct * emit("sigmoid", x))
# by the result, which the next layer keeps anyway; 0 at 0, as torch has it
vjp("relu", lambda ct, out, x: where(compare("gt", out, 0), ct, 0.0))
vjp("identity", lambda ct, out, x: ct)
vjp("cast", lambda ct, out, x, dtype: emit("cast", ct, dtype=x.dtype))

for _step in ("stop_gradient", "sign", "floor", "ceil", "round", "trunc", "floor_divide"):
    fill("vjp", _step, no_gradient)

# --- binary ----------------------------------------------------------------------------------------------

vjp("add", lambda ct, out, x, y: ct,
           lambda ct, out, x, y: ct)
vjp("sub", lambda ct, out, x, y: ct,
           lambda ct, out, x, y: -ct)
vjp("mul", lambda ct, out, x, y: ct * y,
           lambda ct, out, x, y: ct * x)
vjp("div", lambda ct, out, x, y: ct / y,
           lambda ct, out, x, y: -(ct * out) / y)
vjp("remainder", lambda ct, out, x, y: ct,
                 lambda ct, out, x, y: -ct * emit("floor_divide", x, y))
vjp("fmod", lambda ct, out, x, y: ct,
            lambda ct, out, x, y: -ct * emit("trunc", x / y))
vjp("hypot", lambda ct, out, x, y: ct * (x / out),
             lambda ct, out, x, y: ct * (y / out))
vjp("atan2", lambda ct, out, y, x: ct * (x / (x * x + y * y)),
             lambda ct, out, y, x: -ct * (y / (x * x + y * y)))


def _pow_base(ct: Value, out: Value, x: Value, y: Value) -> Value:
    return where(compare("eq", y, 0.0), 0.0, ct * (y * x ** (y - 1.0)))


def _pow_exponent(ct: Value, out: Value, x: Value, y: Value) -> Value:
    # 0 ** y is flat in y where y >= 0; the inner `where` keeps the log finite there, in second order too
    flat = emit("logical_and", compare("eq", x, 0.0), compare("ge", y, 0.0))
    return where(flat, 0.0, ct * (out * emit("log", where(flat, 1.0, x))))


def _share(ct: Value, x: Value, y: Value, ahead: str) -> Value:
    """The cotangent where x is ahead of y, half of it where they are equal, 0 where y is ahead."""
    return where(emit("eq", x, y), ct * 0.5, where(emit(ahead, x, y), ct, 0.0))


vjp("pow", _pow_base, _pow_exponent)
vjp("maximum", lambda ct, out, x, y: _share(ct, x, y, "gt"),
               lambda ct, out, x, y: _share(ct, y, x, "gt"))
vjp("minimum", lambda ct, out, x, y: _share(ct, x, y, "lt"),
               lambda ct, out, x, y: _share(ct, y, x, "lt"))

# --- selection -------------------------------------------------------------------------------------------


def _clip(ct: Value, out: Value, x: Value, lo: float | None, hi: float | None) -> Value:
    if lo is not None:
        ct = where(compare("ge", x, lo), ct, 0.0)
    if hi is not None:
        ct = where(compare("le", x, hi), ct, 0.0)
    return ct


vjp("where", None, lambda ct, out, c, x, y: where(c, ct, 0.0),
                   lambda ct, out, c, x, y: where(c, 0.0, ct))
vjp("clip", _clip)
