"""Tensors whose elements are not there: not drawn yet, or lying in parts on the ranks of a mesh.

A parameter is drawn when its elements are first asked for. On one process that is the first step (or whoever looks);
on a mesh a rank asks for its part alone, so a model may be larger than the memory of any one rank. What a part holds
are the numbers that the whole would hold: an initialiser remembers its place in the random stream, not its result.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..ir.errors import ArgumentsError
from ..ir.location import user_location
from ..ir.types import TensorType
from .eager import Concrete, empty_aligned

Place = tuple[slice, ...]
"""Of a part in the whole tensor: a slice with start and stop for each dimension."""
_lock = threading.RLock()


class Source(Protocol):
    """Where elements come from."""

    @property
    def type(self) -> TensorType:
        """Of the whole tensor."""

    def part(self, place: Place) -> np.ndarray:
        """The elements of a part."""


@dataclass(frozen=True)
class Full:
    """One value everywhere."""

    type: TensorType
    value: float

    def part(self, place: Place) -> np.ndarray:
        """The elements of a part."""
        return np.full([s.stop - s.start for s in place], self.value, self.type.dtype.np)


@dataclass(frozen=True)
class Cast:
    """Another source's elements in another dtype."""

    source: Source
    type: TensorType

    def part(self, place: Place) -> np.ndarray:
        """The elements of a part."""
        return self.source.part(place).astype(self.type.dtype.np)


@dataclass(frozen=True)
class Elsewhere:
    """No elements here: `where` says where they are and how to get them."""

    type: TensorType
    name: str
    where: str

    def part(self, place: Place) -> np.ndarray:
        """Raises ArgumentsError."""
        raise ArgumentsError(f"{self.name or 'a tensor'} ({self.type}) {self.where}", user_location())


def everything(type: TensorType) -> Place:
    """The place of the whole tensor."""
    return tuple(slice(0, size) for size in type.shape)


class Pending(Concrete):
    """A value whose array is made when it is first asked for."""

    __slots__ = ("_held", "source")

    def __init__(self, source: Source):
        self._held: np.ndarray | None = None
        self.source: Source | None = source
        super().__init__(None, source.type)
        self.mutable = True

    @property
    def waiting(self) -> bool:
        """Whether nobody has asked yet."""
        return self._held is None and self.source is not None

    @property
    def array(self) -> np.ndarray | None:
        """The elements, in memory that compiled code may update."""
        if self._held is None and self.source is not None:
            with _lock:
                if self._held is None and self.source is not None:
                    made = self.source.part(everything(self.type))
                    self._held = empty_aligned(made.shape, made.dtype)
                    np.copyto(self._held, made, casting="no")
                    self.source = None
        return self._held

    @array.setter
    def array(self, array: np.ndarray | None) -> None:
        self._held = array
        if array is not None:
            self.source = None


def waiting(value: Any) -> bool:
    """Whether a tensor's value has no elements yet."""
    return isinstance(value, Pending) and value.waiting


def parked(value: Any) -> bool:
    """Whether a tensor's elements are elsewhere."""
    return isinstance(value, Pending) and value.waiting and isinstance(value.source, Elsewhere)
