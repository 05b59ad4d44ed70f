"""Ops that move elements, and those that make tensors of shapes.

Shapes, axes and bounds are attributes in old opsets and operands in new ones; either way they must be known when the
graph is traced. They may hold symbolic sizes (`Dim`), which pass through.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...ir.dims import Dim
from ...ir.dtypes import int64
from .. import functions as F
from ..data_sizes import require_zero, size_tensor
from ..dispatch import apply, as_tensor, cast, constant
from ..tensor import Tensor
from .dtypes import attribute_dtype
from .node import OnnxNode
from .rules import onnx_rule
from .sizes import as_number, inside, numbers, ranged, reshaped, sizes, sliced_by_data
from .values import dims_array, dtype_of, known, require_ints, require_known, shape_of, tensor

INFINITE = 10**9
"""Bounds at least this far out mean the end of an axis, whatever its size."""


def number_of(node: OnnxNode, value: Any, what: str) -> Any:
    """A known scalar (or vector of one) as a Python number or Dim."""
    array = np.asarray(require_known(node, value, what)).reshape(-1)
    if array.size != 1:
        raise node.fail(f"{what} is one number, got {array.size}")
    return array[0] if isinstance(array[0], Dim) else array[0].item() if hasattr(array[0], "item") else array[0]


def axis_of(node: OnnxNode, axis: int, ndim: int) -> int:
    """An axis in [0, ndim)."""
    if not -ndim <= axis < ndim:
        raise node.fail(f"axis {axis} is out of range for {ndim} axes")
    return axis % ndim


# Shapes ----------------------------------------------------------------------------------------------------------

@onnx_rule("Shape")
def shape(node: OnnxNode, x: Any) -> np.ndarray:
    """The shape, known: ints and Dims; from opset 15 a part of it."""
    sizes = list(shape_of(x))[node.attr("start", 0):node.attr("end", None)]
    return dims_array(sizes)


@onnx_rule("Size")
def size(node: OnnxNode, x: Any) -> np.ndarray:
    return dims_array([math.prod(shape_of(x))]).reshape(())


@onnx_rule("Reshape", since=5, static=(1,))
def reshape(node: OnnxNode, x: Any, shape: Any) -> Tensor:
    """0 keeps the size of that axis (unless `allowzero`), -1 is what is left."""
    x = tensor(x)
    wanted = numbers(node, shape, "shape")
    if not node.attr("allowzero", 0):
        if any(isinstance(s, int) and s == 0 and i >= x.ndim for i, s in enumerate(wanted)):
            raise node.fail(f"the shape {wanted} copies a size that {x.type} does not have")
        wanted = [x.shape[i] if isinstance(s, int) and s == 0 else
                  F.where(s == 0, as_number(x.shape[i]), s) if isinstance(s, Tensor) and i < x.ndim else s
                  for i, s in enumerate(wanted)]
    if any(isinstance(s, Tensor) for s in wanted):
        return reshaped(node, x, wanted)
    return F.reshape(x, _completed(x, wanted))


def _completed(x: Tensor, wanted: list[Any]) -> tuple[Any, ...]:
    """-1 replaced; what both shapes have is left out of the division, so that sizes of 0 and Dims pass."""
    if not any(isinstance(s, int) and s == -1 for s in wanted):
        return tuple(wanted)
    have, rest = list(x.shape), [s for s in wanted if not (isinstance(s, int) and s == -1)]
    for s in list(rest):
        if s in have:
            have.remove(s)
            rest.remove(s)
    left, divisor = math.prod(have), math.prod(rest)
    if isinstance(divisor, int) and (divisor == 0 or (isinstance(left, int) and left % divisor)):
        return tuple(wanted)  # reshape says what is wrong
    return tuple(left // divisor if isinstance(s, int) and s == -1 else s for s in wanted)


@onnx_rule("Reshape", since=1)
def reshape_attribute(node: OnnxNode, x: Any) -> Tensor:
    return reshape(node, x, np.asarray(node.attr("shape", []), np.int64))


@onnx_rule("Flatten")
def flatten(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    axis = int(node.attr("axis", 1))
    axis = axis + x.ndim if axis < 0 else axis
    return F.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _axes(node: OnnxNode, axes: Any) -> list[int] | None:
    if axes is not None:
        return require_ints(node, axes, "axes")
    listed = node.attr("axes", None)
    return None if listed is None else [int(a) for a in listed]


@onnx_rule("Squeeze", static=(1,))
def squeeze(node: OnnxNode, x: Any, axes: Any = None) -> Tensor:
    x, places = tensor(x), _axes(node, axes)
    return F.squeeze(x, None if places is None else tuple(places)) if places != [] else x


@onnx_rule("Unsqueeze", static=(1,))
def unsqueeze(node: OnnxNode, x: Any, axes: Any = None) -> Tensor:
    return F.expand_dims(tensor(x), tuple(_axes(node, axes) or ()))


@onnx_rule("Transpose")
def transpose(node: OnnxNode, x: Any) -> Tensor:
    perm = node.attr("perm", None)
    return F.transpose(tensor(x), None if perm is None else tuple(int(p) for p in perm))


@onnx_rule("Identity")
def identity(node: OnnxNode, x: Any) -> Any:
    return x


@onnx_rule("Expand", static=(1,))
def expand(node: OnnxNode, x: Any, shape: Any) -> Tensor:
    """x broadcast with a shape, in both directions."""
    x = tensor(x)
    wanted = numbers(node, shape, "shape")
    rank = max(len(wanted), x.ndim)
    ours, theirs = [1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    # What data decide is the size of an axis that has one, or 1.
    shape = [a if isinstance(b, int) and b == 1 or isinstance(b, Tensor) and a != 1 else
             node.size(b, f"shape[{i}]") if isinstance(b, Tensor) else b for i, (a, b) in enumerate(zip(ours, theirs))]
    return F.broadcast_to(x, tuple(shape))


@onnx_rule("Tile", since=6, static=(1,))
def tile(node: OnnxNode, x: Any, repeats: Any) -> Tensor:
    x = tensor(x)
    times = sizes(node, repeats, "repeats")
    if not x.ndim:
        return x
    spread = F.reshape(x, tuple(s for each in x.shape for s in (1, each)))
    spread = F.broadcast_to(spread, tuple(s for t, each in zip(times, x.shape) for s in (t, each)))
    return F.reshape(spread, tuple(t * each for t, each in zip(times, x.shape)))


@onnx_rule("Tile", since=1, static=(1, 2))
def tile_axis(node: OnnxNode, x: Any, tiles: Any, axis: Any) -> Tensor:
    repeats = [1] * len(shape_of(x))
    repeats[int(number_of(node, axis, "axis"))] = number_of(node, tiles, "tiles")
    return tile(node, x, np.asarray(repeats))


# Joining and cutting ---------------------------------------------------------------------------------------------

@onnx_rule("Concat")
def concat(node: OnnxNode, *xs: Any) -> Tensor:
    return F.concatenate([tensor(x) for x in xs], int(node.attr("axis", 1)))


@onnx_rule("Split", static=(1,))
def split(node: OnnxNode, x: Any, parts: Any = None) -> tuple[Tensor, ...]:
    """Into parts of given sizes, or as many as there are outputs, the last one smaller if need be."""
    x = tensor(x)
    axis = axis_of(node, int(node.attr("axis", 0)), x.ndim)
    listed = numbers(node, parts, "split") if parts is not None else node.attr("split", None)
    total = x.shape[axis]
    if listed is None or len(listed) == 0:
        count = int(node.attr("num_outputs", None) or len(node.outputs))
        if isinstance(total, Dim):
            listed = [total // count] * count
        else:
            each = -(-total // count)
            listed = [min(each, max(total - i * each, 0)) for i in range(count)]
    if isinstance(total, int) and all(isinstance(s, (int, np.integer)) for s in listed) and sum(listed) != total:
        raise node.fail(f"the parts {list(listed)} do not add up to axis {axis} of {x.type}")
    results, start = [], 0
    for part in _parts(node, listed, total):
        results.append(slice_axis(x, axis, start, start + part))
        start = start + part
    return tuple(results)


def _parts(node: OnnxNode, listed: list[Any], total: Any) -> list[Any]:
    """The sizes of parts; the last of those that data decide is what the others leave."""
    open_ones = [i for i, n in enumerate(listed) if isinstance(n, Tensor)]
    if not open_ones:
        return listed
    wrong = as_number(total)
    for n in listed:
        wrong = wrong - as_number(n)
    require_zero(wrong, f"{node}: the parts do not add up to the {total} elements of the axis")
    found = [node.size(n, f"split[{i}]", total) if i in open_ones[:-1] else n for i, n in enumerate(listed)]
    last = open_ones[-1]
    found[last] = total - sum(n for i, n in enumerate(found) if i != last)
    return found


def slice_axis(x: Tensor, axis: int, start: Any, limit: Any) -> Tensor:
    """Elements start to limit of one axis."""
    start, limit = (v if isinstance(v, Dim) else int(v) for v in (start, limit))
    starts = tuple(start if i == axis else 0 for i in range(x.ndim))
    limits = tuple(limit if i == axis else s for i, s in enumerate(x.shape))
    result: Tensor = apply("slice", x, starts=starts, limits=limits, strides=(1,) * x.ndim)
    return result


@onnx_rule("Slice")
def slice_attributes(node: OnnxNode, x: Any) -> Tensor:
    starts, ends = list(node.attr("starts", [])), list(node.attr("ends", []))
    return sliced(node, tensor(x), starts, ends, list(node.attr("axes", None) or range(len(starts))),
                  [1] * len(starts))


@onnx_rule("Slice", since=10, static=(1, 2, 3, 4))
def slice_rule(node: OnnxNode, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    first = numbers(node, starts, "starts")
    places = list(range(len(first))) if axes is None else require_ints(node, axes, "axes")
    strides = [1] * len(first) if steps is None else require_ints(node, steps, "steps")
    return sliced(node, tensor(x), first, numbers(node, ends, "ends"), places, strides)


def sliced(node: OnnxNode, x: Tensor, starts: list[Any], ends: list[Any], axes: list[int],
           steps: list[int]) -> Tensor:
    """NumPy's x[start:end:step] of some axes: bounds outside are moved to the border."""
    bounds: list[tuple[Any, Any, int]] = [(0, s, 1) for s in x.shape]
    for start, end, axis, step in zip(starts, ends, axes, steps):
        if step == 0:
            raise node.fail("a step of 0 never ends")
        place = axis_of(node, int(axis), x.ndim)
        if not inside(start, x.shape[place]) or not inside(end, x.shape[place]):
            x = sliced_by_data(node, x, place, start, end, int(step))
            bounds[place] = (0, x.shape[place], 1)
            continue
        bounds[place] = slice_bounds(x.shape[place], start, end, int(step))
    if all(b == (0, s, 1) for b, s in zip(bounds, x.shape)):
        return x
    result: Tensor = apply("slice", x, starts=tuple(b[0] for b in bounds), limits=tuple(b[1] for b in bounds),
                           strides=tuple(b[2] for b in bounds))
    return result


def slice_bounds(size: Any, start: Any, end: Any, step: int) -> tuple[Any, Any, int]:
    """(start, limit, stride) as the op `slice` wants them. Bounds of a symbolic axis are taken to lie inside."""
    if all(isinstance(v, int) for v in (size, start, end)):
        picked = range(size)[slice(start, None if step < 0 and end < -size else end, step)]
        if not len(picked):
            return (0, 0, 1)
        return (picked[0], picked[-1] + (1 if step > 0 else -1), step)
    if step > 0:
        return (_inside(size, start), _inside(size, end), step)
    first = size - 1 if isinstance(start, int) and (start >= INFINITE or start == -1) else _inside(size, start)
    last = -1 if isinstance(end, int) and end <= -INFINITE else _inside(size, end)
    return (first, last, step)


def _inside(size: Any, bound: Any) -> Any:
    """A bound of a symbolic axis, counted from its start."""
    if not isinstance(bound, int):
        return bound
    if bound >= INFINITE:
        return size
    if bound <= -INFINITE:
        return 0
    return size + bound if bound < 0 else bound


# Padding ---------------------------------------------------------------------------------------------------------

@onnx_rule("Pad")
def pad_attributes(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    pads = node.attr("pads", None) or node.attr("paddings", [])
    return padded(node, x, [int(p) for p in pads], constant(node.attr("value", 0.0), x.dtype))


@onnx_rule("Pad", since=11, static=(1, 3))
def pad(node: OnnxNode, x: Any, pads: Any, value: Any = None, axes: Any = None) -> Tensor:
    x = tensor(x)
    widths = require_ints(node, pads, "pads")
    if axes is not None:
        places = [axis_of(node, a, x.ndim) for a in require_ints(node, axes, "axes")]
        spread = [0] * (2 * x.ndim)
        for i, place in enumerate(places):
            spread[place], spread[x.ndim + place] = widths[i], widths[len(places) + i]
        widths = spread
    return padded(node, x, widths, value)


def padded(node: OnnxNode, x: Tensor, widths: list[Any], value: Any) -> Tensor:
    """x with `widths` (all lows, then all highs) elements added, or cut off where negative."""
    low, high = widths[:x.ndim], widths[x.ndim:]
    if len(high) != x.ndim:
        raise node.fail(f"pads has {len(widths)} numbers; {x.type} needs {2 * x.ndim}")
    mode = node.attr("mode", "constant")
    if mode == "constant":
        return _pad_constant(x, low, high, value)
    for axis, (before, after) in enumerate(zip(low, high)):
        if (before, after) != (0, 0):
            x = F.take(x, pad_index(node, x.shape[axis], before, after, mode), axis=axis)
    return x


def _pad_constant(x: Tensor, low: list[int], high: list[int], value: Any) -> Tensor:
    fill = known(value) if value is not None else np.zeros(())
    if not any(low) and not any(high):
        return x
    place: dict[str, Any] = {"low": tuple(low), "high": tuple(high), "interior": (0,) * x.ndim}
    if fill is not None:
        number = fill.reshape(()).astype(np.float64).item() if x.dtype.is_float else fill.reshape(()).item()
        number = number if x.dtype.is_float else bool(number) if x.dtype.is_bool else int(number)
        result: Tensor = apply("pad", x, **place, value=number)
        return result
    inside = apply("pad", F.broadcast_to(constant(True, F.asarray(True).dtype), x.shape), **place, value=False)
    return F.where(inside, apply("pad", x, **place, value=0), F.reshape(tensor(value), ()))


NUMPY_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def pad_index(node: OnnxNode, size: Any, before: int, after: int, mode: str) -> Tensor:
    """Which element of an axis stands at each place of the padded one."""
    if mode not in NUMPY_MODES:
        raise node.fail(f'mode is "constant", "reflect", "edge" or "wrap", not {mode!r}')
    if isinstance(size, Dim):
        place = F.arange(size + before + after) - before
        if mode == "edge":
            return F.clip(place, 0, None) if after == 0 else F.minimum(F.clip(place, 0, None), size_tensor(size - 1))
        if mode == "wrap":
            return F.remainder(place, size_tensor(size))
        place = F.absolute(place)
        last = size_tensor(size - 1)
        return last - F.absolute(last - place)
    if size == 0:
        raise node.fail(f"an empty axis has nothing to {mode}")
    index = np.pad(np.arange(size), (max(before, 0), max(after, 0)), mode=mode)  # type: ignore[call-overload]
    index = index[max(-before, 0):len(index) - max(-after, 0)]
    return as_tensor(index.astype(np.int64))


# Making ----------------------------------------------------------------------------------------------------------

@onnx_rule("Constant")
def constant_rule(node: OnnxNode) -> np.ndarray:
    for name, dtype in (("value", None), ("sparse_value", None), ("value_float", np.float32),
                        ("value_floats", np.float32), ("value_int", np.int64), ("value_ints", np.int64),
                        ("value_string", object), ("value_strings", object)):
        if node.has(name):
            value = node.attr(name)
            return value if dtype is None else np.array(value, dtype)
    raise node.fail("it has no value")


@onnx_rule("ConstantOfShape", static=(0,))
def constant_of_shape(node: OnnxNode, shape: Any) -> Tensor:
    value = node.attr("value", None)
    value = np.zeros((), np.float32) if value is None else np.asarray(value).reshape(())
    return F.broadcast_to(as_tensor(value), tuple(sizes(node, shape, "shape")))


LARGE = 1 << 16
"""A range with more elements is made at run time."""


@onnx_rule("Range", static=(0, 1, 2))
def range_rule(node: OnnxNode, start: Any, limit: Any, delta: Any) -> Any:
    """start, start + delta, ... before limit."""
    given = [numbers(node, v, n)[0] for v, n in ((start, "start"), (limit, "limit"), (delta, "delta"))]
    if any(isinstance(v, Tensor) for v in given):
        return ranged(node, given[0], given[1], given[2], dtype_of(start))
    first, last, step = given
    if isinstance(first, Dim) or isinstance(last, Dim):
        if not isinstance(step, int) or step != 1:
            return ranged(node, first, last, step, int64)
        return F.arange(first, last, step, dtype="int64")
    dtype = require_known(node, start, "start").dtype
    if step == 0:
        raise node.fail("delta is 0")
    count = max(math.ceil((last - first) / step), 0)
    if count > LARGE:
        return F.astype(F.arange(count), str(dtype)) * dtype.type(step) + dtype.type(first)
    wide = dtype if dtype.kind in "iu" or dtype.itemsize >= 4 else np.dtype(np.float32)
    return (np.arange(count).astype(wide) * wide.type(step) + wide.type(first)).astype(dtype)


@onnx_rule("EyeLike")
def eye_like(node: OnnxNode, x: Any) -> Tensor:
    rows, columns = shape_of(x)
    dtype = attribute_dtype(node, "dtype", tensor(x).dtype)
    return F.eye(rows, columns, int(node.attr("k", 0)), dtype)


@onnx_rule("Trilu", static=(1,))
def trilu(node: OnnxNode, x: Any, k: Any = None) -> Tensor:
    diagonal = 0 if k is None else int(number_of(node, k, "k"))
    return (F.triu if node.attr("upper", 1) else F.tril)(tensor(x), diagonal)


# Rearranging -----------------------------------------------------------------------------------------------------

@onnx_rule("DepthToSpace")
def depth_to_space(node: OnnxNode, x: Any) -> Tensor:
    """Blocks of channels become blocks of pixels; which of both varies faster is the mode."""
    x, b = tensor(x), int(node.attr("blocksize", 1))
    n, c, h, w = x.shape
    if node.attr("mode", "DCR") == "CRD":
        blocks = F.transpose(F.reshape(x, (n, c // (b * b), b, b, h, w)), (0, 1, 4, 2, 5, 3))
    else:
        blocks = F.transpose(F.reshape(x, (n, b, b, c // (b * b), h, w)), (0, 3, 4, 1, 5, 2))
    return F.reshape(blocks, (n, c // (b * b), h * b, w * b))


@onnx_rule("SpaceToDepth")
def space_to_depth(node: OnnxNode, x: Any) -> Tensor:
    x, b = tensor(x), int(node.attr("blocksize", 1))
    n, c, h, w = x.shape
    blocks = F.reshape(x, (n, c, h // b, b, w // b, b))
    order = (0, 1, 3, 5, 2, 4) if node.attr("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    return F.reshape(F.transpose(blocks, order), (n, c * b * b, h // b, w // b))


@onnx_rule("CenterCropPad", static=(1,))
def center_crop_pad(node: OnnxNode, x: Any, shape: Any) -> Tensor:
    """Each axis cut or padded with zeros evenly at both ends; the odd element comes or goes at the end."""
    x = tensor(x)
    wanted = require_ints(node, shape, "shape")
    axes = node.attr("axes", None)
    low, high = [0] * x.ndim, [0] * x.ndim
    for axis, size in zip(range(x.ndim) if axes is None else (axis_of(node, int(a), x.ndim) for a in axes), wanted):
        missing = size - x.shape[axis]
        before = missing // 2 if missing >= 0 else -((-missing) // 2)
        low[axis], high[axis] = before, missing - before
    return _pad_constant(x, low, high, None)


@onnx_rule("ReverseSequence")
def reverse_sequence(node: OnnxNode, x: Any, lengths: Any) -> Tensor:
    """The first lengths[i] steps of sequence i backwards, the rest as they are."""
    x = tensor(x)
    return reversed_sequences(x, tensor(lengths), int(node.attr("time_axis", 0)), int(node.attr("batch_axis", 1)))


def reversed_sequences(x: Tensor, lengths: Tensor, time: int, batch: int) -> Tensor:
    steps = F.reshape(F.arange(x.shape[time]), (x.shape[time], 1))
    ends = F.reshape(cast(lengths, steps.dtype), (1, x.shape[batch]))
    index = F.where(steps < ends, ends - 1 - steps, steps)  # (time, batch)
    index = index if time < batch else F.transpose(index)
    index = F.reshape(index, tuple(s if i in (time, batch) else 1 for i, s in enumerate(x.shape)))
    return F.take_along_axis(x, index, time)
