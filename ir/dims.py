"""Symbolic dimensions.

A `Dim` is a polynomial with integer coefficients over named sizes, kept in a canonical form, so that
two expressions for the same size compare equal: `batch`, `2*seq + 1`, `batch*seq` (what a reshape
makes). A floor division that does not come out even becomes an atom of its own, `((h+1)//2)`,
which strided convolutions need. Arithmetic that comes out constant gives a plain `int`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union

from .errors import ShapeError

Size = Union[int, "Dim"]
Atom = Union[str, "FloorDiv"]
Monomial = tuple[Atom, ...]


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

    def __add__(self, other: Size) -> Size:
        total = dict(self.terms)
        for monomial, coefficient in _terms(other).items():
            total[monomial] = total.get(monomial, 0) + coefficient
        return Dim._make(total)

    def __mul__(self, other: Size) -> Size:
        product: dict[Monomial, int] = {}
        for m1, c1 in self.terms.items():
            for m2, c2 in _terms(other).items():
                monomial = tuple(sorted(m1 + m2, key=str))
                product[monomial] = product.get(monomial, 0) + c1 * c2
        return Dim._make(product)

    def __floordiv__(self, other: Size) -> Size:
        divisor = _terms(other)
        if len(divisor) != 1:
            raise ShapeError(f"cannot divide the symbolic size {self} by {other}")
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
        return self - (self // other) * other

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + (-other)

    def __rsub__(self, other: Size) -> Size:
        return (-self) + other

    __radd__ = __add__
    __rmul__ = __mul__

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


def _terms(size: Size) -> dict[Monomial, int]:
    return size.terms if isinstance(size, Dim) else {(): int(size)}


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
