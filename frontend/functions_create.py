"""Functions that make tensors.

The default dtype is float32; Python ints give int64 and bools bool where a value decides. Shapes may hold symbolic
`Dim`s inside a trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ir.dims import Dim
from ..ir.dtypes import as_dtype, bool_, float32, int64
from ..ir.errors import AttributeValueError, ShapeError
from ..ir.location import user_location
from .dispatch import apply, as_tensor, cast, constant, is_weak, normalize_shape
from .functions_elementwise import where
from .tensor import Tensor, default_dtype


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False, role: str | None = None) -> Tensor:
    """A new tensor with a copy of the data.

    Args:
        data: a number, nested lists, a NumPy array or a tensor.
        dtype: default: that of the array; of Python numbers float32, int64 or bool.
        requires_grad: see `Tensor`.
        role: "state" for what traced functions `assign` to; see `Tensor`.

    Raises:
        DTypeError: no supported dtype holds the elements.
        ShapeError: nested lists of different lengths.
    """
    if isinstance(data, Tensor) and data.is_tracer:
        return as_tensor(data, dtype)
    return Tensor(data, dtype, requires_grad=requires_grad, role=role)


def asarray(data: Any, dtype: Any = None) -> Tensor:
    """A tensor with the data, without a copy where possible: the caller must not change a given array afterwards."""
    return as_tensor(data, dtype)


def full(shape: Any, value: Any, dtype: Any = None) -> Tensor:
    """A tensor with every element `value` (a number or a scalar tensor)."""
    shape = normalize_shape(shape)
    if is_weak(value):
        scalar = constant(value, default_dtype(value) if dtype is None else as_dtype(dtype))
    else:
        scalar = as_tensor(value, dtype)
    return scalar if shape == scalar.shape else apply("broadcast_to", scalar, shape=shape)


def zeros(shape: Any, dtype: Any = float32) -> Tensor:
    """A tensor of zeros."""
    return full(shape, 0, float32 if dtype is None else dtype)


def ones(shape: Any, dtype: Any = float32) -> Tensor:
    """A tensor of ones."""
    return full(shape, 1, float32 if dtype is None else dtype)


empty = zeros


def full_like(x: Any, value: Any, dtype: Any = None) -> Tensor:
    """A tensor of the shape (and by default the dtype) of x with every element `value`."""
    x = as_tensor(x)
    return full(x.shape, value, x.dtype if dtype is None else dtype)


def zeros_like(x: Any, dtype: Any = None) -> Tensor:
    """Zeros of the shape (and by default the dtype) of x."""
    return full_like(x, 0, dtype)


def ones_like(x: Any, dtype: Any = None) -> Tensor:
    """Ones of the shape (and by default the dtype) of x."""
    return full_like(x, 1, dtype)


empty_like = zeros_like


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> Tensor:
    """start, start + step, ... before stop; `arange(stop)` starts at 0.

    Raises:
        AttributeValueError: step is 0.
    """
    if stop is None:
        start, stop = 0, start
    numbers = (start, stop, step)
    if dtype is None:
        dtype = float32 if any(isinstance(v, (float, np.floating)) for v in numbers) else int64
    dtype = as_dtype(dtype)
    if step == 0:
        raise AttributeValueError("arange: step must not be 0", user_location())
    if any(isinstance(v, Dim) for v in numbers):
        if not isinstance(step, int) or step != 1:
            raise ShapeError("arange over a symbolic size needs step 1", user_location())
        count = stop - start
    else:
        count = max(math.ceil((stop - start) / step), 0)
    wide = dtype if dtype.bits >= 32 else as_dtype("float32" if dtype.is_float else "int32")
    x: Tensor = apply("iota", shape=(count,), axis=0, dtype=wide)
    if step != 1:
        x = x * step
    if start != 0:
        x = x + start
    return cast(x, dtype)


def linspace(start: float, stop: float, num: int = 50, endpoint: bool = True, dtype: Any = None) -> Tensor:
    """`num` evenly spaced numbers from start to stop, stop included unless `endpoint` is False."""
    dtype = float32 if dtype is None else as_dtype(dtype)
    return as_tensor(np.linspace(start, stop, num, endpoint).astype(dtype.np))


def eye(rows: int, columns: int | None = None, k: int = 0, dtype: Any = float32) -> Tensor:
    """A matrix with ones on diagonal k (0: the main one, positive: above it)."""
    shape = normalize_shape((rows, rows if columns is None else columns))
    return cast(_diagonals(shape, k, "eq"), as_dtype(dtype))


def _diagonals(shape: Sequence[Any], k: int, compare: str) -> Tensor:
    """Elements (i, j) where i + k compares so with j."""
    down: Tensor = apply("iota", shape=(shape[0], 1), axis=0, dtype=int64)
    across: Tensor = apply("iota", shape=(1, shape[1]), axis=1, dtype=int64)
    result: Tensor = apply(compare, down + k, across)
    return result


def _triangle(x: Any, k: int, compare: str) -> Tensor:
    x = as_tensor(x)
    if x.ndim < 2:
        raise ShapeError(f"a triangle needs at least two axes, got {x.type}", user_location())
    mask = _diagonals(x.shape[-2:], k, compare)
    if x.dtype.is_bool:
        return mask & x
    return where(mask, x, constant(0, x.dtype))


def tril(x: Any, k: int = 0) -> Tensor:
    """The lower triangles of the matrices in the last two axes: zeros above diagonal k."""
    return _triangle(x, k, "ge")


def triu(x: Any, k: int = 0) -> Tensor:
    """The upper triangles of the matrices in the last two axes: zeros below diagonal k."""
    return _triangle(x, k, "le")


def tri(rows: int, columns: int | None = None, k: int = 0, dtype: Any = float32) -> Tensor:
    """Ones at and below diagonal k."""
    return cast(_diagonals((rows, rows if columns is None else columns), k, "ge"), as_dtype(dtype))


def meshgrid(*xs: Any, indexing: str = "xy") -> list[Tensor]:
    """Coordinate grids of 1-D tensors; `indexing` is "xy" (the first varies along axis 1) or "ij"."""
    if indexing not in ("xy", "ij"):
        raise AttributeValueError(f'meshgrid: indexing is "xy" or "ij", not {indexing!r}', user_location())
    tensors = [as_tensor(x) for x in xs]
    order = list(range(len(tensors)))
    if indexing == "xy" and len(order) > 1:
        order[0], order[1] = 1, 0
    shape: list[Any] = [0] * len(tensors)
    for axis, x in zip(order, tensors):
        shape[axis] = x.size
    grids = []
    for axis, x in zip(order, tensors):
        column = apply("reshape", x, shape=tuple(x.size if i == axis else 1 for i in range(len(shape))))
        grids.append(apply("broadcast_to", column, shape=tuple(shape)))
    return grids


def diag(x: Any, k: int = 0) -> Tensor:
    """A matrix with the vector x on diagonal k, or the diagonal k of a matrix."""
    x = as_tensor(x)
    if x.ndim == 1:
        size = x.shape[0] + (k if k >= 0 else -k)
        row = apply("pad", x, low=(max(k, 0),), high=(max(-k, 0),), interior=(0,), value=0)  # along the columns
        mask = _diagonals((size, size), k, "eq")
        return where(mask, row, constant(0, x.dtype)) if not x.dtype.is_bool else mask & row
    if x.ndim != 2:
        raise ShapeError(f"diag needs one or two axes, got {x.type}", user_location())
    rows, columns = x.shape
    first = k if k >= 0 else -k * columns
    count = max(min(rows, columns - k) if k >= 0 else min(rows + k, columns), 0)
    if count == 0:
        return zeros((0,), x.dtype)
    flat = apply("reshape", x, shape=(rows * columns,))
    result: Tensor = apply("slice", flat, starts=(first,), limits=(first + (count - 1) * (columns + 1) + 1,),
                           strides=(columns + 1,))
    return result


def one_hot(indices: Any, depth: int, dtype: Any = float32) -> Tensor:
    """1 at the index along a new last axis of size `depth`, 0 elsewhere; an index outside gives zeros."""
    dtype = as_dtype(dtype)
    indices = as_tensor(indices)
    if dtype == bool_:
        return cast(one_hot(indices, depth, "uint8"), bool_)
    result: Tensor = apply("one_hot", indices, depth=depth, dtype=dtype)
    return result
