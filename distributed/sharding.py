"""How one value lies on a mesh.

Along each mesh axis a value is in one of three states: *whole* (every rank has all of it), *split* along one of its
dimensions (each rank has an equal part), or a *partial sum* (the value is the sum of what the ranks have). A
`Sharding` says this by dimension, as one writes it: `Sharding(("data", None))` is split along its first dimension
over the axis "data" and whole along all others; `partial` names the axes over which it is a sum.

The parts of the package that look at one axis at a time use a *placement*: a dimension's number, or WHOLE, or PARTIAL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import ShapeError
from ..ir.types import TensorType
from .mesh import Mesh, MeshError

WHOLE, PARTIAL = -1, -2


@dataclass(frozen=True)
class Sharding:
    """A mesh axis or None for each dimension, and the axes over which the value is a partial sum.

    Raises:
        MeshError: an axis stands twice.
    """

    dims: tuple[str | None, ...]
    partial: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(d or None for d in self.dims))
        object.__setattr__(self, "partial", tuple(sorted(self.partial)))
        used = [d for d in (*self.dims, *self.partial) if d is not None]
        if len(set(used)) != len(used):
            raise MeshError(f"the sharding {self} uses a mesh axis twice: a value is split over it once, or a "
                            "sum over it")

    @classmethod
    def whole(cls, rank: int) -> Sharding:
        """Every rank has all of the value."""
        return cls((None,) * rank)

    @classmethod
    def of(cls, rank: int, placements: Mapping[str, int]) -> Sharding:
        """From the placement along each axis."""
        dims: list[str | None] = [None] * rank
        for axis, placement in placements.items():
            if placement >= 0:
                if dims[placement] is not None:
                    raise MeshError(f"dimension {placement} would be split over {dims[placement]!r} and {axis!r}; a "
                                    "dimension is split over one mesh axis")
                dims[placement] = axis
        return cls(tuple(dims), tuple(axis for axis, placement in placements.items() if placement == PARTIAL))

    def placement(self, axis: str) -> int:
        """The dimension that is split over an axis, or WHOLE, or PARTIAL."""
        if axis in self.partial:
            return PARTIAL
        return self.dims.index(axis) if axis in self.dims else WHOLE

    def placed(self, axis: str, placement: int) -> Sharding:
        """The same with another placement along one axis."""
        dims = [None if d == axis else d for d in self.dims]
        partial = [a for a in self.partial if a != axis]
        if placement == PARTIAL:
            partial.append(axis)
        elif placement != WHOLE:
            dims[placement] = axis
        return Sharding(tuple(dims), tuple(partial))

    @property
    def is_whole(self) -> bool:
        """Every rank has all of the value."""
        return not self.partial and not any(self.dims)

    def local(self, type: TensorType, mesh: Mesh) -> TensorType:
        """The type of one rank's part.

        Raises:
            ShapeError: a dimension does not divide. (Nothing is padded: the message gives the nearest size that fits.)
            MeshError: the ranks differ, or the mesh has no such axis.
        """
        self.check(type, mesh)
        return type.with_shape(tuple(s if d is None else s // mesh[d] for s, d in zip(type.shape, self.dims)))

    def check(self, type: TensorType, mesh: Mesh) -> None:
        """That a value of this type can lie so."""
        if len(self.dims) != type.rank:
            raise MeshError(f"the sharding {self} is for {len(self.dims)} dimensions, the value is {type}")
        for i, (size, axis) in enumerate(zip(type.shape, self.dims)):
            if axis is None:
                continue
            if not isinstance(size, int):
                raise ShapeError(f"dimension {i} of {type} is symbolic: partitioning needs a number")
            if size % mesh[axis]:
                fits = -(-size // mesh[axis]) * mesh[axis]
                raise ShapeError(f"dimension {i} of {type} does not divide over the {mesh[axis]} ranks of {axis!r}; "
                                 f"nothing is padded: make it {fits}, or leave the dimension whole")
        for axis in self.partial:
            mesh[axis]

    def part(self, mesh: Mesh, rank: int, shape: Iterable[int]) -> tuple[slice, ...]:
        """Where a rank's part lies in the whole: global coordinates, one slice per dimension."""
        here = mesh.coordinates(rank)
        return tuple(slice(0, size) if axis is None else
                     slice(here[axis] * (size // mesh[axis]), (here[axis] + 1) * (size // mesh[axis]))
                     for size, axis in zip(shape, self.dims))

    def cut(self, array: Any, mesh: Mesh, rank: int) -> np.ndarray:
        """A rank's part of a whole array, a copy; of a partial sum the first rank has all, the others have zeros."""
        array = np.asarray(array)
        here = mesh.coordinates(rank)
        if any(here[axis] for axis in self.partial):
            array = np.zeros_like(array)
        return np.array(array[self.part(mesh, rank, array.shape)])

    def join(self, parts: list[np.ndarray], mesh: Mesh) -> np.ndarray:
        """The whole array from every rank's part."""
        shape = tuple(s if d is None else s * mesh[d] for s, d in zip(parts[0].shape, self.dims))
        result = np.zeros(shape, parts[0].dtype)
        first = [a for a in mesh.names if a not in self.dims and a not in self.partial]
        for rank, part in enumerate(parts):
            if all(mesh.coordinates(rank)[a] == 0 for a in first):
                at = self.part(mesh, rank, shape)
                result[at] = result[at] + part if self.partial else part
        return result

    def __str__(self) -> str:
        text = "[" + ",".join(d or "-" for d in self.dims) + "]"
        return text + (f"+sum({','.join(self.partial)})" if self.partial else "")
