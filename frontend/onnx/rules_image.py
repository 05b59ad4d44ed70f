"""Ops that sample images at places that data decides: GridSample, RoiAlign, deformable convolution.

All of them gather the corners around a place and weigh them, so that gradients reach both the image and the places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ...ir.dtypes import float32, int64
from .. import functions as F
from ..dispatch import apply, cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .rules_nn import channel_column
from .rules_resize import cubic_weight
from .values import require_known, tensor

Tap = tuple[Tensor, Tensor]
"""An index along an axis, and the weight of what is there; tensors of one shape."""


# Sampling --------------------------------------------------------------------------------------------------------

def picked(x: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Elements of x (planes, channels, *spatial) at one index per spatial axis, each (planes, points)."""
    flat = F.reshape(x, (*x.shape[:2], math.prod(x.shape[2:])))
    place = indices[0]
    for index, size in zip(indices[1:], x.shape[3:]):
        place = place * size + index
    place = F.broadcast_to(F.expand_dims(place, 1), (x.shape[0], x.shape[1], place.shape[1]))
    result: Tensor = apply("take_along_axis", flat, place, axis=2)
    return result


def weighted(x: Tensor, axes: Sequence[Sequence[Tap]]) -> Tensor:
    """The sum over all combinations of taps: (planes, channels, points)."""
    total = None
    for corner in itertools.product(*axes):
        weight = corner[0][1]
        for _, w in corner[1:]:
            weight = weight * w
        part = picked(x, [index for index, _ in corner]) * F.expand_dims(weight, 1)
        total = part if total is None else total + part
    assert total is not None
    return total


def bounded(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A whole-numbered place as an index inside the axis, and whether it was inside."""
    inside = F.logical_and(place >= 0, place <= size - 1)
    return cast(F.minimum(F.maximum(place, 0), size - 1), int64), inside


def linear_taps(place: Tensor, size: int, zeros_outside: bool) -> list[Tap]:
    """The two neighbours of a place; what is outside is zero, or the border's element."""
    low = F.floor(place)
    share = place - low
    found = []
    for at, weight in ((low, 1 - share), (low + 1, share)):
        index, inside = bounded(at, size)
        found.append((index, F.where(inside, weight, constant(0, weight.dtype)) if zeros_outside else weight))
    return found


# GridSample ------------------------------------------------------------------------------------------------------

def reflected(place: Tensor, size: int, align: bool) -> Tensor:
    """A place outside the axis mirrored at its ends: the centres of the outermost elements, or their outer edges."""
    low, high = (0.0, size - 1.0) if align else (-0.5, size - 0.5)
    span = high - low
    if span <= 0:
        return place * 0.0
    distance = F.absolute(place - low)
    turns = F.floor(distance / span)
    rest = distance - turns * span
    return F.where(F.remainder(turns, 2.0) == 0, rest + low, high - rest)


def grid_taps(place: Tensor, size: int, mode: str, padding: str, align: bool) -> list[Tap]:
    """What a place along one axis is made of."""
    def inside(p: Tensor) -> Tensor:
        if padding == "reflection":
            p = reflected(p, size, align)
        return p if padding == "zeros" else F.minimum(F.maximum(p, 0.0), size - 1.0)

    zero = constant(0, place.dtype)
    if mode == "nearest":
        index, found = bounded(F.round(inside(place)), size)
        one = F.ones_like(place)
        return [(index, F.where(found, one, zero) if padding == "zeros" else one)]
    if mode == "linear":
        return linear_taps(inside(place), size, padding == "zeros")
    base = F.floor(place)
    result = []
    for k in range(-1, 3):
        weight = cubic_weight(place - (base + k), -0.75)
        index, found = bounded(F.round(inside(base + k)), size)
        result.append((index, F.where(found, weight, zero) if padding == "zeros" else weight))
    return result


MODES = {"linear": "linear", "bilinear": "linear", "nearest": "nearest", "cubic": "cubic", "bicubic": "cubic"}


@onnx_rule("GridSample", since=16)
def grid_sample(node: OnnxNode, x: Any, grid: Any) -> Tensor:
    """x (N, C, *spatial) at places grid (N, *out, rank) in [-1, 1], the last axis of x first."""
    x, grid = tensor(x), tensor(grid)
    rank, out = x.ndim - 2, grid.shape[1:-1]
    mode = MODES.get(node.attr("mode", "linear"))
    if mode is None:
        raise node.fail(f"mode is one of {', '.join(MODES)}, not {node.attr('mode')!r}")
    padding, align = node.attr("padding_mode", "zeros"), bool(node.attr("align_corners", 0))
    axes = []
    for axis, size in enumerate(x.shape[2:]):
        g = cast(F.reshape(grid[..., rank - 1 - axis], (grid.shape[0], math.prod(out))), float32 if
                 x.dtype.bits < 64 else x.dtype)
        place = (g + 1) * ((size - 1) / 2) if align else ((g + 1) * size - 1) * 0.5
        axes.append(grid_taps(place, size, mode, padding, align))
    wide = x if x.dtype.is_float and x.dtype.bits >= 32 else cast(x, float32)
    return cast(F.reshape(weighted(wide, axes), (*x.shape[:2], *out)), x.dtype)


# Regions ---------------------------------------------------------------------------------------------------------

@onnx_rule("RoiAlign", since=10)
def roi_align(node: OnnxNode, x: Any, rois: Any, batch: Any) -> Tensor:
    """Each region (R, 4) of an image cut into bins; a bin is the mean (or maximum) of bilinear samples."""
    x, rois, batch = tensor(x), tensor(rois), cast(tensor(batch), int64)
    default = "half_pixel" if node.opset >= 16 else "output_half_pixel"
    half = node.attr("coordinate_transformation_mode", default) == "half_pixel"
    corners = rois * node.attr("spatial_scale", 1.0) - (0.5 if half else 0.0)
    count, planes = rois.shape[0], x.shape[0] * x.shape[1]
    taps, numbers = [], []
    for axis, name in ((1, "output_height"), (0, "output_width")):
        start, extent = corners[:, axis], corners[:, axis + 2] - corners[:, axis]
        extent = extent if half else F.maximum(extent, 1.0)
        where, valid, number = _samples(node, start, extent, int(node.attr(name, 1)))
        taps.append(_roi_taps(where, valid, x.shape[3] if axis == 0 else x.shape[2]))
        numbers.append(number)
    flat = F.reshape(x, (planes, x.shape[2], x.shape[3]))
    channels = F.reshape(batch, (count, 1)) * x.shape[1] + F.arange(x.shape[1])             # (R, C) planes
    corner_values = []
    for (iy, wy), (ix, wx) in itertools.product(*taps):
        index = F.stack(F.broadcast_arrays(F.reshape(channels, (count, x.shape[1], 1, 1, 1, 1)),
                                           F.reshape(iy, (count, 1, *iy.shape[1:], 1, 1)),
                                           F.reshape(ix, (count, 1, 1, 1, *ix.shape[1:]))), -1)
        weight = F.reshape(wy, (count, 1, *wy.shape[1:], 1, 1)) * F.reshape(wx, (count, 1, 1, 1, *wx.shape[1:]))
        corner_values.append(F.gather_nd(flat, index) * weight)                            # (R, C, oh, gh, ow, gw)
    if node.attr("mode", "avg") == "max":  # as the standard's reference: of the weighted corners
        best = corner_values[0]
        for value in corner_values[1:]:
            best = F.maximum(best, value)
        return F.max(best, (3, 5))
    total = corner_values[0]
    for value in corner_values[1:]:
        total = total + value
    return F.sum(total, (3, 5)) / F.reshape(F.maximum(numbers[0] * numbers[1], 1.0), (count, 1, 1, 1))


def _samples(node: OnnxNode, start: Tensor, extent: Tensor, bins: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Places (R, bins, samples), which of them count, and how many each bin has: (R,)."""
    ratio = int(node.attr("sampling_ratio", 0))
    each = extent / bins
    if ratio > 0:
        most, numbers, valid = ratio, F.full(extent.shape, float(ratio), extent.dtype), None
    else:  # as many as the bin has elements
        numbers = F.ceil(each)
        most = max(int(require_known(node, F.max(numbers), "the number of samples of a bin").reshape(())), 1)
        valid = F.expand_dims(F.arange(most, dtype=extent.dtype) < F.expand_dims(numbers, 1), 1)
    step = F.reshape(each / F.maximum(numbers, 1.0), (-1, 1, 1))
    first = F.reshape(start, (-1, 1, 1)) + F.reshape(each, (-1, 1, 1)) * F.reshape(F.arange(bins), (1, bins, 1))
    return first + (F.arange(most, dtype=extent.dtype) + 0.5) * step, valid, numbers


def _roi_taps(place: Tensor, valid: Tensor | None, size: int) -> list[Tap]:
    """The two neighbours of places; those more than one element outside count for nothing."""
    inside = F.logical_and(place >= -1.0, place <= float(size))
    inside = inside if valid is None else F.logical_and(inside, valid)
    place = F.minimum(F.maximum(place, 0.0), size - 1.0)
    low = F.floor(place)
    share = place - low
    zero = constant(0, place.dtype)
    near = ((low, 1 - share), (low + 1, share))
    return [(bounded(at, size)[0], F.where(inside, weight, zero)) for at, weight in near]


@onnx_rule("MaxRoiPool")
def max_roi_pool(node: OnnxNode, x: Any, rois: Any) -> Tensor:
    """The largest of each bin of each region (R, 5: image, left, top, right, bottom); 0 of a bin without elements."""
    x, rois = tensor(x), tensor(rois)
    rows, columns = (int(n) for n in node.require("pooled_shape"))
    corners = F.floor(rois[:, 1:] * node.attr("spatial_scale", 1.0) + 0.5)
    y = F.take(x, cast(rois[:, 0], int64), axis=0)                                          # (R, C, H, W)
    y = _binned_max(y, corners[:, 0], corners[:, 2], columns)                              # (R, C, H, columns)
    y = _binned_max(F.swapaxes(y, 2, 3), corners[:, 1], corners[:, 3], rows)               # (R, C, columns, rows)
    y = F.swapaxes(y, 2, 3)
    return F.where(F.isfinite(y), y, constant(0, y.dtype))


def _binned_max(x: Tensor, start: Tensor, end: Tensor, bins: int) -> Tensor:
    """The maximum over the last axis of x within each bin of [start, end]: (R, C, rows, bins)."""
    size = F.maximum(end - start + 1, 1.0) / bins
    k = F.arange(bins, dtype=x.dtype)
    low = F.floor(F.expand_dims(size, 1) * k) + F.expand_dims(start, 1)                     # (R, bins)
    high = F.ceil(F.expand_dims(size, 1) * (k + 1)) + F.expand_dims(start, 1)
    place = F.arange(x.shape[-1], dtype=x.dtype)
    member = F.logical_and(place >= F.expand_dims(low, 2), place < F.expand_dims(high, 2))  # (R, bins, size)
    member = F.reshape(member, (member.shape[0], 1, 1, *member.shape[1:]))
    return F.max(F.where(member, F.expand_dims(x, 3), constant(-math.inf, x.dtype)), -1)


# Deformable convolution ------------------------------------------------------------------------------------------

@onnx_rule("DeformConv", since=19, weights=(1, 3))
def deform_conv(node: OnnxNode, x: Any, w: Any, offset: Any, b: Any = None, mask: Any = None) -> Tensor:
    """A convolution whose kernel elements are each moved by an offset, and weighed by a mask (Zhu et al., 2019)."""
    x, w, offset = tensor(x), tensor(w), tensor(offset)
    rank = x.ndim - 2
    kernel, out = w.shape[2:], offset.shape[2:]
    stride, dilation = (tuple(node.attr(name, None) or (1,) * rank) for name in ("strides", "dilations"))
    pads = tuple(node.attr("pads", None) or (0,) * (2 * rank))
    parts, groups = int(node.attr("offset_group", 1)), int(node.attr("group", 1))
    taps, batch = math.prod(kernel), x.shape[0]
    offset = F.reshape(offset, (batch * parts, taps, rank, *out))
    axes = []
    for axis in range(rank):
        start = apply("iota", shape=tuple(n if i == axis else 1 for i, n in enumerate(out)), axis=axis, dtype=x.dtype)
        step = apply("iota", shape=tuple(n if i == axis else 1 for i, n in enumerate(kernel)), axis=axis,
                     dtype=x.dtype) * float(dilation[axis])
        step = F.reshape(F.broadcast_to(step, kernel), (taps, *(1,) * rank))
        place = offset[:, :, axis] + (start * float(stride[axis]) - float(pads[axis]) + step)
        axes.append(linear_taps(F.reshape(place, (batch * parts, taps * math.prod(out))), x.shape[2 + axis], True))
    planes = F.reshape(x, (batch * parts, x.shape[1] // parts, *x.shape[2:]))
    columns = F.reshape(weighted(planes, axes), (batch, parts, x.shape[1] // parts, taps, math.prod(out)))
    if mask is not None:
        columns = columns * F.reshape(tensor(mask), (batch, parts, 1, taps, math.prod(out)))
    columns = F.reshape(columns, (batch, groups, x.shape[1] // groups * taps, math.prod(out)))
    rows = F.reshape(w, (groups, w.shape[0] // groups, math.prod(w.shape[1:])))
    y = F.reshape(F.matmul(rows, columns), (batch, w.shape[0], *out))
    return y if b is None else y + channel_column(tensor(b), y.ndim)
