"""Normalisations and dropout."""

from __future__ import annotations

import math
from typing import Any

from ...ir.dtypes import bool_, float32
from .. import functions as F
from .. import random
from ..dispatch import apply, cast, constant
from ..nn import functional as N
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .rules_shape import axis_of
from .values import known, tensor

# By channels -----------------------------------------------------------------------------------------------------


@onnx_rule("BatchNormalization", weights=(1, 2), state=(3, 4))
def batch_norm(node: OnnxNode, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
    """Opset 14 says by an attribute, 7 to 13 by the number of results, 6 by `is_test` whether it is training."""
    x, scale, bias, mean, var = map(tensor, (x, scale, bias, mean, var))
    eps, momentum = node.attr("epsilon", 1e-5), node.attr("momentum", 0.9)
    if node.opset >= 14:
        training = bool(node.attr("training_mode", 0))
    elif node.opset >= 7:
        training = any(node.wants(i) for i in range(1, 5))
    else:
        training = not node.attr("is_test", 0)
    if not training:
        return cast(N.batch_norm(x, mean, var, scale, bias, training=False, eps=eps), x.dtype)
    y, batch_mean, batch_var = F.batch_norm(x, scale, bias, eps=eps)
    fresh = [old * momentum + cast(F.stop_gradient(new), old.dtype) * (1 - momentum)
             for old, new in ((mean, batch_mean), (var, batch_var))]
    return (y, *fresh, batch_mean, batch_var)


@onnx_rule("InstanceNormalization", weights=(1, 2))
def instance_norm(node: OnnxNode, x: Any, scale: Any, bias: Any) -> Tensor:
    x = tensor(x)
    return F.group_norm(x, tensor(scale), tensor(bias), groups=x.shape[1], eps=node.attr("epsilon", 1e-5))


@onnx_rule("GroupNormalization", since=18, weights=(1, 2))
def group_norm(node: OnnxNode, x: Any, scale: Any, bias: Any) -> Tensor:
    """Scale and bias belong to the groups at opset 18, to the channels from 21 on."""
    x, scale, bias = tensor(x), tensor(scale), tensor(bias)
    groups = int(node.require("num_groups"))
    if node.opset < 21:
        scale, bias = (F.repeat(p, x.shape[1] // groups) for p in (scale, bias))
    return F.group_norm(x, scale, bias, groups=groups, eps=node.attr("epsilon", 1e-5))


@onnx_rule("LRN")
def lrn(node: OnnxNode, x: Any) -> Tensor:
    """x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    x, size = tensor(x), int(node.require("size"))
    rows = F.reshape(F.square(x), (x.shape[0], 1, x.shape[1], math.prod(x.shape[2:])))
    mean = apply("avg_pool", rows, window=(size, 1), stride=(1, 1), count_include_pad=True,
                 padding=(((size - 1) // 2, size // 2), (0, 0)))
    mean = F.reshape(mean, x.shape)
    return x / F.power(mean * node.attr("alpha", 1e-4) + node.attr("bias", 1.0), node.attr("beta", 0.75))


@onnx_rule("MeanVarianceNormalization")
def mean_variance_norm(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    axes = tuple(axis_of(node, int(a), x.ndim) for a in node.attr("axes", None) or (0, 2, 3))
    centered = x - F.mean(x, axes, keepdims=True)
    return centered / (F.sqrt(F.mean(F.square(centered), axes, keepdims=True)) + 1e-9)


@onnx_rule("LpNormalization")
def lp_norm(node: OnnxNode, x: Any) -> Tensor:
    """x divided by its norm along an axis; zeros where that is zero."""
    x = tensor(x)
    axis = axis_of(node, int(node.attr("axis", -1)), x.ndim)
    if int(node.attr("p", 2)) == 1:
        total = F.sum(F.absolute(x), axis, keepdims=True)
        return x / F.where(total == 0, constant(1, x.dtype), total)
    squares = F.sum(F.square(x), axis, keepdims=True)
    return x * F.rsqrt(F.where(squares == 0, constant(1, x.dtype), squares))


# Over trailing axes ----------------------------------------------------------------------------------------------

@onnx_rule(("LayerNormalization",), weights=(1, 2))
def layer_norm(node: OnnxNode, x: Any, scale: Any, bias: Any = None) -> Any:
    """(y, mean, 1 / standard deviation) over the axes from `axis` on."""
    x = tensor(x)
    axis = axis_of(node, int(node.attr("axis", -1)), x.ndim)
    y = layer_normalized(x, tensor(scale), None if bias is None else tensor(bias), axis, node.attr("epsilon", 1e-5))
    return (y, *moments(x, axis, node.attr("epsilon", 1e-5))) if node.wants(1) or node.wants(2) else y


def layer_normalized(x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """x normalised over its axes from `axis` on, times scale plus bias, which broadcast to these axes or to x."""
    count = x.ndim - axis
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, scale, F.zeros(shape, x.dtype) if bias is None else bias, axes=count, eps=eps)
    if scale.ndim <= count and (bias is None or bias.ndim <= count):
        return layer_normalized(x, F.broadcast_to(scale, shape),
                                None if bias is None else F.broadcast_to(bias, shape), axis, eps)
    y = F.layer_norm(x, F.ones(shape, x.dtype), F.zeros(shape, x.dtype), axes=count, eps=eps) * scale
    return y if bias is None else y + bias


def moments(x: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and the reciprocal of the standard deviation over the axes from `axis` on, float32 of narrow x."""
    wide = x if x.dtype.bits >= 32 else cast(x, float32)
    axes = tuple(range(axis, x.ndim))
    mean = F.mean(wide, axes, keepdims=True)
    return mean, F.rsqrt(F.mean(F.square(wide - mean), axes, keepdims=True) + eps)


@onnx_rule("RMSNormalization", since=23, weights=(1,))
def rms_norm(node: OnnxNode, x: Any, scale: Any) -> Tensor:
    x = tensor(x)
    axis = axis_of(node, int(node.attr("axis", -1)), x.ndim)
    return rms_normalized(x, tensor(scale), axis, node.attr("epsilon", 1e-5))


def rms_normalized(x: Tensor, scale: Tensor, axis: int, eps: float) -> Tensor:
    """x / sqrt(mean(x * x) + eps) over its axes from `axis` on, times scale, which broadcasts to x."""
    shape = x.shape[axis:]
    flat = F.reshape(x, (*x.shape[:axis], math.prod(shape)))
    if scale.ndim <= len(shape):
        whole = F.reshape(F.broadcast_to(scale, shape), (math.prod(shape),))
        return F.reshape(F.rms_norm(flat, whole, eps=eps), x.shape)
    return F.reshape(F.rms_norm(flat, F.ones((math.prod(shape),), x.dtype), eps=eps), x.shape) * scale


# Dropout ---------------------------------------------------------------------------------------------------------

@onnx_rule("Dropout")
def dropout_attributes(node: OnnxNode, x: Any) -> Any:
    """Before opset 7 an attribute says whether it is a test; then it never drops."""
    x = tensor(x)
    ratio = node.attr("ratio", 0.5)
    training = node.opset < 7 and not node.attr("is_test", 0)
    y, mask = dropped(x, ratio, training)
    return y, mask if node.opset >= 10 else cast(mask, x.dtype)


@onnx_rule("Dropout", since=12, static=(1, 2))
def dropout(node: OnnxNode, x: Any, ratio: Any = None, training: Any = None) -> Any:
    """(y, mask): each element dropped with the probability `ratio`, the others scaled to keep the mean."""
    x = tensor(x)
    training_known = known(training) if training is not None else None
    if training is None or (training_known is not None and not training_known.any()):
        return dropped(x, 0.0, False)
    rate: Any = 0.5 if ratio is None else known(ratio)
    if rate is None:
        rate = tensor(ratio)
    elif not isinstance(rate, float):
        rate = float(rate.reshape(()))
    y, mask = dropped(x, rate, True)
    if training_known is None:
        now = F.reshape(tensor(training), ())
        return F.where(now, y, x), F.logical_or(mask, F.logical_not(now))
    return y, mask


def dropped(x: Tensor, rate: Any, training: bool) -> tuple[Tensor, Tensor]:
    """x after dropout, and what it kept."""
    if not training or (isinstance(rate, float) and rate == 0):
        return x, F.ones(x.shape, bool_)
    if isinstance(rate, Tensor):
        rate = F.reshape(cast(rate, float32), ())
        keep = F.greater_equal(random.uniform(x.shape), rate)
        return F.where(keep, x * cast(1 / (1 - rate), x.dtype), constant(0, x.dtype)), keep
    keep = random.bernoulli(1.0 - rate, x.shape)
    scale = 1.0 / (1.0 - rate) if rate < 1 else 0.0
    return F.where(keep, x * scale, constant(0, x.dtype)), keep


__all__ = ["dropped", "layer_normalized", "moments", "rms_normalized"]
