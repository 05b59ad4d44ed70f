"""Symbolic dimensions.

A `Dim` is a polynomial with integer coefficients over named sizes, kept in a canonical form, so that
two expressions for the same size compare equal: `batch`, `2*seq + 1`, `batch*seq` (what a reshape
makes). A floor division that does not come out even becomes an atom of its own, `((h+1)//2)`,
which strided convolutions need. Arithmetic that comes out constant gives a plain `int`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Union

from .errors import ShapeError

Size = Union[int, "Dim"]
Atom = Union[str, "FloorDiv"]
Monomial = tuple[Atom, ...]


class DataSize(str):
    """The name of a size that data decide: unlike others it may well be 0."""

    __slots__ = ()


class FloorDiv:
    """The atom `numerator // divisor`, where the division does not come out even symbolically."""

    __slots__ = ("numerator", "divisor")

    def __init__(self, numerator: Dim, divisor: int):
        self.numerator, self.divisor = numerator, divisor

    def __str__(self) -> str:
        return f"(({self.numerator})//{self.divisor})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FloorDiv) and (self.numerator, self.divisor) == (other.numerator, other.divisor)

    def __hash__(self) -> int:
        return hash((self.numerator, self.divisor))


class Dim:
    """A symbolic size. `Dim("batch")`; combine with + - * and // by an integer.

    The value of a `Dim` is known only when a compiled function is called; ordering two symbolic
    sizes therefore raises `ShapeError`. Equality is structural.
    """

    __slots__ = ("terms", "_hash")
    terms: dict[Monomial, int]
    foreign: ClassVar[tuple[type, Callable[[Dim], Any]] | None] = None
    """A code generator's class of expressions, and what makes one of a size: filled by `schedules`, so that sizes can
    stand in its arithmetic."""

    def __init__(self, name: str):
        if not name.isidentifier():
            raise ShapeError(f"a symbolic dimension needs a Python identifier as its name, not {name!r}")
        self._set({(name,): 1})

    def _set(self, terms: dict[Monomial, int]) -> None:
        self.terms = terms
        self._hash = hash(frozenset(terms.items()))

    @staticmethod
    def _make(terms: Mapping[Monomial, int]) -> Size:
        kept = {m: c for m, c in terms.items() if c}
        if not kept:
            return 0
        if set(kept) == {()}:
            return kept[()]
        dim = Dim.__new__(Dim)
        dim._set(kept)
        return dim

    def _with(self, operation: Callable[[Any, Any], Any], other: Any, reflected: bool = False) -> Any:
        """Arithmetic with something that is no size."""
        if Dim.foreign is None or not isinstance(other, Dim.foreign[0]):
            return NotImplemented
        mine = Dim.foreign[1](self)
        return operation(other, mine) if reflected else operation(mine, other)

    def __add__(self, other: Size) -> Size:
        if not _is_size(other):
            return self._with(operator.add, other)
        total = dict(self.terms)
        for monomial, coefficient in _terms(other).items():
            total[monomial] = total.get(monomial, 0) + coefficient
        return Dim._make(total)

    def __mul__(self, other: Size) -> Size:
        if not _is_size(other):
            return self._with(operator.mul, other)
        product: dict[Monomial, int] = {}
        for m1, c1 in self.terms.items():
            for m2, c2 in _terms(other).items():
                monomial = tuple(sorted(m1 + m2, key=str))
                product[monomial] = product.get(monomial, 0) + c1 * c2
        return Dim._make(product)

    def __floordiv__(self, other: Size) -> Size:
        if not _is_size(other):
            return self._with(operator.floordiv, other)
        divisor = _terms(other)
        if len(divisor) != 1:
            found = _long_division(self, divisor)
            if found is None:
                raise ShapeError(f"{self} is not a multiple of {other}: cannot tell the size that is left")
            return found
        (monomial, coefficient), = divisor.items()
        quotient: dict[Monomial, int] = {}
        for m, c in self.terms.items():
            left = _without(m, monomial)
            if left is None or c % coefficient:
                break
            quotient[left] = c // coefficient
        else:
            return Dim._make(quotient)
        if monomial or coefficient <= 0:
            raise ShapeError(f"{self} is not a multiple of {other}: cannot tell the size that is left")
        # what divides evenly leaves the atom: (4*h + 1)//2 = 2*h + 1//2
        even = Dim._make({m: c // coefficient for m, c in self.terms.items() if c % coefficient == 0 and m})
        rest_terms = {m: c for m, c in self.terms.items() if c % coefficient or not m}
        constant = rest_terms.get((), 0)
        rest_terms[()] = constant % coefficient
        rest = Dim._make(rest_terms)
        whole = even + constant // coefficient
        if isinstance(rest, int):
            return whole + rest // coefficient
        return Dim._make({(FloorDiv(rest, coefficient),): 1}) + whole

    def __mod__(self, other: int) -> Size:
        if not _is_size(other):
            return self._with(operator.mod, other)
        return self - (self // other) * other

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + (-other)

    def __rsub__(self, other: Size) -> Size:
        return (-self) + other if _is_size(other) else self._with(operator.sub, other, reflected=True)

    def __radd__(self, other: Size) -> Size:
        return self + other if _is_size(other) else self._with(operator.add, other, reflected=True)

    def __rmul__(self, other: Size) -> Size:
        return self * other if _is_size(other) else self._with(operator.mul, other, reflected=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def _order(self, other: object) -> bool:
        raise ShapeError(f"the size {self} is known only at run time: it cannot be compared with {other} while tracing")

    __lt__ = __le__ = __gt__ = __ge__ = _order

    def __bool__(self) -> bool:
        return True  # a symbolic dimension is never the constant 0

    def __index__(self) -> int:
        raise ShapeError(f"the size {self} is known only at run time: give `trace` or `compile` a number for it")

    def __str__(self) -> str:
        parts = []
        for monomial, coefficient in sorted(self.terms.items(), key=lambda t: (-len(t[0]), str(t[0]))):
            factors = [str(a) for a in monomial]
            if abs(coefficient) != 1 or not factors:
                factors.insert(0, str(abs(coefficient)))
            parts.append(("-" if coefficient < 0 else "+") + "*".join(factors))
        text = "".join(parts)
        return text[1:] if text.startswith("+") else text

    __repr__ = __str__

    @property
    def names(self) -> frozenset[str]:
        """The named sizes that this one depends on."""
        found: set[str] = set()
        for monomial in self.terms:
            for atom in monomial:
                found |= {atom} if isinstance(atom, str) else atom.numerator.names
        return frozenset(found)

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """The number this size is when the named sizes have the given values."""
        total = 0
        for monomial, coefficient in self.terms.items():
            for atom in monomial:
                coefficient *= (sizes[atom] if isinstance(atom, str)
                                else atom.numerator.evaluate(sizes) // atom.divisor)
            total += coefficient
        return total


def _is_size(x: Any) -> bool:
    return isinstance(x, (int, Dim)) or hasattr(x, "__index__")


def _terms(size: Size) -> dict[Monomial, int]:
    return size.terms if isinstance(size, Dim) else {(): int(size)}


def _long_division(size: Dim, divisor: Mapping[Monomial, int]) -> Size | None:
    """The quotient of two polynomials, leading term by leading term; None if something is left."""
    lead = max(divisor, key=_degree)
    quotient: Size = 0
    left: Size = size
    while left != 0:
        terms = _terms(left)
        first = max(terms, key=_degree)
        monomial = _without(first, lead)
        if monomial is None or terms[first] % divisor[lead]:
            return None
        step = Dim._make({monomial: terms[first] // divisor[lead]})
        quotient, left = quotient + step, left - step * Dim._make(divisor)
    return quotient


def _degree(monomial: Monomial) -> tuple[int, list[str]]:
    return len(monomial), sorted(map(str, monomial))


def _without(monomial: Monomial, factor: Monomial) -> Monomial | None:
    rest = list(monomial)
    for atom in factor:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """A size as a number, given the values of the named sizes."""
    return size.evaluate(sizes) if isinstance(size, Dim) else int(size)


def substitute(size: Size, sizes: Mapping[str, Size]) -> Size:
    """A size with some of its names replaced."""
    if not isinstance(size, Dim) or not size.names & sizes.keys():
        return size
    total: Size = 0
    for monomial, coefficient in size.terms.items():
        term: Size = coefficient
        for atom in monomial:
            factor = (sizes.get(atom, Dim._make({(atom,): 1})) if isinstance(atom, str)
                      else substitute(atom.numerator, sizes) // atom.divisor)
            term = term * factor
        total = total + term
    return total


def solve(declared: Size, actual: int, sizes: dict[str, int]) -> bool:
    """Matches a declared size with an actual one, adding a name that it determines to `sizes`.

    Returns False when they contradict. A size of the form `a*name + b` determines `name`; anything
    more complex is only checked once all of its names are known (True is returned before that).
    """
    if isinstance(declared, int):
        return declared == actual
    unknown = declared.names - sizes.keys()
    if not unknown:
        return declared.evaluate(sizes) == actual
    if len(unknown) == 1:
        (name,) = unknown
        slope = declared.terms.get((name,), 0)
        if slope and set(declared.terms) <= {(name,), ()}:
            rest = actual - declared.terms.get((), 0)
            if rest % slope or rest // slope < 0:
                return False
            sizes[name] = rest // slope
    return True
