"""Sizes that are known only when a program runs.

A `Dim` in a shape becomes an int64 variable of the kernels that use it: `Dim`s stand in TIR arithmetic as they are, and
`with_sizes` makes parameters of the variables that a finished kernel uses. What a schedule decides while it is
generated rests on what holds for all sizes (`at_least`, `exact`), or, where only speed depends on it, on the sizes
that are expected (`hint`).

Named sizes are taken to be at least 1 in these proofs. A kernel whose results are empty is not run; and where an
operand is empty, elements may be read that do not exist, and are not used (`sized.padded`: there is memory for them).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from ..ir.dims import Dim, FloorDiv, Size, evaluate
from ..ir.errors import ShapeError

COMMON = 96  # what a size is expected to be of which nothing is known

_variables: dict[str, Any] = {}


def variable(name: str) -> Any:
    """The variable that stands for a named size, the same in all kernels."""
    if name not in _variables:
        _variables[name] = tirx.Var(name, "int64")
    return _variables[name]


def expression(size: Size) -> Any:
    """A size as a TIR expression (a number stays one)."""
    if not isinstance(size, Dim):
        return size
    total: Any = None
    for monomial, coefficient in size.terms.items():
        term: Any = None
        for atom in monomial:
            factor = variable(atom) if isinstance(atom, str) else _floor(atom)
            term = factor if term is None else term * factor
        if term is None:
            term = tirx.const(coefficient, "int64")
        elif coefficient != 1:
            term = term * tirx.const(coefficient, "int64")
        total = term if total is None else total + term
    return total


def _floor(atom: FloorDiv) -> Any:
    numerator = expression(atom.numerator)
    divide = tirx.truncdiv if at_least(atom.numerator, 0) else tirx.floordiv
    return divide(numerator, tirx.const(atom.divisor, "int64"))


Dim.foreign = (tvm.ir.Expr, expression)
Dim.__tvm_ffi_object__ = expression  # type: ignore[attr-defined]  # how TVM takes a foreign object for one of its own


def expressions(shape: Sequence[Size]) -> tuple[Any, ...]:
    """A shape as TVM's buffers take it."""
    return tuple(expression(n) for n in shape)


def is_dynamic(*sizes: Any) -> bool:
    """Whether one of the sizes is known only at run time."""
    return any(not isinstance(n, int) for n in sizes)


def with_sizes(function: Any) -> Any:
    """A finished kernel with the named sizes that it uses as further parameters, in the order of their names."""
    found: dict[str, Any] = {}

    def note(var: Any) -> None:
        if var.name not in found and var.name in _variables and _variables[var.name].same_as(var):
            found[var.name] = var

    used = list(tirx.analysis.undefined_vars(function.body, function.params))
    for param in function.params:
        if tirx.buffer.is_buffer_var(param):
            for extent in param.shape:
                tvm_ffi.structural_walk(extent, [(tirx.Var, note)])
    for var in used:
        note(var)
    if not found:
        return function
    params = [*function.params, *(found[name] for name in sorted(found))]
    return tirx.PrimFunc(params, function.body, ret_type=function.ret_type, attrs=function.attrs)


def size_names(function: Any) -> list[str]:
    """The named sizes among the parameters of a kernel."""
    return [p.name for p in function.params if not tirx.buffer.is_buffer_var(p)]


# What is expected ----------------------------------------------------------------------------------------------------

class _Hints(threading.local):
    sizes: Mapping[str, int] = {}


_hints = _Hints()


@contextmanager
def expecting(sizes: Mapping[str, int] | None) -> Iterator[None]:
    """Schedules are chosen for these sizes (and are right for all)."""
    before, _hints.sizes = _hints.sizes, dict(sizes or {})
    try:
        yield
    finally:
        _hints.sizes = before


class _Expected(dict):
    def __missing__(self, name: str) -> int:
        return max(_hints.sizes.get(name, COMMON), 1)


def hint(size: Any) -> int:
    """The number that a size is expected to be."""
    return size if isinstance(size, int) else evaluate(size, _Expected())


def hinted(shape: Sequence[Size]) -> tuple[int, ...]:
    return tuple(hint(n) for n in shape)


# What holds for all sizes --------------------------------------------------------------------------------------------

def at_least(size: Any, bound: Any) -> bool:
    """Whether `size >= bound` is certain, for all named sizes of 1 or more (infinite ones are for unknown bounds)."""
    if size == math.inf or bound == -math.inf:
        return True
    if size == -math.inf or bound == math.inf:
        return False
    difference = size - bound
    if not isinstance(difference, Dim):
        return bool(difference >= 0)
    return _non_negative(difference) or _non_negative(_without_floors(difference))


def _non_negative(size: Size) -> bool:
    """Whether a polynomial has no negative coefficient once each atom is written as its least value plus something."""
    if isinstance(size, int):
        return size >= 0
    total: Size = 0
    shifted: dict[Any, Size] = {}
    for monomial, coefficient in size.terms.items():
        term: Size = coefficient
        for atom in monomial:
            if atom not in shifted:
                least = 1 if isinstance(atom, str) else _least(atom)
                if least is None:
                    return False
                shifted[atom] = Dim._make({(atom,): 1}) + least
            term = term * shifted[atom]
        total = total + term
    return all(c >= 0 for c in total.terms.values()) if isinstance(total, Dim) else total >= 0


def _least(atom: FloorDiv) -> int | None:
    """The least value of a quotient whose numerator only grows with the sizes."""
    numerator = atom.numerator
    if any(c < 0 for m, c in numerator.terms.items() if m):
        return None
    least = 0
    for monomial, c in numerator.terms.items():
        for a in monomial:
            low = 1 if isinstance(a, str) else _least(a)
            if low is None:
                return None
            c *= low
        least += c
    return least // atom.divisor


def _without_floors(size: Size) -> Size:
    """A lower bound, times something positive: quotients that are subtracted replaced by numerator / divisor."""
    if isinstance(size, int):
        return size
    for monomial, coefficient in size.terms.items():
        floors = [a for a in monomial if isinstance(a, FloorDiv)]
        if coefficient < 0 and floors:
            atom = floors[0]
            rest = list(monomial)
            rest.remove(atom)
            others = Dim._make({m: c for m, c in size.terms.items() if m != monomial})
            bound = others * atom.divisor + atom.numerator * Dim._make({tuple(rest): coefficient})
            return _without_floors(bound)
    return size


def exact(size: Size, divisor: Size) -> Size | None:
    """`size / divisor` where that comes out even for all sizes, else None."""
    if isinstance(size, int):
        if isinstance(divisor, int):
            return size // divisor if divisor and size % divisor == 0 else None
        return 0 if size == 0 else None
    try:
        quotient = size // divisor
    except ShapeError:
        return None
    return quotient if quotient * divisor == size else None


def smaller(x: Any, y: Any) -> Any:
    """min(x, y): a number or size if it is certain, else an expression."""
    if at_least(y, x):
        return x
    return y if at_least(x, y) else tirx.min(expression(x), expression(y))


def trunc_div(value: Any, divisor: Any) -> Any:
    """value // divisor of what is not negative, by a divisor that may be a size."""
    return tirx.truncdiv(value, tirx.const(divisor, "int64") if isinstance(divisor, int) else expression(divisor))


def trunc_mod(value: Any, divisor: Any) -> Any:
    return tirx.truncmod(value, expression(divisor))
