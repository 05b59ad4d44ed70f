"""The type of a value: a shape and a dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .dims import Dim, Size, evaluate
from .dtypes import DType, as_dtype
from .errors import ShapeError

Shape = tuple[Size, ...]


def as_shape(spec: Any) -> Shape:
    """A tuple of non-negative ints and `Dim`s from an int, a Dim or an iterable of them."""
    sizes: Iterable[Any] = (spec,) if isinstance(spec, (int, Dim)) or hasattr(spec, "__index__") else spec
    shape = tuple(s if isinstance(s, Dim) else int(s.__index__()) for s in sizes)
    for size in shape:
        if isinstance(size, int) and size < 0:
            raise ShapeError(f"negative size {size} in shape {shape}")
    return shape


@dataclass(frozen=True)
class TensorType:
    """A dense tensor: `shape` of ints and symbolic `Dim`s, `dtype`. Text: `f32[8,784]`."""

    shape: Shape
    dtype: DType

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", as_shape(self.shape))
        object.__setattr__(self, "dtype", as_dtype(self.dtype))

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        return all(isinstance(s, int) for s in self.shape)

    @property
    def size(self) -> Size:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> Size:
        return self.size * self.dtype.itemsize

    def with_shape(self, shape: Any) -> TensorType:
        return TensorType(shape, self.dtype)

    def with_dtype(self, dtype: Any) -> TensorType:
        return TensorType(self.shape, dtype)

    def specialize(self, sizes: Mapping[str, int]) -> TensorType:
        """The static type that this is when the named sizes have the given values."""
        return TensorType(tuple(evaluate(s, sizes) for s in self.shape), self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype.short}[{','.join(map(str, self.shape))}]"


def broadcast_shapes(*shapes: Shape) -> Shape:
    """NumPy's broadcasting of shapes; a symbolic size broadcasts with 1 and with itself.

    Raises:
        ShapeError: two sizes differ and neither is 1; the message names both shapes.
    """
    rank = max(map(len, shapes), default=0)
    result: list[Size] = []
    for column in zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True):
        distinct = {s for s in column if s != 1}
        if len(distinct) > 1:
            raise ShapeError("shapes do not broadcast: " + " with ".join(shape_text(s) for s in shapes))
        result.append(distinct.pop() if distinct else 1)
    return tuple(result)


def shape_text(shape: Shape) -> str:
    """`[8, 784]`: a shape as messages show it."""
    return f"[{', '.join(map(str, shape))}]"
