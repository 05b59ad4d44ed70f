"""Indexing and its transposes: `x[...]`, `x.at[...]`, take, gather, scatter.

Basic indices (ints, slices, None, Ellipsis) become slices and reshapes. Integer arrays become `take` (one of them) or
`gather_nd`, with NumPy's rules for where the new axes go. Bool masks become the indices of what they select, as many as
the data say (`data_sizes`). Negative indices count from the end. Outside a trace an index out of range is an
error; inside, gathers clamp it and scatters drop it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.dims import Dim
from ..ir.dtypes import bool_, int64
from ..ir.errors import ArgumentsError, AttributeValueError, DTypeError, ShapeError, TraceError
from ..ir.location import user_location
from .data_sizes import is_data_size, selected, size_tensor, true_indices
from .dispatch import apply, as_tensor, cast, constant, is_weak, normalize_axis, promoted
from .functions_elementwise import add, not_equal, where
from .functions_shape import broadcast_arrays, broadcast_to, expand_dims, moveaxis, reshape, stack, transpose
from .recording import current_trace
from .tensor import Tensor


@dataclass
class _Plan:
    """An index taken apart: a strided slice, the shape after it, and the integer arrays that come then.

    `result` lists, for each axis of the sliced and reshaped tensor, its size; `arrays` holds (axis of that tensor,
    indices); `place` is where the axes of the broadcast indices go among the remaining ones.
    """

    starts: list[Any] = field(default_factory=list)
    limits: list[Any] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    counts: list[Any] = field(default_factory=list)
    result: list[Any] = field(default_factory=list)
    arrays: list[tuple[int, Tensor]] = field(default_factory=list)
    place: int = 0

    def add_axis(self, start: Any, limit: Any, stride: int, count: Any) -> None:
        """One axis of the tensor."""
        self.starts.append(start)
        self.limits.append(limit)
        self.strides.append(stride)
        self.counts.append(count)


def getitem(x: Any, index: Any) -> Tensor:
    """x[index] with NumPy's meaning."""
    x = as_tensor(x)
    mask = _mask(x, index)
    if mask is not None and mask.is_tracer and mask.ndim:
        return selected(x, mask)
    plan = _plan(x, index)
    y = _sliced(x, plan)
    return y if not plan.arrays else _gathered(y, plan)


def _sliced(x: Tensor, plan: _Plan) -> Tensor:
    whole = all(isinstance(s, int) and s == 0 and k == 1 and c == n for s, k, c, n in
                zip(plan.starts, plan.strides, plan.counts, x.shape))
    if not whole:
        x = apply("slice", x, starts=tuple(plan.starts), limits=tuple(plan.limits), strides=tuple(plan.strides))
    return reshape(x, tuple(plan.result))


def _gathered(x: Tensor, plan: _Plan) -> Tensor:
    indices = broadcast_arrays(*(i for _, i in plan.arrays))
    axes = [a for a, _ in plan.arrays]
    new = indices[0].ndim
    if len(axes) == 1:
        y = apply("take", x, indices[0], axis=axes[0])
        at = axes[0]
    else:
        rest = [i for i in range(x.ndim) if i not in axes]
        y = apply("gather_nd", transpose(x, (*axes, *rest)), stack(indices, -1))
        at = 0
    if at == plan.place or not new:
        return y
    return moveaxis(y, tuple(range(at, at + new)), tuple(range(plan.place, plan.place + new)))


def _plan(x: Tensor, index: Any) -> _Plan:
    items = _expand(x, list(index) if isinstance(index, tuple) else [index])
    plan = _Plan()
    advanced: list[int] = []  # places of ints and arrays in the index
    before: list[int] = []    # axes of the result before each item, arrays not counted
    axis = kept = 0
    for at, item in enumerate(items):
        before.append(kept)
        if item is None:
            plan.result.append(1)
            kept += 1
            continue
        size = x.shape[axis]
        if isinstance(item, slice):
            start, limit, stride, count = _slice_bounds(x, axis, item)
            plan.add_axis(start, limit, stride, count)
            plan.result.append(count)
            kept += 1
        elif isinstance(item, Tensor):
            plan.add_axis(0, size, 1, size)
            plan.arrays.append((len(plan.result), _wrapped(item, size, axis)))
            plan.result.append(size)
            advanced.append(at)
        else:
            start = _position(item, size, axis)
            plan.add_axis(start, start + 1, 1, 1)
            advanced.append(at)
        axis += 1
    together = not advanced or advanced == list(range(advanced[0], advanced[0] + len(advanced)))
    plan.place = before[advanced[0]] if advanced and together else 0
    return plan


def _expand(x: Tensor, items: list[Any]) -> list[Any]:
    """One item per axis (and None): masks as integer arrays, lists as tensors, the ellipsis as full slices."""
    clean: list[Any] = []
    for item in items:
        if isinstance(item, (list, np.ndarray, Tensor)) or (hasattr(item, "__array__") and not is_weak(item)
                                                            and not isinstance(item, np.generic)):
            clean += _array_items(item)
        elif isinstance(item, (bool, np.bool_)):
            raise AttributeValueError("a Python bool is no index; use an array of bools, or td.where", user_location())
        else:
            clean.append(item)
    used = sum(1 for i in clean if i is not None and i is not Ellipsis)
    dots = [k for k, i in enumerate(clean) if i is Ellipsis]
    if len(dots) > 1 or used > x.ndim:
        raise ShapeError(f"an index of {used} axes{' and two ellipses' if len(dots) > 1 else ''} does not fit {x.type}",
                         user_location())
    at = dots[0] if dots else len(clean)
    return clean[:at] + [slice(None)] * (x.ndim - used) + clean[at + len(dots):]


def _array_items(item: Any) -> list[Any]:
    if isinstance(item, list) and not item:
        item = np.zeros(0, np.int64)
    index = as_tensor(item)
    if index.dtype.is_bool:
        if index.is_tracer:
            return list(true_indices(index, "the number of elements that a mask selects"))
        return [as_tensor(i) for i in np.nonzero(np.asarray(item))]
    if not index.dtype.is_integer:
        raise DTypeError(f"an index needs an integer dtype or bool, got {index.type}", user_location())
    return [index]


def _position(item: Any, size: Any, axis: int) -> Any:
    if isinstance(item, Dim):
        return item
    try:
        at = int(item.__index__())
    except (AttributeError, TypeError):
        raise DTypeError(f"{item!r} is no index: use ints, slices, None, ..., integer arrays or bool masks",
                         user_location()) from None
    if isinstance(size, int) and not -size <= at < size:
        raise AttributeValueError(f"index {at} is out of range for axis {axis} of size {size}", user_location())
    return at + size if at < 0 else at


def _wrapped(index: Tensor, size: Any, axis: int) -> Tensor:
    """Indices counted from the start; checked if they are known."""
    if not index.is_tracer and current_trace() is None and isinstance(size, int):
        array = index.numpy(copy=False)
        if array.size and not (-size <= int(array.min()) and int(array.max()) < size):
            raise AttributeValueError(f"index {int(array.min())} to {int(array.max())} is out of range for axis {axis} "
                                      f"of size {size}", user_location())
        if index.dtype.is_unsigned or not array.size or int(array.min()) >= 0:
            return index
    if index.dtype.is_unsigned:
        return index
    wide = index if index.dtype.bits >= 32 and isinstance(size, int) else cast(index, int64)
    if isinstance(size, Dim):
        size = size_tensor(size)
    return where(wide < 0, wide + size, wide)


def _slice_bounds(x: Tensor, axis: int, item: slice) -> tuple[Any, Any, int, Any]:
    """(start, limit, stride, count) of a slice of an axis, normalised for the op `slice`."""
    size = x.shape[axis]
    for bound in (item.start, item.stop, item.step):
        if isinstance(bound, Tensor) and bound.is_tracer:
            raise TraceError("the bounds of a slice cannot be traced tensors, as the shape of the result would not be "
                             "known. Use instead: td.dynamic_slice(x, starts, sizes)", user_location())
    step = 1 if item.step is None else int(item.step.__index__())
    if step == 0:
        raise AttributeValueError("the step of a slice must not be 0", user_location())
    if isinstance(size, Dim) or isinstance(item.start, Dim) or isinstance(item.stop, Dim):
        return _symbolic_bounds(size, item, step)
    picked = range(size)[item]
    count = len(picked)
    if count == 0:
        return (0, 0, 1, 0)
    last = picked[-1] + (1 if step > 0 else -1)
    return (picked[0], last, step, count)


def _symbolic_bounds(size: Any, item: slice, step: int) -> tuple[Any, Any, int, Any]:
    """Bounds on an axis whose size is known at run time only; they are taken to lie inside."""
    if step < 0:
        if item.start is not None or item.stop is not None:
            raise ShapeError(f"a slice backwards of the symbolic size {size} needs open ends: x[::-1]", user_location())
        return (size - 1, -1, step, (size - 1) // -step + 1)
    start = 0 if item.start is None else item.start
    stop = size if item.stop is None else item.stop
    start = size + start if isinstance(start, int) and start < 0 else start
    stop = size + stop if isinstance(stop, int) and stop < 0 else stop
    return (start, stop, step, (stop - start + step - 1) // step)


# Updates -------------------------------------------------------------------------------------------------------


class At:
    """`x.at`: index it to name the elements that `set` or `add` give new values, in a copy of x."""

    def __init__(self, x: Tensor):
        self.x = x

    def __getitem__(self, index: Any) -> Place:
        return Place(self.x, index)


class Place:
    """Some elements of a tensor; `x.at[index]`."""

    def __init__(self, x: Tensor, index: Any):
        self.x, self.index = x, index

    def get(self) -> Tensor:
        """x[index]."""
        return getitem(self.x, self.index)

    def set(self, values: Any) -> Tensor:
        """x with these elements replaced; of repeated indices the last wins."""
        return _update(self.x, self.index, values, "set")

    def add(self, values: Any) -> Tensor:
        """x with values added to these elements; repeated indices add up."""
        return _update(self.x, self.index, values, "add")

    def multiply(self, values: Any) -> Tensor:
        """x with these elements (each named once) multiplied."""
        return self.set(self.get() * values)

    def minimum(self, values: Any) -> Tensor:
        """x with these elements (each named once) replaced by the values where those are smaller."""
        current, given = promoted(self.get(), values)
        return self.set(apply("minimum", current, given))

    def maximum(self, values: Any) -> Tensor:
        """x with these elements (each named once) replaced by the values where those are larger."""
        current, given = promoted(self.get(), values)
        return self.set(apply("maximum", current, given))


def _update(x: Tensor, index: Any, values: Any, how: str) -> Tensor:
    values = constant(values, x.dtype) if is_weak(values) else cast(as_tensor(values), x.dtype)
    mask = _mask(x, index)
    if mask is not None and (values.ndim == 0 or mask.is_tracer and not is_data_size(values.shape[0])):
        mask = reshape(mask, mask.shape + (1,) * (x.ndim - mask.ndim))
        return where(mask, values if how == "set" else add(x, values), x)
    plan = _plan(x, index)
    if plan.arrays:
        return _scatter(x, index, plan, values, how)
    region = _fitted(values, tuple(plan.result), x)
    region = reshape(region, tuple(plan.counts))
    if any(c == 0 for c in plan.counts):
        return x
    backwards = tuple(i for i, k in enumerate(plan.strides) if k < 0)
    if backwards:
        region = apply("reverse", region, axes=backwards)
    if how == "set" and tuple(plan.counts) == x.shape:
        return region
    place = _place(x, plan)
    spread = apply("pad", region, **place, value=0)
    if how == "add":
        return add(x, spread)
    inside = broadcast_to(constant(True, bool_), tuple(plan.counts))
    return where(apply("pad", inside, **place, value=False), spread, x)


def _place(x: Tensor, plan: _Plan) -> dict[str, Any]:
    """The padding that puts a region of the plan's size where the plan's slice is."""
    low: list[int] = []
    high: list[int] = []
    interior: list[int] = []
    for size, start, stride, count in zip(x.shape, plan.starts, plan.strides, plan.counts):
        if any(isinstance(v, Dim) for v in (size, start, count)):
            if (start, stride, count) != (0, 1, size):
                raise ShapeError(f"x.at with part of an axis needs known sizes, got {x.type}", user_location())
            low, high, interior = [*low, 0], [*high, 0], [*interior, 0]
            continue
        first = start if stride > 0 else start + (count - 1) * stride
        step = abs(stride)
        low.append(first)
        high.append(size - first - (count - 1) * step - 1)
        interior.append(step - 1)
    return {"low": tuple(low), "high": tuple(high), "interior": tuple(interior)}


def _fitted(values: Tensor, shape: tuple[Any, ...], x: Tensor) -> Tensor:
    while values.ndim > len(shape) and values.shape[0] == 1:
        values = reshape(values, values.shape[1:])
    try:
        return broadcast_to(values, shape)
    except ShapeError:
        raise ShapeError(f"values of type {values.type} do not fit the indexed elements {shape} of {x.type}",
                         user_location()) from None


def _mask(x: Tensor, index: Any) -> Tensor | None:
    """The index as a mask, if it is one bool array over the leading axes of x."""
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(index, (Tensor, np.ndarray)):
        return None
    mask = as_tensor(index)
    if not mask.dtype.is_bool:
        return None
    if mask.shape != x.shape[:mask.ndim]:
        raise ShapeError(f"the mask {mask.type} does not fit {x.type}", user_location())
    return mask


def _scatter(x: Tensor, index: Any, plan: _Plan, values: Tensor, how: str) -> Tensor:
    """Values at integer arrays: rows of axis 0 directly, anything else through the flat positions it names."""
    rows = len(plan.arrays) == 1 and plan.arrays[0][0] == 0 and tuple(plan.result) == x.shape and all(
        s == 0 and k == 1 for s, k in zip(plan.starts, plan.strides))
    if rows and not isinstance(x.shape[0], Dim):
        indices = plan.arrays[0][1]
        updates = _fitted(values, indices.shape + x.shape[1:], x)
        flat, shape = x, x.shape
    else:
        shape = x.shape
        positions = reshape(apply("iota", shape=(math.prod(shape),), axis=0, dtype=int64), shape)
        indices = _dropped(getitem(positions, index), plan, math.prod(shape))
        updates = _fitted(values, indices.shape, x)
        flat = reshape(x, (math.prod(shape),))
    op = "scatter_nd" if how == "set" else "scatter_add_nd"
    result: Tensor = apply(op, flat, expand_dims(indices, -1), updates)
    return reshape(result, shape)


def _dropped(positions: Tensor, plan: _Plan, size: Any) -> Tensor:
    """Flat positions gathered by the plan; those out of range are moved to `size`, where scatters drop them."""
    inside = None
    for axis, indices in plan.arrays:
        fits = (indices >= 0) & (indices < plan.result[axis])
        inside = fits if inside is None else inside & fits
    assert inside is not None
    after = positions.ndim - plan.place - inside.ndim
    return where(reshape(inside, inside.shape + (1,) * after), positions, size)


def setitem(x: Tensor, index: Any, values: Any) -> None:
    """Refuses: tensors do not change."""
    raise ArgumentsError("tensors do not change: instead of x[i] = v write x = x.at[i].set(v); parameters and state "
                         "are replaced by x.assign(v)", user_location())


# By name -------------------------------------------------------------------------------------------------------


def take(x: Any, indices: Any, axis: int | None = None) -> Tensor:
    """Slices of x along an axis (None: of the flattened x) at integer indices of any shape."""
    x, indices = as_tensor(x), _integers(indices)
    if axis is None:
        x, axis = reshape(x, (x.size,)), 0
    place = normalize_axis(axis, x.ndim)
    result: Tensor = apply("take", x, _wrapped(indices, x.shape[place], place), axis=place)
    return result


def gather(x: Any, indices: Any, axis: int = 0) -> Tensor:
    """`take` along axis 0 by default: the counterpart of `scatter_add`."""
    return take(x, indices, axis)


def _integers(indices: Any) -> Tensor:
    indices = as_tensor(indices)
    if not indices.dtype.is_integer:
        raise DTypeError(f"indices need an integer dtype, got {indices.type}; cast with .astype('int64')",
                         user_location())
    return indices


def take_along_axis(x: Any, indices: Any, axis: int) -> Tensor:
    """Elements of x at one index each along an axis; the other axes of the indices are those of x, or of size 1."""
    x, indices = as_tensor(x), _integers(indices)
    place = normalize_axis(axis, x.ndim)
    if indices.ndim == x.ndim:
        indices = broadcast_to(indices, tuple(n if i == place or n != 1 else s for i, (n, s) in
                                              enumerate(zip(indices.shape, x.shape))))
    result: Tensor = apply("take_along_axis", x, _wrapped(indices, x.shape[place], place), axis=place)
    return result


def scatter_add(x: Any, indices: Any, updates: Any, axis: int = 0) -> Tensor:
    """x with slices of `updates` added along an axis at integer indices; repeated ones add up.

    `updates` has the shape of `take(x, indices, axis)`.
    """
    x, indices = as_tensor(x), _integers(indices)
    place = normalize_axis(axis, x.ndim)
    updates = cast(as_tensor(updates), x.dtype)
    result: Tensor = apply("scatter_add", x, _wrapped(indices, x.shape[place], place), updates, axis=place)
    return result


def gather_nd(x: Any, indices: Any) -> Tensor:
    """Slices x[i_1, ..., i_k] for the index vectors (non-negative) in the last axis of `indices`."""
    result: Tensor = apply("gather_nd", as_tensor(x), _integers(indices))
    return result


def scatter_add_nd(x: Any, indices: Any, updates: Any) -> Tensor:
    """x with updates added to the slices x[i_1, ..., i_k]; repeated ones add up."""
    x = as_tensor(x)
    result: Tensor = apply("scatter_add_nd", x, _integers(indices), cast(as_tensor(updates), x.dtype))
    return result


def _starts(starts: Sequence[Any]) -> list[Tensor]:
    return [constant(s, int64) if is_weak(s) else cast(_integers(s), int64) for s in starts]


def dynamic_slice(x: Any, starts: Sequence[Any], sizes: Sequence[int]) -> Tensor:
    """The block of x of a fixed size at a place known only at run time; it is moved so that it lies inside.

    Args:
        starts: an integer or scalar tensor per axis.
        sizes: an int per axis.
    """
    x = as_tensor(x)
    result: Tensor = apply("dynamic_slice", x, *_starts(starts), sizes=tuple(int(s) for s in sizes))
    return result


def dynamic_update_slice(x: Any, update: Any, starts: Sequence[Any]) -> Tensor:
    """x with a block at a place known only at run time replaced; it is moved so that it lies inside."""
    x = as_tensor(x)
    result: Tensor = apply("dynamic_update_slice", x, cast(as_tensor(update), x.dtype), *_starts(starts))
    return result


def nonzero(x: Any) -> tuple[Tensor, ...]:
    """The indices of the elements that are not zero, one tensor per axis, in row-major order.

    Inside a trace their number is a symbolic size, which the compiled function counts at run time.
    """
    x = as_tensor(x)
    if x.is_tracer:
        return tuple(true_indices(x if x.dtype.is_bool else not_equal(x, 0)))
    return tuple(as_tensor(i.astype(np.int64)) for i in np.nonzero(x.numpy(copy=False)))
