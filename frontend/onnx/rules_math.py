"""Arithmetic, comparison, logic and activations: what is computed for each element by itself.

ONNX operands of one node have one dtype (`Pow` and the shifts aside), so nothing is promoted here. Before opset 7
operands broadcast only if the attribute `broadcast` says so, and along `axis`; `aligned` brings that to NumPy's rules.
Activations have rules though the standard gives most of them a function body: these are written so that the branch
not taken cannot put a NaN into a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...ir.dtypes import float32, float64, promote
from .. import functions as F
from ..dispatch import apply, binary, cast, constant
from ..nn import functional as N
from ..tensor import Tensor
from .dtypes import attribute_dtype
from .node import OnnxNode
from .rules import onnx_rule
from .values import known, require_known, tensor

# Families --------------------------------------------------------------------------------------------------------


def aligned(node: OnnxNode, x: Tensor, y: Tensor) -> Tensor:
    """y as NumPy's broadcasting wants it: before opset 7 it stands at `axis` of x, if `broadcast` is set."""
    axis = node.attr("axis", None)
    if node.opset >= 7 or not node.attr("broadcast", 0) or axis is None:
        return y
    after = x.ndim - int(axis) % max(x.ndim, 1) - y.ndim
    return F.reshape(y, (*y.shape, *(1,) * after)) if after > 0 else y


def unary_rule(op_type: str, fn: Callable[[Tensor], Tensor]) -> None:
    """A rule for an op of one operand and no attributes."""
    @onnx_rule(op_type)
    def rule(node: OnnxNode, x: Any) -> Tensor:
        return fn(tensor(x))


def binary_rule(op_type: str, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A rule for an op of two operands that broadcast."""
    @onnx_rule(op_type)
    def rule(node: OnnxNode, x: Any, y: Any) -> Tensor:
        a, b = tensor(x), tensor(y)
        return fn(a, aligned(node, a, b))


def fold_rule(op_type: str, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A rule for an op of any number of operands, taken together from the left."""
    @onnx_rule(op_type)
    def rule(node: OnnxNode, first: Any, *more: Any) -> Tensor:
        total = tensor(first)
        for x in more:
            total = fn(total, tensor(x))
        return total


def truncated_quotient(x: Tensor, y: Tensor) -> Tensor:
    """x / y; integers towards zero, as in C."""
    if x.dtype.is_float:
        return F.divide(x, y)
    if x.dtype.is_unsigned:
        return F.floor_divide(x, y)
    return F.floor_divide(x - F.fmod(x, y), y)


for _name, _unary in {
    "Abs": F.absolute, "Acos": F.acos, "Acosh": F.acosh, "Asin": F.asin, "Asinh": F.asinh, "Atan": F.atan,
    "Atanh": F.atanh, "Ceil": F.ceil, "Cos": F.cos, "Cosh": F.cosh, "Erf": F.erf, "Exp": F.exp, "Floor": F.floor,
    "Log": F.log, "Neg": F.negative, "Reciprocal": F.reciprocal, "Relu": F.relu, "Round": F.round,
    "Sigmoid": F.sigmoid, "Sign": F.sign, "Sin": F.sin, "Sinh": F.sinh, "Softplus": F.softplus, "Sqrt": F.sqrt,
    "Tan": F.tan, "Tanh": F.tanh, "IsNaN": F.isnan, "Not": F.logical_not, "BitwiseNot": F.bitwise_not,
    "Mish": N.mish, "HardSwish": N.hardswish,
}.items():
    unary_rule(_name, _unary)

for _name, _binary in {
    "Add": F.add, "Sub": F.subtract, "Mul": F.multiply, "Div": truncated_quotient,
    "Equal": F.equal, "Greater": F.greater, "GreaterOrEqual": F.greater_equal, "Less": F.less,
    "LessOrEqual": F.less_equal, "And": F.logical_and, "Or": F.logical_or, "Xor": F.logical_xor,
    "BitwiseAnd": F.bitwise_and, "BitwiseOr": F.bitwise_or, "BitwiseXor": F.bitwise_xor,
}.items():
    binary_rule(_name, _binary)

for _name, _binary in {"Max": F.maximum, "Min": F.minimum, "Sum": F.add}.items():
    fold_rule(_name, _binary)


@onnx_rule("Mean")
def mean(node: OnnxNode, *xs: Any) -> Tensor:
    total = tensor(xs[0])
    for x in xs[1:]:
        total = total + tensor(x)
    return total / len(xs)


# Arithmetic with a twist -----------------------------------------------------------------------------------------

@onnx_rule("Mod")
def mod(node: OnnxNode, x: Any, y: Any) -> Tensor:
    """The sign of y, or with `fmod` that of x."""
    return (F.fmod if node.attr("fmod", 0) else F.remainder)(tensor(x), tensor(y))


@onnx_rule("Pow")
def power(node: OnnxNode, x: Any, y: Any) -> Tensor:
    """x ** y in the dtype of x. A known exponent becomes squares and roots, whose gradients hold at x <= 0 too."""
    base = tensor(x)
    exponent = known(y)
    if exponent is not None and exponent.size == 1 and exponent.dtype != object and exponent.ndim <= base.ndim:
        number = exponent.reshape(()).item()
        if base.dtype.is_float:
            return F.power(base, float(number))
        if float(number) == int(number):
            return F.power(base, int(number))
    y = aligned(node, base, tensor(y))
    if y.dtype == base.dtype:
        return F.power(base, y)
    wide = base.dtype if base.dtype.is_float else y.dtype if y.dtype.is_float else promote(base.dtype, y.dtype)
    if wide.is_float and not base.dtype.is_float:
        wide = float64
    return cast(F.power(cast(base, wide), cast(y, wide)), base.dtype)


@onnx_rule("BitShift")
def bit_shift(node: OnnxNode, x: Any, y: Any) -> Tensor:
    shift = F.left_shift if node.attr("direction", "") == "LEFT" else F.right_shift
    return shift(tensor(x), tensor(y))


@onnx_rule("IsInf")
def is_inf(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    infinite = F.isinf(x)
    if not node.attr("detect_negative", 1):
        infinite = F.logical_and(infinite, x > 0)
    return infinite if node.attr("detect_positive", 1) else F.logical_and(infinite, x < 0)


@onnx_rule("Where")
def where(node: OnnxNode, condition: Any, x: Any, y: Any) -> Tensor:
    return F.where(tensor(condition), tensor(x), tensor(y))


@onnx_rule("Cast")
def cast_rule(node: OnnxNode, x: Any) -> Tensor:
    """Another dtype; what an 8-bit float cannot hold becomes its largest value unless `saturate` is 0."""
    return cast_to(tensor(x), attribute_dtype(node, "to"), bool(node.attr("saturate", 1)))


@onnx_rule("CastLike")
def cast_like(node: OnnxNode, x: Any, like: Any) -> Tensor:
    return cast_to(tensor(x), tensor(like).dtype, bool(node.attr("saturate", 1)))


LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def cast_to(x: Tensor, dtype: Any, saturate: bool = True) -> Tensor:
    if dtype in LARGEST and saturate and x.dtype.is_float:
        x = F.clip(x if x.dtype.bits > 8 else cast(x, float32), -LARGEST[dtype], LARGEST[dtype])
    return cast(x, dtype)


@onnx_rule("BitCast")
def bit_cast(node: OnnxNode, x: Any) -> Tensor:
    """The same bits under another dtype of the same width."""
    x, dtype = tensor(x), attribute_dtype(node, "to")
    if dtype.bits != x.dtype.bits:
        raise node.fail(f"{x.type} cannot be read as {dtype}: BitCast keeps the number of bits of an element")
    return x if dtype == x.dtype else apply("bitcast", x, dtype=dtype)


# Clip ------------------------------------------------------------------------------------------------------------

@onnx_rule("Clip")
def clip_attributes(node: OnnxNode, x: Any) -> Tensor:
    low, high = node.attr("min", None), node.attr("max", None)
    return tensor(x) if low is None and high is None else F.clip(tensor(x), low, high)


@onnx_rule("Clip", since=11)
def clip(node: OnnxNode, x: Any, low: Any = None, high: Any = None) -> Tensor:
    """Known bounds are attributes of the IR's clip; others are operands. max wins where min > max."""
    bounds = [None if b is None else _bound(b) for b in (low, high)]
    x = tensor(x)
    return x if bounds == [None, None] else F.clip(x, *bounds)


def _bound(value: Any) -> Any:
    bound = known(value)
    if bound is None:
        return tensor(value)
    return bound.reshape(()).item() if bound.dtype.kind in "biuf" else float(bound.reshape(()))


# Activations -----------------------------------------------------------------------------------------------------

@onnx_rule("LeakyRelu")
def leaky_relu(node: OnnxNode, x: Any) -> Tensor:
    return N.leaky_relu(tensor(x), node.attr("alpha", 0.01))


@onnx_rule("PRelu", weights=(1,))
def prelu(node: OnnxNode, x: Any, slope: Any) -> Tensor:
    """Before opset 7 a slope of one axis belongs to the channels."""
    x, slope = tensor(x), tensor(slope)
    if node.opset < 7 and slope.ndim == 1 and x.ndim > 2 and slope.shape[0] != 1:
        slope = F.reshape(slope, (slope.shape[0], *(1,) * (x.ndim - 2)))
    return F.where(x < 0, x * slope, x)


@onnx_rule("Elu")
def elu(node: OnnxNode, x: Any) -> Tensor:
    return N.elu(tensor(x), node.attr("alpha", 1.0))


@onnx_rule("Celu")
def celu(node: OnnxNode, x: Any) -> Tensor:
    """max(x, 0) + min(0, alpha * (exp(x / alpha) - 1))."""
    x, alpha = tensor(x), node.attr("alpha", 1.0)
    return F.where(x > 0, x, alpha * F.expm1(F.minimum(x, 0) / alpha))


@onnx_rule("Selu")
def selu(node: OnnxNode, x: Any) -> Tensor:
    return node.attr("gamma", 1.0507009873554805) * N.elu(tensor(x), node.attr("alpha", 1.6732632423543772))


@onnx_rule("HardSigmoid")
def hard_sigmoid(node: OnnxNode, x: Any) -> Tensor:
    return F.clip(tensor(x) * node.attr("alpha", 0.2) + node.attr("beta", 0.5), 0, 1)


@onnx_rule("ThresholdedRelu")
def thresholded_relu(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    return F.where(x > node.attr("alpha", 1.0), x, constant(0, x.dtype))


@onnx_rule("Shrink")
def shrink(node: OnnxNode, x: Any) -> Tensor:
    x, bias, threshold = tensor(x), node.attr("bias", 0.0), node.attr("lambd", 0.5)
    above, below = binary("gt", _floating(x), threshold), binary("lt", _floating(x), -threshold)
    shift = bias if x.dtype.is_float else int(bias)
    return F.where(above, x - shift, F.where(below, x + shift, constant(0, x.dtype)))


def _floating(x: Tensor) -> Tensor:
    return x if x.dtype.is_float else cast(x, float32)


@onnx_rule("Softsign")
def softsign(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    return x / (1 + F.absolute(x))


@onnx_rule("Gelu")
def gelu(node: OnnxNode, x: Any) -> Tensor:
    return N.gelu(tensor(x), node.attr("approximate", "none"))


@onnx_rule("Swish")
def swish(node: OnnxNode, x: Any) -> Tensor:
    return scaled_silu(tensor(x), node.attr("alpha", 1.0))


def scaled_silu(x: Tensor, alpha: float) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return x * F.sigmoid(x if alpha == 1 else x * alpha)


@onnx_rule("SwiGLU")
def swiglu(node: OnnxNode, gate: Any, value: Any) -> Tensor:
    return scaled_silu(tensor(gate), node.attr("alpha", 1.0)) * tensor(value)


# Running totals and determinants ---------------------------------------------------------------------------------

def cumulative_rule(op_type: str, op: str) -> None:
    """CumSum and CumProd: the axis is an operand."""
    @onnx_rule(op_type, static=(1,))
    def rule(node: OnnxNode, x: Any, axis: Any) -> Tensor:
        x = tensor(x)
        place = int(require_known(node, axis, "axis").reshape(())) % max(x.ndim, 1)
        result: Tensor = apply(op, x, axis=place, exclusive=bool(node.attr("exclusive", 0)),
                               reverse=bool(node.attr("reverse", 0)))
        return result


cumulative_rule("CumSum", "cumsum")
cumulative_rule("CumProd", "cumprod")


@onnx_rule("Det")
def det(node: OnnxNode, x: Any) -> Tensor:
    """Gaussian elimination with the largest pivot of each column; the product of the pivots, signed by the swaps."""
    x = tensor(x)
    size = x.shape[-1]
    if x.ndim < 2 or not isinstance(size, int) or x.shape[-2] != size:
        raise node.fail(f"the determinant is of square matrices, got {x.type}")
    lead = x.shape[:-2]
    rest, total = F.reshape(x, (math.prod(lead), size, size)), F.ones((math.prod(lead),), x.dtype)
    rows = F.arange(size)
    for k in range(size):
        column = F.absolute(rest[:, :, 0])
        pivot = F.argmax(column, axis=1)                      # (batch,)
        chosen = F.expand_dims(pivot, 1)
        order = F.where(rows[:size - k] == chosen, 0, rows[:size - k])   # row 0 stands where the pivot stood
        top = F.take_along_axis(rest, F.reshape(pivot, (-1, 1, 1)), axis=1)
        rest = F.take_along_axis(rest, F.expand_dims(order, 2), axis=1)
        head = top[:, 0, 0]
        total = total * head * F.where(pivot == 0, constant(1, x.dtype), constant(-1, x.dtype))
        safe = F.where(head == 0, constant(1, x.dtype), head)
        factors = rest[:, 1:, :1] / F.reshape(safe, (-1, 1, 1))
        rest = rest[:, 1:, 1:] - factors * top[:, :, 1:]
    return F.reshape(total, lead)
