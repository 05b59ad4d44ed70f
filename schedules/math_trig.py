"""Trigonometric functions of f32 over the whole range.

The quadrant and the rest of an argument come from arithmetic in f64 up to 2**25, and from a 96-bit window of
2/pi beyond (M. Payne, R. Hanek, "Radian reduction for trigonometric functions", SIGNUM 18, 1983), so that
sin(1e38) is as right as sin(1).
"""

from __future__ import annotations

import math as cmath
from typing import Any

from tvm import tirx

from .lower_slots import cast, const, is_nan, let
from .math_base import by_dtype, copysign, d, f, fma, horner, libm, select, u32

TWO_OVER_PI = (0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB)
HALF_PI_HI = float.fromhex("0x1.921fb4p+0")  # 24 bits: times a quadrant number it is exact in f64
HALF_PI_LO = cmath.pi / 2 - HALF_PI_HI + 6.123233995736766e-17
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
ATAN = (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1)
ASIN = (4.2163199048e-2, 2.4181311049e-2, 4.5470025998e-2, 7.4953002686e-2, 1.6666752422e-1)


def near_quadrant(x: Any) -> tuple[Any, Any]:
    """(quadrant number, rest in f64) for |x| < 2**25."""
    wide = let(cast(x, "float64"))
    k = let(tirx.call_llvm_pure_intrin("float64", "llvm.roundeven", wide * d(2 / cmath.pi)))
    rest = fma(k, d(-HALF_PI_LO), fma(k, d(-HALF_PI_HI), wide))
    shifted = tirx.reinterpret("int64", k + d(6755399441055744.0))
    return let(cast(tirx.reinterpret("uint64", shifted), "uint32")), let(rest)


def far_quadrant(x: Any) -> tuple[Any, Any]:
    """(quadrant number, rest in f64) of |x| for |x| >= 2**25: the product with the bits of 2/pi that matter."""
    b = let(tirx.reinterpret("uint32", tirx.abs(x)))
    mantissa = let(cast((b & u32(0x7FFFFF)) | u32(0x800000), "uint64"))
    exponent = let(tirx.Max(cast(b >> u32(23), "int32") - const(152, "int32"), const(0, "int32")))
    word, shift = let(exponent >> const(5, "int32")), let(cast(exponent & const(31, "int32"), "uint64"))

    def pick(i: int) -> Any:
        choices = [const(w, "uint64") for w in TWO_OVER_PI[i:i + 4]]
        chosen = choices[-1]
        for j in range(len(choices) - 2, -1, -1):
            chosen = tirx.Select(word == const(j, "int32"), choices[j], chosen)
        return let(chosen)

    words = [pick(i) for i in range(4)]
    low = const(0xFFFFFFFF, "uint64")
    thirty_two = const(32, "uint64")
    window = [let((((words[i] << thirty_two) | words[i + 1]) >> (thirty_two - shift)) & low) for i in range(3)]
    # (mantissa * window) >> 32, modulo 2**64; put together so that no sum overflows, which TVM declares impossible.
    rest = let(mantissa * window[1] + ((mantissa * window[2]) >> thirty_two))
    product = let((((mantissa * window[0]) + (rest >> thirty_two)) << thirty_two) | (rest & low))
    quadrant = cast(((product >> const(61, "uint64")) + const(1, "uint64")) >> const(1, "uint64"), "uint32")
    rest = cast(tirx.reinterpret("int64", product << const(2, "uint64")), "float64") * d(cmath.pi / 2 / 2 ** 64)
    return let(quadrant), let(tirx.Select(tirx.reinterpret("uint32", x) >= u32(0x80000000), -rest, rest))


def reduce_angle(x: Any) -> tuple[Any, Any]:
    """(quadrant mod 4 as u32, rest in [-pi/4, pi/4] as f32); the rest of infinities and NaN is NaN."""
    far = let(tirx.Not(tirx.abs(x) < f(33554432.0)))
    q0, r0 = near_quadrant(tirx.Select(far, f(0.0), x))
    q1, r1 = far_quadrant(x)
    negative = tirx.reinterpret("uint32", x) >= u32(0x80000000)
    quadrant = tirx.Select(far, tirx.Select(negative, u32(4) - q1, q1), q0) & u32(3)
    rest = cast(tirx.Select(far, r1, r0), "float32")
    return let(quadrant), let(tirx.Select(tirx.abs(x) < f(cmath.inf), rest, f(cmath.nan)))


def sin_cos(r: Any) -> tuple[Any, Any]:
    """Sine and cosine on [-pi/4, pi/4]."""
    z = let(r * r)
    sine = let(fma(z * horner(z, SIN), r, r))
    cosine = let(fma(z * z, horner(z, COS), fma(z, f(-0.5), f(1.0))))
    return sine, cosine


def flipped(value: Any, when: Any) -> Any:
    return tirx.Select(when, -value, value)


@by_dtype(tirx.sin)
def sin(x: Any) -> Any:
    """Sine of x in radians."""
    q, r = reduce_angle(x)
    s, c = sin_cos(r)
    value = flipped(tirx.Select((q & u32(1)) == u32(0), s, c), (q & u32(2)) != u32(0))
    return tirx.Select(x == f(0.0), x, value)


@by_dtype(tirx.cos)
def cos(x: Any) -> Any:
    """Cosine of x in radians."""
    q, r = reduce_angle(x)
    s, c = sin_cos(r)
    return flipped(tirx.Select((q & u32(1)) == u32(0), c, s), ((q + u32(1)) & u32(2)) != u32(0))


@by_dtype(tirx.tan)
def tan(x: Any) -> Any:
    """Tangent of x in radians."""
    q, r = reduce_angle(x)
    s, c = sin_cos(r)
    even = let((q & u32(1)) == u32(0))
    return tirx.Select(x == f(0.0), x, tirx.Select(even, s, -c) / tirx.Select(even, c, s))


def atan_positive(a: Any) -> Any:
    """atan on [0, inf]."""
    big, middle = let(a > f(2.414213562373095)), let(a > f(0.4142135623730950))
    base = select(big, f(cmath.pi / 2), middle, f(cmath.pi / 4), f(0.0))
    t = let(select(big, f(-1.0) / a, middle, (a - f(1.0)) / (a + f(1.0)), a))
    t = let(tirx.Select(a == f(cmath.inf), f(0.0), t))
    z = let(t * t)
    return base + fma(z * horner(z, ATAN), t, t)


@by_dtype(libm("atan"))
def atan(x: Any) -> Any:
    """Inverse tangent."""
    return copysign(atan_positive(let(tirx.abs(x))), x)


@by_dtype(libm("atan2"))
def atan2(y: Any, x: Any) -> Any:
    """The angle of the point (x, y), all quadrants, infinities and signed zeros as in C."""
    a, b = let(tirx.abs(y)), let(tirx.abs(x))
    steep = let(a > b)
    low, high = let(tirx.Select(steep, b, a)), let(tirx.Select(steep, a, b))
    ratio = select(high == f(0.0), f(0.0), low == f(cmath.inf), f(1.0), low / high)
    angle = let(atan_positive(let(ratio)))
    angle = let(tirx.Select(steep, f(cmath.pi / 2) - angle, angle))
    left = tirx.reinterpret("uint32", x) >= u32(0x80000000)
    angle = tirx.Select(left, f(cmath.pi) - angle, angle)
    return select(tirx.Or(is_nan(x), is_nan(y)), x + y, copysign(let(angle), y))


def asin_small(a: Any, z: Any) -> Any:
    """asin(a) for 0 <= a <= 0.5 where z is a*a."""
    return let(fma(z * horner(z, ASIN), a, a))


@by_dtype(libm("asin"))
def asin(x: Any) -> Any:
    """Inverse sine; NaN outside [-1, 1]."""
    a = let(tirx.abs(x))
    big = let(a > f(0.5))
    z = let(tirx.Select(big, f(0.5) * (f(1.0) - a), a * a))
    p = asin_small(let(tirx.Select(big, tirx.sqrt(z), a)), z)
    return copysign(tirx.Select(big, f(cmath.pi / 2) - f(2.0) * p, p), x)


@by_dtype(libm("acos"))
def acos(x: Any) -> Any:
    """Inverse cosine; NaN outside [-1, 1]."""
    a = let(tirx.abs(x))
    big = let(a > f(0.5))
    z = let(tirx.Select(big, f(0.5) * (f(1.0) - a), a * a))
    p = asin_small(let(tirx.Select(big, tirx.sqrt(z), a)), z)
    twice = f(2.0) * p
    return select(big, tirx.Select(x < f(0.0), f(cmath.pi) - twice, twice), f(cmath.pi / 2) - copysign(p, x))


__all__ = ["acos", "asin", "atan", "atan2", "cos", "libm", "sin", "tan"]
