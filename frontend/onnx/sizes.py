"""Operands that are sizes: known ones, those that follow from other sizes (`elements`), and those that data decide.

Of the last `OnnxNode.size` makes symbolic sizes (`frontend.data_sizes`), so that one program serves all values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.dims import Dim, Size
from ...ir.dtypes import int64
from ...ir.errors import ShapeError
from .. import functions as F
from ..data_sizes import is_data_size, require_zero, size_tensor
from ..dispatch import cast
from ..recording import current_trace
from ..tensor import Tensor
from .elements import element
from .values import is_known, plain


def numbers(node: Any, value: Any, what: str) -> list[Any]:
    """A vector, of which each element is a number, a `Dim`, or a scalar tensor (integers as int64) that data decide."""
    if is_known(value):
        return list(plain(value).reshape(-1).tolist())
    if not isinstance(value, Tensor):
        raise node.fail(f"the operand {what!r} is missing")
    if current_trace() is None or not value.is_tracer:
        return list(node.need(value, what).reshape(-1).tolist())
    if not isinstance(value.size, int):
        raise node.fail(f"the operand {what!r} has the type {value.type}: its length depends on data too")
    flat = F.reshape(value, (value.size,))
    listed = [element(flat, i) for i in range(value.size)]
    wide = int64 if flat.dtype.is_integer else flat.dtype
    return [cast(flat[i], wide) if size is None else size for i, size in enumerate(listed)]


def sizes(node: Any, value: Any, what: str) -> list[Size]:
    """`numbers`, of which those that data decide have become symbolic sizes: at least 0."""
    return [node.size(n, f"{what}[{i}]") if isinstance(n, Tensor) else n
            for i, n in enumerate(numbers(node, value, what))]


def as_number(size: Any) -> Tensor:
    """An int, a `Dim` or a scalar tensor as an int64 scalar tensor."""
    return size if isinstance(size, Tensor) else size_tensor(size)


def total(factors: Sequence[Any]) -> Any:
    """A product: a size, or a scalar tensor where a factor is one."""
    if not any(isinstance(n, Tensor) for n in factors):
        return math.prod(factors)
    result = as_number(1)
    for n in factors:
        result = result * as_number(n)
    return result


# Reshape ----------------------------------------------------------------------------------------------------------

def reshaped(node: Any, x: Tensor, wanted: Sequence[Any]) -> Tensor:
    """x under a shape of which data decide some sizes; -1 stands for what is left.

    That both have the same number of elements is checked at run time.
    """
    open_ones = [i for i, n in enumerate(wanted) if isinstance(n, Tensor)]
    rest = [n for n in wanted if not isinstance(n, Tensor)]
    left = _left(x, rest) if len(open_ones) == 1 and -1 not in [n for n in rest if isinstance(n, int)] else None
    if left is not None:  # one size, which follows from the others
        given = wanted[open_ones[0]]
        wrong = F.logical_and(given != -1, given != as_number(left))
        shape = [left if isinstance(n, Tensor) else n for n in wanted]
    else:
        shape = [_chosen(node, x, wanted, i) for i in range(len(wanted))]
        wrong = as_number(total(shape)) != as_number(x.size)
    require_zero(cast(wrong, int64), f"{node}: the shape does not fit the elements of {x.type}")
    if left is None:
        x = F.reshape(x, (x.size,))[:math.prod(shape)]
    return F.reshape(x, tuple(shape))


def _left(x: Tensor, rest: Sequence[Size]) -> Size | None:
    have: list[Size] = list(x.shape)
    others = []
    for n in rest:
        if n in have:
            have.remove(n)
        else:
            others.append(n)
    size, divisor = math.prod(have), math.prod(others)
    try:
        if isinstance(size, Dim):
            return size // divisor
    except ShapeError:
        return None
    return size // divisor if isinstance(divisor, int) and divisor and size % divisor == 0 else None


def _chosen(node: Any, x: Tensor, wanted: Sequence[Any], i: int) -> Size:
    n = wanted[i]
    if not isinstance(n, Tensor) and n != -1:
        size: Size = n
        return size
    others = as_number(1)
    for k, m in enumerate(wanted):
        if k != i:
            others = others * (F.where(m == -1, 1, m) if isinstance(m, Tensor) else as_number(m if m != -1 else 1))
    rest = as_number(x.size) // F.maximum(others, 1)
    size = node.size(F.where(n == -1, rest, n) if isinstance(n, Tensor) else rest, f"shape[{i}]")
    return size


# Slices -----------------------------------------------------------------------------------------------------------

def inside(bound: Any, size: Size) -> bool:
    """Whether a bound of a slice needs no clamping: data do not decide it, or it is the size itself."""
    if isinstance(bound, Tensor):
        return False
    return bound == size or not is_data_size(bound) and (
        not is_data_size(size) or bound == 0 or isinstance(bound, int) and abs(bound) >= 10**9)


def sliced_by_data(node: Any, x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    """x[start:end:step] of one axis, bounds clamped at run time; as long as they say."""
    size = x.shape[axis]
    length, zero = as_number(size), as_number(0)
    low, high = (zero, length) if step > 0 else (zero - 1, length - 1)

    def clamped(bound: Any) -> Tensor:
        number = as_number(bound)
        return F.minimum(F.maximum(F.where(number < 0, number + length, number), low), high)

    first, last = clamped(start), clamped(end)
    count = F.maximum((last - first + (step - 1 if step > 0 else step + 1)) // step, 0)
    steps = node.size(count, f"the length of the slice along axis {axis}", size)
    if isinstance(start, int) and start == 0 and step == 1:
        return x[tuple(slice(0, steps) if i == axis else slice(None) for i in range(axis + 1))]
    return F.take(x, first + F.arange(steps) * step, axis)


def ranged(node: Any, start: Any, limit: Any, delta: Any, dtype: Any) -> Tensor:
    """start, start + delta, ... before limit, as long as data say; the bounds are numbers, `Dim`s or scalar tensors."""
    wide = dtype if dtype.is_float else int64
    first, last, step = (cast(as_number(v) if isinstance(v, (Dim, Tensor)) else F.asarray(v, wide), wide)
                         for v in (start, limit, delta))
    count = cast(F.ceil((last - first) / step), int64) if dtype.is_float else -((first - last) // step)
    steps = node.size(F.maximum(count, 0), "the number of elements of the range")
    return cast(cast(F.arange(steps), wide) * step + first, dtype)
