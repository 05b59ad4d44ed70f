"""Quantized ops of the domain com.microsoft: elementwise ones go by way of float32, products stay exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.dtypes import float32
from .. import functions as F
from ..dispatch import cast
from ..nn import functional as N
from ..tensor import Tensor
from .node import OnnxNode
from .rules import CONTRIB, onnx_rule
from .rules_nn import average_pool
from .rules_quant import (
    dequantize,
    flat,
    matmul_integers,
    quantize,
    quantized_by_range,
    requantized,
    to_integers,
)
from .values import tensor


def real(x: Any, scale: Any, zero: Any) -> Tensor:
    """The numbers that a quantized tensor (with one scale) stands for."""
    wide = cast(tensor(x), float32)
    return (wide if zero is None else wide - cast(flat(zero), float32)) * cast(flat(scale), float32)


def quantized(y: Tensor, scale: Any, zero: Any, like: Any) -> Tensor:
    """Numbers as integers of the zero point's dtype, or of that of `like`."""
    dtype = tensor(like).dtype if zero is None else tensor(zero).dtype
    return to_integers(y / cast(flat(scale), float32), None if zero is None else flat(zero), dtype)


def binary_rule(op_type: str, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """QLinearAdd and QLinearMul."""
    @onnx_rule(op_type, domain=CONTRIB)
    def rule(node: OnnxNode, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any, scale: Any,
             zero: Any = None) -> Tensor:
        return quantized(fn(real(a, a_scale, a_zero), real(b, b_scale, b_zero)), scale, zero, a)


def unary_rule(op_type: str, fn: Callable[[OnnxNode, Tensor], Tensor]) -> None:
    """An op of one quantized tensor."""
    @onnx_rule(op_type, domain=CONTRIB)
    def rule(node: OnnxNode, x: Any, scale: Any, zero: Any, y_scale: Any, y_zero: Any = None) -> Tensor:
        return quantized(fn(node, real(x, scale, zero)), y_scale, y_zero, x)


def _channels_last(fn: Callable[[OnnxNode, Tensor], Tensor]) -> Callable[[OnnxNode, Tensor], Tensor]:
    def run(node: OnnxNode, x: Tensor) -> Tensor:
        if not node.attr("channels_last", 0):
            return fn(node, x)
        return F.moveaxis(fn(node, F.moveaxis(x, -1, 1)), 1, -1)
    return run


binary_rule("QLinearAdd", F.add)
binary_rule("QLinearMul", F.multiply)
unary_rule("QLinearSigmoid", lambda node, x: F.sigmoid(x))
unary_rule("QLinearLeakyRelu", lambda node, x: N.leaky_relu(x, node.attr("alpha", 0.01)))
unary_rule("QLinearSoftmax", lambda node, x: F.softmax(x, axis=int(node.attr("axis", -1))))
unary_rule("QLinearAveragePool", _channels_last(lambda node, x: average_pool(node, x)))
unary_rule("QLinearGlobalAveragePool", _channels_last(
    lambda node, x: F.mean(x, tuple(range(2, x.ndim)), keepdims=True)))


@onnx_rule("QLinearConcat", domain=CONTRIB)
def qlinear_concat(node: OnnxNode, scale: Any, zero: Any, *parts: Any) -> Tensor:
    """(x, its scale, its zero point) of each part."""
    numbers = [real(*parts[i:i + 3]) for i in range(0, len(parts), 3)]
    return quantized(F.concatenate(numbers, int(node.require("axis"))), scale, zero, parts[0])


@onnx_rule("QLinearWhere", domain=CONTRIB)
def qlinear_where(node: OnnxNode, condition: Any, x: Any, x_scale: Any, x_zero: Any, y: Any, y_scale: Any, y_zero: Any,
                  scale: Any, zero: Any) -> Tensor:
    return quantized(F.where(tensor(condition), real(x, x_scale, x_zero), real(y, y_scale, y_zero)), scale, zero, x)


@onnx_rule("QGemm", domain=CONTRIB)
def qgemm(node: OnnxNode, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any, c: Any = None,
          scale: Any = None, zero: Any = None) -> Tensor:
    """alpha * (a' b' + c), c quantized like the product; floats where no scale of the result is given."""
    left, right = (F.matrix_transpose(tensor(x)) if node.attr(f"trans{side}", 0) else tensor(x)
                   for x, side in ((a, "A"), (b, "B")))
    total = matmul_integers(left, right, a_zero, b_zero)
    total = total if c is None else total + tensor(c)
    factor = flat(a_scale) * flat(b_scale) * node.attr("alpha", 1.0)
    if scale is None:
        return cast(total, float32) * factor
    return requantized(total, factor / flat(scale), zero, tensor(a).dtype)


@onnx_rule("MatMulIntegerToFloat", domain=CONTRIB)
def matmul_integer_to_float(node: OnnxNode, a: Any, b: Any, a_scale: Any, b_scale: Any, a_zero: Any = None,
                            b_zero: Any = None, bias: Any = None) -> Tensor:
    factor = flat(a_scale) * flat(b_scale)
    y = cast(matmul_integers(a, b, a_zero, b_zero), factor.dtype) * factor
    return y if bias is None else y + tensor(bias)


@onnx_rule("DynamicQuantizeMatMul", domain=CONTRIB)
def dynamic_quantize_matmul(node: OnnxNode, a: Any, b: Any, b_scale: Any, b_zero: Any = None,
                            bias: Any = None) -> Tensor:
    """a is quantized to 8 bits by its range, then multiplied exactly."""
    quantized_a, scale, zero = quantized_by_range(tensor(a))
    total = matmul_integers(quantized_a, b, zero, b_zero)
    y = cast(total, float32) * (scale * flat(b_scale))
    return y if bias is None else y + tensor(bias)


onnx_rule("QuantizeLinear", domain=CONTRIB)(quantize)
onnx_rule("DequantizeLinear", domain=CONTRIB)(dequantize)
