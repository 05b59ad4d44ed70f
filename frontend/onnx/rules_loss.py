"""Losses: the negative log likelihood, alone and after a softmax. Classes are axis 1."""

from __future__ import annotations

from typing import Any

from ...ir.dtypes import int64
from .. import functions as F
from ..dispatch import cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .values import tensor


def likelihood_loss(node: OnnxNode, log_p: Tensor, labels: Tensor, weight: Any) -> Tensor:
    """-weight[label] * log_p[label] of each example, reduced; the mean divides by the sum of the weights.

    Args:
        log_p: (N, classes, ...).
        labels: (N, ...) class numbers; `ignore_index` counts for nothing.
        weight: (classes,) or None.
    """
    labels = cast(labels, int64)
    counted = None
    ignored = node.attr("ignore_index", None)
    if ignored is not None:
        counted = labels != int(ignored)
        labels = F.where(counted, labels, 0)
    picked = F.squeeze(F.take_along_axis(log_p, F.expand_dims(labels, 1), axis=1), 1)
    each = None if weight is None else F.take(tensor(weight), labels, axis=0)
    if counted is not None:
        each = cast(counted, log_p.dtype) if each is None else each * cast(counted, log_p.dtype)
        picked = F.where(counted, picked, constant(0, picked.dtype))
    loss = -picked if each is None else -picked * each
    how = node.attr("reduction", "mean")
    if how == "none":
        return loss
    if how == "sum":
        return F.sum(loss)
    return F.mean(loss) if each is None else F.sum(loss) / F.sum(each)


@onnx_rule("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood(node: OnnxNode, x: Any, labels: Any, weight: Any = None) -> Tensor:
    return likelihood_loss(node, tensor(x), tensor(labels), weight)


@onnx_rule("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy(node: OnnxNode, scores: Any, labels: Any, weight: Any = None) -> Any:
    """(loss, log probabilities)."""
    log_p = F.log_softmax(tensor(scores), axis=1)
    loss = likelihood_loss(node, log_p, tensor(labels), weight)
    return (loss, log_p) if node.wants(1) else loss
