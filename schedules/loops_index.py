"""Index arithmetic of generated loops.

An `Index` is an affine form over *atoms*: loop axes, and opaque integer expressions (a gathered
index, a division that does not come out even) with known bounds. Because bounds and divisibility
are known, the indices that reshapes produce fold away: `(16*i + j) // 16` with `j < 16` is `i`. So the address of
every load is affine in the loop axes wherever it can be, and its strides say how to vectorise, which axes to
collapse and what is contiguous, without asking TVM's simplifier.

Extents, coefficients and bounds are numbers or symbolic sizes (`sizes.py`); a bound that cannot be told is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Union

from tvm import tirx

from ..ir.dims import Dim, Size
from .sizes import at_least, exact, expression, trunc_div, trunc_mod

Int = Union[int, "Index"]


class Atom:
    """An integer quantity in [lo, hi] that an index is affine in. `axes`: the loop axes that it depends on."""

    __slots__ = ("lo", "hi", "_expr", "axes")

    def __init__(self, lo: Any, hi: Any, expr: Any = None, axes: frozenset[Axis] = frozenset()):
        self.lo, self.hi, self._expr, self.axes = lo, hi, expr, axes

    def expr(self) -> Any:
        return self._expr


class Axis(Atom):
    """One axis of an iteration domain. `part_of`: the merged axis (with the size of what is inside this one) that
    loops over it, once neighbouring axes have been collapsed."""

    __slots__ = ("extent", "part_of", "name")

    def __init__(self, extent: Size, name: str = "i"):
        super().__init__(0, max(extent - 1, 0) if isinstance(extent, int) else extent - 1, tirx.Var(name, "int32"))
        self.extent = extent
        self.name = name
        self.axes = frozenset({self})
        self.part_of: tuple[Merged, Any] | None = None

    def bind(self, expr: Any) -> None:
        """The loop variable expression that stands for this axis in the code being written."""
        self._expr = expr

    def expr(self) -> Any:
        if self.part_of is None:
            return self._expr
        whole, inside = self.part_of
        value = whole.expr()
        if isinstance(value, int):
            if value == 0:
                return 0
            if not isinstance(inside, Dim) and not isinstance(self.extent, Dim):
                return value // inside % self.extent
            value = tirx.const(value, "int64")
        if isinstance(inside, Dim) or isinstance(self.extent, Dim):
            value = value if inside == 1 else trunc_div(value, inside)
            return value if inside * self.extent == whole.extent else trunc_mod(value, self.extent)
        value = value if inside == 1 else tirx.floordiv(value, inside)
        return value if inside * self.extent == whole.extent else tirx.floormod(value, self.extent)

    def __repr__(self) -> str:
        return f"{self.name}<{self.extent}"


class Merged(Axis):
    """An axis that loops over several neighbouring axes at once."""

    __slots__ = ("parts", "inside_sizes")

    def __init__(self, parts: Sequence[Axis]):
        extent: Size = 1
        self.parts = tuple(parts)
        self.inside_sizes: set[Size] = set()
        for part in reversed(self.parts):
            if part.extent != 1:
                self.inside_sizes.add(extent)
            part.part_of = (self, extent)
            extent *= part.extent
        super().__init__(extent, "f")

    def release(self) -> None:
        for part in self.parts:
            part.part_of = None


class Index:
    """`const + sum(coefficient * atom)`. Immutable; use `affine` arithmetic: + - * // % with ints and each other."""

    __slots__ = ("terms", "const")

    def __init__(self, terms: dict[Atom, Any], const: Any = 0):
        self.terms, self.const = terms, const

    @staticmethod
    def of(x: Any) -> Index:
        if isinstance(x, Index):
            return x
        if isinstance(x, (int, Dim)):
            return Index({}, x)
        return Index({x: 1}) if x.lo != x.hi else Index({}, x.lo)

    def __add__(self, other: Any) -> Index:
        other = Index.of(other)
        terms = dict(self.terms)
        for atom, c in other.terms.items():
            total = terms.get(atom, 0) + c
            if isinstance(total, Dim) or total:
                terms[atom] = total
            else:
                terms.pop(atom, None)
        return Index(terms, self.const + other.const)

    def __mul__(self, factor: Size) -> Index:
        return Index({a: c * factor for a, c in self.terms.items()} if factor != 0 else {}, self.const * factor)

    def __sub__(self, other: Any) -> Index:
        return self + Index.of(other) * -1

    def __rsub__(self, other: Any) -> Index:
        return Index.of(other) - self

    def __neg__(self) -> Index:
        return self * -1

    __radd__ = __add__
    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.const == other.const and self.terms == other.terms

    def __hash__(self) -> int:
        return hash((self.const, frozenset(self.terms.items())))

    @property
    def plain(self) -> bool:
        """Whether it is affine in loop axes alone."""
        return all(isinstance(a, Axis) for a in self.terms)

    @property
    def lo(self) -> Any:
        return self._bound(False)

    @property
    def hi(self) -> Any:
        return self._bound(True)

    def _bound(self, high: bool) -> Any:
        total: Any = self.const
        for a, c in self.terms.items():
            positive = c > 0 if isinstance(c, int) else True if at_least(c, 0) else False if at_least(-c, 0) else None
            end = None if positive is None else a.hi if positive == high else a.lo
            if end is None or end in (math.inf, -math.inf):
                return math.inf if high else -math.inf
            total = total + end * c
        return total

    @property
    def axes(self) -> frozenset[Axis]:
        """The loop axes that the index depends on."""
        return frozenset().union(*(a.axes for a in self.terms))

    def divided(self, divisor: Size) -> tuple[Index, Index]:
        """(floor quotient, remainder) by a positive size, exact wherever bounds show it."""
        if divisor == 1:
            return self, Index({}, 0)
        quotients = {a: exact(c, divisor) for a, c in self.terms.items()}
        even = {a: q for a, q in quotients.items() if q is not None}
        left = {a: c for a, c in self.terms.items() if quotients[a] is None}
        if isinstance(self.const, int) and isinstance(divisor, int):
            rest, whole = Index(left, self.const % divisor), Index(even, self.const // divisor)
            low, high = rest.lo, rest.hi
            if isinstance(low, int) and isinstance(high, int):
                step = low // divisor
                if high // divisor == step:
                    return whole + step, rest - step * divisor
        else:
            q = exact(self.const, divisor)
            rest, whole = (Index(left, self.const), Index(even, 0)) if q is None else (Index(left, 0), Index(even, q))
            low, high = rest.lo, rest.hi
        if at_least(low, 0) and at_least(divisor - 1, high):
            return whole, rest
        if isinstance(divisor, int):  # TVM 0.27 simplifies (3 - v) % 4 to -(v % -4): it gets no falling numerators
            falling = {a: c for a, c in rest.terms.items() if isinstance(c, int) and c < 0}
            rest = rest + Index({a: c % divisor - c for a, c in falling.items()}, 0)
            whole = whole + Index({a: c // divisor for a, c in falling.items()}, 0)
        return (whole + Index({Division(rest, divisor, False): 1}), Index({Division(rest, divisor, True): 1}))

    def __floordiv__(self, divisor: int) -> Index:
        return self.divided(divisor)[0]

    def __mod__(self, divisor: int) -> Index:
        return self.divided(divisor)[1]

    def expr(self) -> Any:
        """The TIR expression (or a Python int, if constant)."""
        result: Any = None
        for atom, c in _merged(self.terms).items():
            value = atom.expr()
            if isinstance(value, int) and isinstance(c, Dim):
                c = expression(c)
            term = value if isinstance(c, int) and c == 1 else value * c
            result = term if result is None else result + term
        if result is None:
            return expression(self.const)
        return result + expression(self.const) if isinstance(self.const, Dim) or self.const else result

    def __repr__(self) -> str:
        return " + ".join([f"{c}*{a!r}" for a, c in self.terms.items()] + [str(self.const)])


class Division(Atom):
    """The quotient or remainder of a division that bounds do not decide. Equal divisions are equal atoms."""

    __slots__ = ("of", "divisor", "remainder")

    def __init__(self, of: Index, divisor: Size, remainder: bool):
        super().__init__(*_quotient_bounds(of, divisor, remainder), None, of.axes)
        self.of, self.divisor, self.remainder = of, divisor, remainder

    def expr(self) -> Any:
        """Written out when used, in terms of the loops of that moment."""
        value = self.of.expr()
        if isinstance(self.divisor, Dim):
            value = tirx.const(value, "int64") if isinstance(value, int) else value
            if at_least(self.of.lo, 0):
                return (trunc_mod if self.remainder else trunc_div)(value, self.divisor)
            return (tirx.floormod if self.remainder else tirx.floordiv)(value, expression(self.divisor))
        if isinstance(value, int):
            return value % self.divisor if self.remainder else value // self.divisor
        return (tirx.floormod if self.remainder else tirx.floordiv)(value, self.divisor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Division) and (self.divisor, self.remainder, self.of) == (
            other.divisor, other.remainder, other.of)

    def __hash__(self) -> int:
        return hash((self.of, self.divisor, self.remainder))


def _quotient_bounds(of: Index, divisor: Size, remainder: bool) -> tuple[Any, Any]:
    if remainder:
        return 0, divisor - 1
    low, high = of.lo, of.hi
    if isinstance(low, int) and isinstance(high, int) and isinstance(divisor, int):
        return low // divisor, high // divisor
    if not at_least(low, 0):
        return -math.inf, math.inf
    count = None if high == math.inf else exact(high + 1, divisor)
    return 0, high if count is None else count - 1


def _merged(terms: dict[Atom, Any]) -> dict[Atom, Any]:
    """Terms with collapsed axes joined: `12*i + j` with i, j parts of one axis f is `f`."""
    groups: dict[Merged, dict[Any, Any]] = {}
    result: dict[Atom, Any] = {}
    for atom, c in terms.items():
        if isinstance(atom, Axis) and atom.part_of is not None:
            groups.setdefault(atom.part_of[0], {})[atom.part_of[1]] = c
        else:
            result[atom] = c
    for whole, parts in groups.items():
        scale = whole_coefficient(whole, parts)
        if scale is not None:
            result[whole] = result.get(whole, 0) + scale
        else:
            result.update({a: c for a, c in terms.items() if isinstance(a, Axis) and a.part_of
                           and a.part_of[0] is whole})
    return result


def whole_coefficient(whole: Merged, parts: dict[Any, Any]) -> Any:
    """The coefficient c with which the parts (size inside -> coefficient) add up to `c * whole`, if there is one."""
    scale = parts.get(1)
    if scale is None or any(c != scale * inside for inside, c in parts.items()):
        return None
    return scale if set(parts) == whole.inside_sizes else None


def opaque(expr: Any, lo: Any, hi: Any, axes: Iterable[Axis]) -> Index:
    """An index that only the running kernel knows (a gathered position), known to lie in [lo, hi]."""
    return Index({Atom(lo, hi, expr, frozenset(axes)): 1}) if lo != hi else Index({}, lo)


def clamp(index: Index, lo: int, hi: Size) -> Index:
    """The index moved into [lo, hi]; itself if it cannot lie outside."""
    below, above = not at_least(index.lo, lo), not at_least(hi, index.hi)
    if not below and not above:
        return index
    if isinstance(hi, int) and lo >= hi:
        return Index({}, lo)
    value = index.expr()
    if isinstance(value, int) and isinstance(hi, int):
        return Index({}, min(max(value, lo), hi))
    if isinstance(hi, Dim):  # `hi` may be below `lo` where there is nothing to read
        return opaque(tirx.max(tirx.min(value, expression(hi)), lo), lo, hi, index.axes)
    if below:
        value = tirx.max(value, lo)
    if above:
        value = tirx.min(value, hi)
    return opaque(value, lo, hi, index.axes)


def within(index: Index, lo: Size, hi: Size) -> Any:
    """The condition lo <= index <= hi: True or False where bounds decide, else a TIR expression."""
    below, above = not at_least(index.lo, lo), not at_least(hi, index.hi)
    if not below and not above:
        return True
    if at_least(lo - 1, index.hi) or at_least(index.lo, hi + 1):
        return False
    value = index.expr()
    if isinstance(value, int):
        value = tirx.const(value, "int64")
    parts = ([value >= expression(lo)] if below else []) + ([value <= expression(hi)] if above else [])
    return parts[0] if len(parts) == 1 else tirx.And(*parts)


def strides_of(shape: Sequence[Size]) -> tuple[Size, ...]:
    """Row-major strides in elements."""
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * (max(size, 1) if isinstance(size, int) else size)  # an empty axis has no elements to tell apart
    return tuple(reversed(strides))


def flatten(index: Sequence[Index], shape: Sequence[Size]) -> Index:
    """The row-major position of an element."""
    total = Index({}, 0)
    for i, stride in zip(index, strides_of(shape)):
        total = total + i * stride
    return total


def unflatten(position: Index, shape: Sequence[Size]) -> tuple[Index, ...]:
    """The index of the element at a row-major position."""
    result: list[Index] = []
    for size in reversed(shape):
        if isinstance(size, int) and size <= 1:
            result.append(Index({}, 0))
            continue
        position, rest = position.divided(size)
        result.append(rest)
    return tuple(reversed(result))
