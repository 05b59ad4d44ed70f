"""Ops that move elements without changing them. All work on every dtype.

Sizes and bounds are normalised: the frontend turns -1 in a reshape, negative axes, and Python's slices into what
these ops take.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .ops_common import (
    REQUIRED,
    Size,
    TensorType,
    broadcasts_to,
    check_axes,
    check_axis,
    check_ints,
    check_rank,
    check_same_dtype,
    check_shape_attr,
    contiguous,
    define,
    fail_attr,
    fail_shape,
    listing,
    same_size,
    shape_text,
)


def reshape_infer(x: TensorType, shape: Any) -> TensorType:
    shape = check_shape_attr(shape)
    if not same_size(x.size, math.prod(shape)):
        fail_shape(f"{x} has {x.size} elements, the shape {shape_text(shape)} has {math.prod(shape)}")
    return x.with_shape(shape)


define("reshape", "x", reshape_infer, lambda x, shape: np.reshape(x, shape),
       "The same elements in row-major order under another shape.", attrs={"shape": REQUIRED}, traits=["view"],
       nbytes=lambda node: 0)


def transpose_infer(x: TensorType, perm: Any) -> TensorType:
    if sorted(check_ints("perm", perm, x.rank)) != list(range(x.rank)):
        fail_attr(f"perm is {perm}; expected each of 0..{x.rank - 1} once for {x}")
    return x.with_shape(tuple(x.shape[p] for p in perm))


define("transpose", "x", transpose_infer, lambda x, perm: contiguous(np.transpose(x, perm)),
       "Axis i of the result is axis perm[i] of x.", attrs={"perm": REQUIRED}, traits=["view"])


def broadcast_to_infer(x: TensorType, shape: Any) -> TensorType:
    shape = check_shape_attr(shape)
    if not broadcasts_to(x.shape, shape):
        fail_shape(f"{x} does not broadcast to the shape {shape_text(shape)}")
    return x.with_shape(shape)


define("broadcast_to", "x", broadcast_to_infer, lambda x, shape: np.broadcast_to(x, shape).copy(),
       "x repeated along axes of size 1, and along new leading axes, to a shape.", attrs={"shape": REQUIRED},
       traits=["view"])


def concat_infer(*xs: TensorType, axis: Any) -> TensorType:
    if not xs:
        fail_shape("needs at least one operand")
    check_same_dtype(*xs)
    first = xs[0]
    check_rank(first, 1, "the first operand")
    check_axis(axis, first.rank)
    for x in xs[1:]:
        if x.rank != first.rank or any(i != axis and not same_size(a, b)
                                       for i, (a, b) in enumerate(zip(x.shape, first.shape))):
            fail_shape(f"{listing(first, x)} differ beyond axis {axis}, along which they are joined")
    total: Size = sum((x.shape[axis] for x in xs), 0)
    return first.with_shape((*first.shape[:axis], total, *first.shape[axis + 1:]))


define("concat", "*xs", concat_infer, lambda *xs, axis: np.concatenate(xs, axis),
       "Operands joined along an axis.", attrs={"axis": REQUIRED})


def slice_size(start: Size, limit: Size, stride: int) -> Size:
    """Number of elements from start, in steps of stride, before limit."""
    return (limit - start + stride - 1) // stride if stride > 0 else (start - limit - stride - 1) // -stride


def slice_infer(x: TensorType, starts: Any, limits: Any, strides: Any) -> TensorType:
    for name, bounds in (("starts", starts), ("limits", limits)):
        if not isinstance(bounds, tuple) or len(bounds) != x.rank:
            fail_attr(f"{name} is {bounds!r}; expected a tuple of {x.rank} sizes for {x}")
    check_ints("strides", strides, x.rank)
    shape = []
    for axis, (size, start, limit, stride) in enumerate(zip(x.shape, starts, limits, strides)):
        if stride == 0:
            fail_attr(f"strides is {strides}; a stride of 0 on axis {axis} never ends")
        if all(isinstance(s, int) for s in (size, start, limit)):
            good = 0 <= start <= limit <= size if stride > 0 else -1 <= limit <= start < max(size, 1)
            if not good:
                fail_attr(f"axis {axis} of {x}: start {start}, limit {limit}, stride {stride} is not normalised; "
                          f"expected 0 <= start <= limit <= {size}, or -1 <= limit <= start < {size} going backwards")
        shape.append(slice_size(start, limit, stride))
    return x.with_shape(tuple(shape))


def slice_reference(x: Any, starts: Any, limits: Any, strides: Any) -> Any:
    index = tuple(slice(start, None if limit < 0 else limit, stride)
                  for start, limit, stride in zip(starts, limits, strides))
    return contiguous(x[index])


define("slice", "x", slice_infer, slice_reference,
       "Elements start, start + stride, ... before limit of each axis. With a negative stride limit -1 means: down "
       "to element 0.", attrs={"starts": REQUIRED, "limits": REQUIRED, "strides": REQUIRED}, traits=["view"],
       nbytes=lambda node: 2 * node.result.type.nbytes)


def pad_infer(x: TensorType, low: Any, high: Any, interior: Any, value: Any) -> TensorType:
    check_ints("low", low, x.rank)
    check_ints("high", high, x.rank)
    check_ints("interior", interior, x.rank, least=0)
    if not isinstance(value, (bool, int, float)):
        fail_attr(f"value is {value!r}; expected a number")
    shape = []
    for size, lo, hi, gap in zip(x.shape, low, high, interior):
        spread = size + gap * (size - 1) if isinstance(size, int) and size else size * (gap + 1) - gap
        padded = lo + hi + (0 if size == 0 else spread)
        if isinstance(padded, int) and padded < 0:
            fail_shape(f"{x} with low={low}, high={high} would have a negative size")
        shape.append(padded)
    return x.with_shape(tuple(shape))


def pad_reference(x: Any, low: Any, high: Any, interior: Any, value: Any) -> Any:
    fill = np.asarray(value).astype(x.dtype)
    spread = np.full([n + g * max(n - 1, 0) for n, g in zip(x.shape, interior)], fill, x.dtype)
    spread[tuple(slice(None, None, g + 1) for g in interior)] = x
    grow = [(max(lo, 0), max(hi, 0)) for lo, hi in zip(low, high)]
    padded = np.pad(spread, grow, constant_values=fill) if x.ndim else spread
    crop = tuple(slice(max(-lo, 0), n - max(-hi, 0)) for n, lo, hi in zip(padded.shape, low, high))
    return contiguous(padded[crop])


define("pad", "x", pad_infer, pad_reference,
       "x with `interior` values between neighbours, `low` before and `high` after each axis; negative low or high "
       "crop.", attrs={"low": REQUIRED, "high": REQUIRED, "interior": REQUIRED, "value": 0})


def reverse_infer(x: TensorType, axes: Any) -> TensorType:
    check_axes(axes, x.rank)
    return x


define("reverse", "x", reverse_infer, lambda x, axes: contiguous(np.flip(x, axes)),
       "x with the order along some axes reversed.", attrs={"axes": REQUIRED}, traits=["view"])
