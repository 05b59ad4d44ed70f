"""Export of convolution, pooling and their transposes.

The gradient of a convolution in its input is ConvTranspose; that in its weight is a convolution again, with batch and
channels exchanged and stride and dilation too, so both are one node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.dims import Dim, Size
from ...ir.graph import Node
from ...ir.ops_layout import to_first
from ...ir.ops_reduce import lowest
from .export_math import both
from .export_rules import exports, in_f32
from .export_shape import filled, pad_edges, reshape, scalar_size, take_slice, transpose
from .export_writer import INT64, Ref, Writer

Shape = tuple[Any, ...]


def channels_first(node: Node, i: int) -> Shape:
    """The shape of an operand as (N, C, *spatial)."""
    shape = node.operands[i].shape
    return to_first(shape) if node.attrs.get("channels_last") else shape


def to_channels_first(out: Writer, node: Node, x: Ref) -> Ref:
    """An activation as ONNX has it."""
    rank = node.operands[0].rank
    return transpose(out, x, [0, rank - 1, *range(1, rank - 1)]) if node.attrs.get("channels_last") else x


def from_channels_first(out: Writer, node: Node, y: Ref) -> Ref:
    """A result as the op gives it."""
    rank = node.operands[0].rank
    return transpose(out, y, [0, *range(2, rank), 1]) if node.attrs.get("channels_last") else y


def pads(padding: Sequence[tuple[int, int]]) -> list[int] | None:
    """ONNX's order: all lows, then all highs; None if there is no padding."""
    listed = [*(lo for lo, _ in padding), *(hi for _, hi in padding)]
    return listed if any(listed) else None


def steps(values: Sequence[int]) -> list[int] | None:
    """Strides or dilations; None where all are 1."""
    return list(values) if set(values) != {1} else None


def window_attrs(node: Node, kernel: Sequence[Any]) -> dict[str, Any]:
    """What Conv and ConvTranspose are told."""
    attrs = node.attrs
    known = not any(isinstance(k, Dim) for k in kernel)
    return {"kernel_shape": [int(k) for k in kernel] if known else None, "strides": steps(attrs["stride"]),
            "pads": pads(attrs["padding"]), "dilations": steps(attrs["dilation"]),
            "group": attrs["groups"] if attrs["groups"] != 1 else None}


def computed(out: Writer, node: Node, *refs: Ref) -> tuple[Ref, ...]:
    """Operands of a convolution in the dtype that it accumulates in."""
    wanted = node.result.dtype
    if wanted.is_integer:
        raise out.fail(f"ONNX convolves integers only from 8 to 32 bits (ConvInteger), not {refs[0].dtype} to "
                       f"{wanted}: cast to float32, or to float64 for numbers above 2**24")
    inner = wanted if wanted.bits > 16 or refs[0].dtype.bits == 16 and out.takes("Conv", wanted) else "float32"
    return tuple(out.cast(r, inner) for r in refs)


@exports("conv")
def write_conv(out: Writer, node: Node, x: Ref, w: Ref, bias: Ref | None = None) -> Ref:
    """Conv, perhaps with a bias (C,)."""
    x = to_channels_first(out, node, x)
    attrs = window_attrs(node, node.operands[1].shape[2:])
    if x.dtype in ("int8", "uint8") and node.result.dtype == "int32":
        made = out.op("ConvInteger", x, w, dtype="int32", **attrs)
    else:
        made = out.cast(out.op("Conv", *computed(out, node, x, w), bias, **attrs), node.result.dtype)
    return from_channels_first(out, node, made)


@exports("conv_input_grad")
def write_conv_transpose(out: Writer, node: Node, dy: Ref, w: Ref, bias: Ref | None = None) -> Ref:
    """ConvTranspose; where the output padding is symbolic, its whole result is cut to the size that is wanted."""
    attrs = node.attrs
    spatial, kernel = attrs["input_spatial"], node.operands[1].shape[2:]
    dy, w = computed(out, node, to_channels_first(out, node, dy), w)
    given = window_attrs(node, kernel)
    places = channels_first(node, 0)[2:]
    extra = [n - ((o - 1) * s - lo - hi + d * (k - 1) + 1) for n, o, s, (lo, hi), d, k in
             zip(spatial, places, attrs["stride"], attrs["padding"], attrs["dilation"], kernel)]
    if not any(isinstance(e, Dim) for e in extra):
        made = out.op("ConvTranspose", dy, w, bias, **given, output_padding=extra if any(extra) else None)
    else:
        full = out.op("ConvTranspose", dy, w, **{**given, "pads": None})
        room = list(attrs["stride"])
        full = pad_edges(out, full, [0] * (len(room) + 2), [0, 0, *room], None)
        low = [lo for lo, _ in attrs["padding"]]
        made = take_slice(out, full, range(2, len(low) + 2), out.ints(*low),
                          out.shape([lo + n for lo, n in zip(low, spatial)]))
        if bias is not None:
            column = reshape(out, bias, (node.result.shape[1],), (node.result.shape[1], *(1,) * len(low)))
            made = out.op("Add", made, column)
    return from_channels_first(out, node, out.cast(made, node.result.dtype))


@exports("conv_weight_grad")
def conv_weight_grad(out: Writer, node: Node, x: Ref, dy: Ref) -> Ref:
    """Channel c of image n becomes image c of channel n; groups stay groups, of N channels each."""
    attrs = node.attrs
    batch, channels, *spatial = channels_first(node, 0)
    groups, kernel, count = attrs["groups"], attrs["kernel_spatial"], len(attrs["kernel_spatial"])
    x, dy = computed(out, node, to_channels_first(out, node, x), to_channels_first(out, node, dy))
    if 0 in (*node.operands[0].shape, *node.operands[1].shape):
        return filled(out, 0, node.result.shape, node.result.dtype)
    each = channels // groups
    if groups > 1:
        x = reshape(out, x, (batch, channels, *spatial), (batch, groups, each, *spatial))
        x = transpose(out, x, [2, 1, 0, *range(3, count + 3)])
        x = reshape(out, x, (each, groups, batch, *spatial), (each, groups * batch, *spatial))
    else:
        x = transpose(out, x, [1, 0, *range(2, count + 2)])
    dy = transpose(out, dy, [1, 0, *range(2, count + 2)])
    made = out.op("Conv", x, dy, strides=steps(attrs["dilation"]), dilations=steps(attrs["stride"]),
                  pads=pads(attrs["padding"]), group=groups if groups > 1 else None)
    made = take_slice(out, made, range(2, count + 2), out.ints(*[0] * count), out.ints(*kernel))
    made = transpose(out, made, [1, 0, *range(2, count + 2)])
    return out.cast(made, node.result.dtype)


# Pooling ---------------------------------------------------------------------------------------------------------

def alone(node: Node) -> bool:
    """Whether a window may lie in the padding alone, which ONNX's pools do not take."""
    dilation = node.attrs.get("dilation") or (1,) * len(node.attrs["window"])
    return any(max(pair) > d * (k - 1) for pair, k, d in zip(node.attrs["padding"], node.attrs["window"], dilation))


@exports("max_pool")
def max_pool(out: Writer, node: Node, x: Ref) -> tuple[Ref, Ref]:
    """The indices of ONNX count through batch and channels too, and through padding that is written out."""
    attrs = node.attrs
    _, _, *spatial = channels_first(node, 0)
    x = to_channels_first(out, node, x)
    padding, apart = attrs["padding"], alone(node)
    if apart:
        fill = out.const(lowest(x.dtype.np))
        x = pad_edges(out, x, [0, 0, *(lo for lo, _ in padding)], [0, 0, *(hi for _, hi in padding)], fill)
        x = out.op("Max", x, fill)  # onnxruntime would fuse the padding into the pool, and refuse it there
    given: dict[str, Any] = {
        "kernel_shape": list(attrs["window"]), "strides": list(attrs["stride"]), "dilations": steps(attrs["dilation"]),
        "pads": None if apart else pads(padding)}
    if not out.uses.get(node.results[1]):
        y = from_channels_first(out, node, out.op("MaxPool", x, **given))
        return y, Ref("", node.results[1].dtype)
    y, index = out.op("MaxPool", x, results=2, dtype=INT64, **given)
    if apart:
        index = index_without_padding(out, index, spatial, padding)
    else:
        index = out.op("Mod", index, scalar_size(out, math.prod(spatial)))
    return from_channels_first(out, node, y), from_channels_first(out, node, out.cast(index, "int32"))


def index_without_padding(out: Writer, index: Ref, spatial: Sequence[Size], padding: Sequence[tuple[int, int]]) -> Ref:
    """Indices into a padded plane as indices into the plane itself; -1 in the padding."""
    flat, outside = out.const(np.int64(0)), out.const(np.array(False))
    inner: Size = 1
    outer: Size = 1
    for n, (lo, hi) in reversed(list(zip(spatial, padding))):
        place = out.op("Mod", out.op("Div", index, scalar_size(out, outer)), scalar_size(out, n + lo + hi))
        place = both(out, "Sub", place, lo)
        wrong = out.op("Or", both(out, "Less", place, 0), out.op("Not", out.op("Less", place, scalar_size(out, n))))
        outside = out.op("Or", outside, wrong)
        flat = out.op("Add", flat, out.op("Mul", place, scalar_size(out, inner)))
        inner, outer = inner * n, outer * (n + lo + hi)
    return out.op("Where", outside, out.const(np.int64(-1)), flat)


@exports("max_pool_grad")
@in_f32
def max_pool_grad(out: Writer, node: Node, dy: Ref, index: Ref) -> Ref:
    """Each dy added at its index into a plane of zeros; -1 is dropped."""
    out.needs(16, "the gradient of max pooling (adding at indices)")
    batch, channels, *places = channels_first(node, 0)
    spatial = node.attrs["input_spatial"]
    before, flat = (batch, channels, *places), (batch, channels, math.prod(places))
    dy, index = to_channels_first(out, node, dy), out.cast(to_channels_first(out, node, index), INT64)
    dy, index = (reshape(out, r, before, flat) for r in (dy, index))
    none = both(out, "Less", index, 0)
    dy = out.op("Where", none, out.like(0, dy), dy)
    index = out.op("Where", none, out.like(0, index), index)
    plane: Size = math.prod(spatial)
    zeros = filled(out, 0, (batch, channels, plane), dy.dtype)
    if 0 in before:
        made = zeros
    else:
        made = out.op("ScatterElements", zeros, index, dy, axis=2, reduction="add")
    return from_channels_first(out, node, reshape(out, made, (batch, channels, plane), (batch, channels, *spatial)))


@exports("avg_pool")
@in_f32
def avg_pool(out: Writer, node: Node, x: Ref) -> Ref:
    attrs = node.attrs
    padding, include = attrs["padding"], attrs["count_include_pad"]
    shape = channels_first(node, 0)
    x = to_channels_first(out, node, x)
    given: dict[str, Any] = {"kernel_shape": list(attrs["window"]), "strides": list(attrs["stride"])}
    if not alone(node):
        made = out.op("AveragePool", x, **given, pads=pads(padding),
                           count_include_pad=int(include) if pads(padding) else None)
        return from_channels_first(out, node, made)
    batch, channels, *spatial = shape
    planes = reshape(out, x, shape, (batch * channels, 1, *spatial))
    total = window_sums(out, node, planes)
    if include:
        made = both(out, "Div", total, math.prod(attrs["window"]))
    else:
        made = out.op("Div", total, window_counts(out, node, spatial, x.dtype))
    sizes = to_first(node.result.shape) if attrs["channels_last"] else node.result.shape
    made = reshape(out, made, (batch * channels, 1, *sizes[2:]), sizes)
    return from_channels_first(out, node, made)


def window_sums(out: Writer, node: Node, planes: Ref) -> Ref:
    """Sums over the windows of images of one channel, as a convolution with ones: it takes any padding."""
    window = node.attrs["window"]
    kernel = filled(out, 1, (1, 1, *window), planes.dtype)
    return out.op("Conv", planes, kernel, kernel_shape=list(window), strides=steps(node.attrs["stride"]),
                       pads=pads(node.attrs["padding"]))


def window_counts(out: Writer, node: Node, spatial: Sequence[Size], dtype: Any) -> Ref:
    """How many elements each window has, padding not counted, (1, 1, *out); at least 1."""
    counts = window_sums(out, node, filled(out, 1, (1, 1, *spatial), dtype))
    return out.op("Max", counts, out.like(1, counts))


@exports("avg_pool_grad")
@in_f32
def avg_pool_grad(out: Writer, node: Node, dy: Ref) -> Ref:
    """The share of each element, placed over its window: ConvTranspose of every plane with a kernel of ones."""
    attrs = node.attrs
    batch, channels, *places = channels_first(node, 0)
    spatial, window, stride, padding = (attrs[k] for k in ("input_spatial", "window", "stride", "padding"))
    dy = to_channels_first(out, node, dy)
    if 0 in node.result.shape or 0 in node.operands[0].shape:
        return filled(out, 0, node.result.shape, dy.dtype)
    if attrs["count_include_pad"] or not pads(padding):
        share = both(out, "Div", dy, math.prod(window))
    else:
        share = out.op("Div", dy, window_counts(out, node, spatial, dy.dtype))
    planes = reshape(out, share, (batch, channels, *places), (batch * channels, 1, *places))
    kernel = filled(out, 1, (1, 1, *window), dy.dtype)
    full = out.op("ConvTranspose", planes, kernel, kernel_shape=list(window), strides=steps(stride))
    full = pad_edges(out, full, [0] * (len(window) + 2), [0, 0, *stride], None)
    low = [lo for lo, _ in padding]
    made = take_slice(out, full, range(2, len(window) + 2), out.ints(*low),
                      out.shape([lo + n for lo, n in zip(low, spatial)]))
    made = reshape(out, made, (batch * channels, 1, *spatial), (batch, channels, *spatial))
    return from_channels_first(out, node, made)
