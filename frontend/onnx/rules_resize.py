"""Resize and Upsample: each axis by itself, as weighted sums of gathered slices.

For an axis, `taps` finds which elements of x each element of the result is made of, and with what weights: one for
"nearest", two for "linear", four for "cubic", more where `antialias` widens the kernel. The formulas are those of the
standard's reference. For numeric sizes they are evaluated while tracing, and the graph holds their results: gathers
and products (a matrix product for many taps), whose gradients are scatters. For symbolic sizes they become part of the
graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ...ir.dims import Dim
from ...ir.dtypes import DType, float32, float64, int64
from .. import eager
from .. import functions as F
from ..data_sizes import size_tensor
from ..dispatch import apply, as_tensor, cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .rules_shape import axis_of
from .values import is_known, known, require_ints, require_known, tensor

MATRIX_TAPS = 5
"""From so many taps on an axis is resized by a matrix product."""


@dataclass(frozen=True)
class Axis:
    """How one axis is resized.

    Attributes:
        old, new: sizes, perhaps symbolic.
        scale: what coordinates are computed with; a number, or a scalar tensor where a size is symbolic.
        length: scale * old, before it was rounded.
        start, end: of the region of interest, as shares of the axis; numbers or scalar tensors.
    """

    old: Any
    new: Any
    scale: Any
    length: Any
    start: Any = 0.0
    end: Any = 1.0

    @property
    def is_static(self) -> bool:
        """Whether everything is a number."""
        return not any(isinstance(v, (Dim, Tensor)) for v in (self.old, self.new, self.scale, self.start, self.end))


@dataclass(frozen=True)
class Kernel:
    """What a node's attributes say of the interpolation."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    exclude_outside: bool
    antialias: bool


# Coordinates -----------------------------------------------------------------------------------------------------

def number(size: Any, dtype: DType) -> Any:
    """A size as a number, or, if it is symbolic, as a scalar tensor."""
    return cast(size_tensor(size), dtype) if isinstance(size, Dim) else float(size)


def positions(node: OnnxNode, axis: Axis, mode: str, dtype: DType) -> Tensor:
    """Where in x (in elements) each element of the result is taken from: (new,)."""
    i = cast(F.arange(axis.new), dtype)
    old, scale = number(axis.old, dtype), axis.scale
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and axis.new != 1):
        return (i + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        offset = (1 - number(axis.new, dtype) / axis.length) * old / 2
        return (i + 0.5) / scale - 0.5 + offset
    if mode == "asymmetric":
        return i / scale
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if mode in ("align_corners", "pytorch_half_pixel"):
        if isinstance(axis.new, int) and axis.new == 1:
            return i * 0.0
        return i * (old - 1) / (axis.length - 1)
    if mode == "tf_crop_and_resize":
        if isinstance(axis.new, int) and axis.new == 1:
            return i + (axis.start + axis.end) * (old - 1) * 0.5
        return i * ((axis.end - axis.start) * (old - 1) / (number(axis.new, dtype) - 1)) + axis.start * (old - 1)
    raise node.fail(f"coordinate_transformation_mode {mode!r} is unknown")


NEAREST = {
    "round_prefer_floor": lambda x: F.ceil(x - 0.5), "round_prefer_ceil": lambda x: F.floor(x + 0.5),
    "floor": F.floor, "ceil": F.ceil, "simple": F.floor,
}


def cubic_weight(distance: Tensor, a: float) -> Tensor:
    """The kernel of cubic convolution (Keys, 1981)."""
    x = F.absolute(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return F.where(x <= 1, near, F.where(x < 2, far, constant(0, x.dtype)))


def taps(node: OnnxNode, axis: Axis, kernel: Kernel, dtype: DType) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, weights), both (new, taps), and whether the position (new,) lies inside x."""
    x = positions(node, axis, kernel.coordinates, dtype)
    last = number(axis.old, dtype) - 1
    inside = F.logical_and(x >= 0, x <= last)
    if kernel.mode == "nearest":
        if kernel.nearest not in NEAREST:
            raise node.fail(f"nearest_mode {kernel.nearest!r} is unknown")
        index = F.minimum(F.maximum(NEAREST[kernel.nearest](x), 0), last)
        return F.expand_dims(cast(index, int64), 1), F.ones((axis.new, 1), dtype), inside
    radius = 1 if kernel.mode == "linear" else 2
    shrink = min(float(axis.scale), 1.0) if kernel.antialias and axis.is_static else 1.0
    first = math.floor(-radius / shrink) + 1
    base = F.floor(x)
    places = F.expand_dims(base, 1) + F.arange(first, 2 - first, dtype=dtype)
    distance = (places - F.expand_dims(x, 1)) * shrink
    weight = F.maximum(1 - F.absolute(distance), 0) if radius == 1 else cubic_weight(distance, kernel.cubic)
    if kernel.exclude_outside:
        weight = F.where(F.logical_and(places >= 0, places <= last), weight, constant(0, dtype))
    if kernel.exclude_outside or shrink != 1.0:
        weight = weight / F.sum(weight, 1, keepdims=True)
    return cast(F.minimum(F.maximum(places, 0), last), int64), weight, inside


def plan(node: OnnxNode, axis: Axis, kernel: Kernel) -> tuple[Any, Any, Any]:
    """`taps` as arrays where everything is a number, else as tensors of the trace."""
    if not axis.is_static:
        return taps(node, axis, kernel, float32)
    with eager.eager_builder():
        return tuple(t.numpy() for t in taps(node, axis, kernel, float64))  # type: ignore[return-value]


# Applying it -----------------------------------------------------------------------------------------------------

def resized_axis(x: Tensor, place: int, index: Any, weight: Any, mode: str) -> Tensor:
    """x with one axis replaced by weighted sums of its slices."""
    static = isinstance(index, np.ndarray)
    if mode == "nearest":
        flat = index[:, 0]
        if static and len(flat) % x.shape[place] == 0 and len(flat):
            times = len(flat) // x.shape[place]
            if (flat == np.arange(len(flat)) // times).all():
                return F.repeat(x, times, place)
        return taken(x, flat, place)
    if static and index.shape[1] >= MATRIX_TAPS:
        matrix = np.zeros((len(index), x.shape[place]))
        np.add.at(matrix, (np.arange(len(index))[:, None], index), weight)
        moved = F.matmul(F.moveaxis(x, place, -1), as_tensor(matrix.astype(x.dtype.np)), transpose_y=True)
        return F.moveaxis(moved, -1, place)
    total = None
    for k in range(index.shape[1]):
        column = as_tensor(weight[:, k].astype(x.dtype.np)) if static else cast(weight[:, k], x.dtype)
        column = F.reshape(column, tuple(column.shape[0] if i == place else 1 for i in range(x.ndim)))
        part = taken(x, index[:, k], place) * column
        total = part if total is None else total + part
    assert total is not None
    return total


def taken(x: Tensor, index: Any, place: int) -> Tensor:
    """Slices at places that lie inside."""
    result: Tensor = apply("take", x, as_tensor(index), axis=place)
    return result


def resized(node: OnnxNode, x: Tensor, axes: dict[int, Axis], kernel: Kernel) -> Tensor:
    """x resized along some axes; integers are computed in float32 and cut."""
    crop = kernel.coordinates == "tf_crop_and_resize"
    y = x if x.dtype.is_float and x.dtype.bits >= 32 or kernel.mode == "nearest" else cast(x, float32)
    outside: Tensor | None = None
    for place, axis in axes.items():
        same = isinstance(axis.scale, float) and axis.scale == 1.0 and axis.new == axis.old
        if same and not crop:
            continue
        index, weight, inside = plan(node, axis, kernel)
        y = resized_axis(y, place, index, weight, kernel.mode)
        if crop:
            out = F.logical_not(as_tensor(inside))
            out = F.reshape(out, tuple(axis.new if i == place else 1 for i in range(x.ndim)))
            outside = out if outside is None else F.logical_or(outside, out)
    if outside is not None:
        y = F.where(outside, constant(node.attr("extrapolation_value", 0.0), y.dtype), y)
    return y if y.dtype == x.dtype else cast(y, x.dtype)


# The ops ---------------------------------------------------------------------------------------------------------

def scaled_size(size: Any, scale: float) -> Any:
    """floor(size * scale); of a symbolic size by the fraction that the scale stands for."""
    if not isinstance(size, Dim):
        return math.floor(size * scale)
    ratio = Fraction(scale).limit_denominator(4096)
    return size * ratio.numerator // ratio.denominator


def by_scales(x: Tensor, places: Sequence[int], scales: Sequence[float]) -> dict[int, Axis]:
    """The axes that are resized by given factors."""
    axes = {}
    for place, scale in zip(places, scales):
        old = x.shape[place]
        length = float(scale) * old if isinstance(old, int) else float(scale) * number(old, float32)
        axes[place] = Axis(old, scaled_size(old, float(scale)), float(scale), length)
    return axes


def by_sizes(node: OnnxNode, x: Tensor, places: Sequence[int], sizes: Sequence[Any]) -> dict[int, Axis]:
    """The axes that are resized to given sizes, or as near to them as their common ratio allows."""
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    olds = [x.shape[place] for place in places]
    if policy != "stretch":
        if any(isinstance(s, Dim) for s in (*olds, *sizes)):
            raise node.fail(f"keep_aspect_ratio_policy {policy!r} needs numeric sizes, got {x.type}")
        choose = min if policy == "not_larger" else max
        scale = choose(new / old for new, old in zip(sizes, olds))
        return {place: Axis(old, math.floor(scale * old + 0.5), scale, scale * old) for place, old in zip(places, olds)}
    axes = {}
    for place, old, new in zip(places, olds, sizes):
        symbolic = isinstance(old, Dim) or isinstance(new, Dim)
        scale = 1.0 if old == new else number(new, float32) / number(old, float32) if symbolic else new / old
        axes[place] = Axis(old, new, scale, number(new, float32))
    return axes


def given(value: Any) -> bool:
    """Whether an operand is there; an empty tensor stands for an absent one."""
    return value is not None and (not hasattr(value, "size") or value.size != 0)


@onnx_rule("Resize", since=11, static=(2, 3))
def resize(node: OnnxNode, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    x = tensor(x)
    listed = node.attr("axes", None)
    places = list(range(x.ndim)) if not listed else [axis_of(node, int(a), x.ndim) for a in listed]
    if given(sizes):
        axes = by_sizes(node, x, places, require_ints(node, sizes, "sizes"))
    elif given(scales):
        axes = by_scales(x, places, require_known(node, scales, "scales").astype(np.float32).tolist())
    else:
        raise node.fail("it needs scales or sizes")
    coordinates = node.attr("coordinate_transformation_mode", "half_pixel")
    if coordinates == "tf_crop_and_resize":
        axes = _cropped(node, axes, roi)
    kernel = Kernel(node.attr("mode", "nearest"), coordinates, node.attr("nearest_mode", "round_prefer_floor"),
                    node.attr("cubic_coeff_a", -0.75), bool(node.attr("exclude_outside", 0)),
                    bool(node.attr("antialias", 0)))
    if kernel.mode not in ("nearest", "linear", "cubic"):
        raise node.fail(f'mode is "nearest", "linear" or "cubic", not {kernel.mode!r}')
    return resized(node, x, axes, kernel)


def _cropped(node: OnnxNode, axes: dict[int, Axis], roi: Any) -> dict[int, Axis]:
    if not given(roi):
        raise node.fail("tf_crop_and_resize needs a region of interest")
    region = known(roi).tolist() if is_known(roi) else cast(tensor(roi), float32)  # type: ignore[union-attr]
    count = len(axes)
    return {place: Axis(a.old, a.new, a.scale, a.length, region[i], region[count + i])
            for i, (place, a) in enumerate(axes.items())}


def upsampled(node: OnnxNode, x: Any, scales: Any) -> Tensor:
    """Coordinates are divided by the scale, and rounded down."""
    x = tensor(x)
    mode = node.attr("mode", "nearest")
    kernel = Kernel("linear" if mode in ("linear", "bilinear") else mode, "asymmetric", "floor", -0.75, False, False)
    return resized(node, x, by_scales(x, range(x.ndim), scales), kernel)


@onnx_rule("Upsample", since=1)
def upsample_image(node: OnnxNode, x: Any) -> Tensor:
    return upsampled(node, x, [1.0, 1.0, float(node.require("height_scale")), float(node.require("width_scale"))])


@onnx_rule("Upsample", since=7)
def upsample_attribute(node: OnnxNode, x: Any) -> Tensor:
    return upsampled(node, x, list(node.require("scales")))


@onnx_rule("Upsample", since=9, static=(1,))
def upsample(node: OnnxNode, x: Any, scales: Any) -> Tensor:
    return upsampled(node, x, require_known(node, scales, "scales").tolist())


@onnx_rule("Resize", since=10, static=(1,))
def resize_scales(node: OnnxNode, x: Any, scales: Any) -> Tensor:
    return upsampled(node, x, require_known(node, scales, "scales").tolist())
