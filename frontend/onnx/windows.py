"""What convolutions and pools have in common: the windows that a node's attributes describe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.dims import Dim
from .. import functions as F
from ..data_sizes import size_tensor
from ..dispatch import apply, as_tensor
from ..tensor import Tensor
from .node import OnnxNode

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Windows:
    """Windows over the spatial axes of (N, C, *spatial).

    Attributes:
        kernel, stride, dilation: one int per spatial axis.
        padding: (low, high) per axis, as the node declares it.
        reach: the same with what `ceil_mode` adds at the high end, so that the last window fits.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Pairs
    reach: Pairs


def windows_of(node: OnnxNode, x: Tensor, kernel: Any = None) -> Windows:
    """The windows of a node over x; `kernel` where a weight says it."""
    rank = x.ndim - 2
    if rank < 1:
        raise node.fail(f"{x.type} needs at least three axes, (batch, channels, *spatial)")
    sizes = node.attr("kernel_shape", None) or kernel
    if not sizes:
        raise node.fail("the attribute 'kernel_shape' is missing")
    window = _ints(node, "kernel_shape", sizes, rank)
    stride = _ints(node, "strides", node.attr("strides", None) or (1,) * rank, rank)
    dilation = _ints(node, "dilations", node.attr("dilations", None) or (1,) * rank, rank)
    extent = tuple((k - 1) * d + 1 for k, d in zip(window, dilation))
    padding = _padding(node, x.shape[2:], extent, stride)
    reach = padding
    if node.attr("ceil_mode", 0):
        reach = tuple(map(_ceiled, x.shape[2:], extent, stride, padding))
    return Windows(window, stride, dilation, padding, reach)


def _ints(node: OnnxNode, name: str, values: Any, rank: int) -> tuple[int, ...]:
    if len(values) != rank:
        raise node.fail(f"{name} is {list(values)}; there are {rank} spatial axes")
    return tuple(int(v) for v in values)


def _padding(node: OnnxNode, spatial: Any, extent: Any, stride: Any) -> Pairs:
    mode = node.attr("auto_pad", "NOTSET") or "NOTSET"
    rank = len(spatial)
    if mode == "NOTSET":
        pads = [int(p) for p in node.attr("pads", None) or (0,) * (2 * rank)]
        if len(pads) != 2 * rank:
            raise node.fail(f"pads is {pads}; there are {rank} spatial axes")
        return tuple(zip(pads[:rank], pads[rank:]))
    if mode == "VALID":
        return ((0, 0),) * rank
    return tuple(same_padding(node, n, k, s, mode) for n, k, s in zip(spatial, extent, stride))


def same_padding(node: OnnxNode, size: Any, extent: int, stride: int, mode: str) -> tuple[int, int]:
    """The padding that makes ceil(size / stride) windows; the odd element is at the high end, or the low one."""
    if isinstance(size, Dim):
        if stride != 1:
            raise node.fail(f"auto_pad with the stride {stride} depends on the size {size}, which is known only at "
                            "run time; give the input a fixed size")
        total = extent - 1
    else:
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    small, large = total // 2, total - total // 2
    return (large, small) if mode == "SAME_LOWER" else (small, large)


def _ceiled(size: Any, extent: int, stride: int, pads: tuple[int, int]) -> tuple[int, int]:
    """Padding with as much more at the end as the last, incomplete window needs, unless it starts in the padding."""
    low, high = pads
    room = size + low + high - extent
    if isinstance(room, Dim):
        return (low, high + stride - 1)
    extra = -room % stride
    last = (room + extra) // stride * stride
    return (low, high + extra) if last < size + low else pads


def window_sum(x: Tensor, windows: Windows) -> Tensor:
    """The sum of each window, padding counted as zeros; also of what `ceil_mode` reaches beyond it."""
    if all(d == 1 for d in windows.dilation):
        mean = apply("avg_pool", x, window=windows.kernel, stride=windows.stride, padding=windows.reach,
                     count_include_pad=True)
        return mean * float(math.prod(windows.kernel))
    planes = F.reshape(x, (x.shape[0] * x.shape[1], 1, *x.shape[2:]))
    ones = F.ones((1, 1, *windows.kernel), x.dtype)
    summed = F.conv(planes, ones, windows.stride, windows.reach, windows.dilation)
    return F.reshape(summed, (*x.shape[:2], *summed.shape[2:]))


def window_count(x: Tensor, windows: Windows, with_padding: bool) -> Tensor:
    """How many elements each window has, of shape (1, 1, *out): of x, or of x and its declared padding."""
    counts = []
    for size, k, s, d, (low, high), (_, reach) in zip(x.shape[2:], windows.kernel, windows.stride, windows.dilation,
                                                     windows.padding, windows.reach):
        out = (size + low + reach - (k - 1) * d - 1) // s + 1
        first, last = (0, size + low + high) if with_padding else (low, low + size)
        counts.append(_covered(out, k, s, d, first, last))
    total = counts[0]
    for count in counts[1:]:
        total = F.expand_dims(total, -1) * count
    return F.reshape(F.astype(total, x.dtype), (1, 1, *total.shape))


def _covered(out: Any, kernel: int, stride: int, dilation: int, first: Any, last: Any) -> Tensor:
    """How many of the `kernel` places of each of `out` windows lie in [first, last)."""
    if isinstance(out, int) and isinstance(last, int):
        places = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation
        return as_tensor(((places >= first) & (places < last)).sum(1).astype(np.int64))
    places_now = F.reshape(F.arange(out), (out, 1)) * stride + F.arange(kernel) * dilation
    return F.count_nonzero(F.logical_and(places_now >= first, places_now < size_tensor(last)), axis=1)
