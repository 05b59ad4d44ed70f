"""How one value lies on a mesh.

Along each mesh axis a value is in one of three states: *whole* (every rank has all of it), *split* along one of its
dimensions (each rank has an equal part), or a *partial sum* (the value is the sum of what the ranks have). A
`Sharding` says this by dimension, as one writes it: `Sharding(("data", None))` is split along its first dimension
over the axis "data" and whole along all others; `partial` names the axes over which it is a sum.

A dimension may be split over several axes, `("data", "tensor")`. The later one of the mesh cuts first, the earlier one
what that has left: so what is gathered most often (along the first axis, ZeRO's) is put together again by one gather.

A dimension may be split in blocks. `"tensor:3"` is a dimension of three parts one after the other (query, key and value
of one projection) each of which is split: a rank has its share of every block, not a third of them all.

A dimension that does not divide may be padded, if one axis splits it and not in blocks: every rank has as much as the
first, and what lies beyond the end means nothing (`partition.py` masks it where it would count).

The parts of the package that look at one axis at a time use a *placement*, a number: WHOLE, or PARTIAL, or the
dimension that is split, with the number of blocks (`split`, `dim_of`, `blocks_of`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.dtypes import as_dtype
from ..ir.errors import ShapeError
from ..ir.types import TensorType
from .mesh import Mesh, MeshError

WHOLE, PARTIAL = -1, -2
_RANKS = 64  # NumPy's most dimensions



def split(dim: int, blocks: int = 1) -> int:
    """The placement of a dimension that is split, in so many blocks."""
    return dim + _RANKS * (blocks - 1)


def dim_of(placement: int) -> int:
    """The dimension that is split."""
    return placement % _RANKS


def blocks_of(placement: int) -> int:
    """In how many blocks it is split: 1, unless it is more."""
    return placement // _RANKS + 1


def _parsed(entry: Any) -> list[tuple[str, int]]:
    """(axis, blocks) of what a dimension is split over."""
    names = entry.split(",") if isinstance(entry, str) else [n for part in entry or () for n in part.split(",")]
    found = []
    for name in filter(None, (n.strip() for n in names)):
        axis, _, blocks = name.partition(":")
        if blocks and (not blocks.isdigit() or not int(blocks)):
            raise MeshError(f"a dimension is split over {name!r}; expected a mesh axis such as 'tensor', or with a "
                            "number of blocks 'tensor:3'")
        found.append((axis, int(blocks or 1)))
    return found


def _written(axes: Iterable[tuple[str, int]]) -> Any:
    names = tuple(axis if blocks == 1 else f"{axis}:{blocks}" for axis, blocks in sorted(axes))
    return None if not names else names[0] if len(names) == 1 else names


@dataclass(frozen=True)
class Sharding:
    """For each dimension None, a mesh axis, or several; and the axes over which the value is a partial sum.

    Raises:
        MeshError: an axis stands twice.
    """

    dims: tuple[Any, ...]
    partial: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parsed = tuple(map(_parsed, self.dims))
        object.__setattr__(self, "dims", tuple(map(_written, parsed)))
        object.__setattr__(self, "partial", tuple(sorted(self.partial)))
        object.__setattr__(self, "_split", tuple(map(tuple, parsed)))
        used = [*(axis for axes in parsed for axis, _ in axes), *self.partial]
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
        return _placed(rank, tuple(placements.items()))

    def axes(self, dim: int) -> tuple[str, ...]:
        """The mesh axes that a dimension is split over."""
        return tuple(axis for axis, _ in self._split[dim])  # type: ignore[attr-defined]

    @property
    def split_axes(self) -> tuple[str, ...]:
        """All mesh axes that a dimension is split over."""
        return tuple(axis for dim in range(len(self.dims)) for axis in self.axes(dim))

    @property
    def is_blocked(self) -> bool:
        """Whether a rank's part is not one run along every dimension."""
        return any(blocks > 1 for axes in self._split for _, blocks in axes)  # type: ignore[attr-defined]

    def placement(self, axis: str) -> int:
        """The dimension (and blocks) that is split over an axis, or WHOLE, or PARTIAL."""
        if axis in self.partial:
            return PARTIAL
        for dim, axes in enumerate(self._split):  # type: ignore[attr-defined]
            for own, blocks in axes:
                if own == axis:
                    return split(dim, blocks)
        return WHOLE

    def placed(self, axis: str, placement: int) -> Sharding:
        """The same with another placement along one axis."""
        placements = {a: self.placement(a) for a in (*self.split_axes, *self.partial)}
        return Sharding.of(len(self.dims), {**placements, axis: placement})

    def order(self, dim: int, mesh: Mesh) -> list[tuple[str, int]]:
        """(axis, blocks) of a dimension, the one that cuts first in front."""
        own = dict(self._split[dim])  # type: ignore[attr-defined]
        for axis in own:
            mesh[axis]
        return [(axis, own[axis]) for axis in reversed(mesh.names) if axis in own]

    def ranks(self, dim: int, mesh: Mesh) -> int:
        """Over how many ranks a dimension is split."""
        return math.prod(mesh[axis] for axis in self.axes(dim))

    @property
    def is_whole(self) -> bool:
        """Every rank has all of the value."""
        return not self.partial and not any(self.dims)

    def local(self, type: TensorType, mesh: Mesh) -> TensorType:
        """The type of one rank's part, padded where a dimension does not divide.

        Raises:
            ShapeError: a dimension can neither be divided nor padded.
            MeshError: the ranks differ, or the mesh has no such axis.
        """
        self.check(type, mesh, padded=True)
        return type.with_shape(tuple(s if d is None else -(-s // self.ranks(i, mesh))
                                     for i, (s, d) in enumerate(zip(type.shape, self.dims))))

    def pads(self, dim: int, size: Any, mesh: Mesh) -> bool:
        """Whether a dimension of this size does not divide, but can be padded."""
        own = self._split[dim]  # type: ignore[attr-defined]
        return isinstance(size, int) and len(own) == 1 and own[0][1] == 1 and size % mesh[own[0][0]] != 0

    def check(self, type: TensorType, mesh: Mesh, name: str = "", padded: bool = False) -> None:
        """That a value of this type (and name, for the message) can lie so; `padded`: padding is allowed.

        Raises:
            ShapeError: a dimension does not divide; the message gives the nearest size that does.
            MeshError: the ranks differ, or the mesh has no such axis.
        """
        what = f"{name} ({type})" if name else str(type)
        if len(self.dims) != type.rank:
            raise MeshError(f"the sharding {self} is for {len(self.dims)} dimensions, the value is {what}")
        for i, size in enumerate(type.shape):
            if self.dims[i] is None:
                continue
            if not isinstance(size, int):
                raise ShapeError(f"dimension {i} of {what} is symbolic: partitioning needs a number")
            order = self.order(i, mesh)
            if padded and self.pads(i, size, mesh):
                continue
            if not self.fits(i, size, mesh):
                unit = self.ranks(i, mesh) * math.lcm(*(blocks for _, blocks in order))
                over = " and ".join(f"{mesh[axis]} ranks of {axis!r}" for axis, _ in order)
                parts = "".join(f" in {blocks} blocks" for _, blocks in order if blocks > 1)
                raise ShapeError(f"dimension {i} of {what} does not divide over the {over}{parts}; nothing is padded: "
                                 f"make it {-(-size // unit) * unit}, or leave the dimension whole")
        for axis in self.partial:
            mesh[axis]

    def fits(self, dim: int, size: Any, mesh: Mesh) -> bool:
        """Whether a dimension of this size divides."""
        return isinstance(size, int) and divides(size, [(blocks, mesh[axis]) for axis, blocks in self.order(dim, mesh)])

    def indices(self, dim: int, mesh: Mesh, rank: int, size: int) -> np.ndarray:
        """Which elements of a dimension a rank has."""
        here, found = mesh.coordinates(rank), np.arange(size)
        if self.pads(dim, size, mesh):
            (axis,) = self.axes(dim)
            each = -(-size // mesh[axis])
            return found[here[axis] * each:(here[axis] + 1) * each]
        for axis, blocks in self.order(dim, mesh):
            found = found.reshape(blocks, mesh[axis], -1)[:, here[axis]].reshape(-1)
        return found

    def part(self, mesh: Mesh, rank: int, shape: Iterable[int]) -> tuple[slice, ...]:
        """Where a rank's part lies in the whole: global coordinates, one slice per dimension.

        Raises:
            MeshError: it is split in blocks, so that it is several `pieces`.
        """
        if self.is_blocked:
            raise MeshError(f"a part under {self} is not one run; ask for its pieces")
        return next(self.pieces(mesh, rank, tuple(shape)))[1]

    def pieces(self, mesh: Mesh, rank: int,
               shape: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """A rank's part piece by piece: (where in the part, where in the whole), slices of every dimension."""
        for runs in itertools.product(*(_runs(self.indices(i, mesh, rank, size)) for i, size in enumerate(shape))):
            yield (tuple(slice(at, at + n) for at, _, n in runs),
                   tuple(slice(start, start + n) for _, start, n in runs))

    def assemble(self, mesh: Mesh, rank: int, type: TensorType,
                 read: Callable[[tuple[slice, ...]], np.ndarray]) -> np.ndarray:
        """A rank's part from what `read` gives of places in the whole."""
        part = np.zeros(self.local(type, mesh).shape, type.dtype.np)
        for own, at in self.pieces(mesh, rank, tuple(map(int, type.shape))):
            part[own] = read(at)
        return part

    def cut(self, array: Any, mesh: Mesh, rank: int) -> np.ndarray:
        """A rank's part of a whole array, a copy; of a partial sum the first rank has all, the others have zeros."""
        array = np.asarray(array)
        here = mesh.coordinates(rank)
        if any(here[axis] for axis in self.partial):
            array = np.zeros_like(array)
        if any(self.pads(i, n, mesh) for i, n in enumerate(array.shape)):
            return self.assemble(mesh, rank, TensorType(array.shape, as_dtype(array.dtype)), array.__getitem__)
        if not self.is_blocked:
            return np.array(array[self.part(mesh, rank, array.shape)])
        return np.array(array[np.ix_(*(self.indices(i, mesh, rank, n) for i, n in enumerate(array.shape)))])

    def join(self, parts: list[np.ndarray], mesh: Mesh, shape: Sequence[int] | None = None) -> np.ndarray:
        """The whole array, of a shape (default: nothing was padded), from every rank's part."""
        shape = tuple(s * self.ranks(i, mesh) for i, s in enumerate(parts[0].shape)) if shape is None else tuple(shape)
        result = np.zeros(shape, parts[0].dtype)
        first = [a for a in mesh.names if a not in self.split_axes and a not in self.partial]
        for rank, part in enumerate(parts):
            if all(mesh.coordinates(rank)[a] == 0 for a in first):
                for own, at in self.pieces(mesh, rank, shape):
                    result[at] = result[at] + part[own] if self.partial else part[own]
        return result

    def __str__(self) -> str:
        text = "[" + ",".join("-" if d is None else d if isinstance(d, str) else "(" + ",".join(d) + ")"
                              for d in self.dims) + "]"
        return text + (f"+sum({','.join(self.partial)})" if self.partial else "")


def divides(size: int, cuts: Iterable[tuple[int, int]]) -> bool:
    """Whether a dimension can be cut by these (blocks, ranks), one after the other."""
    for blocks, ranks in cuts:
        if size % (blocks * ranks):
            return False
        size //= ranks
    return True


def _runs(indices: np.ndarray) -> list[tuple[int, int, int]]:
    """Runs of consecutive numbers: (place in the list, first number, how many)."""
    if not indices.size:
        return [(0, 0, 0)]
    starts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist()]
    return [(at, int(indices[at]), end - at) for at, end in zip(starts, [*starts[1:], indices.size])]


@functools.lru_cache(maxsize=4096)
def _placed(rank: int, placements: tuple[tuple[str, int], ...]) -> Sharding:
    dims: list[list[tuple[str, int]]] = [[] for _ in range(rank)]
    for axis, placement in placements:
        if placement >= 0:
            dims[dim_of(placement)].append((axis, blocks_of(placement)))
    return Sharding(tuple(map(_written, dims)), tuple(axis for axis, p in placements if p == PARTIAL))
