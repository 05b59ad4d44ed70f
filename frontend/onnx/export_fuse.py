"""Groups of IR nodes that one ONNX op says: activations, batch normalisation, products with their bias.

A group is found at its last node, before that node's own rule is asked. What is inside was written already; if
nothing else reads it, it is dropped in the end (`export_proto.live`). Products and convolutions are taken in only if
the bias is their one reader, so that nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...ir.dims import Dim
from ...ir.graph import Node, Value
from ...ir.simplify_match import constant_of, made_by, uniform
from .export_nn import gemm
from .export_window import write_conv, write_conv_transpose
from .export_writer import Ref, Writer

Pattern = Callable[[Writer, Node], "Ref | None"]
PATTERNS: dict[str, list[Pattern]] = {}


def fuses(name: str) -> Callable[[Pattern], Pattern]:
    """Declares a pattern that ends in the op `name`."""
    def declare(pattern: Pattern) -> Pattern:
        PATTERNS.setdefault(name, []).append(pattern)
        return pattern
    return declare


def fused(out: Writer, node: Node) -> Ref | None:
    """What stands for the node's result as the end of a group; None if it is none."""
    for pattern in PATTERNS.get(node.op.name, ()):
        found = pattern(out, node)
        if found is not None:
            return found
    return None


# Matching --------------------------------------------------------------------------------------------------------

def operands(value: Value, name: str) -> tuple[Value, ...]:
    """The operands of the value if it was made by the op; else none."""
    return value.producer.operands if value.producer is not None and made_by(value, name) else ()


def either_order(pair: tuple[Value, ...]) -> Iterator[tuple[Value, Value]]:
    """Two operands in both orders; nothing for none."""
    if len(pair) == 2:
        yield pair[0], pair[1]
        yield pair[1], pair[0]


def close(number: Any, wanted: float, dtype: Any) -> bool:
    """Equal as far as the dtype tells."""
    digits = 1e-6 if dtype.bits >= 32 else 2e-3
    return isinstance(number, (int, float)) and math.isclose(number, wanted, rel_tol=digits)


def scaled(value: Value) -> tuple[Value, float] | None:
    """(x, c) of x * c or x / (1 / c)."""
    for x, c in either_order(operands(value, "mul")):
        number = uniform(c)
        if number is not None and c.rank == 0 and uniform(x) is None:
            return x, float(number)
    if pair := operands(value, "div"):
        number = uniform(pair[1])
        if number and pair[1].rank == 0:
            return pair[0], 1 / float(number)
    return None


def shifted(value: Value) -> tuple[Value, float] | None:
    """(x, c) of x + c."""
    for x, c in either_order(operands(value, "add")):
        number = uniform(c)
        if number is not None and c.rank == 0:
            return x, float(number)
    return None


def factors(value: Value) -> tuple[list[Value], float]:
    """The product as values and one number."""
    pair = operands(value, "mul") or operands(value, "square") * 2
    if not pair:
        number = uniform(value)
        return ([], float(number)) if number is not None and value.rank == 0 else ([value], 1.0)
    (left, a), (right, b) = map(factors, pair)
    return left + right, a * b


# Activations -----------------------------------------------------------------------------------------------------

@fuses("mul")
def gelu(out: Writer, node: Node) -> Ref | None:
    """x * 0.5 * (1 + erf(x / sqrt 2)), or 1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3)) for the last factor."""
    dtype = node.result.dtype
    if out.opset < 20 or dtype not in ("float32", "float16"):
        return None
    others, number = factors(node.result)
    if len(others) != 2 or not close(number, 0.5, dtype):
        return None
    for x, gate in (others, others[::-1]):
        inner = shifted(gate)
        if inner is None or inner[1] != 1:
            continue
        kind = "none" if _is_erf(inner[0], x) else "tanh" if _is_tanh(inner[0], x) else None
        if kind is not None:
            return out.op("Gelu", out.refs[x], approximate=kind)
    return None


def _is_erf(value: Value, x: Value) -> bool:
    argument = operands(value, "erf")
    found = scaled(argument[0]) if argument else None
    return found is not None and found[0] is x and close(found[1], math.sqrt(0.5), x.dtype)


def _is_tanh(value: Value, x: Value) -> bool:
    argument = operands(value, "tanh")
    found = scaled(argument[0]) if argument else None
    if found is None or not close(found[1], math.sqrt(2 / math.pi), x.dtype):
        return False
    for cube, plain in either_order(operands(found[0], "add")):
        others, number = factors(cube)
        if plain is x and len(others) == 3 and all(v is x for v in others) and close(number, 0.044715, x.dtype):
            return True
    return False


def _hard_gate(value: Value) -> tuple[Value, float, float] | None:
    """(x, alpha, beta) of clip(alpha * x + beta, 0, 1)."""
    if not operands(value, "clip") or value.producer is None:
        return None
    if (value.producer.attrs["lo"], value.producer.attrs["hi"]) != (0, 1) or not value.dtype.is_float:
        return None
    sum_ = shifted(value.producer.operands[0])
    product = scaled(sum_[0]) if sum_ is not None else None
    return None if sum_ is None or product is None else (*product, sum_[1])


@fuses("clip")
def hard_sigmoid(out: Writer, node: Node) -> Ref | None:
    found = _hard_gate(node.result)
    if found is None or node.result.dtype == "float64":
        return None
    x, alpha, beta = found
    return out.op("HardSigmoid", out.refs[x], alpha=float(np.float32(alpha)), beta=float(np.float32(beta)))


@fuses("mul")
def hard_swish(out: Writer, node: Node) -> Ref | None:
    """HardSwish, an op since opset 14."""
    dtype = node.result.dtype
    if out.opset < 14 or dtype == "float64":
        return None
    for x, gate in either_order(node.operands):
        found = _hard_gate(gate)
        if found is not None and found[0] is x and close(found[1], 1 / 6, dtype) and found[2] == 0.5:
            return out.op("HardSwish", out.refs[x])
    return None


def _positive_part(node: Node) -> tuple[Value, Value] | None:
    """(x, other) of where(x > 0, x, other)."""
    test, x, other = node.operands
    pair = operands(test, "gt")
    if pair and pair[0] is x and uniform(pair[1]) == 0 and x.dtype.is_float and x.shape == node.result.shape:
        return x, other
    return None


@fuses("where")
def leaky_relu(out: Writer, node: Node) -> Ref | None:
    found = _positive_part(node)
    product = scaled(found[1]) if found is not None else None
    if found is None or product is None or product[0] is not found[0] or node.result.dtype == "float64":
        return None
    return out.op("LeakyRelu", out.refs[found[0]], alpha=product[1])


@fuses("where")
def elu(out: Writer, node: Node) -> Ref | None:
    """where(x > 0, x, alpha * expm1(min(x, 0)))."""
    found = _positive_part(node)
    if found is None or node.result.dtype == "float64":
        return None
    x, other = found
    power, alpha = scaled(other) or (other, 1.0)
    inner = operands(power, "expm1")
    for least, zero in either_order(operands(inner[0], "minimum") if inner else ()):
        if least is x and uniform(zero) == 0:
            return out.op("Elu", out.refs[x], alpha=alpha)
    return None


@fuses("where")
def prelu(out: Writer, node: Node) -> Ref | None:
    """where(x < 0, x * slope, x)."""
    test, product, x = node.operands
    pair = operands(test, "lt")
    if not pair or pair[0] is not x or uniform(pair[1]) != 0 or not x.dtype.is_float or x.shape != product.shape:
        return None
    for value, slope in either_order(operands(product, "mul")):
        if value is x and uniform(slope) is None:
            return out.op("PRelu", out.refs[x], out.refs[slope])
    return None


# Biases ----------------------------------------------------------------------------------------------------------

def channel_vector(out: Writer, value: Value, rank: int, channels: Any) -> Ref | None:
    """The vector (C,) of a value that has one number for each channel of (N, C, ...); None for another shape."""
    shape = (1,) * (rank - value.rank) + tuple(value.shape)
    if rank < 2 or shape != (1, channels, *(1,) * (rank - 2)):
        return None
    if value.shape == (channels,):
        return out.refs[value]
    array = constant_of(value)
    if array is not None:
        return out.const(array.reshape(-1))
    source = operands(value, "reshape")
    return out.refs[source[0]] if source and source[0].shape == (channels,) else None


@fuses("add")
def convolution_bias(out: Writer, node: Node) -> Ref | None:
    for y, b in either_order(node.operands):
        conv = y.producer
        if conv is None or conv.op.name not in ("conv", "conv_input_grad") or out.uses.get(y) != 1:
            continue
        attrs = conv.attrs
        if attrs["channels_last"] or attrs["out_dtype"] is not None or not y.dtype.is_float or y.dtype.bits < 32:
            continue
        bias = channel_vector(out, b, y.rank, y.shape[1])
        if bias is None or y.shape != node.result.shape:
            continue
        refs = [out.refs[v] for v in conv.operands]
        return write_conv(out, conv, *refs, bias) if conv.op.name == "conv" else \
            write_conv_transpose(out, conv, *refs, bias)
    return None


@fuses("add")
def matmul_bias(out: Writer, node: Node) -> Ref | None:
    """Gemm: a product of two matrices, plus a row."""
    for y, b in either_order(node.operands):
        matmul = y.producer
        if matmul is None or matmul.op.name != "matmul" or out.uses.get(y) != 1 or y.rank != 2:
            continue
        if not y.dtype.is_float or y.dtype.bits < 32 or matmul.attrs["out_dtype"] is not None or 0 in y.shape:
            continue
        if b.shape == y.shape[1:] and [v.rank for v in matmul.operands] == [2, 2] \
                and matmul.operands[0].shape[0 if matmul.attrs["transpose_x"] else 1] != 0:
            left, right = (out.refs[v] for v in matmul.operands)
            return gemm(out, left, right, out.refs[b], matmul.attrs["transpose_x"], matmul.attrs["transpose_y"])
    return None


# Batch normalisation with fixed statistics -----------------------------------------------------------------------

@fuses("add")
def batch_norm(out: Writer, node: Node) -> Ref | None:
    """x * scale + (bias - mean * scale) with scale = weight / sqrt(var + eps)."""
    x_dtype = node.result.dtype
    if x_dtype not in ("float32", "float64"):
        return None
    for product, shift in either_order(node.operands):
        for x, factor in either_order(operands(product, "mul")):
            if x.rank < 2 or x.shape != node.result.shape or isinstance(x.shape[1], Dim):
                continue
            made = _normalised(out, x, factor, shift)
            if made is not None:
                return made
    return None


def _normalised(out: Writer, x: Value, factor: Value, shift: Value) -> Ref | None:
    channels = x.shape[1]
    scale, offset = (_column(v, x.rank, channels) for v in (factor, shift))
    if scale is None or offset is None:
        return None
    weight, statistics = _weight_and_variance(scale)
    if statistics is None:
        return None
    variance, eps = statistics
    found = _bias_and_mean(offset, scale)
    if found is None or variance.shape != (channels,) or found[1].shape != (channels,):
        return None
    bias, mean = found
    if any(v is not None and v.shape != (channels,) for v in (weight, bias)):
        return None
    ones, zeros = (out.const(np.full(channels, n, x.dtype.np)) for n in (1, 0))
    return out.op("BatchNormalization", out.refs[x], ones if weight is None else out.refs[weight],
                       zeros if bias is None else out.refs[bias], out.refs[mean], out.refs[variance],
                       epsilon=float(np.float32(eps)))


def _column(value: Value, rank: int, channels: Any) -> Value | None:
    """The vector (C,) that was reshaped to stand beside (N, C, ...)."""
    if value.shape == (channels,) and rank == 2:
        return value
    shape = (1,) * (rank - value.rank) + tuple(value.shape)
    source = operands(value, "reshape")
    good = source and source[0].shape == (channels,) and shape == (1, channels, *(1,) * (rank - 2))
    return source[0] if good else None


def _weight_and_variance(scale: Value) -> tuple[Value | None, tuple[Value, float] | None]:
    """(weight, (variance, eps)) of weight * rsqrt(variance + eps); no weight if it is 1."""
    if root := operands(scale, "rsqrt"):
        return None, shifted(root[0])
    for weight, power in either_order(operands(scale, "mul")):
        if root := operands(power, "rsqrt"):
            return weight, shifted(root[0])
    return None, None


def _bias_and_mean(offset: Value, scale: Value) -> tuple[Value | None, Value] | None:
    """(bias, mean) of bias - mean * scale; no bias if it is 0."""
    pair = operands(offset, "sub")
    bias, product = (pair[0], pair[1]) if pair else (None, None)
    if not pair and (negated := operands(offset, "neg")):
        product = negated[0]
    if product is None:
        return None
    for mean, other in either_order(operands(product, "mul")):
        if other is scale:
            return bias, mean
    return None
