"""Functions that reduce over axes, accumulate along one, sort, or search.

`axis` is None (all), an int or a tuple of ints; negative ones count from the end. Sums and products of small
integers and bools are int64 (uint64 of unsigned ones), as in NumPy; means and norms of integers are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..ir.dtypes import as_dtype, float32
from ..ir.errors import AttributeValueError, ShapeError
from ..ir.location import user_location
from .dispatch import apply, as_tensor, cast, normalize_axes, normalize_axis
from .functions_elementwise import absolute, as_bool, sqrt, square, where
from .tensor import Tensor

Axis = Any


def _reduce(op: str, x: Tensor, axis: Axis, keepdims: bool) -> Tensor:
    axes = normalize_axes(axis, x.ndim)
    if not axes and axis is not None:
        return x
    result: Tensor = apply(op, x, axes=axes, keepdims=bool(keepdims))
    return result


def _floating(x: Any) -> Tensor:
    x = as_tensor(x)
    return x if x.dtype.is_float else cast(x, float32)


def _wide(x: Any, dtype: Any) -> Tensor:
    """x in `dtype`, or in the dtype that sums of x have."""
    x = as_tensor(x)
    if dtype is not None:
        return cast(x, as_dtype(dtype))
    if x.dtype.is_float or x.dtype.bits == 64:
        return x
    return cast(x, as_dtype("uint64" if x.dtype.is_unsigned else "int64"))


def sum(x: Any, axis: Axis = None, keepdims: bool = False, dtype: Any = None) -> Tensor:
    """Sum over axes, computed and given in `dtype`."""
    return _reduce("reduce_sum", _wide(x, dtype), axis, keepdims)


def prod(x: Any, axis: Axis = None, keepdims: bool = False, dtype: Any = None) -> Tensor:
    """Product over axes, computed and given in `dtype`."""
    return _reduce("reduce_prod", _wide(x, dtype), axis, keepdims)


def mean(x: Any, axis: Axis = None, keepdims: bool = False, dtype: Any = None) -> Tensor:
    """Mean over axes; NaN over no elements."""
    x = _floating(x)
    return _reduce("reduce_mean", x if dtype is None else cast(x, as_dtype(dtype)), axis, keepdims)


def _extreme(op: str, on_bool: str, x: Any, axis: Axis, keepdims: bool) -> Tensor:
    x = as_tensor(x)
    return _reduce(on_bool if x.dtype.is_bool else op, x, axis, keepdims)


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Largest over axes; NaN if there is one; the smallest value of the dtype over no elements."""
    return _extreme("reduce_max", "reduce_any", x, axis, keepdims)


def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Smallest over axes; NaN if there is one; the largest value of the dtype over no elements."""
    return _extreme("reduce_min", "reduce_all", x, axis, keepdims)


amax, amin = max, min


def any(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Whether any element is true; numbers are true if they are not zero."""
    return _reduce("reduce_any", as_bool(x), axis, keepdims)


def all(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Whether all elements are true; numbers are true if they are not zero."""
    return _reduce("reduce_all", as_bool(x), axis, keepdims)


def count_nonzero(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """How many elements are not zero, int64."""
    return sum(as_bool(x), axis, keepdims)


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) over axes, without overflow."""
    return _reduce("logsumexp", _floating(x), axis, keepdims)


def _count(x: Tensor, axes: tuple[int, ...]) -> Any:
    count = math.prod(x.shape[a] for a in axes)
    if not isinstance(count, int):
        raise ShapeError(f"a correction needs the number of elements, but {count} is known only at run time; use "
                         "correction=0", user_location())
    return count


def var(x: Any, axis: Axis = None, keepdims: bool = False, correction: float = 0, ddof: float | None = None) -> Tensor:
    """Variance over axes; `correction` (NumPy's `ddof`) is subtracted from the number of elements it divides by."""
    x = _floating(x)
    correction = correction if ddof is None else ddof
    axes = normalize_axes(axis, x.ndim)
    squares = square(x - mean(x, axes, keepdims=True))
    if correction == 0:
        return mean(squares, axes, keepdims)
    count = _count(x, axes) - correction
    return sum(squares, axes, keepdims) / (count if count > 0 else 0.0)


def std(x: Any, axis: Axis = None, keepdims: bool = False, correction: float = 0, ddof: float | None = None) -> Tensor:
    """Standard deviation over axes: the square root of `var`."""
    return sqrt(var(x, axis, keepdims, correction, ddof))


def norm(x: Any, ord: Any = 2, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Vector norm of all elements together, or along axes: (sum |x| ** ord) ** (1 / ord).

    Args:
        ord: a number; 0 counts what is not zero, inf and -inf give the largest and smallest magnitude.
    """
    x = _floating(x)
    if ord == 2:
        return sqrt(sum(square(x), axis, keepdims))
    magnitude = absolute(x)
    if ord == math.inf:
        return max(magnitude, axis, keepdims)
    if ord == -math.inf:
        return min(magnitude, axis, keepdims)
    if ord == 1:
        return sum(magnitude, axis, keepdims)
    if ord == 0:
        return cast(count_nonzero(x, axis, keepdims), x.dtype)
    if not isinstance(ord, (int, float)):
        raise AttributeValueError(f"norm: ord is {ord!r}; expected a number", user_location())
    return sum(magnitude ** ord, axis, keepdims) ** (1.0 / ord)


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 1 else apply("reshape", x, shape=(x.size,))


def _arg(op: str) -> Callable[..., Tensor]:
    def function(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
        x = as_tensor(x)
        if axis is None:
            found: Tensor = apply(op, _flat(x), axis=0, keepdims=False)
            return apply("reshape", found, shape=(1,) * x.ndim) if keepdims else found
        result: Tensor = apply(op, x, axis=normalize_axis(axis, x.ndim), keepdims=bool(keepdims))
        return result

    function.__name__ = function.__qualname__ = op
    return function


argmax = _arg("argmax")
argmax.__doc__ = "Index (int64) of the largest along an axis, or in the flattened tensor; the first of equals."
argmin = _arg("argmin")
argmin.__doc__ = "Index (int64) of the smallest along an axis, or in the flattened tensor; the first of equals."


def _cumulative(op: str) -> Callable[..., Tensor]:
    def function(x: Any, axis: int | None = None, dtype: Any = None, exclusive: bool = False,
                 reverse: bool = False) -> Tensor:
        x = _wide(x, dtype)
        if axis is None:
            x, axis = _flat(x), 0
        result: Tensor = apply(op, x, axis=normalize_axis(axis, x.ndim), exclusive=bool(exclusive),
                               reverse=bool(reverse))
        return result

    function.__name__ = function.__qualname__ = op
    return function


cumsum = _cumulative("cumsum")
cumsum.__doc__ = "Running sum along an axis (None: flattened); exclusive: of what comes before; reverse: from the end."
cumprod = _cumulative("cumprod")
cumprod.__doc__ = "Running product along an axis (None: flattened); options as for `cumsum`."


# Order ---------------------------------------------------------------------------------------------------------


def sort(x: Any, axis: int = -1, descending: bool = False) -> Tensor:
    """x in order along an axis, stable; NaN counts as the largest."""
    x = as_tensor(x)
    values: Tensor = apply("sort", x, axis=normalize_axis(axis, x.ndim), descending=bool(descending))[0]
    return values


def argsort(x: Any, axis: int = -1, descending: bool = False) -> Tensor:
    """The indices (int64) that put x in order along an axis, stable."""
    x = as_tensor(x)
    indices: Tensor = apply("sort", x, axis=normalize_axis(axis, x.ndim), descending=bool(descending))[1]
    return indices


def top_k(x: Any, k: int, axis: int = -1, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) along an axis, best first, and their indices (int64)."""
    x = as_tensor(x)
    values, indices = apply("top_k", x, k=k, axis=normalize_axis(axis, x.ndim), largest=bool(largest))
    return values, indices


def median(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The middle value along an axis (None: of all), or the mean of the two middle ones; NaN if there is one."""
    x = _floating(x)
    ndim = x.ndim
    if axis is None:
        x, place = _flat(x), 0
    else:
        place = normalize_axis(axis, ndim)
    size = _count(x, (place,))
    if size == 0:
        raise ShapeError(f"the median along axis {place} of {x.type} has no elements", user_location())
    ordered = sort(x, place)
    low = _slice(ordered, place, (size - 1) // 2)
    middle = low if size % 2 else (low + _slice(ordered, place, size // 2)) * 0.5
    largest = _slice(ordered, place, size - 1)
    middle = where(largest != largest, largest, middle)  # NaN sorts last
    shape = tuple(1 if axis is None or i == place else s for i, s in enumerate(x.shape if axis is not None else
                                                                              (1,) * ndim))
    if keepdims:
        result: Tensor = apply("reshape", middle, shape=shape)
        return result
    return apply("reshape", middle, shape=tuple(s for i, s in enumerate(middle.shape) if i != place))


def _slice(x: Tensor, axis: int, index: int) -> Tensor:
    starts = tuple(index if i == axis else 0 for i in range(x.ndim))
    limits = tuple(index + 1 if i == axis else s for i, s in enumerate(x.shape))
    result: Tensor = apply("slice", x, starts=starts, limits=limits, strides=(1,) * x.ndim)
    return result


def ptp(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Largest minus smallest over axes."""
    return max(x, axis, keepdims) - min(x, axis, keepdims)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along an axis, without overflow."""
    x = _floating(x)
    result: Tensor = apply("softmax", x, axis=normalize_axis(axis, x.ndim))
    return result


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """log(softmax(x)) along an axis, without overflow."""
    x = _floating(x)
    result: Tensor = apply("log_softmax", x, axis=normalize_axis(axis, x.ndim))
    return result
