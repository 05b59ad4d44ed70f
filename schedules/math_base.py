"""What the elementary functions are written in: immediates, bits, selects, fused multiply-add, Horner's scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from .lower_slots import const, dtype_of, let


def f(value: float) -> Any:
    return const(value, "float32")


def u32(value: int) -> Any:
    return const(value, "uint32")


def i32(value: int) -> Any:
    return const(value, "int32")


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c rounded once."""
    return tirx.call_llvm_pure_intrin(dtype_of(a), "llvm.fma", a, b, c)


def horner(x: Any, coefficients: Sequence[float]) -> Any:
    """The polynomial at x, highest power first."""
    total = const(coefficients[0], dtype_of(x))
    for c in coefficients[1:]:
        total = fma(total, x, const(c, dtype_of(x)))
    return let(total)


def bits(x: Any) -> Any:
    return tirx.reinterpret("uint32", x)


def from_bits(x: Any) -> Any:
    return tirx.reinterpret("float32", x)


def copysign(x: Any, y: Any) -> Any:
    """x, which is not negative, with the sign of y.

    Not the usual two masks: where their result is selected against an operand, LLVM 22 merges both into a masked
    VPTERNLOG whose operands it confuses.
    """
    return from_bits(bits(x) | (bits(y) & u32(0x80000000)))


def select(*cases: Any) -> Any:
    """`select(condition, value, condition, value..., otherwise)`."""
    result = cases[-1]
    for i in range(len(cases) - 3, -1, -2):  # bound at each step: TVM takes exponential time over nested ones
        result = let(tirx.Select(cases[i], let(cases[i + 1]), let(result)))
    return result


def by_dtype(wide: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function on f32, `wide` on f64."""
    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*xs: Any) -> Any:
            if dtype_of(xs[0]) == "float64":
                return wide(*xs)
            return fn(*(let(x) for x in xs))
        apply.__name__, apply.__doc__ = fn.__name__, fn.__doc__
        return apply
    return decorate


def libm(name: str) -> Callable[..., Any]:
    return lambda *xs: tirx.call_pure_extern("float64", name, *xs)


def d(value: float) -> Any:
    return const(value, "float64")
