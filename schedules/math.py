"""Elementary functions as vectorisable scalar expressions.

A call into the C library costs 1.5 to 7 ns an element and stops vectorisation, so the f32 functions here are
written out: argument reduction, polynomial, reconstruction, with selects for the special cases, no branch and no table.
They hold over the whole range of f32: subnormal arguments and results, infinities, NaN. The bound of each
in ulp (`BOUNDS`) is checked by a test. f64 calls the C library.

Sources: fdlibm (log family), Cephes (exp, asin, atan), N. Juffa (the form of erfc), Payne and Hanek (math_trig).
"""

from __future__ import annotations

import math as cmath
from collections.abc import Callable
from typing import Any

from tvm import tirx

from .lower_slots import cast, const, dtype_of, hide, is_nan, let
from .math_base import bits, by_dtype, copysign, d, f, fma, from_bits, horner, i32, libm, select, u32
from .math_trig import acos, asin, atan, atan2, cos, sin, tan

# Largest error in units in the last place of the correctly rounded f32 result, over all of f32.
BOUNDS = {"exp": 2, "exp2": 2, "expm1": 3, "log": 2, "log2": 2, "log10": 2, "log1p": 2, "cbrt": 2, "sin": 2, "cos": 2,
          "tan": 4, "asin": 4, "acos": 4, "atan": 4, "atan2": 4, "sinh": 4, "cosh": 4, "tanh": 4, "asinh": 4,
          "acosh": 4, "atanh": 4, "erf": 6, "erfc": 4, "sigmoid": 4, "softplus": 4, "pow": 1, "hypot": 1}
__all__ = ["BOUNDS", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "erf", "erfc",
           "exp", "exp2", "expm1", "hypot", "log", "log10", "log1p", "log2", "pow", "reciprocal", "round_even",
           "sigmoid", "sin", "sinh", "softplus", "tan", "tanh"]
INF, NAN = cmath.inf, cmath.nan
LN2_HI, LN2_LO = 0.693145751953125, 1.42860677e-6  # the high part has 17 bits: times a small integer it is exact


# Exponentials ------------------------------------------------------------------------------------------------------

EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which then stands in the low bits


def reduce_exp(x: Any, scale: float = 1 / cmath.log(2)) -> tuple[Any, Any, Any]:
    """(k, k as int32, r) with x = k*ln2 + r, |r| <= ln2/2 (scale 1/ln2), for |x| below about 2**20."""
    shifted = let(fma(x, f(scale), f(ROUND)))
    k = let(shifted - f(ROUND))
    whole = let(tirx.reinterpret("int32", shifted) - i32(0x4B400000))
    r = let(fma(k, f(-LN2_LO), fma(k, f(-LN2_HI), x)))
    return k, whole, r


def two_to(k: Any) -> Any:
    """2**k for an int32 k in [-126, 127]."""
    return tirx.reinterpret("float32", (k + i32(127)) << i32(23))


def scaled(p: Any, k: Any) -> Any:
    """p * 2**k for k in [-252, 254], in two steps so that subnormal results round once."""
    half = let(k >> i32(1))
    return p * two_to(half) * two_to(k - half)


def exp_of(k: Any, r: Any) -> Any:
    return scaled(let(fma(horner(r, EXP) * r, r, r) + f(1.0)), k)


@by_dtype(tirx.exp)
def exp(x: Any) -> Any:
    """e ** x."""
    inside = let(select(x > f(89.0), f(89.0), x < f(-104.0), f(-104.0), x))
    _, k, r = reduce_exp(inside)
    return exp_of(k, r)


@by_dtype(tirx.exp2)
def exp2(x: Any) -> Any:
    """2 ** x."""
    inside = let(select(x > f(129.0), f(129.0), x < f(-151.0), f(-151.0), x))
    shifted = let(hide(inside + f(ROUND)))
    r = let((inside - hide(shifted - f(ROUND))) * f(cmath.log(2)))
    return exp_of(let(tirx.reinterpret("int32", shifted) - i32(0x4B400000)), r)


EXPM1 = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


@by_dtype(libm("expm1"))
def expm1(x: Any) -> Any:
    """e ** x - 1."""
    inside = let(select(x > f(89.0), f(89.0), x < f(-20.0), f(-20.0), x))
    _, k, r = reduce_exp(inside)
    p = let(fma(horner(r, EXPM1) * r, r, r))
    scale = let(two_to(tirx.Min(k, i32(127))))
    small = fma(scale, p, scale - f(1.0))
    return select(tirx.abs(x) < f(1e-4), fma(x * f(0.5), x, x), k > i32(30), scaled(p + f(1.0), k), small)


# Logarithms --------------------------------------------------------------------------------------------------------

LOG = (0.24279078841, 0.28498786688, 0.40000972152, 0.66666662693)  # in s*s, highest first: fdlibm's Lg4..Lg1


def split_log(x: Any) -> tuple[Any, Any]:
    """(k as f32, f) with x = 2**k * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), for positive finite x."""
    tiny = let(x < f(1.17549435e-38))
    b = let(bits(tirx.Select(tiny, x * f(8388608.0), x)) + u32(0x3F800000 - 0x3F3504F3))
    k = let(cast(b >> u32(23), "int32") - tirx.Select(tiny, i32(127 + 23), i32(127)))
    m = from_bits((b & u32(0x007FFFFF)) + u32(0x3F3504F3))
    return let(cast(k, "float32")), let(m - f(1.0))


def log_tail(g: Any) -> tuple[Any, Any]:
    """(g*g/2, s*(g*g/2 + R)): log(1 + g) = g - g*g/2 + s*(g*g/2 + R)."""
    s = let(g / (f(2.0) + g))
    z = let(s * s)
    half = let(f(0.5) * g * g)
    return half, let(s * (half + z * horner(z, LOG)))


def log_special(x: Any, value: Any) -> Any:
    return select(x < f(0.0), f(NAN), x == f(0.0), f(-INF), x < f(INF), value, x)


@by_dtype(tirx.log)
def log(x: Any) -> Any:
    """Natural logarithm."""
    k, g = split_log(x)
    half, tail = log_tail(g)
    value = fma(k, f(6.9313812256e-1), g - (half - fma(k, f(9.0580006145e-6), tail)))
    return log_special(x, value)


def log_split(x: Any, inverse: tuple[float, float], of_two: tuple[float, float]) -> Any:
    """A logarithm to another base: the head of log(1+g) is kept to 12 bits, so that products with it are exact."""
    k, g = split_log(x)
    half, tail = log_tail(g)
    head = let(from_bits(bits(g - half) & u32(0xFFFFF000)))
    rest = let((g - head) - half + tail)
    high, low = inverse
    value = let((rest + head) * f(low) + rest * f(high))
    value = let(fma(k, f(of_two[1]), value)) if of_two[1] else value
    return log_special(x, fma(k, f(of_two[0]), fma(head, f(high), value)))


@by_dtype(libm("log2"))
def log2(x: Any) -> Any:
    """Logarithm to base 2."""
    return log_split(x, (1.4428710938, -1.7605285393e-4), (1.0, 0.0))


@by_dtype(tirx.log10)
def log10(x: Any) -> Any:
    """Logarithm to base 10."""
    return log_split(x, (4.3432617188e-1, -3.1689971365e-5), (3.0102920532e-1, 7.9034151668e-7))


@by_dtype(libm("log1p"))
def log1p(x: Any) -> Any:
    """log(1 + x)."""
    whole = let(hide(x + f(1.0)))
    k, near = split_log(whole)
    plain = let(k == f(0.0))
    lost = tirx.Select(x < f(1.0), x - (whole - f(1.0)), f(1.0) - (whole - x))
    correction = let(tirx.Select(plain, f(0.0), lost / whole))
    g = let(tirx.Select(plain, x, near))
    half, tail = log_tail(g)
    value = fma(k, f(6.9313812256e-1), g - (half - (tail + fma(k, f(9.0580006145e-6), correction))))
    return select(x < f(-1.0), f(NAN), x == f(-1.0), f(-INF), tirx.abs(x) < f(1e-7), x, x < f(INF), value, x)


# Powers and roots --------------------------------------------------------------------------------------------------

def reciprocal(x: Any) -> Any:
    return const(1, dtype_of(x)) / x


def round_even(x: Any) -> Any:
    return tirx.call_llvm_pure_intrin(dtype_of(x), "llvm.roundeven", x)


@by_dtype(libm("cbrt"))
def cbrt(x: Any) -> Any:
    """Real cube root: a guess from the bits, two of Halley's steps."""
    a = let(tirx.abs(x))
    tiny, huge = let(a < f(1.17549435e-38)), let(a > f(1e36))
    a = let(select(tiny, a * f(16777216.0), huge, a * f(1 / 16777216.0), a))
    y = let(from_bits(tirx.floordiv(bits(a), u32(3)) + u32(0x2A5137A0)))
    cube = let(y * y * y)
    y = let(y * ((cube + a + a) / (cube + cube + a)))
    wide = lambda v: cast(v, "float64")  # noqa: E731
    t, b = let(wide(y)), let(wide(a))
    y = let(cast(t - (t * t * t - b) / (const(3, "float64") * t * t), "float32"))
    root = copysign(select(tiny, y * f(1 / 256), huge, y * f(256.0), y), x)
    return select(tirx.Or(is_nan(x), tirx.Or(x == f(0.0), tirx.abs(x) == f(INF))), x + x, root)


@by_dtype(lambda x, y: _hypot64(x, y))
def hypot(x: Any, y: Any) -> Any:
    """sqrt(x*x + y*y): in f64, where f32 cannot overflow."""
    a, b = let(cast(x, "float64")), let(cast(y, "float64"))
    infinite = tirx.Or(tirx.abs(x) == f(INF), tirx.abs(y) == f(INF))
    return select(infinite, f(INF), cast(tirx.sqrt(a * a + b * b), "float32"))


def _hypot64(x: Any, y: Any) -> Any:
    return libm("hypot")(x, y)


LOG2_SERIES = tuple(2 / (2 * i + 1) / cmath.log(2) for i in range(9, -1, -1))
EXP2_SERIES = tuple(cmath.log(2) ** i / cmath.factorial(i) for i in range(10, -1, -1))


def log2_wide(a: Any) -> Any:
    """log2 of a positive f32 in f64, to about 40 bits, by the series of atanh."""
    k, g = split_log(a)
    wide = let(cast(g, "float64"))
    s = let(wide / (wide + d(2.0)))
    return let(fma(s, horner(let(s * s), LOG2_SERIES), cast(k, "float64")))


def exp2_wide(t: Any) -> Any:
    """2 ** t as f32 for an f64 t."""
    inside = let(select(t > d(130.0), d(130.0), t < d(-152.0), d(-152.0), t))
    shifted = let(hide(inside + d(6755399441055744.0)))  # 1.5 * 2**52
    r = let(inside - hide(shifted - d(6755399441055744.0)))
    k = tirx.reinterpret("int64", shifted) - const(0x4338000000000000, "int64")
    scale = tirx.reinterpret("float64", (k + const(1023, "int64")) << const(52, "int64"))
    return let(cast(horner(r, EXP2_SERIES) * scale, "float32"))


@by_dtype(lambda x, y: tirx.pow(x, y))
def pow(x: Any, y: Any) -> Any:
    """x ** y by 2 ** (y * log2(x)), carried out in f64. Small whole exponents are products."""
    if isinstance(y, tirx.FloatImm) and float(y.value) in (1.0, 2.0, 3.0, -1.0):
        return {1: lambda: x, 2: lambda: x * x, 3: lambda: x * x * x, -1: lambda: reciprocal(x)}[int(y.value)]()
    a = let(tirx.abs(x))
    logarithm = let(select(a == f(0.0), d(-INF), a < f(INF), log2_wide(a), cast(a, "float64")))
    size = exp2_wide(let(cast(y, "float64") * logarithm))
    whole = let(tirx.trunc(y) == y)
    half = let(y * f(0.5))
    odd = let(tirx.And(whole, tirx.trunc(half) != half))
    negative = let((bits(x) >> u32(31)) != u32(0))
    signed = tirx.Select(tirx.And(odd, negative), -size, size)
    impossible = tirx.And(tirx.And(negative, tirx.Not(whole)), tirx.And(a != f(0.0), a < f(INF)))
    one = tirx.Or(tirx.Or(y == f(0.0), x == f(1.0)), tirx.And(x == f(-1.0), tirx.abs(y) == f(INF)))
    return select(one, f(1.0), tirx.Or(is_nan(x), is_nan(y)), x + y, impossible, f(NAN), signed)


# Hyperbolic functions and what is made of exponentials -------------------------------------------------------------

@by_dtype(tirx.tanh)
def tanh(x: Any) -> Any:
    """Hyperbolic tangent, by expm1(2|x|)."""
    a = let(tirx.abs(x))
    t = let(expm1(tirx.Select(a > f(10.0), f(20.0), a + a)))
    return copysign(let(t / (t + f(2.0))), x)


@by_dtype(libm("sinh"))
def sinh(x: Any) -> Any:
    """Hyperbolic sine."""
    a = let(tirx.abs(x))
    t = let(expm1(a))
    e = let(exp(a * f(0.5)))
    value = tirx.Select(a > f(40.0), f(0.5) * e * e, f(0.5) * (t + t / (t + f(1.0))))
    return copysign(let(value), x)


@by_dtype(libm("cosh"))
def cosh(x: Any) -> Any:
    """Hyperbolic cosine."""
    a = let(tirx.abs(x))
    e, h = let(exp(a)), let(exp(a * f(0.5)))
    return tirx.Select(a > f(40.0), f(0.5) * h * h, f(0.5) * (e + f(1.0) / e))


@by_dtype(libm("asinh"))
def asinh(x: Any) -> Any:
    """Inverse hyperbolic sine."""
    a = let(tirx.abs(x))
    square = let(a * a)
    near = log1p(a + square / (f(1.0) + tirx.sqrt(square + f(1.0))))
    far = log(a) + f(cmath.log(2))
    return copysign(tirx.Select(a > f(1e6), far, near), x)


@by_dtype(libm("acosh"))
def acosh(x: Any) -> Any:
    """Inverse hyperbolic cosine; NaN below 1."""
    t = let(x - f(1.0))
    near = log1p(t + tirx.sqrt(t * (t + f(2.0))))
    return select(x < f(1.0), f(NAN), x > f(1e6), log(x) + f(cmath.log(2)), near)


@by_dtype(libm("atanh"))
def atanh(x: Any) -> Any:
    """Inverse hyperbolic tangent."""
    a = let(tirx.abs(x))
    return copysign(f(0.5) * log1p((a + a) / (f(1.0) - a)), x)


@by_dtype(lambda x: _sigmoid(x, tirx.exp))
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), small results with all their digits."""
    return _sigmoid(x, exp)


def _sigmoid(x: Any, exponential: Callable[..., Any]) -> Any:
    x = let(x)
    z = let(exponential(const(-1, dtype_of(x)) * tirx.abs(x)))
    return tirx.Select(x >= const(0, dtype_of(x)), const(1, dtype_of(x)), z) / (const(1, dtype_of(x)) + z)


@by_dtype(lambda x: _softplus(x, tirx.exp, libm("log1p")))
def softplus(x: Any) -> Any:
    """log(1 + exp(x))."""
    return _softplus(x, exp, log1p)


def _softplus(x: Any, exponential: Callable[..., Any], logarithm: Callable[..., Any]) -> Any:
    x = let(x)
    zero = const(0, dtype_of(x))
    return tirx.Select(x < zero, zero, x) + logarithm(exponential(const(-1, dtype_of(x)) * tirx.abs(x)))


# The error function ------------------------------------------------------------------------------------------------

# erf(x) / x in x*x up to 3.92, where erf is 1 in f32: numerator and denominator, highest power first; a fit.
ERF = ((6.571922534e-6, 4.052877459e-4, 4.191925611e-3, 5.556872073e-2, 1.924245801e-1, 1.12837917),
       (2.480492981e-7, 7.09919626e-5, 1.406417193e-3, 1.620645826e-2, 1.172010164e-1, 5.038652644e-1, 1.0))
# (1 + 2a) * exp(a*a) * erfc(a) - 1 in q = (a - 4) / (a + 4): a least-squares fit, relative error 2e-8.
ERFC = (8.85053072e-4, 7.02587655e-3, -1.58883315e-2, 3.6424268e-2, -6.66383803e-2, 9.38173309e-2, -1.00990735e-1,
        6.8093732e-2, 1.53773772e-2, -1.39621079e-1, 2.32995138e-1)


@by_dtype(libm("erf"))
def erf(x: Any) -> Any:
    """Error function: a quotient of polynomials, without the exponential."""
    inside = let(select(x > f(3.92), f(3.92), x < f(-3.92), f(-3.92), x))
    z = let(inside * inside)
    value = let(inside * horner(z, ERF[0]) / horner(z, ERF[1]))
    return select(value > f(1.0), f(1.0), value < f(-1.0), f(-1.0), value)


@by_dtype(libm("erfc"))
def erfc(x: Any) -> Any:
    """1 - erf(x): exp(-x*x) times a polynomial in (a - 4) / (a + 4), a = |x| (N. Juffa)."""
    a = let(tirx.abs(x))
    inverse = let(f(1.0) / (a + f(4.0)))
    q = let((a - f(4.0)) * inverse)
    q = let(fma(inverse, fma(q, -a, fma(q + f(1.0), f(-4.0), a)), q))
    p = horner(q, ERFC)
    r = let(f(1.0) / fma(f(2.0), a, f(1.0)))
    q = let(fma(p, r, r))
    r = let(fma(fma(fma(q, -a, f(0.5)), f(2.0), p - q), r, q))
    s = let(a * a)
    e = let(exp(-s))
    value = let(fma(r, e, r * e * fma(-a, a, s)))
    value = let(select(is_nan(x), x, a > f(10.06), f(0.0), value))
    return tirx.Select(x < f(0.0), f(2.0) - value, value)
