"""The optimizer steps of ai.onnx.preview.training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.dtypes import as_dtype
from .. import functions as F
from ..dispatch import cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import TRAINING, onnx_rule
from .values import tensor

Update = Callable[[OnnxNode, Tensor, Tensor, list[Tensor]], tuple[Tensor, ...]]


def optimizer_rule(op_type: str, tensors: int, update: Update) -> None:
    """A rule for (rate, count, parameters, gradients, state...): the new parameters, then the new state.

    Args:
        op_type: the optimizer.
        tensors: how many each parameter comes with: itself, its gradient, and its state.
        update: called for each parameter with the rate, the count and these; gives the new parameter and state.
    """
    @onnx_rule(op_type, domain=TRAINING)
    def rule(node: OnnxNode, rate: Any, count: Any, *rest: Any) -> tuple[Tensor, ...]:
        if len(rest) % tensors:
            raise node.fail(f"it takes {tensors} tensors for each parameter, got {len(rest)} in all")
        each = len(rest) // tensors
        results = [update(node, tensor(rate), tensor(count), [tensor(rest[j * each + i]) for j in range(tensors)])
                   for i in range(each)]
        return tuple(result[j] for j in range(tensors - 1) for result in results)


def regularized(node: OnnxNode, x: Tensor, g: Tensor) -> Tensor:
    """The gradient with that of norm_coefficient / 2 * |x| ** 2."""
    weight = node.attr("norm_coefficient", 0.0)
    return g if weight == 0 else g + x * weight


def adagrad(node: OnnxNode, rate: Tensor, count: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    x, g, h = tensors
    rate = rate / (1 + cast(count, rate.dtype) * node.attr("decay_factor", 0.0))
    g = regularized(node, x, g)
    h = h + F.square(g)
    return x - cast(rate, x.dtype) * g / (F.sqrt(h) + node.attr("epsilon", 1e-6)), h


def adam(node: OnnxNode, rate: Tensor, count: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Adam (Kingma & Ba, 2015): the bias correction is part of the rate."""
    x, g, v, h = tensors
    alpha, beta = node.attr("alpha", 0.9), node.attr("beta", 0.999)
    g = regularized(node, x, g)
    v = v * alpha + g * (1 - alpha)
    h = h * beta + F.square(g) * (1 - beta)
    steps = cast(count, as_dtype("float64"))
    correction = F.sqrt(1 - F.power(constant(beta, steps.dtype), steps)) / (
        1 - F.power(constant(alpha, steps.dtype), F.maximum(steps, 1.0)))
    rate = rate * cast(F.where(steps > 0, correction, constant(1, steps.dtype)), rate.dtype)
    x = x - cast(rate, x.dtype) * v / (F.sqrt(h) + node.attr("epsilon", 1e-6))
    return x * (1 - node.attr("norm_coefficient_post", 0.0)), v, h


def momentum(node: OnnxNode, rate: Tensor, count: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradient descent with momentum, in the standard way or Nesterov's."""
    x, g, v = tensors
    alpha = node.attr("alpha", 0.9)
    g = regularized(node, x, g)
    beta = F.where(count > 0, constant(node.attr("beta", 1.0), x.dtype), constant(1, x.dtype))
    v = v * alpha + g * beta
    step = g + v * alpha if node.attr("mode", "standard") == "nesterov" else v
    return x - cast(rate, x.dtype) * step, v


optimizer_rule("Adagrad", 3, adagrad)
optimizer_rule("Adam", 4, adam)
optimizer_rule("Momentum", 3, momentum)
