"""Functions of each element by itself: arithmetic, powers, trigonometry, comparison, logic, choice.

Operands broadcast by NumPy's rules and promote as `dispatch` says. Functions whose result is not an integer
(`exp`, `sqrt`, `divide`...) turn integers into float32 first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..ir.dtypes import as_dtype
from ..ir.errors import ArgumentsError, AttributeValueError
from ..ir.location import user_location
from .dispatch import apply, as_tensor, binary, cast, common_dtype, is_weak, promoted, unary
from .tensor import Tensor

Unary = Callable[[Any], Tensor]
Binary = Callable[[Any, Any], Tensor]


def _unary(name: str, doc: str, op: str | None = None, floating: bool = True) -> Unary:
    def function(x: Any) -> Tensor:
        return unary(op or name, x, floating)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


def _binary(name: str, doc: str, op: str | None = None, floating: bool = False) -> Binary:
    def function(x: Any, y: Any) -> Tensor:
        return binary(op or name, x, y, floating)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


def _rounding(name: str, doc: str) -> Unary:
    def function(x: Any) -> Tensor:
        x = as_tensor(x)
        return unary(name, x) if x.dtype.is_float else x

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


def _logical(name: str, doc: str) -> Binary:
    def function(x: Any, y: Any) -> Tensor:
        return binary(name, as_bool(x), as_bool(y))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


negative = _unary("negative", "-x.", "neg", floating=False)
sign = _unary("sign", "-1, 0 or 1; NaN at NaN.", floating=False)
square = _unary("square", "x * x.", floating=False)
relu = _unary("relu", "max(x, 0); its derivative at 0 is 0.", floating=False)
exp = _unary("exp", "e ** x.")
exp2 = _unary("exp2", "2 ** x.")
expm1 = _unary("expm1", "e ** x - 1, accurate near 0.")
log = _unary("log", "Natural logarithm; NaN below zero.")
log2 = _unary("log2", "Logarithm to base 2.")
log10 = _unary("log10", "Logarithm to base 10.")
log1p = _unary("log1p", "log(1 + x), accurate near 0.")
sqrt = _unary("sqrt", "Square root; NaN below zero.")
rsqrt = _unary("rsqrt", "1 / sqrt(x).")
cbrt = _unary("cbrt", "Real cube root.")
reciprocal = _unary("reciprocal", "1 / x.")
sin = _unary("sin", "Sine of x in radians.")
cos = _unary("cos", "Cosine of x in radians.")
tan = _unary("tan", "Tangent of x in radians.")
asin = arcsin = _unary("asin", "Inverse sine, in [-pi/2, pi/2].")
acos = arccos = _unary("acos", "Inverse cosine, in [0, pi].")
atan = arctan = _unary("atan", "Inverse tangent, in [-pi/2, pi/2].")
sinh = _unary("sinh", "Hyperbolic sine.")
cosh = _unary("cosh", "Hyperbolic cosine.")
tanh = _unary("tanh", "Hyperbolic tangent.")
asinh = arcsinh = _unary("asinh", "Inverse hyperbolic sine.")
acosh = arccosh = _unary("acosh", "Inverse hyperbolic cosine.")
atanh = arctanh = _unary("atanh", "Inverse hyperbolic tangent.")
erf = _unary("erf", "Error function, 2/sqrt(pi) * integral of exp(-t*t) from 0 to x.")
erfc = _unary("erfc", "1 - erf(x), accurate for large x.")
sigmoid = _unary("sigmoid", "1 / (1 + exp(-x)), without overflow.")
softplus = _unary("softplus", "log(1 + exp(x)), without overflow.")
isnan = _unary("isnan", "Whether x is NaN.")
isinf = _unary("isinf", "Whether x is infinite.")
isfinite = _unary("isfinite", "Whether x is neither infinite nor NaN.")
floor = _rounding("floor", "Largest integer not above x, in the dtype of x.")
ceil = _rounding("ceil", "Smallest integer not below x, in the dtype of x.")
trunc = _rounding("trunc", "x without its fraction, in the dtype of x.")
bitwise_not = invert = _unary("bitwise_not", "Every bit flipped; on bool, not x.", floating=False)
stop_gradient = _unary("stop_gradient", "x itself; gradients take it for a constant.", floating=False)

add = _binary("add", "x + y.")
subtract = _binary("subtract", "x - y.", "sub")
multiply = _binary("multiply", "x * y.", "mul")
divide = true_divide = _binary("divide", "x / y; integers give float32.", "div", floating=True)
floor_divide = _binary("floor_divide", "floor(x / y), in the common dtype; an integer divided by zero gives 0.")
remainder = mod = _binary("remainder", "x - floor(x / y) * y: the sign of y.")
fmod = _binary("fmod", "x - trunc(x / y) * y: the sign of x.")
maximum = _binary("maximum", "The larger of x and y; NaN if either is.")
minimum = _binary("minimum", "The smaller of x and y; NaN if either is.")
atan2 = arctan2 = _binary("atan2", "The angle of the point (y, x), all four quadrants.", floating=True)
hypot = _binary("hypot", "sqrt(x*x + y*y), without overflow.", floating=True)
bitwise_and = _binary("bitwise_and", "Bits set in both; on bool, x and y.")
bitwise_or = _binary("bitwise_or", "Bits set in either; on bool, x or y.")
bitwise_xor = _binary("bitwise_xor", "Bits set in one of the two.")
left_shift = _binary("left_shift", "x << y.")
right_shift = _binary("right_shift", "x >> y, keeping the sign.")
equal = _binary("equal", "x == y, elementwise.", "eq")
not_equal = _binary("not_equal", "x != y, elementwise.", "ne")
less = _binary("less", "x < y, elementwise.", "lt")
less_equal = _binary("less_equal", "x <= y, elementwise.", "le")
greater = _binary("greater", "x > y, elementwise.", "gt")
greater_equal = _binary("greater_equal", "x >= y, elementwise.", "ge")
logical_and = _logical("logical_and", "x and y; numbers are true if they are not zero.")
logical_or = _logical("logical_or", "x or y; numbers are true if they are not zero.")
logical_xor = _logical("logical_xor", "Whether exactly one of x and y is true.")


def as_bool(x: Any) -> Tensor:
    """x as bool: numbers are true if they are not zero."""
    x = as_tensor(x)
    return x if x.dtype.is_bool else binary("ne", x, 0)


def logical_not(x: Any) -> Tensor:
    """not x; numbers are true if they are not zero."""
    return unary("logical_not", as_bool(x))


def absolute(x: Any) -> Tensor:
    """|x|, in the dtype of x."""
    x = as_tensor(x)
    return x if x.dtype.is_bool or x.dtype.is_unsigned else unary("abs", x)


abs = absolute


def round(x: Any, decimals: int = 0) -> Tensor:
    """x to the nearest integer (or multiple of 10 ** -decimals), halves to the even one."""
    x = as_tensor(x)
    if not x.dtype.is_float:
        return x
    if decimals == 0:
        return unary("round", x)
    return unary("round", x * 10.0 ** decimals) / 10.0 ** decimals


def positive(x: Any) -> Tensor:
    """x itself."""
    return as_tensor(x)


# Exponents that have an op of their own, or are a few multiplications.
_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    1: lambda x: x,
    2: lambda x: unary("square", x),
    3: lambda x: binary("mul", unary("square", x), x),
}
_FLOAT_POWERS = _POWERS | {
    0.5: lambda x: unary("sqrt", x),
    -0.5: lambda x: unary("rsqrt", x),
    -1: lambda x: unary("reciprocal", x),
    -2: lambda x: unary("reciprocal", unary("square", x)),
}


def power(x: Any, y: Any) -> Tensor:
    """x ** y. Integers wrap; a negative power of an integer is 0 unless x is 1 or -1."""
    if is_weak(y) and not is_weak(x) and not isinstance(y, bool):
        x = as_tensor(x)
        dtype = common_dtype((x, y))
        special = (_FLOAT_POWERS if dtype.is_float else _POWERS).get(y)
        if special is not None and not dtype.is_bool:
            return special(cast(x, dtype))
    return binary("pow", x, y)


pow = power


def where(condition: Any, x: Any, y: Any) -> Tensor:
    """x where the condition holds, else y; all three broadcast.

    The gradient of the side not chosen is zero, but a NaN computed in it still poisons its own gradient: make the
    argument safe with another `where` first.
    """
    result: Tensor = apply("where", as_bool(condition), *promoted(x, y))
    return result


def clip(x: Any, min: Any = None, max: Any = None) -> Tensor:
    """x between `min` and `max` (numbers or tensors; None: no bound). NaN stays NaN.

    Raises:
        ArgumentsError: neither bound is given.
    """
    if min is None and max is None:
        raise ArgumentsError("clip needs a bound: min, max or both", user_location())
    x = as_tensor(x)
    dtype = common_dtype([b for b in (x, min, max) if b is not None])
    if dtype != x.dtype:
        x = cast(x, dtype)
    if all(b is None or (is_weak(b) and not isinstance(b, bool)) for b in (min, max)) and _fits(dtype, min, max):
        result: Tensor = apply("clip", x, lo=min, hi=max)
        return result
    if min is not None:
        x = maximum(x, min)
    return x if max is None else minimum(x, max)


def _fits(dtype: Any, *bounds: Any) -> bool:
    if dtype.is_bool:
        return False
    if dtype.is_float:
        return True
    info = np.iinfo(dtype.np)
    return all(b is None or info.min <= b <= info.max for b in bounds)


def copysign(x: Any, y: Any) -> Tensor:
    """The magnitude of x with the sign of y, that of zeros included."""
    x, y = promoted(x, y, floating=True)
    signed = where(equal(y, 0), reciprocal(y), y)  # 1 / -0 is -inf
    return where(less(signed, 0), -absolute(x), absolute(x))


def astype(x: Any, dtype: Any) -> Tensor:
    """x in another dtype: floats round to the nearest, floats to integers truncate, integers wrap, bool is x != 0."""
    return cast(as_tensor(x), as_dtype(dtype))


def isclose(x: Any, y: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    """Whether |x - y| <= atol + rtol * |y|, elementwise; infinities of one sign are close."""
    x, y = promoted(x, y, floating=True)
    near = logical_and(less_equal(absolute(x - y), atol + rtol * absolute(y)), isfinite(y))
    near = logical_or(near, equal(x, y))
    return logical_or(near, logical_and(isnan(x), isnan(y))) if equal_nan else near


def nan_to_num(x: Any, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Tensor:
    """x with NaN and infinities replaced by numbers; by default 0 and the largest of the dtype."""
    x = as_tensor(x)
    if not x.dtype.is_float:
        return x
    largest = _largest(x.dtype)
    high, low = largest if posinf is None else posinf, -largest if neginf is None else neginf
    x = where(isnan(x), nan, x)
    return where(equal(x, float("inf")), high, where(equal(x, float("-inf")), low, x))


def _largest(dtype: Any) -> float:
    limits = {"float64": np.finfo(np.float64).max, "float32": np.finfo(np.float32).max, "float16": 65504.0,
              "bfloat16": 3.3895313892515355e38}
    if dtype not in limits:
        raise AttributeValueError(f"nan_to_num is not defined for {dtype}", user_location())
    return float(limits[dtype])


