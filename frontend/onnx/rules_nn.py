"""Convolution, pooling and matrix products."""

from __future__ import annotations

import math
from typing import Any

from ...ir.dtypes import int64
from .. import functions as F
from ..dispatch import apply, cast
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .values import require_ints, tensor
from .windows import Windows, window_count, window_sum, windows_of


def channel_column(parameter: Tensor, ndim: int) -> Tensor:
    """A parameter of the channels (C,) as it broadcasts with (N, C, *spatial)."""
    return F.reshape(parameter, (parameter.shape[0], *(1,) * (ndim - 2)))


def convolved(node: OnnxNode, x: Tensor, w: Tensor, b: Any = None, out_dtype: Any = None) -> Tensor:
    """The convolution that a node's attributes describe, plus a bias (C,)."""
    windows = windows_of(node, x, w.shape[2:])
    pads = windows.padding
    if any(p < 0 for pair in pads for p in pair):
        x = apply("pad", x, low=(0, 0, *(min(p[0], 0) for p in pads)), high=(0, 0, *(min(p[1], 0) for p in pads)),
                  interior=(0,) * x.ndim, value=0)
        pads = tuple((max(lo, 0), max(hi, 0)) for lo, hi in pads)
    y = F.conv(x, w, windows.stride, pads, windows.dilation, int(node.attr("group", 1)), out_dtype)
    return y if b is None else y + channel_column(tensor(b), y.ndim)


@onnx_rule("Conv", weights=(1, 2))
def conv(node: OnnxNode, x: Any, w: Any, b: Any = None) -> Tensor:
    return convolved(node, tensor(x), tensor(w), b)


@onnx_rule("ConvTranspose", weights=(1, 2))
def conv_transpose(node: OnnxNode, x: Any, w: Any, b: Any = None) -> Tensor:
    """Each element of x places a kernel; `output_shape` or `auto_pad` say how much of the border is cut off."""
    x, w = tensor(x), tensor(w)
    rank = x.ndim - 2
    stride, dilation, extra = (tuple(int(v) for v in node.attr(name, None) or (default,) * rank) for name, default in
                               (("strides", 1), ("dilations", 1), ("output_padding", 0)))
    extent = tuple((k - 1) * d + 1 for k, d in zip(w.shape[2:], dilation))
    whole = tuple((n - 1) * s + e + o for n, s, e, o in zip(x.shape[2:], stride, extent, extra))
    pads = _transposed_padding(node, x.shape[2:], stride, whole)
    groups = int(node.attr("group", 1))
    if all(0 <= lo and 0 <= hi for lo, hi in pads) and all(o < s for o, s in zip(extra, stride)):
        spatial = tuple(n - lo - hi for n, (lo, hi) in zip(whole, pads))
        y = apply("conv_input_grad", x, w, input_spatial=spatial, stride=stride, padding=pads, dilation=dilation,
                  groups=groups)
    else:
        spatial = tuple(n - o for n, o in zip(whole, extra))
        y = apply("conv_input_grad", x, w, input_spatial=spatial, stride=stride, padding=((0, 0),) * rank,
                  dilation=dilation, groups=groups)
        y = apply("pad", y, low=(0, 0, *(-lo for lo, _ in pads)), interior=(0,) * y.ndim, value=0,
                  high=(0, 0, *(o - hi for o, (_, hi) in zip(extra, pads))))
    return y if b is None else y + channel_column(tensor(b), y.ndim)


def _transposed_padding(node: OnnxNode, spatial: Any, stride: Any, whole: Any) -> tuple[tuple[Any, Any], ...]:
    mode = node.attr("auto_pad", "NOTSET") or "NOTSET"
    wanted = node.attr("output_shape", None)
    if not wanted and mode in ("NOTSET", "VALID"):
        pads = [int(p) for p in (node.attr("pads", None) if mode == "NOTSET" else None) or (0,) * (2 * len(spatial))]
        return tuple(zip(pads[:len(spatial)], pads[len(spatial):]))
    sizes = wanted[-len(spatial):] if wanted else [n * s for n, s in zip(spatial, stride)]
    pairs = []
    for n, size in zip(whole, sizes):
        total = n - size
        small = total // 2
        pairs.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
    return tuple(pairs)


# Pooling ---------------------------------------------------------------------------------------------------------

@onnx_rule("MaxPool")
def max_pool(node: OnnxNode, x: Any) -> Any:
    """(y, indices): an index counts through the whole of x, in rows or, by `storage_order`, in columns."""
    x = tensor(x)
    windows = windows_of(node, x)
    y, flat = apply("max_pool", x, window=windows.kernel, stride=windows.stride, padding=windows.reach,
                    dilation=windows.dilation)
    if not node.wants(1):
        return y
    spatial = x.shape[2:]
    index = cast(flat, int64)
    if node.attr("storage_order", 0):
        index = _column_major(index, spatial)
    plane = F.arange(x.shape[0] * x.shape[1]) * math.prod(spatial)
    return y, index + F.reshape(plane, (*x.shape[:2], *(1,) * len(spatial)))


def _column_major(index: Tensor, spatial: Any) -> Tensor:
    total, rest, stride = None, index, math.prod(spatial)
    for size in reversed(spatial):
        stride = stride // size
        place = F.remainder(rest, size) * stride
        rest = F.floor_divide(rest, size)
        total = place if total is None else total + place
    assert total is not None
    return total


@onnx_rule("AveragePool")
def average_pool(node: OnnxNode, x: Any) -> Tensor:
    """The mean of each window; what `ceil_mode` reaches beyond the padding never counts."""
    x = tensor(x)
    windows = windows_of(node, x)
    counted = bool(node.attr("count_include_pad", 0))
    plain = all(d == 1 for d in windows.dilation)
    if plain and (windows.reach == windows.padding or not counted):
        result: Tensor = apply("avg_pool", x, window=windows.kernel, stride=windows.stride, padding=windows.reach,
                               count_include_pad=counted)
        return result
    return window_sum(x, windows) / window_count(x, windows, counted)


@onnx_rule("LpPool", since=2)
def lp_pool(node: OnnxNode, x: Any) -> Tensor:
    """(sum of |x| ** p) ** (1 / p) of each window."""
    x, p = tensor(x), int(node.attr("p", 2))
    return _root(window_sum(F.power(F.absolute(x), p), windows_of(node, x)), p)


def _root(total: Tensor, p: int) -> Tensor:
    return F.sqrt(total) if p == 2 else total if p == 1 else F.power(total, 1.0 / p)


def _spatial_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@onnx_rule("GlobalAveragePool")
def global_average_pool(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    return F.mean(x, _spatial_axes(x), keepdims=True)


@onnx_rule("GlobalMaxPool")
def global_max_pool(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    return F.max(x, _spatial_axes(x), keepdims=True)


@onnx_rule("GlobalLpPool", since=2)
def global_lp_pool(node: OnnxNode, x: Any) -> Tensor:
    x, p = tensor(x), int(node.attr("p", 2))
    return _root(F.sum(F.power(F.absolute(x), p), _spatial_axes(x), keepdims=True), p)


@onnx_rule("MaxUnpool", static=(2,))
def max_unpool(node: OnnxNode, x: Any, indices: Any, output_shape: Any = None) -> Tensor:
    """Zeros with each x where its index says; a larger `output_shape` adds zeros at the end of each axis."""
    x, indices = tensor(x), tensor(indices)
    windows: Windows = windows_of(node, x)
    spatial = tuple((n - 1) * s + k - lo - hi for n, s, k, (lo, hi) in
                    zip(x.shape[2:], windows.stride, windows.kernel, windows.padding))
    shape = (*x.shape[:2], *spatial)
    flat = F.zeros((math.prod(shape),), x.dtype)
    y = F.reshape(F.scatter_add(flat, F.ravel(indices), F.ravel(x)), shape)
    if output_shape is None:
        return y
    more = tuple(n - s for n, s in zip(require_ints(node, output_shape, "output_shape"), shape))
    result: Tensor = apply("pad", y, low=(0,) * y.ndim, high=more, interior=(0,) * y.ndim, value=0)
    return result


@onnx_rule("Col2Im", static=(1, 2))
def col2im(node: OnnxNode, x: Any, image_shape: Any, block_shape: Any) -> Tensor:
    """The blocks (N, C * block, L) added where they came from: a transposed convolution with unit kernels."""
    x = tensor(x)
    image, block = require_ints(node, image_shape, "image_shape"), require_ints(node, block_shape, "block_shape")
    rank, size = len(image), math.prod(block)
    stride, dilation = (tuple(node.attr(name, None) or (1,) * rank) for name in ("strides", "dilations"))
    pads = tuple(node.attr("pads", None) or (0,) * (2 * rank))
    padding = tuple(zip(pads[:rank], pads[rank:]))
    out = tuple((n + lo + hi - d * (k - 1) - 1) // s + 1 for n, k, s, d, (lo, hi) in
                zip(image, block, stride, dilation, padding))
    n, channels = x.shape[0], x.shape[1] // size
    unit = F.reshape(F.eye(size, dtype=x.dtype), (size, 1, *block))
    y = apply("conv_input_grad", F.reshape(x, (n * channels, size, *out)), unit, input_spatial=tuple(image),
              stride=stride, padding=padding, dilation=dilation, groups=1)
    return F.reshape(y, (n, channels, *image))


# Products --------------------------------------------------------------------------------------------------------

@onnx_rule("MatMul", weights=(0, 1))
def matmul(node: OnnxNode, x: Any, y: Any) -> Tensor:
    return F.matmul(tensor(x), tensor(y))


@onnx_rule("Gemm", weights=(0, 1, 2))
def gemm(node: OnnxNode, a: Any, b: Any, c: Any = None) -> Tensor:
    """alpha * a' b' + beta * c."""
    a, b = tensor(a), tensor(b)
    y = F.matmul(a, b, bool(node.attr("transA", 0)), bool(node.attr("transB", 0)))
    y = scaled(y, node.attr("alpha", 1.0))
    return y if c is None else y + scaled(tensor(c), node.attr("beta", 1.0))


def scaled(x: Tensor, factor: float) -> Tensor:
    """factor * x; an integer x by a whole number."""
    if factor == 1:
        return x
    return x * factor if x.dtype.is_float else x * int(factor)


@onnx_rule("Einsum")
def einsum(node: OnnxNode, *xs: Any) -> Tensor:
    return F.einsum(str(node.require("equation")).replace(" ", ""), *(tensor(x) for x in xs))
