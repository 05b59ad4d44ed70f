"""Pooling over windows of the spatial axes of x (N, C, *spatial), any rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .ops_common import (
    REQUIRED,
    Shape,
    TensorType,
    as_dtype,
    check_compute,
    check_flag,
    check_ints,
    check_shape_attr,
    contiguous,
    define,
    fail_attr,
    fail_dtype,
    fail_shape,
    in_f32,
    listing,
)
from .ops_conv import check_spatial, check_window, placed, unpadded, window_sizes
from .ops_elementwise import check_accepts
from .ops_layout import either_layout, either_layout_type
from .ops_reduce import lowest

INT32 = as_dtype("int32")


def check_pool(x: TensorType, window: Any, stride: Any, padding: Any, dilation: Any) -> Shape:
    """The type rule of pooling: the shape of the result."""
    if x.rank < 3:
        fail_shape(f"needs at least rank 3, (batch, channels, *spatial), got {x}")
    check_ints("window", window, x.rank - 2, least=1)
    check_window(x.rank - 2, stride, padding, dilation)
    return (*x.shape[:2], *window_sizes(x.shape[2:], window, stride, padding, dilation))


def unit(window: Any) -> tuple[int, ...]:
    return (1,) * len(window)


# Maximum ---------------------------------------------------------------------------------------------------------

def max_pool_infer(x: TensorType, window: Any, stride: Any, padding: Any, dilation: Any) -> tuple[TensorType, ...]:
    check_accepts("number", x)
    shape = check_pool(x, window, stride, padding, dilation)
    return x.with_shape(shape), TensorType(shape, INT32)


def max_pool_reference(x: Any, window: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    spatial = x.shape[2:]
    out = window_sizes(spatial, window, stride, padding, dilation)
    plane = np.arange(math.prod(spatial), dtype=np.int32).reshape(1, 1, *spatial)
    grow = ((0, 0), (0, 0), *padding)
    padded = np.pad(x, grow, constant_values=lowest(x.dtype))
    where = np.pad(plane, grow, constant_values=-1)
    best = np.full((*x.shape[:2], *out), lowest(x.dtype))
    index = np.full(best.shape, -1, np.int32)
    for offsets in np.ndindex(*window):
        here = placed(offsets, out, stride, dilation)
        value, place = padded[here], where[here]
        better = (place >= 0) & ((index < 0) | (value > best) | ((value != value) & (best == best)))
        best = np.where(better, value, best)
        index = np.where(better, place, index)
    return best, index


define("max_pool", "x", either_layout_type(max_pool_infer, (0,), (0, 1)),
       either_layout(max_pool_reference, (0,), (0, 1)),
       "(y, i32 indices): the largest of each window (NaN if there is one), and where it lies in the flattened, "
       "unpadded spatial axes: the first of equals, or the first NaN. Padding never wins; a window of padding alone "
       "gives the smallest value and index -1.",
       attrs={"window": REQUIRED, "stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED,
              "channels_last": False},
       flops=lambda node: node.results[0].type.size * math.prod(node.attrs["window"]))


def max_pool_grad_infer(dy: TensorType, indices: TensorType, input_spatial: Any) -> TensorType:
    check_compute(dy)
    if indices.dtype != "int32":
        fail_dtype(f"the indices of max_pool are i32, got {indices}")
    if dy.shape != indices.shape or dy.rank < 3:
        fail_shape(f"{listing(dy, indices)} need one shape, (batch, channels, *spatial)")
    spatial = check_shape_attr(input_spatial, "input_spatial")
    if len(spatial) != dy.rank - 2:
        fail_attr(f"input_spatial is {input_spatial}; expected {dy.rank - 2} sizes for {dy}")
    return dy.with_shape((*dy.shape[:2], *spatial))


@in_f32
def max_pool_grad_reference(dy: Any, indices: Any, input_spatial: Any) -> Any:
    planes, size = math.prod(dy.shape[:2]), math.prod(input_spatial)
    flat = np.zeros((planes, size), dy.dtype)
    spot = indices.reshape(planes, math.prod(indices.shape[2:]))
    value = np.where(spot >= 0, dy.reshape(spot.shape), dy.dtype.type(0))
    if flat.size:
        np.add.at(flat, (np.arange(planes)[:, None], np.maximum(spot, 0)), value)
    return flat.reshape(*dy.shape[:2], *input_spatial)


define("max_pool_grad", "dy indices", either_layout_type(max_pool_grad_infer, (0, 1), (0,)),
       either_layout(max_pool_grad_reference, (0, 1), (0,)),
       "Transpose of max_pool: zeros of the input's shape with each dy added at its index; index -1 is dropped.",
       attrs={"input_spatial": REQUIRED, "channels_last": False}, flops=lambda node: node.operands[0].type.size)


# Average ---------------------------------------------------------------------------------------------------------

def avg_pool_infer(x: TensorType, window: Any, stride: Any, padding: Any, count_include_pad: Any) -> TensorType:
    check_accepts("float", x)
    check_flag(count_include_pad=count_include_pad)
    return x.with_shape(check_pool(x, window, stride, padding, unit(window)))


def divisor(spatial: Any, window: Any, stride: Any, padding: Any, include: bool, dtype: Any) -> Any:
    """How many elements each window averages, (1, 1, *out); at least 1."""
    if include:
        return np.asarray(math.prod(window), dtype)
    count = window_sum(np.ones((1, 1, *spatial), dtype), window, stride, padding)
    return np.maximum(count, dtype.type(1))


def window_sum(x: Any, window: Any, stride: Any, padding: Any) -> Any:
    out = window_sizes(x.shape[2:], window, stride, padding, unit(window))
    padded = np.pad(x, ((0, 0), (0, 0), *padding))
    total = np.zeros((*x.shape[:2], *out), x.dtype)
    for offsets in np.ndindex(*window):
        total += padded[placed(offsets, out, stride, unit(window))]
    return total


@in_f32
def avg_pool_reference(x: Any, window: Any, stride: Any, padding: Any, count_include_pad: Any) -> Any:
    count = divisor(x.shape[2:], window, stride, padding, count_include_pad, x.dtype)
    return window_sum(x, window, stride, padding) / count


AVERAGE_ATTRS = {"window": REQUIRED, "stride": REQUIRED, "padding": REQUIRED, "count_include_pad": True,
                 "channels_last": False}

define("avg_pool", "x", either_layout_type(avg_pool_infer, (0,), (0,)),
       either_layout(avg_pool_reference, (0,), (0,)),
       "Mean of each window; padding counts as zeros, or not at all (then a window of padding alone gives 0).",
       attrs=AVERAGE_ATTRS, flops=lambda node: node.result.type.size * math.prod(node.attrs["window"]))


def avg_pool_grad_infer(dy: TensorType, input_spatial: Any, window: Any, stride: Any, padding: Any,
                        count_include_pad: Any) -> TensorType:
    check_accepts("float", dy)
    check_flag(count_include_pad=count_include_pad)
    if dy.rank < 3:
        fail_shape(f"needs at least rank 3, (batch, channels, *spatial), got {dy}")
    check_ints("window", window, dy.rank - 2, least=1)
    check_window(dy.rank - 2, stride, padding, unit(window))
    return dy.with_shape((*dy.shape[:2], *check_spatial(input_spatial, dy, window, stride, padding, unit(window))))


@in_f32
def avg_pool_grad_reference(dy: Any, input_spatial: Any, window: Any, stride: Any, padding: Any,
                            count_include_pad: Any) -> Any:
    share = dy / divisor(input_spatial, window, stride, padding, count_include_pad, dy.dtype)
    padded = np.zeros((*dy.shape[:2], *(n + lo + hi for n, (lo, hi) in zip(input_spatial, padding))), dy.dtype)
    for offsets in np.ndindex(*window):
        padded[placed(offsets, dy.shape[2:], stride, unit(window))] += share
    return contiguous(padded[unpadded(input_spatial, padding)])


define("avg_pool_grad", "dy", either_layout_type(avg_pool_grad_infer, (0,), (0,)),
       either_layout(avg_pool_grad_reference, (0,), (0,)),
       "Transpose of avg_pool: each dy shared equally among the elements of its window.",
       attrs={"input_spatial": REQUIRED, **AVERAGE_ATTRS},
       flops=lambda node: node.operands[0].type.size * math.prod(node.attrs["window"]))
