"""Reductions, and where the extreme elements are.

`axes` is an attribute up to opset 11 (`ReduceSum`) or 17 (the others), then an operand; no axes means all of them, or
with `noop_with_empty_axes` none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...ir.dtypes import float64
from .. import functions as F
from ..dispatch import apply, cast
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .rules_shape import slice_axis
from .sizes import numbers
from .values import require_ints, tensor

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def reduced_axes(node: OnnxNode, x: Tensor, axes: Any) -> tuple[int, ...] | None:
    """The axes that a node reduces; None: nothing is to be reduced."""
    if axes is not None:
        axes = require_ints(node, axes, "axes")
    else:
        axes = node.attr("axes", None)
    if axes is None or len(axes) == 0:
        return None if node.attr("noop_with_empty_axes", 0) else tuple(range(x.ndim))
    return tuple(sorted({_axis(node, int(a), x) for a in axes}))


def _axis(node: OnnxNode, axis: int, x: Tensor) -> int:
    if not -x.ndim <= axis < max(x.ndim, 1):
        raise node.fail(f"axis {axis} is out of range for {x.type}")
    return axis % x.ndim if x.ndim else 0


def reduction_rule(op_type: str, reduce: Reduction, before: Callable[[Tensor], Tensor] | None = None,
                   after: Callable[[Tensor], Tensor] | None = None) -> None:
    """A rule that reduces `before(x)` and gives `after` of that."""
    @onnx_rule(op_type, static=(1,))
    def rule(node: OnnxNode, x: Any, axes: Any = None) -> Tensor:
        x = tensor(x)
        over = reduced_axes(node, x, axes)
        y = before(x) if before else x
        if over is not None:
            y = reduce(y, over, bool(node.attr("keepdims", 1)))
        y = after(y) if after else y
        return y if y.dtype == x.dtype else cast(y, x.dtype)


def _sum(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return F.sum(x, axes, keepdims, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    """Integers: the sum divided towards zero."""
    if x.dtype.is_float:
        return F.mean(x, axes, keepdims) if axes else x
    total = F.sum(x, axes, keepdims)
    count = x.size // max(total.size, 1) if isinstance(x.size, int) else None
    if count is None:
        return cast(F.mean(x, axes, keepdims), x.dtype)
    return cast(F.trunc(cast(total, float64) / count), x.dtype)


def _extreme(op: str, on_bool: str) -> Reduction:
    def reduce(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
        result: Tensor = apply(on_bool if x.dtype.is_bool else op, x, axes=axes, keepdims=keepdims)
        return result
    return reduce


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return F.logsumexp(x, axes, keepdims) if axes else x


def _floating(x: Tensor) -> Tensor:
    return x if x.dtype.is_float else cast(x, float64)


reduction_rule("ReduceSum", _sum)
reduction_rule("ReduceMean", _mean)
reduction_rule("ReduceProd", lambda x, axes, keep: F.prod(x, axes, keep, dtype=x.dtype) if axes else x)
reduction_rule("ReduceMax", _extreme("reduce_max", "reduce_any"))
reduction_rule("ReduceMin", _extreme("reduce_min", "reduce_all"))
reduction_rule("ReduceL1", _sum, before=F.absolute)
reduction_rule("ReduceSumSquare", _sum, before=F.square)
reduction_rule("ReduceL2", _sum, before=lambda x: F.square(_floating(x)), after=F.sqrt)
reduction_rule("ReduceLogSum", _sum, before=_floating, after=F.log)


@onnx_rule("ReduceLogSumExp", static=(1,))
def reduce_log_sum_exp(node: OnnxNode, x: Any, axes: Any = None) -> Tensor:
    """Reducing nothing gives log(exp(x)), which is x."""
    x = tensor(x)
    over = reduced_axes(node, x, axes)
    if over is None:
        return x
    return cast(_log_sum_exp(_floating(x), over, bool(node.attr("keepdims", 1))), x.dtype)


def arg_rule(op_type: str, op: str) -> None:
    """ArgMax and ArgMin; with `select_last_index` the last of equals."""
    @onnx_rule(op_type)
    def rule(node: OnnxNode, x: Any) -> Tensor:
        x = tensor(x)
        axis = _axis(node, int(node.attr("axis", 0)), x)
        keep = bool(node.attr("keepdims", 1))
        if not node.attr("select_last_index", 0):
            first: Tensor = apply(op, x, axis=axis, keepdims=keep)
            return first
        return x.shape[axis] - 1 - apply(op, F.flip(x, axis), axis=axis, keepdims=keep)


arg_rule("ArgMax", "argmax")
arg_rule("ArgMin", "argmin")


@onnx_rule("TopK")
def top_k_attribute(node: OnnxNode, x: Any) -> tuple[Tensor, ...]:
    return _top_k(node, tensor(x), int(node.attr("k", 1)))


@onnx_rule("TopK", since=10, static=(1,))
def top_k(node: OnnxNode, x: Any, k: Any) -> tuple[Tensor, ...]:
    """(values, indices), best first; of equals the first."""
    return _top_k(node, tensor(x), *numbers(node, k, "k"))


def _top_k(node: OnnxNode, x: Tensor, k: Any) -> tuple[Tensor, ...]:
    axis, largest = _axis(node, int(node.attr("axis", -1)), x), bool(node.attr("largest", 1))
    if isinstance(k, int):
        values, indices = apply("top_k", x, k=k, axis=axis, largest=largest)
        return values, indices
    size = x.shape[axis]
    number = node.size(k, "k", size) if isinstance(k, Tensor) else k
    order = slice_axis(F.argsort(x, axis, descending=largest), axis, 0, number)
    return F.take_along_axis(x, order, axis), order


@onnx_rule("Hardmax")
def hardmax_flat(node: OnnxNode, x: Any) -> Tensor:
    """Before opset 13 the axes from `axis` on are one."""
    x = tensor(x)
    return F.reshape(_hardmax(matrix_of(x, int(node.attr("axis", 1))), 1), x.shape)


@onnx_rule("Hardmax", since=13)
def hardmax(node: OnnxNode, x: Any) -> Tensor:
    """1 where the first largest element along an axis is, 0 elsewhere."""
    x = tensor(x)
    return _hardmax(x, _axis(node, int(node.attr("axis", -1)), x))


def _hardmax(x: Tensor, axis: int) -> Tensor:
    best = apply("argmax", x, axis=axis, keepdims=True)
    places = apply("iota", shape=tuple(s if i == axis else 1 for i, s in enumerate(x.shape)), axis=axis,
                   dtype=best.dtype)
    return cast(F.equal(best, places), x.dtype)


def matrix_of(x: Tensor, axis: int) -> Tensor:
    """x with the axes before `axis`, and those from it on, joined: what softmax was over before opset 13."""
    place = axis + x.ndim if axis < 0 else axis
    return F.reshape(x, (math.prod(x.shape[:place]), math.prod(x.shape[place:])))


def softmax_rules(op_type: str, fn: Callable[..., Tensor]) -> None:
    """Softmax and its logarithm; before opset 13 over all axes from `axis` on."""
    @onnx_rule(op_type)
    def flat(node: OnnxNode, x: Any) -> Tensor:
        x = tensor(x)
        axis = int(node.attr("axis", 1))
        if axis in (-1, x.ndim - 1):
            return fn(x, axis=-1)
        return F.reshape(fn(matrix_of(x, axis), axis=1), x.shape)

    @onnx_rule(op_type, since=13)
    def rule(node: OnnxNode, x: Any) -> Tensor:
        return fn(tensor(x), axis=int(node.attr("axis", -1)))


softmax_rules("Softmax", F.softmax)
softmax_rules("LogSoftmax", F.log_softmax)
