"""Elementwise ops: result element i depends on element i of the operands, after broadcasting by NumPy's rules.

Each family is a factory and an op is one line of it: name, NumPy function, cost. `accepts` names the dtypes:
"float", "number" (floats and integers), "integer", "bits" (integers and bool), "bool", "any" (all compute dtypes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import special
from .ops_common import (
    REQUIRED,
    STORAGE,
    TensorType,
    as_dtype,
    broadcast_shapes,
    check_compute,
    check_dtype_attr,
    check_float,
    check_same_dtype,
    define,
    fail_attr,
    fail_dtype,
    in_f32,
    per_element,
)

BOOL = as_dtype("bool")
# Cost of a transcendental function in operations: the order of a polynomial with its range reduction.
POLYNOMIAL = 10


def check_accepts(accepts: str, *types: TensorType) -> None:
    """Raises DTypeError unless every type is one that a family accepts."""
    check_compute(*types)
    for t in types:
        d = t.dtype
        if accepts == "float":
            check_float(t)
        elif accepts == "number" and d.is_bool:
            fail_dtype(f"has no meaning on bool, got {t}; use a logical op, or cast first, e.g. to int32")
        elif accepts == "integer" and not d.is_integer:
            fail_dtype(f"needs an integer dtype, got {d} ({t}); cast first, e.g. to int32")
        elif accepts == "bits" and d.is_float:
            fail_dtype(f"needs an integer dtype or bool, got {d} ({t}); cast first, e.g. to int32")
        elif accepts == "bool" and not d.is_bool:
            fail_dtype(f"needs bool, got {d} ({t}); compare with zero, or cast to bool first")


def unary(name: str, fn: Callable[..., Any], doc: str, accepts: str = "float", flops: int = 1,
          to_bool: bool = False, **more: Any) -> None:
    """Declares `name(x)`: the shape of x, its dtype or bool."""
    def infer(x: TensorType) -> TensorType:
        check_accepts(accepts, x)
        return x.with_dtype(BOOL) if to_bool else x

    define(name, "x", infer, fn if to_bool else in_f32(fn), doc, traits=["elementwise"],
           flops=per_element(flops), **more)


def binary(name: str, fn: Callable[..., Any], doc: str, accepts: str = "number", flops: int = 1,
           to_bool: bool = False, commutative: bool = False, **more: Any) -> None:
    """Declares `name(x, y)`: operands of one dtype, broadcast; the result has that dtype, or bool."""
    def infer(x: TensorType, y: TensorType) -> TensorType:
        check_same_dtype(x, y)
        check_accepts(accepts, x, y)
        return TensorType(broadcast_shapes(x.shape, y.shape), BOOL if to_bool else x.dtype)

    define(name, "x y", infer, fn if to_bool else in_f32(fn), doc, flops=per_element(flops),
           traits=["elementwise", "commutative"] if commutative else ["elementwise"], **more)


def transcendental(name: str, fn: Callable[..., Any], doc: str) -> None:
    unary(name, fn, doc, flops=POLYNOMIAL)


def compare(name: str, fn: Callable[..., Any], doc: str, commutative: bool = False) -> None:
    binary(name, fn, doc, accepts="any", to_bool=True, commutative=commutative, undifferentiable="boolean result")


def bitwise(name: str, fn: Callable[..., Any], doc: str, accepts: str = "bits", commutative: bool = True) -> None:
    binary(name, fn, doc, accepts=accepts, commutative=commutative, undifferentiable="integer or boolean result")


# Unary -----------------------------------------------------------------------------------------------------------

unary("neg", np.negative, "-x; wraps on unsigned integers.", accepts="number")
unary("abs", np.abs, "|x|; the smallest signed integer stays itself.", accepts="number")
unary("sign", np.sign, "-1, 0 or 1; NaN at NaN.", accepts="number")
unary("square", np.square, "x * x.", accepts="number")
unary("identity", np.copy, "x itself.", accepts="any")
unary("stop_gradient", np.copy, "x itself; its derivative is taken to be zero.", accepts="any")

transcendental("exp", np.exp, "e ** x.")
transcendental("exp2", np.exp2, "2 ** x.")
transcendental("expm1", np.expm1, "e ** x - 1, accurate near 0.")
transcendental("log", np.log, "Natural logarithm.")
transcendental("log2", np.log2, "Logarithm to base 2.")
transcendental("log10", np.log10, "Logarithm to base 10.")
transcendental("log1p", np.log1p, "log(1 + x), accurate near 0.")
transcendental("cbrt", np.cbrt, "Real cube root, of negative numbers too.")
transcendental("sin", np.sin, "Sine of x in radians.")
transcendental("cos", np.cos, "Cosine of x in radians.")
transcendental("tan", np.tan, "Tangent of x in radians.")
transcendental("asin", np.arcsin, "Inverse sine, in [-pi/2, pi/2].")
transcendental("acos", np.arccos, "Inverse cosine, in [0, pi].")
transcendental("atan", np.arctan, "Inverse tangent, in [-pi/2, pi/2].")
transcendental("sinh", np.sinh, "Hyperbolic sine.")
transcendental("cosh", np.cosh, "Hyperbolic cosine.")
transcendental("tanh", np.tanh, "Hyperbolic tangent.")
transcendental("asinh", np.arcsinh, "Inverse hyperbolic sine.")
transcendental("acosh", np.arccosh, "Inverse hyperbolic cosine.")
transcendental("atanh", np.arctanh, "Inverse hyperbolic tangent.")
transcendental("erf", special.erf, "Error function 2/sqrt(pi) * integral of exp(-t*t) from 0 to x.")
transcendental("erfc", special.erfc, "1 - erf(x), accurate for large x.")
transcendental("sigmoid", special.sigmoid, "1 / (1 + exp(-x)).")
transcendental("softplus", special.softplus, "log(1 + exp(x)), without overflow.")

unary("relu", lambda x: np.maximum(x, x.dtype.type(0)), "max(x, 0); NaN stays NaN.", accepts="number")
unary("sqrt", np.sqrt, "Square root; NaN below zero.")
unary("rsqrt", special.rsqrt, "1 / sqrt(x); infinity at zero.", flops=2)
unary("reciprocal", np.reciprocal, "1 / x.")
unary("floor", np.floor, "Largest integer not above x.")
unary("ceil", np.ceil, "Smallest integer not below x.")
unary("round", np.rint, "Nearest integer, halves to the even one.")
unary("trunc", np.trunc, "x without its fraction.")

unary("logical_not", np.logical_not, "not x.", accepts="bool", to_bool=True, undifferentiable="boolean result")
unary("bitwise_not", np.invert, "Every bit flipped.", accepts="bits", undifferentiable="integer or boolean result")
unary("isnan", np.isnan, "x is NaN.", to_bool=True, undifferentiable="boolean result")
unary("isinf", np.isinf, "x is infinite.", to_bool=True, undifferentiable="boolean result")
unary("isfinite", np.isfinite, "x is neither infinite nor NaN.", to_bool=True, undifferentiable="boolean result")

# Binary ----------------------------------------------------------------------------------------------------------

binary("add", np.add, "x + y.", commutative=True)
binary("sub", np.subtract, "x - y.")
binary("mul", np.multiply, "x * y.", commutative=True)
binary("div", np.divide, "x / y, for floats; see floor_divide for integers.", accepts="float")
binary("floor_divide", np.floor_divide, "floor(x / y); an integer divided by zero gives 0.", flops=2)
binary("remainder", np.remainder, "x - floor(x / y) * y: the sign of y; an integer modulo zero gives 0.", flops=3)
binary("fmod", np.fmod, "x - trunc(x / y) * y: the sign of x, as in C; an integer modulo zero gives 0.", flops=3)
binary("pow", special.power, "x ** y; integers wrap, and x ** -n is 0 unless x is 1 or -1.", flops=2 * POLYNOMIAL)
binary("maximum", np.maximum, "The larger; NaN if either is NaN.", accepts="any", commutative=True)
binary("minimum", np.minimum, "The smaller; NaN if either is NaN.", accepts="any", commutative=True)
binary("atan2", np.arctan2, "Angle of the point (y, x): atan2(x, y) is NumPy's arctan2(x, y), all quadrants.",
       accepts="float", flops=POLYNOMIAL)
binary("hypot", np.hypot, "sqrt(x*x + y*y) without overflow.", accepts="float", flops=4, commutative=True)

bitwise("bitwise_and", np.bitwise_and, "Bits set in both.")
bitwise("bitwise_or", np.bitwise_or, "Bits set in either.")
bitwise("bitwise_xor", np.bitwise_xor, "Bits set in one.")
bitwise("left_shift", np.left_shift, "x << y; 0 where y is negative or at least the number of bits.",
        accepts="integer", commutative=False)
bitwise("right_shift", np.right_shift, "x >> y, with the sign for signed types; all sign bits where y is negative "
        "or at least the number of bits.", accepts="integer", commutative=False)
bitwise("logical_and", np.logical_and, "x and y.", accepts="bool")
bitwise("logical_or", np.logical_or, "x or y.", accepts="bool")
bitwise("logical_xor", np.logical_xor, "Exactly one of x and y.", accepts="bool")

compare("eq", np.equal, "x == y.", commutative=True)
compare("ne", np.not_equal, "x != y.", commutative=True)
compare("lt", np.less, "x < y.")
compare("le", np.less_equal, "x <= y.")
compare("gt", np.greater, "x > y.")
compare("ge", np.greater_equal, "x >= y.")


# Ops with rules of their own -------------------------------------------------------------------------------------

def where_infer(c: TensorType, x: TensorType, y: TensorType) -> TensorType:
    if not c.dtype.is_bool:
        fail_dtype(f"the condition needs bool, got {c}; compare with zero, or cast to bool first")
    check_same_dtype(x, y)
    return TensorType(broadcast_shapes(c.shape, x.shape, y.shape), x.dtype)


define("where", "c x y", where_infer, np.where, "x where c holds, else y.", traits=["elementwise"],
       flops=per_element())


def cast_infer(x: TensorType, dtype: Any) -> TensorType:
    return x.with_dtype(check_dtype_attr(dtype))


def cast_reference(x: Any, dtype: Any) -> Any:
    target = as_dtype(dtype).np
    if as_dtype(x.dtype) in STORAGE and not as_dtype(target).is_float:
        x = x.astype(np.float32 if as_dtype(x.dtype).is_float else np.int32)  # ml_dtypes casts to few types itself
    return x.astype(bool if target == np.bool_ else target)


define("cast", "x", cast_infer, cast_reference, "x in another dtype: floats round to the nearest, floats to integers "
       "truncate, integers wrap, bool is x != 0.", attrs={"dtype": REQUIRED}, traits=["elementwise"],
       flops=per_element())


def bitcast_infer(x: TensorType, dtype: Any) -> TensorType:
    check_compute(x, x.with_dtype(check_dtype_attr(dtype)))
    if dtype.bits != x.dtype.bits:
        fail_attr(f"dtype is {dtype}, of {dtype.bits} bits; {x.dtype} has {x.dtype.bits}, and no bit is added or lost")
    return x.with_dtype(dtype)


define("bitcast", "x", bitcast_infer, lambda x, dtype: np.copy(x).view(as_dtype(dtype).np),
       "The same bits, read as another dtype of the same width.", attrs={"dtype": REQUIRED}, traits=["elementwise"],
       flops=per_element(), undifferentiable="bits, not numbers")


def clip_infer(x: TensorType, lo: Any, hi: Any) -> TensorType:
    check_accepts("number", x)
    for name, bound in (("lo", lo), ("hi", hi)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float))):
            fail_attr(f"{name} is {bound!r}; expected a number or None")
        if x.dtype.is_integer and bound is not None:
            info = np.iinfo(x.dtype.np)
            if not isinstance(bound, int) or not info.min <= bound <= info.max:
                fail_attr(f"{name} is {bound!r}, which {x.dtype} does not hold; cast the operand first")
    return x


def clip_reference(x: Any, lo: Any, hi: Any) -> Any:
    if lo is not None:
        x = np.maximum(x, np.asarray(lo).astype(x.dtype))
    if hi is not None:
        x = np.minimum(x, np.asarray(hi).astype(x.dtype))
    return np.positive(x)


define("clip", "x", clip_infer, clip_reference, "minimum(maximum(x, lo), hi); NaN stays NaN. None: no bound.",
       attrs={"lo": None, "hi": None}, traits=["elementwise"], flops=per_element(2))
