"""Functions that move elements without computing: reshape, transpose, join, cut, repeat, pad, flip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ir.dims import Dim
from ..ir.errors import AttributeValueError, ShapeError
from ..ir.location import user_location
from ..ir.types import broadcast_shapes
from .dispatch import apply, as_tensor, normalize_axes, normalize_axis, normalize_shape, promoted
from .tensor import Tensor, _hooks


def reshape(x: Any, *shape: Any) -> Tensor:
    """The same elements, in row-major order, under another shape; one size may be -1: what is left.

    Raises:
        ShapeError: the number of elements differs.
    """
    x = as_tensor(x)
    sizes = _complete(x, shape[0] if len(shape) == 1 else shape)
    return x if sizes == x.shape else apply("reshape", x, shape=sizes)


def _complete(x: Tensor, shape: Any) -> tuple[Any, ...]:
    sizes = list(shape) if isinstance(shape, (tuple, list)) else [shape]
    unknown = [i for i, s in enumerate(sizes) if not isinstance(s, Dim) and s == -1]
    if len(unknown) > 1:
        raise ShapeError(f"reshape: only one size of {tuple(sizes)} may be -1", user_location())
    if unknown:
        rest = math.prod(s for i, s in enumerate(sizes) if i != unknown[0])
        if not isinstance(rest, Dim) and (rest == 0 or (isinstance(x.size, int) and x.size % rest)):
            raise ShapeError(f"reshape: {x.type} has {x.size} elements, which {tuple(sizes)} does not divide",
                             user_location())
        sizes[unknown[0]] = x.size // rest
    return normalize_shape(tuple(sizes))


def ravel(x: Any) -> Tensor:
    """The elements in row-major order along one axis."""
    return reshape(x, (-1,) if as_tensor(x).size != 0 else (0,))


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """x with the axes from `start_dim` to `end_dim` joined into one."""
    x = as_tensor(x)
    if x.ndim == 0:
        return reshape(x, (1,))
    first, last = normalize_axis(start_dim, x.ndim), normalize_axis(end_dim, x.ndim)
    if first > last:
        raise AttributeValueError(f"flatten: axis {start_dim} comes after {end_dim}", user_location())
    return reshape(x, (*x.shape[:first], math.prod(x.shape[first:last + 1]), *x.shape[last + 1:]))


def transpose(x: Any, *axes: Any) -> Tensor:
    """Axis i of the result is axis `axes[i]` of x; by default the order is reversed."""
    x = as_tensor(x)
    wanted = axes[0] if len(axes) == 1 and not hasattr(axes[0], "__index__") else axes
    if wanted is None or wanted == ():
        perm = tuple(range(x.ndim))[::-1]
    else:
        perm = tuple(normalize_axis(a, x.ndim) for a in wanted)
        if sorted(perm) != list(range(x.ndim)):
            raise AttributeValueError(f"transpose: {tuple(wanted)} does not name each of the {x.ndim} axes of {x.type} "
                                      "once", user_location())
    return x if perm == tuple(range(x.ndim)) else apply("transpose", x, perm=perm)


permute_dims = permute = transpose


def swapaxes(x: Any, axis1: int, axis2: int) -> Tensor:
    """x with two axes exchanged."""
    x = as_tensor(x)
    perm = list(range(x.ndim))
    a, b = normalize_axis(axis1, x.ndim), normalize_axis(axis2, x.ndim)
    perm[a], perm[b] = b, a
    return transpose(x, perm)


def matrix_transpose(x: Any) -> Tensor:
    """x with its last two axes exchanged."""
    return swapaxes(x, -1, -2)


def moveaxis(x: Any, source: Any, destination: Any) -> Tensor:
    """x with the axes `source` (an int or several) at the places `destination`."""
    x = as_tensor(x)
    froms = [normalize_axis(a, x.ndim) for a in (source if isinstance(source, (tuple, list)) else (source,))]
    tos = [normalize_axis(a, x.ndim) for a in (destination if isinstance(destination, (tuple, list)) else
                                               (destination,))]
    perm = [i for i in range(x.ndim) if i not in froms]
    for to, origin in sorted(zip(tos, froms)):
        perm.insert(to, origin)
    return transpose(x, perm)


def squeeze(x: Any, axis: Any = None) -> Tensor:
    """x without axes of size 1: all of them, or those named.

    Raises:
        ShapeError: a named axis has another size.
    """
    x = as_tensor(x)
    if axis is None:
        axes = tuple(i for i, s in enumerate(x.shape) if s == 1)
    else:
        axes = normalize_axes(axis, x.ndim)
        if wrong := [a for a in axes if x.shape[a] != 1]:
            raise ShapeError(f"squeeze: axis {wrong[0]} of {x.type} has size {x.shape[wrong[0]]}, not 1",
                             user_location())
    return reshape(x, tuple(s for i, s in enumerate(x.shape) if i not in axes))


def expand_dims(x: Any, axis: Any) -> Tensor:
    """x with new axes of size 1 at the given places of the result."""
    x = as_tensor(x)
    count = len(axis) if isinstance(axis, (tuple, list)) else 1
    axes = normalize_axes(axis, x.ndim + count)
    sizes = iter(x.shape)
    return reshape(x, tuple(1 if i in axes else next(sizes) for i in range(x.ndim + count)))


unsqueeze = expand_dims


def broadcast_to(x: Any, shape: Any) -> Tensor:
    """x repeated along axes of size 1, and along new leading axes, to a shape."""
    x, shape = as_tensor(x), normalize_shape(shape)
    return x if x.shape == shape else apply("broadcast_to", x, shape=shape)


def broadcast_arrays(*xs: Any) -> list[Tensor]:
    """All operands in the shape that they broadcast to."""
    tensors = [as_tensor(x) for x in xs]
    try:
        shape = broadcast_shapes(*(x.shape for x in tensors))
    except ShapeError as error:
        error.where = user_location()
        raise
    return [broadcast_to(x, shape) for x in tensors]


# Joining and cutting -------------------------------------------------------------------------------------------


def concatenate(xs: Sequence[Any], axis: int | None = 0) -> Tensor:
    """Tensors joined along an axis (None: each flattened first), in their common dtype."""
    tensors = _several("concatenate", xs)
    if axis is None:
        tensors, axis = [ravel(x) for x in tensors], 0
    place = normalize_axis(axis, tensors[0].ndim)
    return tensors[0] if len(tensors) == 1 else apply("concat", *tensors, axis=place)


concat = concatenate


def _several(name: str, xs: Any) -> list[Tensor]:
    if isinstance(xs, Tensor):
        xs = list(xs)
    if not isinstance(xs, (list, tuple)) or not xs:
        raise ShapeError(f"{name} needs a list of at least one tensor, got {xs!r}", user_location())
    return promoted(*xs)


def stack(xs: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    tensors = [stack(x) if isinstance(x, (list, tuple)) else as_tensor(x) for x in xs]
    tensors = _several("stack", tensors)
    if wrong := [x for x in tensors if x.shape != tensors[0].shape]:
        raise ShapeError(f"stack: {tensors[0].type} and {wrong[0].type} differ in shape", user_location())
    place = normalize_axis(axis, tensors[0].ndim + 1)
    return concatenate([expand_dims(x, place) for x in tensors], place)


_hooks["stack"] = stack


def hstack(xs: Sequence[Any]) -> Tensor:
    """Tensors joined along axis 1 (1-D ones along axis 0)."""
    tensors = [x if x.ndim else reshape(x, (1,)) for x in _several("hstack", xs)]
    return concatenate(tensors, 0 if tensors[0].ndim == 1 else 1)


def vstack(xs: Sequence[Any]) -> Tensor:
    """Tensors joined along axis 0; 1-D ones become rows."""
    return concatenate([x if x.ndim > 1 else reshape(x, (1, -1)) for x in _several("vstack", xs)], 0)


def slice_axis(x: Tensor, axis: int, start: Any, limit: Any) -> Tensor:
    """Elements start to limit (exclusive) of one axis."""
    starts = tuple(start if i == axis else 0 for i in range(x.ndim))
    limits = tuple(limit if i == axis else s for i, s in enumerate(x.shape))
    result: Tensor = apply("slice", x, starts=starts, limits=limits, strides=(1,) * x.ndim)
    return result


def split(x: Any, indices_or_sections: Any, axis: int = 0) -> list[Tensor]:
    """x cut along an axis: into so many equal parts (an int), or before each of the given indices.

    Raises:
        ShapeError: the parts would not be equal.
    """
    x = as_tensor(x)
    place = normalize_axis(axis, x.ndim)
    size = x.shape[place]
    if hasattr(indices_or_sections, "__index__"):
        count = int(indices_or_sections)
        if count < 1 or (isinstance(size, int) and size % count):
            raise ShapeError(f"split: axis {place} of {x.type} does not divide into {count} equal parts",
                             user_location())
        each = size // count
        bounds = [each * i for i in range(count)] + [size]
    else:
        cuts = [min(max(i + size if i < 0 else i, 0), size) for i in map(int, indices_or_sections)]
        bounds = [0, *cuts, size]
    return [slice_axis(x, place, lo, hi if isinstance(hi, Dim) or isinstance(lo, Dim) else max(lo, hi))
            for lo, hi in zip(bounds, bounds[1:])]


def chunk(x: Any, chunks: int, axis: int = 0) -> list[Tensor]:
    """x cut along an axis into at most so many parts of equal size, the last one smaller if need be."""
    x = as_tensor(x)
    size = x.shape[normalize_axis(axis, x.ndim)]
    each = max(-(-size // chunks), 1)
    return split(x, list(range(each, size, each)), axis)


def unstack(x: Any, axis: int = 0) -> list[Tensor]:
    """The slices of x along an axis, without that axis."""
    x = as_tensor(x)
    place = normalize_axis(axis, x.ndim)
    return [squeeze(slice_axis(x, place, i, i + 1), place) for i in range(x.shape[place])]


# Repeating and padding -----------------------------------------------------------------------------------------


def tile(x: Any, reps: Any) -> Tensor:
    """x repeated as a whole: `reps` times along each axis, counted from the last."""
    x = as_tensor(x)
    times = (int(reps),) if hasattr(reps, "__index__") else tuple(int(r) for r in reps)
    rank = max(x.ndim, len(times))
    times = (1,) * (rank - len(times)) + times
    sizes = (1,) * (rank - x.ndim) + x.shape
    spread = reshape(x, tuple(s for size in sizes for s in (1, size)))
    spread = broadcast_to(spread, tuple(s for t, size in zip(times, sizes) for s in (t, size)))
    return reshape(spread, tuple(t * size for t, size in zip(times, sizes)))


def repeat(x: Any, repeats: Any, axis: int | None = None) -> Tensor:
    """Each element (or slice along an axis) repeated; `repeats` is an int or one for each (concrete) slice."""
    x = as_tensor(x)
    if axis is None:
        x, axis = ravel(x), 0
    place = normalize_axis(axis, x.ndim)
    if hasattr(repeats, "__index__") and not isinstance(repeats, Tensor):
        times = int(repeats)
        spread = expand_dims(x, place + 1)
        spread = broadcast_to(spread, (*x.shape[:place + 1], times, *x.shape[place + 1:]))
        return reshape(spread, (*x.shape[:place], x.shape[place] * times, *x.shape[place + 1:]))
    index = np.repeat(np.arange(x.shape[place]), np.asarray(repeats))
    result: Tensor = apply("take", x, as_tensor(index), axis=place)
    return result


def pad(x: Any, pad_width: Any, mode: str = "constant", constant_values: Any = 0) -> Tensor:
    """x with elements added before and after each axis.

    Args:
        pad_width: an int, a pair (before, after) for every axis, or one pair per axis.
        mode: "constant", "edge", "reflect", "symmetric" or "wrap", with NumPy's meaning.
        constant_values: the number that "constant" adds.
    """
    x = as_tensor(x)
    widths = _pad_widths(pad_width, x.ndim)
    if mode == "constant":
        if not any(map(any, widths)):
            return x
        result: Tensor = apply("pad", x, low=tuple(w[0] for w in widths), high=tuple(w[1] for w in widths),
                               interior=(0,) * x.ndim, value=_number(constant_values))
        return result
    if mode not in ("edge", "reflect", "symmetric", "wrap"):
        raise AttributeValueError(f'pad: mode is "constant", "edge", "reflect", "symmetric" or "wrap", not {mode!r}',
                                  user_location())
    for axis, width in enumerate(widths):
        if any(width):
            if x.shape[axis] == 0:
                raise ShapeError(f"pad: axis {axis} of {x.type} is empty, there is nothing to {mode}", user_location())
            index = np.pad(np.arange(x.shape[axis]), width, mode=mode)  # type: ignore[call-overload]
            x = apply("take", x, as_tensor(index), axis=axis)
    return x


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _pad_widths(widths: Any, ndim: int) -> list[tuple[int, int]]:
    try:
        spread = np.broadcast_to(np.asarray(widths), (ndim, 2))
    except ValueError:
        spread = np.array([[-1, -1]])
    if spread.dtype.kind not in "iu" or (spread < 0).any():
        raise AttributeValueError(f"pad: pad_width is {widths!r}; expected an int, a pair or {ndim} pairs, >= 0",
                                  user_location())
    return [(int(lo), int(hi)) for lo, hi in spread]


def flip(x: Any, axis: Any = None) -> Tensor:
    """x with the order along axes (None: all) reversed."""
    x = as_tensor(x)
    axes = normalize_axes(axis, x.ndim)
    return apply("reverse", x, axes=axes) if axes else x


def roll(x: Any, shift: Any, axis: Any = None) -> Tensor:
    """x with its elements moved along axes (None: flattened) by `shift`, those that fall off coming in again."""
    x = as_tensor(x)
    if axis is None:
        return reshape(roll(ravel(x), shift, 0), x.shape)
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    shifts = shift if isinstance(shift, (tuple, list)) else (shift,) * len(axes)
    for by, a in zip(shifts, axes, strict=True):
        place = normalize_axis(a, x.ndim)
        size = x.shape[place]
        cut = size - int(by) % size if size else 0
        if 0 < cut < size:
            x = concatenate([slice_axis(x, place, cut, size), slice_axis(x, place, 0, cut)], place)
    return x
