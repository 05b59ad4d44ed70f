"""A mesh: the ranks of a job laid out along named axes.

`Mesh({"data": 2, "tensor": 4})` is 8 ranks; the last axis varies fastest, so ranks 0-3 are the tensor group of the
first data replica. Put the axis that talks most last: its ranks are neighbours, on one host if anything is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..ir.errors import TreadleError


class MeshError(TreadleError, ValueError):
    """A mesh that does not fit the job, or a sharding that does not fit its mesh."""


@dataclass(frozen=True, init=False)
class Mesh:
    """Ranks along named axes, row-major. `axes`: name -> number of ranks, at least 1.

    Raises:
        MeshError: an axis name is no identifier, or a size is not a positive whole number; or `axes` is no mapping.
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, axes: Mapping[str, int]):
        if not isinstance(axes, Mapping):
            raise MeshError(f"a mesh is made of axes and their ranks, such as {{'data': 2, 'tensor': 2}}, not of "
                            f"{axes!r}")
        axes = {name: int(size) if isinstance(size, np.integer) else size for name, size in axes.items()}
        for name, size in axes.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise MeshError(f"a mesh axis is called {name!r}; expected an identifier such as 'data'")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {name!r} has {size!r} ranks; expected a whole number of at least 1"
                                + " (-1, what the job has left, is for make_mesh)" * (size == -1))
        object.__setattr__(self, "axes", tuple(axes.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """The axes, the slowest varying first."""
        return tuple(name for name, _ in self.axes)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return math.prod(size for _, size in self.axes)

    def __contains__(self, axis: object) -> bool:
        return axis in self.names

    def __getitem__(self, axis: str) -> int:
        """The number of ranks along an axis."""
        for name, size in self.axes:
            if name == axis:
                return size
        raise MeshError(f"there is no mesh axis {axis!r}; this mesh is {self}")

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's place along each axis."""
        if not 0 <= rank < self.size:
            raise MeshError(f"rank {rank} is not one of the {self.size} of {self}")
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self.names}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at a place."""
        number = 0
        for name, size in self.axes:
            number = number * size + coordinates[name] % size
        return number

    def group(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from this one along one axis only, this one included, in order."""
        here = self.coordinates(rank)
        return [self.rank({**here, axis: i}) for i in range(self[axis])]

    def check_world(self, ranks: int) -> None:
        """That a job has as many ranks as the mesh.

        Raises:
            MeshError: it has not; the message says how to start it.
        """
        if ranks != self.size:
            needs = f"the mesh {self} needs {self.size} ranks" if self.size > 1 else "the mesh is one of 1 rank"
            raise MeshError(f"{needs}, but this job has {ranks}. Start it with `treadle launch -n {self.size} "
                            f"script.py`, or make a mesh of {ranks}, such as {{'data': {ranks}}}")

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes) or "1 rank"
