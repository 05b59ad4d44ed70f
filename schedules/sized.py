"""What a program with symbolic sizes needs to know of one combination of them, found when it is called.

The sizes follow from the shapes of the inputs. From them follow the shapes of the results and a memory plan: where in
the arena each temporary lies, and how large the arena is. A plan takes a millisecond, so it is kept for the next call
with the same sizes. Nothing here needs TVM: a loaded program runs at any size as well.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..ir.dims import Dim, Size, evaluate, solve
from ..ir.errors import ArgumentsError, ShapeError
from .abi import aligned
from .arena import place
from .signature import Signature

KEPT = 1024
"""Combinations of sizes of which the plan is kept."""


def padded(shape: Sequence[Size], sizes: Mapping[str, int]) -> int:
    """Elements of a buffer, with axes of one element in place of empty ones (see `sizes.py`)."""
    return math.prod(max(evaluate(n, sizes), 1) for n in shape)


class Layout(NamedTuple):
    """The numbers of one combination of sizes: the cells of the table that depend on it (sizes, then offsets of
    temporaries), the bytes of the arena, and the shapes of inputs and outputs."""

    cells: np.ndarray
    arena_bytes: int
    outputs: list[tuple[int, ...]]
    spare: dict[int, int]  # bytes that an empty input must be seen to have


class Layouts:
    """The layouts of one program."""

    def __init__(self, signature: Signature):
        self.signature = signature
        self.kept: OrderedDict[tuple[int, ...], Layout] = OrderedDict()
        self.axes = [(i, k, n) for i, info in enumerate(signature.inputs) for k, n in enumerate(info.shape)
                     if isinstance(n, Dim)]
        # The first axis that is a size by itself, for each size; and the other axes.
        plain = [next(((i, k) for i, k, n in self.axes if n == Dim(name)), None) for name in signature.sizes]
        self.direct = [at for at in plain if at is not None]
        self.simple = len(self.direct) == len(plain)
        self.others = [(i, k, n) for i, k, n in self.axes if (i, k) not in self.direct]

    def sizes(self, arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
        """The values of the named sizes for these inputs.

        Raises:
            ShapeError: the shapes contradict each other; the message names an input and what is known.
        """
        names = self.signature.sizes
        if self.simple:
            values = tuple([arrays[i].shape[k] for i, k in self.direct])
            if not self.others:
                return values
            sizes = dict(zip(names, values))
            if all(arrays[i].shape[k] == n.evaluate(sizes) for i, k, n in self.others):
                return values
        found: dict[str, int] = {}
        for _ in range(2):  # a second look checks expressions whose names were found after them
            for i, k, declared in self.axes:
                actual = arrays[i].shape[k]
                if not solve(declared, actual, found):
                    self._refuse(i, k, declared, actual, found)
        if missing := [name for name in names if name not in found]:
            raise ArgumentsError(f"{self.signature.name}: the sizes {', '.join(missing)} do not follow from its "
                                 "arguments; pass a tensor that has each of them as an axis")
        return tuple(found[name] for name in names)

    def _refuse(self, i: int, k: int, declared: Dim, actual: int, found: Mapping[str, int]) -> None:
        known = ", ".join(f"{name} = {found[name]}" for name in sorted(declared.names) if name in found)
        name = self.signature.inputs[i].name
        raise ShapeError(f"input {i} ({name!r}) of {self.signature.name}: axis {k} has {actual} elements, expected "
                         f"{declared}" + (f", where {known} follows from the arguments" if known else "")
                         + ": pass arrays whose sizes agree")

    def at(self, values: tuple[int, ...]) -> Layout:
        """The layout for values of `signature.sizes`."""
        found = self.kept.get(values)
        if found is None:
            found = self.kept[values] = self._make(dict(zip(self.signature.sizes, values)))
            if len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return found

    def _make(self, sizes: dict[str, int]) -> Layout:
        signature = self.signature
        for check in signature.checks:
            if evaluate(check.rest, sizes) < 0:
                raise ShapeError(f"{signature.name}: for {_text(sizes)} {check.what}")
        temps = [(aligned(padded(t.shape, sizes) * t.itemsize), t.first, t.last) for t in signature.temps]
        offsets, arena = place(temps)
        outputs = [tuple(evaluate(n, sizes) for n in info.shape) for info in signature.outputs]
        for info, shape in zip(signature.outputs, outputs):
            if any(n < 0 for n in shape):
                raise ShapeError(f"{signature.name}: for {_text(sizes)} its result {info} would have the shape "
                                 f"{list(shape)}: pass larger arrays")
        for t in signature.temps:
            if any(evaluate(n, sizes) < 0 for n in t.shape):
                raise ShapeError(f"{signature.name}: for {_text(sizes)} a value of shape "
                                 f"[{', '.join(map(str, t.shape))}] would have a negative size: pass larger arrays")
        spare = {i: padded(info.shape, sizes) * 8 for i, info in enumerate(signature.inputs)
                 if not math.prod(evaluate(n, sizes) for n in info.shape)}
        cells = np.array([*sizes.values(), *offsets], np.int64)
        return Layout(cells, arena, outputs, spare)


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sizes.items())
