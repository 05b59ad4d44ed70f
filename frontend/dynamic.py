"""Which sizes of a compiled function are open until it is called.

    td.compile(fn, dynamic={"x": ("batch", 784)})            # by shape: names are open, numbers are fixed
    td.compile(fn, dynamic={"tokens": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}})    # by axis
    td.compile(fn, dynamic={"image": ("batch", 3, "32*height", "32*width")})

One program then serves every size; sizes of one name must agree. A graph with symbolic sizes, and a module that knows
its open sizes (`dynamic_specs`: an imported ONNX model), need no `dynamic`. `specialize=True` compiles a program for
each combination of sizes instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..ir.dims import Dim, Size, substitute
from ..ir.errors import ArgumentsError, ShapeError
from ..ir.graph import Graph
from ..ir.location import user_location
from ..ir.parse import parse_size
from ..ir.types import TensorType
from . import tree
from .trace import Spec, leaf_type

LEAST_EXPECTED = 32
"""Schedules are made for sizes of at least this, whatever the first call has."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Dynamic:
    """The open sizes of the arguments of one function.

    Args:
        declared: parameter name -> shape, or axis -> name; None: ask the function.
        fixed: sizes by name that are not open after all.
    """

    def __init__(self, declared: Mapping[str, Any] | None, fixed: Mapping[str, int] | None = None):
        self.declared = None if declared is None else {name: _checked(name, d) for name, d in declared.items()}
        self.fixed = dict(fixed or {})

    def fixing(self, sizes: Mapping[str, int]) -> Dynamic:
        """The same with more sizes fixed.

        Raises:
            ArgumentsError: a size is negative or no number.
        """
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ArgumentsError(f"specialize({name}={size!r}): expected a number of elements", user_location())
        return Dynamic(self.declared, {**self.fixed, **sizes})

    def arguments(self, fn: Any, args: Sequence[Any], keywords: Mapping[str, Any], skip: int = 0) -> Arguments | None:
        """The arguments with a `Spec` in place of each tensor that has open sizes; None if none has.

        `skip`: parameters of the function that come before these arguments.

        Raises:
            ArgumentsError: the function has no parameter of a declared name.
            ShapeError: a tensor does not have the declared shape.
        """
        if self.declared is None:
            ask = getattr(fn, "dynamic_specs", None)
            found: Arguments | None = None if ask is None else ask(args, keywords)
        else:
            found = self._declared(fn, args, keywords, skip)
        if found is None:
            return None
        leaves, structure = tree.flatten(found)
        leaves = [self._fix(leaf) if isinstance(leaf, Spec) else leaf for leaf in leaves]
        open_ones = any(isinstance(leaf, Spec) and not leaf.type.is_static for leaf in leaves)
        given: Arguments = tree.unflatten(structure, leaves)
        return given if open_ones or self.fixed else None

    def _fix(self, spec: Spec) -> Spec:
        return _substituted(spec, self.fixed)

    def _declared(self, fn: Any, args: Sequence[Any], keywords: Mapping[str, Any], skip: int) -> Arguments:
        assert self.declared is not None
        names = _parameters(fn)[skip:]
        unknown = [n for n in self.declared if n not in names and n not in keywords]
        if unknown and not (names and names[-1].startswith("*")):
            raise ArgumentsError(f"dynamic names the parameter {unknown[0]!r}; the function has {', '.join(names)}",
                                 user_location())
        given = [self._spec(name, value) for name, value in zip([*names, *[""] * len(args)], args)]
        return tuple(given), {name: self._spec(name, value) for name, value in keywords.items()}

    def _spec(self, name: str, value: Any) -> Any:
        assert self.declared is not None
        if name not in self.declared:
            return value
        leaves, structure = tree.flatten(value)
        declared = self.declared[name]
        return tree.unflatten(structure, [_opened(name, leaf, declared) for leaf in leaves])


def _checked(name: str, declared: Any) -> Any:
    """A declaration as a shape, or a dict of axes; sizes are ints, Dims or None (as in the call)."""
    def size(n: Any) -> Any:
        try:
            return parse_size(n) if isinstance(n, str) else n
        except ValueError as error:
            raise ArgumentsError(f"dynamic[{name!r}]: {error}; give a name, or a formula such as '32*height'",
                                 user_location()) from None

    if isinstance(declared, Mapping):
        return {int(axis): size(n) for axis, n in declared.items()}
    if not isinstance(declared, (tuple, list)):
        raise ArgumentsError(f"dynamic[{name!r}] is {declared!r}; give a shape such as ('batch', 784), or axes such as "
                             "{0: 'batch'}", user_location())
    return tuple(size(n) for n in declared)


def _opened(name: str, leaf: Any, declared: Any) -> Any:
    kind = leaf_type(leaf)
    if kind is None:
        return leaf
    if isinstance(declared, dict):
        if any(not -kind.rank <= axis < kind.rank for axis in declared):
            raise ShapeError(f"dynamic[{name!r}] names the axes {sorted(declared)}, but it got {kind}", user_location())
        sizes: list[Any] = list(kind.shape)
        for axis, n in declared.items():
            sizes[axis] = n
    else:
        if len(declared) != kind.rank:
            raise ShapeError(f"dynamic[{name!r}] has {len(declared)} axes, but the argument is {kind}", user_location())
        sizes = list(declared)
    shape: list[Size] = [have if want is None else want for want, have in zip(sizes, kind.shape)]
    if any(isinstance(want, int) and want != have for want, have in zip(shape, kind.shape)):
        raise ShapeError(f"the argument {name!r} is {kind}; dynamic declares it as "
                         f"[{', '.join(map(str, shape))}]", user_location())
    return Spec(kind.with_shape(tuple(shape)))


def _parameters(fn: Any) -> list[str]:
    try:
        found = inspect.signature(getattr(fn, "forward", fn)).parameters.values()
    except (TypeError, ValueError):
        return []
    return [("*" if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) else "") + p.name for p in found]


def _substituted(spec: Spec, sizes: Mapping[str, Size]) -> Spec:
    return Spec(spec.type.with_shape(tuple(substitute(n, sizes) for n in spec.shape)), spec.name)


# What sizes have to be -----------------------------------------------------------------------------------------------

Pattern = dict[str, Size]
"""What is taken of sizes so that a model can be traced: a multiple of something, or a number. Others are open."""

MOST_MULTIPLE = 32
PATTERNS = 4
"""Programs for different patterns of sizes that one signature is given; beyond that each combination is compiled."""


def under(pattern: Pattern, arguments: Arguments) -> Arguments:
    """Arguments with open sizes, as far as a pattern leaves them open."""
    leaves, structure = tree.flatten(arguments)
    given: Arguments = tree.unflatten(structure, [_substituted(x, pattern) if isinstance(x, Spec) else x
                                                  for x in leaves])
    return given


def sizes_of(arguments: Arguments, args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, int]:
    """The values in this call of the sizes that are an axis by themselves."""
    found: dict[str, int] = {}
    for declared, given in zip(tree.flatten(arguments)[0], tree.flatten((tuple(args), dict(keywords)))[0]):
        kind = leaf_type(given)
        if isinstance(declared, Spec) and kind is not None:
            for size, actual in zip(declared.shape, kind.shape):
                if isinstance(size, Dim) and str(size).isidentifier() and isinstance(actual, int):
                    found.setdefault(str(size), actual)
    return found


def fits(pattern: Pattern, sizes: Mapping[str, int]) -> bool:
    """Whether sizes are as a pattern takes them."""
    return all(name in sizes and (sizes[name] == size if isinstance(size, int)
                                  else sizes[name] % size.evaluate({name: 1}) == 0) for name, size in pattern.items())


def patterns(sizes: Mapping[str, int]) -> Iterator[Pattern]:
    """What may be tried when a model cannot be traced with all sizes open: the weakest first.

    Strided convolutions and the upsampling that undoes them agree only for multiples of a power of two; an axis that a
    model squeezes has one size. The first size (a batch's) stays open.
    """
    yield {}
    names = list(sizes)[1:]
    multiples: Pattern = {}
    for name in names:
        factor = min(sizes[name] & -sizes[name], MOST_MULTIPLE) if sizes[name] else 1
        if factor > 1:
            multiples[name] = Dim(name) * factor
    if multiples:
        yield multiples
    for name in names:
        yield {name: sizes[name]}
    for name in names if len(names) > 1 else ():
        yield {**multiples, name: sizes[name]}
    if len(names) > 1:
        yield {name: sizes[name] for name in names}


def generic_key(fn: Any, arguments: Arguments | None) -> Any:
    """What tells apart the programs that serve all sizes: equal for calls that differ in these alone."""
    if arguments is None:
        return fn
    leaves, structure = tree.flatten(arguments)
    return structure, tuple(kind if (kind := leaf_type(leaf)) is not None else (type(leaf), leaf) for leaf in leaves)


def expected(graph: Graph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes to make schedules for, from those of the first call: rounded up, so that programs of equal graphs agree."""
    return {name: max(1 << (max(sizes[name], 1) - 1).bit_length(), LEAST_EXPECTED) for name in sorted(graph.dims)}


def types_of(arguments: Sequence[Any]) -> list[TensorType]:
    """The types of the tensors among some arguments."""
    leaves, _ = tree.flatten(tuple(arguments))
    return [kind for leaf in leaves if (kind := leaf_type(leaf)) is not None]
