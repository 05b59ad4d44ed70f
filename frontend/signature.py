"""What a call of a compiled function looks like: the key of its cache, found in microseconds.

`scan` walks the arguments once and collects the arrays and, as the key, what the program depends on: containers,
shapes, dtypes, and the values of what is not a tensor. `describe` does the same slowly, with paths, to say why a call
needed a new program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ir.errors import ArgumentsError
from ..ir.location import user_location
from . import tree
from .dispatch import is_weak
from .eager import array_type
from .tensor import Tensor
from .trace import leaf_type


class Scanned:
    """The arguments of one call.

    Attributes:
        arrays: of the tensors, from left to right.
        key: hashable; equal keys run the same program.
        tracked: whether a tensor among them requires a gradient.
        traced: whether one belongs to a trace.
    """

    __slots__ = ("arrays", "key", "traced", "tracked")

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.key: Any = []
        self.tracked = False
        self.traced = False

    def add(self, x: Any) -> None:
        """Takes in one argument, or part of one."""
        kind = type(x)
        if isinstance(x, Tensor):
            if x._trace is not None:
                self.traced = True
                return
            value = x._value
            self.arrays.append(value.array)
            self.key.append(id(value.type))  # types of concrete tensors are interned
            if value.tracked:
                self.tracked = True
        elif kind is np.ndarray:
            self.arrays.append(x)
            self.key.append(id(array_type(x)))
        elif kind is tuple or kind is list:
            self.key.append(kind)
            self.key.append(len(x))
            for item in x:
                self.add(item)
        elif kind is dict:
            self.key.append(kind)
            for name in sorted(x) if all(type(n) is str for n in x) else tree.flatten(x)[1].keys:
                self.key.append(name)
                self.add(x[name])
            self.key.append(None)
        elif isinstance(x, (np.ndarray, np.generic)) and not is_weak(x):
            self.add(np.asarray(x))
        else:
            self._other(x, kind)

    def _other(self, x: Any, kind: type) -> None:
        leaves, structure = tree.flatten(x)
        if structure is tree.LEAF:
            self.key.append((kind, x))
        else:
            self.key.append(structure)
            for leaf in leaves:
                self.add(leaf)


def scan(args: Sequence[Any], keywords: dict[str, Any]) -> Scanned:
    """Takes the arguments of a call apart.

    Raises:
        ArgumentsError: an argument that is no tensor cannot be part of a key, as it is not hashable.
    """
    found = Scanned()
    for x in args:
        found.add(x)
    if keywords:
        found.add(keywords)
    found.key = tuple(found.key)
    try:
        hash(found.key)
    except TypeError:
        leaves, structure = tree.flatten((tuple(args), keywords))
        for leaf, path in zip(leaves, structure.paths()):
            if leaf_type(leaf) is None and not _hashable(leaf):
                raise ArgumentsError(f"the argument {path} is a {type(leaf).__name__}, which is neither a tensor nor "
                                     "hashable: a compiled function cannot tell when it changes. Pass tensors, or "
                                     "close over it.", user_location()) from None
        raise
    return found


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


Description = dict[str, str]


def describe(names: Sequence[str], args: Sequence[Any], keywords: dict[str, Any]) -> Description:
    """Every leaf's path with its type, or its value if it is no tensor."""
    described: Description = {}
    named = list(zip([*names, *(f"argument {i}" for i in range(len(names), len(args)))], args))
    for name, value in [*named, *keywords.items()]:
        leaves, structure = tree.flatten(value)
        if not leaves:
            described[name] = str(structure)
        for leaf, path in zip(leaves, structure.paths()):
            kind = leaf_type(leaf)
            described[name + path] = repr(leaf) if kind is None else str(kind)
    return described


def difference(before: Description, now: Description) -> str:
    """What changed between two calls, in words."""
    parts = [f"{path} was {before[path]}, now {now[path]}" for path in now
             if path in before and before[path] != now[path]]
    parts += [f"{path} is new ({now[path]})" for path in now if path not in before]
    parts += [f"{path} is gone" for path in before if path not in now]
    return "; ".join(parts)
