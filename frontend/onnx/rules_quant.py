"""Quantized tensors: to and from integers, and exact products of them.

Products of 8-bit integers are exact: nothing is rounded before the result is scaled back.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...ir.dims import Dim
from ...ir.dtypes import DType, as_dtype, float32, float64
from .. import functions as F
from ..data_sizes import size_tensor
from ..dispatch import cast, constant
from ..tensor import Tensor
from .dtypes import attribute_dtype
from .node import OnnxNode
from .rules import onnx_rule
from .rules_math import cast_to
from .rules_nn import channel_column, convolved
from .rules_shape import axis_of, slice_axis
from .values import known, tensor

INT8, INT32, UINT8 = as_dtype("int8"), as_dtype("int32"), as_dtype("uint8")


def integer_range(dtype: DType) -> tuple[int, int]:
    """The smallest and the largest number of an integer dtype, 4-bit ones included."""
    span = 1 << dtype.bits
    return (0, span - 1) if dtype.is_unsigned else (-span // 2, span // 2 - 1)


def along(node: OnnxNode, parameter: Any, x: Tensor) -> Tensor:
    """A scale or zero point as it broadcasts with x: one number, one for each slice along `axis`, or one per block."""
    parameter = tensor(parameter)
    if parameter.ndim == 0 or parameter.size == 1:
        return F.reshape(parameter, ())
    axis = axis_of(node, int(node.attr("axis", 1)), x.ndim)
    block = int(node.attr("block_size", 0) or 0)
    if block:
        return slice_axis(F.repeat(parameter, block, axis), axis, 0, x.shape[axis])
    return F.reshape(parameter, tuple(parameter.shape[0] if i == axis else 1 for i in range(x.ndim)))


def to_integers(x: Tensor, zero: Tensor | None, dtype: DType) -> Tensor:
    """x rounded to the nearest (halves to even), plus a zero point, and cut to what the dtype holds."""
    low, high = integer_range(dtype)
    rounded = F.round(x if x.dtype.bits >= 32 else cast(x, float32))
    if zero is not None:
        rounded = rounded + _wide(zero, rounded.dtype)
    clipped = F.clip(rounded, float(low), float(high))
    return cast(clipped if dtype.bits >= 8 else cast(clipped, INT32), dtype)


def _wide(x: Tensor, dtype: Any) -> Tensor:
    return cast(x if x.dtype.bits >= 8 else cast(x, INT32), dtype)


# To and from -----------------------------------------------------------------------------------------------------

@onnx_rule("QuantizeLinear", since=10)
def quantize(node: OnnxNode, x: Any, scale: Any, zero: Any = None) -> Tensor:
    x = tensor(x)
    dtype = tensor(zero).dtype if zero is not None else attribute_dtype(node, "output_dtype", UINT8)
    precision = attribute_dtype(node, "precision", None) if node.attr("precision", 0) else None
    if not x.dtype.is_float:
        x = cast(x, float32)
    factor = along(node, scale, x)
    inner = precision or (x.dtype if x.dtype.bits >= factor.dtype.bits else factor.dtype)
    y = cast(x, inner) / cast(factor, inner)
    if dtype.is_float:
        return cast_to(y, dtype, bool(node.attr("saturate", 1)))
    return to_integers(y, None if zero is None else along(node, zero, x), dtype)


@onnx_rule("DequantizeLinear", since=10)
def dequantize(node: OnnxNode, x: Any, scale: Any, zero: Any = None) -> Tensor:
    x = tensor(x)
    factor = along(node, scale, x)
    wide = _wide(x, float32)
    if zero is not None and not x.dtype.is_float:
        wide = _difference(x, along(node, zero, x))
    result = attribute_dtype(node, "output_dtype", factor.dtype) if node.attr("output_dtype", 0) else factor.dtype
    return cast(cast(wide, float32) * cast(factor, float32), result)


def _difference(x: Tensor, zero: Tensor) -> Tensor:
    """x - zero, without overflow."""
    wide = INT32 if x.dtype.bits <= 16 else as_dtype("int64")
    return _wide(x, wide) - _wide(zero, wide)


@onnx_rule("DynamicQuantizeLinear", since=11)
def dynamic_quantize(node: OnnxNode, x: Any) -> tuple[Tensor, ...]:
    """(y, scale, zero point) with the range of x, 0 included, spread over 8 bits."""
    return quantized_by_range(tensor(x))


def quantized_by_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, scale, zero point) in 8 bits. Divides in f64: kernels of rows multiply by reciprocals, an ulp off in f32."""
    low, high = F.minimum(F.min(x), 0.0), F.maximum(F.max(x), 0.0)
    span = high - low
    scale = F.where(span == 0, constant(1, x.dtype), span / 255.0)
    zero = cast(F.round(F.clip(-low / scale, 0.0, 255.0)), UINT8)
    quotient = cast(cast(x, float64) / cast(scale, float64), x.dtype)
    return to_integers(quotient, zero, UINT8), scale, zero


# Products --------------------------------------------------------------------------------------------------------

def signed(x: Tensor) -> tuple[Tensor, int]:
    """(x', c) with x = x' + c: 8-bit integers as int8, for which there are instructions."""
    if x.dtype == "uint8":
        return cast(F.bitwise_xor(x, 128), INT8), 128
    return x, 0


def offset(zero: Any, shift: int, shape: Any = None) -> Tensor | int:
    """shift - zero in int32, a number where the zero point is known to be one number."""
    if zero is None:
        return shift
    value = known(zero)
    if value is not None and value.size == 1:
        return shift - int(value.reshape(()))
    zero = cast(tensor(zero), INT32)
    return shift - (F.reshape(zero, ()) if zero.size == 1 else zero if shape is None else F.reshape(zero, shape))


def _row(zero: Any) -> Any:
    """The shape in which the zero points or scales of the rows of a matrix are a column; None: as they are."""
    if zero is None or tensor(zero).size == 1:
        return None
    return (*tensor(zero).shape, 1) if tensor(zero).ndim == 1 else None


def matmul_integers(a: Any, b: Any, a_zero: Any, b_zero: Any) -> Tensor:
    """(a - a_zero) (b - b_zero) in int32; zero points are single numbers, one per row of a, one per column of b.

    As a product of int8, and what the zero points add to it: with a = a' + c and b = b' + d
    sum a b = sum a' b' + d sum a' + c sum b' + size c d.
    """
    (left, shift_a), (right, shift_b) = signed(tensor(a)), signed(tensor(b))
    c, d = offset(a_zero, shift_a, _row(a_zero)), offset(b_zero, shift_b)
    total = F.matmul(left, right, out_dtype=INT32)
    with_c, with_d = not (isinstance(c, int) and c == 0), not (isinstance(d, int) and d == 0)
    if with_d:
        rows = F.sum(cast(left, INT32), -1, keepdims=True, dtype=INT32)
        total = total + rows * d
    if with_c:
        columns = F.sum(cast(right, INT32), -2, keepdims=right.ndim > 1 and left.ndim > 1, dtype=INT32)
        total = total + columns * c
    if with_c and with_d:
        size = left.shape[-1]
        total = total + c * d * (cast(size_tensor(size), INT32) if isinstance(size, Dim) else size)
    return total


@onnx_rule("MatMulInteger", since=10)
def matmul_integer(node: OnnxNode, a: Any, b: Any, a_zero: Any = None, b_zero: Any = None) -> Tensor:
    return matmul_integers(a, b, a_zero, b_zero)


def by_rows(parameter: Any) -> Tensor:
    """A scale of a left operand: a number, or one for each row."""
    parameter = tensor(parameter)
    shape = _row(parameter)
    return F.reshape(parameter, ()) if parameter.size == 1 else parameter if shape is None else F.reshape(
        parameter, shape)


def requantized(total: Tensor, factor: Tensor, zero: Any, like: DType) -> Tensor:
    """Integers times a factor as the quantized result."""
    zero = None if zero is None else tensor(zero)
    if zero is not None and zero.size == 1:
        zero = F.reshape(zero, ())
    return to_integers(cast(total, float32) * cast(factor, float32), zero, like if zero is None else zero.dtype)


@onnx_rule("QLinearMatMul", since=10)
def qlinear_matmul(node: OnnxNode, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any,
                   y_scale: Any, y_zero: Any) -> Tensor:
    factor = cast(by_rows(a_scale), float32) * cast(flat(b_scale), float32) / cast(by_rows(y_scale), float32)
    total = matmul_integers(a, b, a_zero, b_zero)
    return requantized(total, factor, by_rows(y_zero), tensor(y_zero).dtype)


def flat(parameter: Any) -> Tensor:
    """A number whatever its shape; others as they are."""
    parameter = tensor(parameter)
    return F.reshape(parameter, ()) if parameter.size == 1 else parameter


def conv_integers(node: OnnxNode, x: Tensor, w: Tensor, x_zero: Any, w_zero: Any) -> Tensor:
    """The convolution of the differences to the zero points, in int32; padding stands for the zero point.

    Floats do it, exactly: differences of 8-bit integers have 9 bits, and as long as no sum can leave the integers that
    the mantissa holds, nothing is rounded.
    """
    most = math.prod(w.shape[1:]) * _largest(x, x_zero) * _largest(w, w_zero)
    inner = float32 if most < 1 << 24 else float64
    column = None if w_zero is None else (tensor(w_zero).size, *(1,) * (w.ndim - 1))
    return cast(convolved(node, _difference_in(x, x_zero, inner), _difference_in(w, w_zero, inner, column)), INT32)


def _largest(x: Tensor, zero: Any) -> int:
    """The largest magnitude that x - zero can have."""
    low, high = integer_range(x.dtype)
    value = None if zero is None else known(zero)
    if zero is None or value is not None:
        points = [0] if value is None else value.reshape(-1).astype(int).tolist()
        return max(max(high - z, z - low) for z in points)
    return high - low


def _difference_in(x: Tensor, zero: Any, dtype: DType, shape: Any = None) -> Tensor:
    """x - zero, in a float dtype."""
    if zero is None or (known(zero) is not None and not np.any(known(zero))):
        return cast(x, dtype)
    zero = tensor(zero)
    zero = F.reshape(zero, ()) if zero.size == 1 or shape is None else F.reshape(zero, shape)
    return cast(x, dtype) - cast(zero, dtype)


@onnx_rule("ConvInteger", since=10)
def conv_integer(node: OnnxNode, x: Any, w: Any, x_zero: Any = None, w_zero: Any = None) -> Tensor:
    return conv_integers(node, tensor(x), tensor(w), x_zero, w_zero)


@onnx_rule("QLinearConv", since=10)
def qlinear_conv(node: OnnxNode, x: Any, x_scale: Any, x_zero: Any, w: Any, w_scale: Any, w_zero: Any, y_scale: Any,
                 y_zero: Any, b: Any = None) -> Tensor:
    x, w = tensor(x), tensor(w)
    total = conv_integers(node, x, w, x_zero, w_zero)
    if b is not None:
        total = total + channel_column(tensor(b), total.ndim)
    scale = flat(w_scale)
    scale = scale if scale.ndim == 0 else channel_column(scale, total.ndim)
    return requantized(total, scale * flat(x_scale) / flat(y_scale), y_zero, x.dtype)
