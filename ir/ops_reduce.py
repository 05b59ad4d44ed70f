"""Reductions and scans over axes.

Attributes: `axes`, a tuple of distinct axes in increasing order (empty: nothing is reduced), and `keepdims`.
16-bit floats accumulate in f32. Integers keep their dtype and wrap: the frontend casts first where NumPy would.
Over zero elements a reduction gives its identity (0, 1, -inf, the smallest integer, False...), the mean NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .ops_common import (
    REQUIRED,
    Shape,
    TensorType,
    as_dtype,
    check_axes,
    check_axis,
    check_flag,
    contiguous,
    define,
    fail_shape,
    in_f32,
)
from .ops_elementwise import POLYNOMIAL, check_accepts

INT64 = as_dtype("int64")


def reduced_shape(shape: Shape, axes: tuple[int, ...], keepdims: bool) -> Shape:
    """The shape that is left of `shape` without the sizes of `axes` (1 in their place with keepdims)."""
    if keepdims:
        return tuple(1 if i in axes else s for i, s in enumerate(shape))
    return tuple(s for i, s in enumerate(shape) if i not in axes)


def operand_size(operations: int = 1) -> Callable[[Any], Any]:
    """The cost of an op that does so many operations for each element of its operand."""
    return lambda node: operations * node.operands[0].type.size


def reduction(name: str, fn: Callable[..., Any], doc: str, accepts: str = "number", flops: int = 1,
              **more: Any) -> None:
    """Declares `name(x; axes, keepdims)`, which keeps the dtype."""
    def infer(x: TensorType, axes: Any, keepdims: Any) -> TensorType:
        check_accepts(accepts, x)
        check_flag(keepdims=keepdims)
        return x.with_shape(reduced_shape(x.shape, check_axes(axes, x.rank), keepdims))

    define(name, "x", infer, in_f32(fn), doc, attrs={"axes": REQUIRED, "keepdims": False},
           traits=["reduction"], flops=operand_size(flops), **more)


def lowest(dtype: np.dtype) -> Any:
    """The identity of max."""
    return np.asarray(-np.inf if as_dtype(dtype).is_float else np.iinfo(dtype).min).astype(dtype)


def highest(dtype: np.dtype) -> Any:
    """The identity of min."""
    return np.asarray(np.inf if as_dtype(dtype).is_float else np.iinfo(dtype).max).astype(dtype)


def reduce_sum(x: Any, axes: Any, keepdims: Any) -> Any:
    return np.sum(x, axis=axes, keepdims=keepdims, dtype=x.dtype)


def reduce_mean(x: Any, axes: Any, keepdims: Any) -> Any:
    count = np.prod([x.shape[a] for a in axes], dtype=np.int64)
    return reduce_sum(x, axes, keepdims) / x.dtype.type(count)


def reduce_prod(x: Any, axes: Any, keepdims: Any) -> Any:
    return np.prod(x, axis=axes, keepdims=keepdims, dtype=x.dtype)


def reduce_max(x: Any, axes: Any, keepdims: Any) -> Any:
    return np.max(x, axis=axes, keepdims=keepdims, initial=lowest(x.dtype))


def reduce_min(x: Any, axes: Any, keepdims: Any) -> Any:
    return np.min(x, axis=axes, keepdims=keepdims, initial=highest(x.dtype))


def reduce_any(x: Any, axes: Any, keepdims: Any) -> Any:
    return np.any(x, axis=axes, keepdims=keepdims)


def reduce_all(x: Any, axes: Any, keepdims: Any) -> Any:
    return np.all(x, axis=axes, keepdims=keepdims)


def logsumexp(x: Any, axes: Any, keepdims: Any) -> Any:
    peak = reduce_max(x, axes, True)
    peak = np.where(np.isfinite(peak), peak, x.dtype.type(0))
    total = np.log(reduce_sum(np.exp(x - peak), axes, True)) + peak
    return total.reshape(reduced_shape(x.shape, axes, keepdims))


reduction("reduce_sum", reduce_sum, "Sum over axes.")
reduction("reduce_mean", reduce_mean, "Mean over axes, for floats.", accepts="float")
reduction("reduce_prod", reduce_prod, "Product over axes.")
reduction("reduce_max", reduce_max, "Largest over axes; NaN if there is one.")
reduction("reduce_min", reduce_min, "Smallest over axes; NaN if there is one.")
reduction("reduce_any", reduce_any, "Whether any is true.", accepts="bool", undifferentiable="boolean result")
reduction("reduce_all", reduce_all, "Whether all are true.", accepts="bool", undifferentiable="boolean result")
reduction("logsumexp", logsumexp, "log(sum(exp(x))) over axes, without overflow.", accepts="float",
          flops=POLYNOMIAL + 3)


# Where the extreme is --------------------------------------------------------------------------------------------

def arg_infer(x: TensorType, axis: Any, keepdims: Any) -> TensorType:
    check_accepts("any", x)
    check_flag(keepdims=keepdims)
    check_axis(axis, x.rank)
    if x.shape[axis] == 0:
        fail_shape(f"axis {axis} of {x} is empty: no element is the extreme one")
    return TensorType(reduced_shape(x.shape, (axis,), keepdims), INT64)


def arg_reduction(name: str, fn: Callable[..., Any], doc: str) -> None:
    """Declares `name(x; axis, keepdims) -> i64`."""
    def reference(x: Any, axis: Any, keepdims: Any) -> Any:
        wide = x.astype(np.float32) if x.dtype.itemsize == 2 and as_dtype(x.dtype).is_float else x
        return fn(wide, axis=axis, keepdims=keepdims).astype(np.int64)

    define(name, "x", arg_infer, reference, doc, attrs={"axis": REQUIRED, "keepdims": False},
           flops=operand_size(), undifferentiable="integer result")


arg_reduction("argmax", np.argmax, "Index of the largest; the first of equals, or the first NaN.")
arg_reduction("argmin", np.argmin, "Index of the smallest; the first of equals, or the first NaN.")


# Cumulative ------------------------------------------------------------------------------------------------------

def cumulative(name: str, fn: Callable[..., Any], identity: int, doc: str) -> None:
    """Declares `name(x; axis, exclusive, reverse)`, of the type of x."""
    def infer(x: TensorType, axis: Any, exclusive: Any, reverse: Any) -> TensorType:
        check_accepts("number", x)
        check_axis(axis, x.rank)
        check_flag(exclusive=exclusive, reverse=reverse)
        return x

    def reference(x: Any, axis: Any, exclusive: Any, reverse: Any) -> Any:
        flipped = np.flip(x, axis) if reverse else x
        total = fn(flipped, axis=axis, dtype=x.dtype)
        if exclusive and x.shape[axis]:
            first = np.full_like(np.take(total, [0], axis), identity)
            total = np.concatenate([first, np.take(total, range(x.shape[axis] - 1), axis)], axis)
        return contiguous(np.flip(total, axis)) if reverse else total

    define(name, "x", infer, in_f32(reference), doc, flops=operand_size(),
           attrs={"axis": REQUIRED, "exclusive": False, "reverse": False})


cumulative("cumsum", np.cumsum, 0, "Running sum along an axis; exclusive: of what comes before; reverse: from the end.")
cumulative("cumprod", np.cumprod, 1, "Running product along an axis; exclusive: of what comes before; reverse: from "
           "the end.")
