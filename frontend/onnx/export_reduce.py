"""Export of reductions, positions of extremes, and running sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.dims import Dim, Size
from ...ir.dtypes import as_dtype
from ...ir.graph import Node, Value
from ...ir.ops_reduce import highest, lowest
from ...ir.simplify_match import uniform
from .export_control import loop_over
from .export_rules import exports, in_f32
from .export_shape import filled, scalar_size, squeeze
from .export_writer import BOOL, INT64, Ref, Writer


def reduce(out: Writer, kind: str, x: Ref, axes: Sequence[int], keepdims: bool) -> Ref:
    """A reduction node; axes are an input since opset 18 (of ReduceSum since 13)."""
    if not axes:
        return x
    keep = {"keepdims": int(keepdims)}
    if out.opset >= (13 if kind == "ReduceSum" else 18):
        made = out.op(kind, x, out.ints(*axes), **keep)
    else:
        made = out.op(kind, x, axes=list(axes), **keep)
    return made


def over_nothing(node: Node) -> bool:
    """Whether elements are reduced of which there are none."""
    shape = node.operands[0].shape
    return any(shape[a] == 0 for a in node.attrs["axes"])


def reduction(name: str, kind: str, identity: Any) -> None:
    """Declares a reduction; over nothing it gives its identity, which runtimes are not agreed on."""
    @exports(name)
    def rule(out: Writer, node: Node, x: Ref) -> Ref:
        if over_nothing(node):
            return filled(out, identity(x.dtype.np), node.result.shape, x.dtype)
        return reduce(out, kind, x, node.attrs["axes"], node.attrs["keepdims"])


reduction("reduce_mean", "ReduceMean", lambda dtype: np.nan)
reduction("reduce_prod", "ReduceProd", lambda dtype: 1)
reduction("reduce_max", "ReduceMax", lowest)
reduction("reduce_min", "ReduceMin", highest)
reduction("reduce_any", "ReduceMax", lambda dtype: False)
reduction("reduce_all", "ReduceMin", lambda dtype: True)


@exports("reduce_sum")
def reduce_sum(out: Writer, node: Node, x: Ref) -> Ref:
    """A sum over ones is a size."""
    (operand,) = node.operands
    size = counted(operand, node.attrs["axes"])
    if size is not None and not node.result.rank and x.dtype == INT64:
        return scalar_size(out, size)
    if over_nothing(node):
        return filled(out, 0, node.result.shape, x.dtype)
    return reduce(out, "ReduceSum", x, node.attrs["axes"], node.attrs["keepdims"])


def counted(x: Value, axes: Sequence[int]) -> Size | None:
    """The number of elements that are summed, if each is 1 and there are symbolically many."""
    if uniform(x) != 1 or x.dtype.is_float or len(axes) != x.rank:
        return None
    size = math.prod(x.shape)
    return size if isinstance(size, Dim) else None


@exports("logsumexp")
@in_f32
def logsumexp(out: Writer, node: Node, x: Ref) -> Ref:
    """Shifted by the largest, which is taken as 0 where it is infinite."""
    axes, keepdims = node.attrs["axes"], node.attrs["keepdims"]
    if over_nothing(node):
        return filled(out, -np.inf, node.result.shape, x.dtype)
    peak = reduce(out, "ReduceMax", x, axes, True)
    finite = out.op("Less", out.op("Abs", peak), out.like(np.inf, peak))
    peak = out.op("Where", finite, peak, out.like(0, peak))
    total = reduce(out, "ReduceSum", out.op("Exp", out.op("Sub", x, peak)), axes, True)
    total = out.op("Add", out.op("Log", total), peak)
    return total if keepdims or not axes else squeeze(out, total, axes)


def position(name: str, kind: str) -> None:
    """Declares argmax or argmin."""
    @exports(name)
    def rule(out: Writer, node: Node, x: Ref) -> Ref:
        made = out.op(kind, x, axis=node.attrs["axis"], keepdims=int(node.attrs["keepdims"]))
        return made


position("argmax", "ArgMax")
position("argmin", "ArgMin")


@exports("cumsum")
@in_f32
def cumsum(out: Writer, node: Node, x: Ref) -> Ref:
    return out.op("CumSum", x, out.const(np.int64(node.attrs["axis"])),
                       exclusive=int(node.attrs["exclusive"]), reverse=int(node.attrs["reverse"]))


@exports("cumprod")
@in_f32
def cumprod(out: Writer, node: Node, x: Ref) -> Ref:
    """An op since opset 26; before, a loop over the axis."""
    axis, exclusive, backwards = (node.attrs[k] for k in ("axis", "exclusive", "reverse"))
    if out.opset >= 26:
        return out.op("CumProd", x, out.const(np.int64(axis)), exclusive=int(exclusive), reverse=int(backwards))
    shape = node.operands[0].shape
    if 0 in shape:
        return x
    rest = tuple(s for i, s in enumerate(shape) if i != axis)
    ones = filled(out, 1, rest, x.dtype)

    def step(inside: Writer, total: Ref, element: Ref) -> tuple[Ref, Ref]:
        product: Ref = inside.op("Mul", total, element)
        return product, total if exclusive else product

    return loop_over(out, step, ones, x, rest, axis, backwards)


__all__ = ["BOOL", "as_dtype", "reduce"]
