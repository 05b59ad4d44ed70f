"""Lowering of elementwise ops: one scalar expression each, for every dtype.

Floats narrower than 64 bits use the vector polynomials of `math`; f64 calls the C library. Signed integers
are added, subtracted and multiplied as unsigned ones, since overflow wraps here and is undefined in LLVM.
"""

from __future__ import annotations

import math as cmath
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from ..ir import ops as _ops  # noqa: F401  (declares the ops whose slots are filled here)
from ..ir.opdef import fill
from . import math as vmath
from .lower_slots import (
    NARROW_FLOATS,
    Pointwise,
    cast,
    compute_dtype,
    const,
    dtype_of,
    hide,
    is_nan,
    let,
    rounded,
)

CHEAP, DIVISION, POLYNOMIAL = 1.0, 4.0, 12.0


def is_float(x: Any) -> bool:
    return dtype_of(x).startswith("float")


def is_signed(x: Any) -> bool:
    return dtype_of(x).startswith("int")


def is_bool(x: Any) -> bool:
    return dtype_of(x) == "bool"


def elementwise(name: str, fn: Callable[..., Any], cost: float = CHEAP) -> None:
    """Fills the slot with `fn(*elements)`."""
    fill("lower", name, Pointwise(lambda node, *xs: fn(*xs), cost, elementwise=True))


def wrapping(wide: Callable[..., Any], halves: Callable[..., Any]) -> Callable[..., Any]:
    """Integer arithmetic that wraps. TVM marks its own as never overflowing from 32 bits on, so 32-bit integers are
    computed in 64 bits (LLVM narrows that again), 64-bit ones in halves."""
    def apply(x: Any, y: Any) -> Any:
        dtype = dtype_of(x)
        if bits_of(x) < 32:
            return wide(x, y)
        if bits_of(x) == 32:
            return cast(hide(wide(cast(x, dtype[:-2] + "64"), cast(y, dtype[:-2] + "64"))), dtype)
        return signed_again(halves(unsigned_word(x), unsigned_word(y)), dtype)
    return apply


def signed_again(word: Any, dtype: str) -> Any:
    """An unsigned number's bits as an integer that may be signed. TVM takes what was unsigned for positive ever after,
    and answers `< 0` by itself: a variable stops it."""
    return let(cast(word, dtype)) if dtype.startswith("int") else cast(word, dtype)


def unsigned_word(x: Any) -> Any:
    """A 64-bit integer as uint64; constants stay immediates, which vectors take better than a scalar variable."""
    return u64(int(x) % (1 << 64)) if isinstance(x, tirx.IntImm) else let(cast(x, "uint64"))


def u64(value: int) -> Any:
    return const(value, "uint64")


LOW = 0xFFFFFFFF


def join_halves(high: Any, low: Any) -> Any:
    """high * 2**32 + low, modulo 2**64, for low below 2**33."""
    return ((high + (low >> u64(32))) << u64(32)) | (low & u64(LOW))


def add_halves(x: Any, y: Any) -> Any:
    return join_halves((x >> u64(32)) + (y >> u64(32)), let((x & u64(LOW)) + (y & u64(LOW))))


def sub_halves(x: Any, y: Any) -> Any:
    """x + ~y + 1."""
    flipped = let(y ^ u64((1 << 64) - 1))
    return join_halves((x >> u64(32)) + (flipped >> u64(32)),
                       let((x & u64(LOW)) + (flipped & u64(LOW)) + u64(1)))


def mul_halves(x: Any, y: Any) -> Any:
    x0, x1, y0, y1 = let(x & u64(LOW)), let(x >> u64(32)), let(y & u64(LOW)), let(y >> u64(32))
    low = let(x0 * y0)
    cross = ((x0 * y1) & u64(LOW)) + ((x1 * y0) & u64(LOW)) + (low >> u64(32))
    return (cross << u64(32)) | (low & u64(LOW))


def unsigned_of(x: Any) -> Any:
    return tirx.Cast("u" + dtype_of(x), x) if is_signed(x) else x


# Arithmetic --------------------------------------------------------------------------------------------------------

def arithmetic(fn: Callable[..., Any], halves: Callable[..., Any]) -> Callable[..., Any]:
    """Integer arithmetic that wraps, float arithmetic that TVM does not reason about."""
    whole = wrapping(fn, halves)

    def apply(x: Any, y: Any) -> Any:
        if not is_float(x):
            return whole(x, y)
        return hide(fn(x, hide(y) if x.same_as(y) or isinstance(y, tirx.FloatImm) else y))
    return apply


add = arithmetic(lambda x, y: x + y, add_halves)
sub = arithmetic(lambda x, y: x - y, sub_halves)
mul = arithmetic(lambda x, y: x * y, mul_halves)


def div(x: Any, y: Any) -> Any:
    return hide(x / hide(y))


def neg(x: Any) -> Any:
    if is_float(x):
        return hide(const(-1.0, dtype_of(x)) * x)
    return sub(const(0, dtype_of(x)), x)


def absolute(x: Any) -> Any:
    if is_float(x):
        return tirx.abs(x)
    return x if not is_signed(x) else tirx.Select(x < const(0, dtype_of(x)), neg(x), x)


def sign(x: Any) -> Any:
    zero, one = const(0, dtype_of(x)), const(1, dtype_of(x))
    if not is_float(x) and not is_signed(x):
        return tirx.Select(x > zero, one, zero)
    return tirx.Select(x > zero, one, tirx.Select(x < zero, const(-1, dtype_of(x)), x))  # x: zero itself, or NaN


def relu(x: Any) -> Any:
    zero = const(0, dtype_of(x))
    return x if dtype_of(x).startswith("uint") else tirx.Select(x < zero, zero, x)  # NaN is not below zero


def maximum(x: Any, y: Any) -> Any:
    if is_bool(x):
        return tirx.Or(x, y)
    if not is_float(x):
        return tirx.Max(x, y)
    return tirx.Select(tirx.Or(x > y, is_nan(x)), x, y)  # a comparison with NaN is false: NaN wins on either side


def minimum(x: Any, y: Any) -> Any:
    if is_bool(x):
        return tirx.And(x, y)
    if not is_float(x):
        return tirx.Min(x, y)
    return tirx.Select(tirx.Or(x < y, is_nan(x)), x, y)


def differ(x: Any, y: Any) -> Any:
    """Exactly one of two bools. (TVM compares bools as floats, and its analysis of ranges fails on vectors of them
    that were made numbers.)"""
    for known, other in ((x, y), (y, x)):
        if isinstance(known, tirx.IntImm):
            return tirx.Not(other) if int(known) else other
    return tirx.Or(tirx.And(x, tirx.Not(y)), tirx.And(tirx.Not(x), y))


def integer_divisor(x: Any, y: Any) -> tuple[Any, Any]:
    """(y without the values that trap, whether the quotient is -x): division by zero and by -1 are set aside."""
    one, zero = const(1, dtype_of(y)), const(0, dtype_of(y))
    if is_signed(y):
        minus = y == const(-1, dtype_of(y))
        return let(tirx.Select(tirx.Or(y == zero, minus), one, y)), minus
    return let(tirx.Select(y == zero, one, y)), None


def floor_divide(x: Any, y: Any) -> Any:
    if is_float(x):
        return float_floor_divide(x, y)
    zero = const(0, dtype_of(x))
    divisor, minus = integer_divisor(x, y)
    quotient = let(tirx.truncdiv(x, divisor))
    if minus is not None:
        rest = let(sub(x, mul(quotient, divisor)))
        down = tirx.And(rest != zero, differ(rest < zero, divisor < zero))
        quotient = tirx.Select(minus, neg(x), tirx.Select(down, sub(quotient, const(1, dtype_of(x))), quotient))
    return tirx.Select(y == zero, zero, quotient)


def remainder(x: Any, y: Any) -> Any:
    zero = const(0, dtype_of(x))
    if is_float(x):
        rest = let(float_fmod(x, y))
        away = tirx.And(rest != zero, differ(rest < zero, y < zero))
        return tirx.Select(rest == zero, copysign(zero, y), tirx.Select(away, rest + y, rest))
    divisor, minus = integer_divisor(x, y)
    rest = let(tirx.truncmod(x, divisor))
    if minus is not None:
        rest = tirx.Select(tirx.And(rest != zero, differ(rest < zero, divisor < zero)), add(rest, divisor), rest)
    return tirx.Select(tirx.Or(y == zero, minus) if minus is not None else y == zero, zero, rest)


def fmod(x: Any, y: Any) -> Any:
    if is_float(x):
        return float_fmod(x, y)
    divisor, minus = integer_divisor(x, y)
    zero = const(0, dtype_of(x))
    bad = tirx.Or(y == zero, minus) if minus is not None else y == zero
    return tirx.Select(bad, zero, tirx.truncmod(x, divisor))


def float_fmod(x: Any, y: Any) -> Any:
    """The C library's; loops with it are not vectorised."""
    dtype = dtype_of(x)
    return tirx.call_pure_extern(dtype, "fmod" if dtype == "float64" else "fmodf", x, y)


def float_floor_divide(x: Any, y: Any) -> Any:
    """NumPy's: from the exact remainder, so that the quotient never rounds up to the next integer."""
    zero, one = const(0, dtype_of(x)), const(1, dtype_of(x))
    rest = let(float_fmod(x, y))
    exact = let((x - rest) / y)
    away = tirx.And(rest != zero, differ(rest < zero, y < zero))
    quotient = let(tirx.Select(away, exact - one, exact))
    whole = let(tirx.floor(quotient))
    nearest = tirx.Select(quotient - whole > const(0.5, dtype_of(x)), whole + one, whole)
    settled = tirx.Select(quotient == zero, copysign(zero, x / y), nearest)
    return tirx.Select(y == zero, x / y, settled)


def ceil(x: Any) -> Any:
    return tirx.call_llvm_pure_intrin(dtype_of(x), "llvm.ceil", x)


def copysign(x: Any, y: Any) -> Any:
    bits = {"float32": "uint32", "float64": "uint64"}[dtype_of(x)]
    top = const(1 << (63 if bits == "uint64" else 31), bits)
    rest = const((1 << (63 if bits == "uint64" else 31)) - 1, bits)
    return tirx.reinterpret(dtype_of(x), (tirx.reinterpret(bits, x) & rest) | (tirx.reinterpret(bits, y) & top))


def power(x: Any, y: Any) -> Any:
    return vmath.pow(x, y) if is_float(x) else integer_power(x, y)


def integer_power(x: Any, y: Any) -> Any:
    """By squaring, once per bit of y; wraps. A negative power is 0 unless x is 1 or -1."""
    dtype = dtype_of(x)
    one, zero = const(1, dtype), const(0, dtype)
    kind = dtype_of(unsigned_of(x))
    exponent, base, result = let(unsigned_of(y)), let(unsigned_of(x)), const(1, kind)
    for i in range(bits_of(x)):
        odd = ((exponent >> const(i, kind)) & const(1, kind)) == const(1, kind)
        result = let(tirx.Select(odd, mul(result, base), result))
        base = let(mul(base, base))
    result = cast(result, dtype)
    if not is_signed(x):
        return result
    odd = (y & one) == one
    flipped = tirx.Select(x == one, one, tirx.Select(x == const(-1, dtype), tirx.Select(odd, x, one), zero))
    return tirx.Select(y < zero, flipped, result)


def clip(node: Any, x: Any) -> Any:
    lo, hi = node.attrs["lo"], node.attrs["hi"]
    narrow = node.operands[0].dtype
    bound = lambda v: const(np.asarray(v).astype(narrow.np), dtype_of(x))  # noqa: E731
    x = x if lo is None else let(maximum(x, bound(lo)))
    return x if hi is None else minimum(x, bound(hi))


# Bits and logic ----------------------------------------------------------------------------------------------------

def bitwise(on_bool: Callable[..., Any], on_int: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *xs: on_bool(*xs) if is_bool(xs[0]) else on_int(*xs)


def bits_of(x: Any) -> int:
    return int("".join(c for c in dtype_of(x) if c.isdigit()))


def shift_amount(x: Any, y: Any) -> tuple[Any, Any]:
    """(y where it is a number of bits that x has, else 0; whether it is)."""
    good = let(unsigned_of(y) < const(bits_of(x), dtype_of(unsigned_of(y))))
    return tirx.Select(good, y, const(0, dtype_of(y))), good


def left_shift(x: Any, y: Any) -> Any:
    amount, good = shift_amount(x, y)
    shifted = signed_again(unsigned_of(x) << unsigned_of(amount), dtype_of(x))
    return tirx.Select(good, shifted, const(0, dtype_of(x)))


def right_shift(x: Any, y: Any) -> Any:
    amount, good = shift_amount(x, y)
    fill_bits = const(0, dtype_of(x)) if not is_signed(x) else tirx.Select(
        x < const(0, dtype_of(x)), const(-1, dtype_of(x)), const(0, dtype_of(x)))
    return tirx.Select(good, x >> amount, fill_bits)


def compare(fn: Callable[..., Any], of_bools: Callable[..., Any]) -> Callable[..., Any]:
    def apply(x: Any, y: Any) -> Any:
        if is_bool(x):
            return of_bools(x, y)
        if x.same_as(y):
            y = hide(y)
        return fn(x, y)
    return apply


def not_equal(x: Any, y: Any) -> Any:
    """x != y; for floats TVM means the ordered comparison, which is false for NaN."""
    return tirx.Or(x != y, tirx.Or(is_nan(x), is_nan(y))) if is_float(x) else x != y


def convert(node: Any, x: Any) -> Any:
    source, target = node.operands[0].dtype, node.result.dtype
    dtype = compute_dtype(target)
    if is_bool(x) and dtype != "bool":  # TVM's cast fails on a vector that is compared with a constant
        return tirx.Select(x, const(1, dtype), const(0, dtype))
    if target == "bool":
        return x if is_bool(x) else not_equal(x, const(0, dtype_of(x)))
    if is_float(x) and str(dtype) in ("int8", "int16", "uint8", "uint16", "uint32", "uint64"):
        # C leaves what does not fit open; through the widest integer it wraps, and is not poison to LLVM.
        x = cast(x, "int64" if target != "uint64" else "uint64")
    if target in ("int4", "uint4"):
        wide = cast(x, dtype)
        return wide & const(15, "uint8") if target == "uint4" else (wide << const(4, dtype)) >> const(4, dtype)
    if source.is_float and target in NARROW_FLOATS:
        if dtype_of(x) == "float64" and target != "float64":
            x = to_f32_for_rounding(x)
        return rounded(let(cast(x, "float32")), target)
    if target in NARROW_FLOATS:
        return rounded(let(cast(x, "float32")), target)
    return signed_again(x, dtype) if dtype_of(x).startswith("uint") else cast(x, dtype)


def same_bits(node: Any, x: Any) -> Any:
    """Narrow floats are computed with as f32, and bools as one bit: their stored form is made first, and read last."""
    source, target = node.operands[0].dtype, node.result.dtype
    if is_bool(x):
        return tirx.Select(x, const(1, target), const(0, target))
    if source == "bfloat16":
        x = cast(tirx.reinterpret("uint32", let(x)) >> const(16, "uint32"), "uint16")
    elif source == "float16":
        x = let(cast(x, "float16"))
    if target == "bool":
        return not_equal(x, const(0, dtype_of(x)))
    if target == "bfloat16":
        word = cast(tirx.reinterpret("uint16", let(x)), "uint32")
        return tirx.reinterpret("float32", let(word << const(16, "uint32")))
    return cast(tirx.reinterpret(target, let(x)), compute_dtype(target))


def to_f32_for_rounding(x: Any) -> Any:
    """f64 to f32 rounded to odd: a second rounding, to fewer bits, is then as if it were the only one."""
    x = let(x)
    near = let(cast(x, "float32"))
    bits = let(tirx.reinterpret("uint32", near))
    exact = cast(near, "float64") == x
    too_far = tirx.abs(cast(near, "float64")) > tirx.abs(x)
    u = lambda v: const(v, "uint32")  # noqa: E731
    odd = tirx.Select(too_far, bits - u(1), bits) | u(1)
    keep = tirx.Or(exact, tirx.Not(tirx.abs(near) < const(float("inf"), "float32")))
    return let(tirx.Select(keep, near, tirx.reinterpret("float32", odd)))


for _name, _fn in {
    "neg": neg, "abs": absolute, "sign": sign, "square": lambda x: mul(x, x), "relu": relu, "identity": lambda x: x,
    "stop_gradient": lambda x: x, "add": add, "sub": sub, "mul": mul, "maximum": maximum, "minimum": minimum,
    "floor": tirx.floor, "ceil": ceil, "trunc": tirx.trunc,
    "round": vmath.round_even, "logical_not": tirx.Not, "logical_and": tirx.And, "logical_or": tirx.Or,
    "logical_xor": differ,
    "bitwise_not": bitwise(tirx.Not, tirx.bitwise_not),
    "bitwise_and": bitwise(tirx.And, tirx.bitwise_and), "bitwise_or": bitwise(tirx.Or, tirx.bitwise_or),
    "bitwise_xor": bitwise(differ, tirx.bitwise_xor),
    "left_shift": left_shift, "right_shift": right_shift,
    "eq": compare(lambda x, y: x == y, lambda x, y: tirx.Not(differ(x, y))), "ne": compare(not_equal, differ),
    "lt": compare(lambda x, y: x < y, lambda x, y: tirx.And(tirx.Not(x), y)),
    "le": compare(lambda x, y: x <= y, lambda x, y: tirx.Or(tirx.Not(x), y)),
    "gt": compare(lambda x, y: x > y, lambda x, y: tirx.And(x, tirx.Not(y))),
    "ge": compare(lambda x, y: x >= y, lambda x, y: tirx.Or(x, tirx.Not(y))),
    "isnan": lambda x: is_nan(x),
    "isinf": lambda x: tirx.abs(x) == const(cmath.inf, dtype_of(x)),
    "isfinite": lambda x: tirx.abs(x) < const(cmath.inf, dtype_of(x)),
    "where": tirx.Select,
}.items():
    elementwise(_name, _fn)

for _name, _fn in {
    "div": div, "reciprocal": lambda x: vmath.reciprocal(x), "sqrt": tirx.sqrt,
    "rsqrt": lambda x: const(1, dtype_of(x)) / tirx.sqrt(x), "floor_divide": floor_divide, "remainder": remainder,
    "fmod": fmod, "hypot": vmath.hypot,
}.items():
    elementwise(_name, _fn, DIVISION)

for _name in ("exp exp2 expm1 log log2 log10 log1p cbrt sin cos tan asin acos atan sinh cosh tanh asinh acosh "
              "atanh erf erfc sigmoid softplus atan2").split():
    elementwise(_name, getattr(vmath, _name), POLYNOMIAL)
elementwise("pow", power, 3 * POLYNOMIAL)
fill("lower", "clip", Pointwise(clip, CHEAP, elementwise=True))
fill("lower", "cast", Pointwise(convert, CHEAP, elementwise=True))
fill("lower", "bitcast", Pointwise(same_bits, CHEAP, elementwise=True))
