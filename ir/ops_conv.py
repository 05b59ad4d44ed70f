"""Convolution of any spatial rank, and its two transposes.

x is (N, C, *spatial), w is (O, C / groups, *kernel); the result is (N, O, *out). `padding` holds (low, high) for
each spatial axis. `conv_input_grad` is also the transposed convolution ("deconvolution"). The references gather
the windows into a matrix (im2col) and multiply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .ops_common import (
    REQUIRED,
    Shape,
    Size,
    TensorType,
    as_dtype,
    check_ints,
    check_shape_attr,
    contiguous,
    define,
    fail_attr,
    fail_shape,
    listing,
    same_size,
    shape_text,
)
from .ops_layout import either_layout, either_layout_type
from .ops_linalg import accumulated_dtype, accumulator

# Largest matrix of windows that a reference makes at once, in elements; it takes the batch in parts.
COLUMN_ELEMENTS = 1 << 22


# Windows: shared with pooling ------------------------------------------------------------------------------------

def check_window(spatial: int, stride: Any, padding: Any, dilation: Any) -> None:
    check_ints("stride", stride, spatial, least=1)
    check_ints("dilation", dilation, spatial, least=1)
    if not isinstance(padding, tuple) or len(padding) != spatial:
        fail_attr(f"padding is {padding!r}; expected {spatial} pairs (low, high)")
    for pair in padding:
        check_ints("a pair of padding", pair, 2, least=0)


def window_size(size: Size, window: Any, stride: int, padding: tuple[int, int], dilation: int) -> Any:
    """How many windows fit along an axis."""
    room = size + padding[0] + padding[1] - dilation * (window - 1) - 1
    if isinstance(room, int) and room < 0:
        fail_shape(f"a window of {window} with dilation {dilation} is larger than the axis of {size} with padding "
                   f"{padding}")
    return room // stride + 1


def window_sizes(spatial: Shape, window: Any, stride: Any, padding: Any, dilation: Any) -> Shape:
    return tuple(map(window_size, spatial, window, stride, padding, dilation))


def windows(x: Any, window: Any, stride: Any, padding: Any, dilation: Any, fill: Any = 0) -> Any:
    """A read-only view (N, C, *window, *out) of the padded x: every element of every window."""
    spatial = x.shape[2:]
    out: Any = window_sizes(spatial, window, stride, padding, dilation)
    if any(lo or hi for lo, hi in padding):
        x = np.pad(x, ((0, 0), (0, 0), *padding), constant_values=fill)
    steps = x.strides[2:]
    return np.lib.stride_tricks.as_strided(
        x, (*x.shape[:2], *window, *out), writeable=False,
        strides=(*x.strides[:2], *(s * d for s, d in zip(steps, dilation)), *(s * t for s, t in zip(steps, stride))))


def placed(offsets: Any, out: Any, stride: Any, dilation: Any) -> tuple[Any, ...]:
    """Where, in the padded plane, the elements at one offset of all windows lie."""
    return planes(slice(o * d, o * d + (n - 1) * s + 1 if n else o * d, s)
                  for o, n, s, d in zip(offsets, out, stride, dilation))


def unpadded(spatial: Any, padding: Any) -> tuple[Any, ...]:
    """Where, in the padded plane, the input lies."""
    return planes(slice(lo, lo + n) for n, (lo, _) in zip(spatial, padding))


def planes(spatial_index: Iterable[Any]) -> tuple[Any, ...]:
    """An index into the spatial axes, for all images and channels."""
    return (slice(None), slice(None), *spatial_index)


def batches(size: int, elements_each: int) -> list[slice]:
    """The batch in parts whose windows fit into COLUMN_ELEMENTS."""
    step = max(COLUMN_ELEMENTS // max(elements_each, 1), 1)
    return [slice(i, i + step) for i in range(0, size, step)]


# Type rules ------------------------------------------------------------------------------------------------------

def check_conv(x: TensorType, other: TensorType, stride: Any, padding: Any, dilation: Any, groups: Any) -> None:
    if x.rank < 3 or other.rank != x.rank:
        fail_shape(f"{listing(x, other)} need one rank, at least 3: (batch, channels, *spatial)")
    check_window(x.rank - 2, stride, padding, dilation)
    check_ints("(groups,)", (groups,), 1, least=1)


def check_groups(channels: Size, groups: int, what: str) -> None:
    if isinstance(channels, int) and channels % groups:
        fail_shape(f"{what} are not a multiple of groups={groups}")


def conv_infer(x: TensorType, w: TensorType, stride: Any, padding: Any, dilation: Any, groups: Any,
               out_dtype: Any) -> TensorType:
    check_conv(x, w, stride, padding, dilation, groups)
    dtype = accumulated_dtype(x, w, out_dtype)
    check_groups(w.shape[0], groups, f"the {w.shape[0]} output channels of the weight {w}")
    if not same_size(x.shape[1], w.shape[1] * groups):
        fail_shape(f"{x} has {x.shape[1]} channels, the weight {w} with groups={groups} takes {w.shape[1] * groups}")
    return TensorType((x.shape[0], w.shape[0], *window_sizes(x.shape[2:], w.shape[2:], stride, padding, dilation)),
                      dtype)


def conv_input_grad_infer(dy: TensorType, w: TensorType, input_spatial: Any, stride: Any, padding: Any, dilation: Any,
                          groups: Any, out_dtype: Any) -> TensorType:
    check_conv(dy, w, stride, padding, dilation, groups)
    dtype = accumulated_dtype(dy, w, out_dtype)
    check_groups(w.shape[0], groups, f"the {w.shape[0]} output channels of the weight {w}")
    if not same_size(dy.shape[1], w.shape[0]):
        fail_shape(f"{dy} has {dy.shape[1]} channels, the weight {w} gives {w.shape[0]}")
    spatial = check_spatial(input_spatial, dy, w.shape[2:], stride, padding, dilation)
    return TensorType((dy.shape[0], w.shape[1] * groups, *spatial), dtype)


def check_spatial(input_spatial: Any, dy: TensorType, window: Shape, stride: Any, padding: Any,
                  dilation: Any) -> Shape:
    """The input sizes of which windows make the spatial sizes of dy."""
    spatial = check_shape_attr(input_spatial, "input_spatial")
    if len(spatial) != dy.rank - 2:
        fail_attr(f"input_spatial is {input_spatial}; expected {dy.rank - 2} sizes for {dy}")
    made = window_sizes(spatial, window, stride, padding, dilation)
    if not all(map(same_size, made, dy.shape[2:])):
        fail_shape(f"windows {shape_text(window)} over an input of {shape_text(spatial)} give {shape_text(made)}, "
                   f"not the spatial sizes of {dy}")
    return spatial


def conv_weight_grad_infer(x: TensorType, dy: TensorType, kernel_spatial: Any, stride: Any, padding: Any,
                           dilation: Any, groups: Any, out_dtype: Any) -> TensorType:
    check_conv(x, dy, stride, padding, dilation, groups)
    dtype = accumulated_dtype(x, dy, out_dtype)
    if not same_size(x.shape[0], dy.shape[0]):
        fail_shape(f"{listing(x, dy)} differ in the batch size")
    check_groups(x.shape[1], groups, f"the {x.shape[1]} channels of {x}")
    check_groups(dy.shape[1], groups, f"the {dy.shape[1]} channels of {dy}")
    kernel = check_ints("kernel_spatial", kernel_spatial, x.rank - 2, least=1)
    check_spatial(x.shape[2:], dy, kernel, stride, padding, dilation)
    return TensorType((dy.shape[1], x.shape[1] // groups, *kernel), dtype)


# References ------------------------------------------------------------------------------------------------------

def columns(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    """The windows of x as a matrix for each image and group: (N, groups, C / groups * kernel, out)."""
    view = windows(x, kernel, stride, padding, dilation)
    out = math.prod(view.shape[2 + len(kernel):])
    return view.reshape(x.shape[0], groups, x.shape[1] // groups * math.prod(kernel), out)


def conv_reference(x: Any, w: Any, stride: Any, padding: Any, dilation: Any, groups: Any, out_dtype: Any) -> Any:
    out_type = x.dtype if out_dtype is None else as_dtype(out_dtype).np
    inner = accumulator(x.dtype, out_type)
    x, w = x.astype(inner, copy=False), w.astype(inner, copy=False)
    kernel = w.shape[2:]
    out = window_sizes(x.shape[2:], kernel, stride, padding, dilation)
    y = np.empty((x.shape[0], w.shape[0], *out), inner)
    rows = w.reshape(groups, w.shape[0] // groups, math.prod(w.shape[1:]))
    for part in batches(x.shape[0], x.shape[1] * math.prod(kernel) * math.prod(out)):
        y[part] = np.matmul(rows, columns(x[part], kernel, stride, padding, dilation, groups)).reshape(y[part].shape)
    return y.astype(out_type, copy=False)


def conv_input_grad_reference(dy: Any, w: Any, input_spatial: Any, stride: Any, padding: Any, dilation: Any,
                              groups: Any, out_dtype: Any) -> Any:
    out_type = dy.dtype if out_dtype is None else as_dtype(out_dtype).np
    inner = accumulator(dy.dtype, out_type)
    dy, w = dy.astype(inner, copy=False), w.astype(inner, copy=False)
    kernel, out, batch = w.shape[2:], dy.shape[2:], dy.shape[0]
    channels = w.shape[1] * groups
    padded = np.zeros((batch, channels, *(n + lo + hi for n, (lo, hi) in zip(input_spatial, padding))), inner)
    rows = w.reshape(groups, w.shape[0] // groups, math.prod(w.shape[1:])).swapaxes(1, 2)
    grouped = dy.reshape(batch, groups, dy.shape[1] // groups, math.prod(out))
    for part in batches(batch, channels * math.prod(kernel) * math.prod(out)):
        spread = np.matmul(rows, grouped[part])
        spread = spread.reshape(len(spread), channels, *kernel, *out)
        for offsets in np.ndindex(*kernel):
            padded[part][placed(offsets, out, stride, dilation)] += spread[planes(offsets)]
    return contiguous(padded[unpadded(input_spatial, padding)]).astype(out_type, copy=False)


def conv_weight_grad_reference(x: Any, dy: Any, kernel_spatial: Any, stride: Any, padding: Any, dilation: Any,
                               groups: Any, out_dtype: Any) -> Any:
    out_type = x.dtype if out_dtype is None else as_dtype(out_dtype).np
    inner = accumulator(x.dtype, out_type)
    x, dy = x.astype(inner, copy=False), dy.astype(inner, copy=False)
    out = math.prod(dy.shape[2:])
    grouped = dy.reshape(dy.shape[0], groups, dy.shape[1] // groups, out)
    depth = x.shape[1] // groups * math.prod(kernel_spatial)
    total = np.zeros((groups, dy.shape[1] // groups, depth), inner)
    for part in batches(x.shape[0], x.shape[1] * math.prod(kernel_spatial) * out):
        seen = columns(x[part], kernel_spatial, stride, padding, dilation, groups)
        total += np.matmul(grouped[part], seen.swapaxes(2, 3)).sum(0, dtype=inner)
    shape: tuple[int, ...] = (dy.shape[1], x.shape[1] // groups, *kernel_spatial)
    return total.reshape(shape).astype(out_type, copy=False)


def _conv_flops(dy: Any, channels: Any, kernel: Any) -> Any:
    return 2 * dy.type.size * channels * math.prod(kernel)


WINDOW_ATTRS = {"stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED, "groups": 1, "out_dtype": None,
                "channels_last": False}

define("conv", "x w", either_layout_type(conv_infer, (0,), (0,)),
       either_layout(conv_reference, (0,), (0,)), "Convolution (correlation, as in every deep-learning library) of x "
       "(N, C, *spatial) with w (O, C / groups, *kernel).", attrs=WINDOW_ATTRS, traits=["contraction"],
       flops=lambda node: _conv_flops(node.result, node.operands[1].shape[1], node.operands[1].shape[2:]))
define("conv_input_grad", "dy w", either_layout_type(conv_input_grad_infer, (0,), (0,)),
       either_layout(conv_input_grad_reference, (0,), (0,)),
       "Transpose of conv in x: a sum of kernels placed at the elements of dy (N, O, *out), cut to input_spatial. Also "
       "the transposed convolution.", attrs={"input_spatial": REQUIRED, **WINDOW_ATTRS}, traits=["contraction"],
       flops=lambda node: _conv_flops(node.operands[0], node.operands[1].shape[1], node.operands[1].shape[2:]))
define("conv_weight_grad", "x dy", either_layout_type(conv_weight_grad_infer, (0, 1), ()),
       either_layout(conv_weight_grad_reference, (0, 1), ()),
       "Transpose of conv in w: windows of x weighted with dy, of the shape (O, C / groups, *kernel_spatial).",
       attrs={"kernel_spatial": REQUIRED, **WINDOW_ATTRS}, traits=["contraction"],
       flops=lambda node: _conv_flops(node.operands[1], node.result.shape[1], node.result.shape[2:]))
