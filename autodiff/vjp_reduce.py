"""Derivatives of reductions and scans along an axis.

A reduction's cotangent is brought back to the rank of its operand with axes of size 1; the walk in reverse.py
then spreads it over the operand's shape. `reduce_max` and `reduce_min` share the cotangent evenly between equal
elements, as torch's amax does.
"""

from __future__ import annotations

import math
from typing import Any

from ..ir.context import emit
from ..ir.dtypes import float32
from ..ir.graph import Value
from ..ir.types import TensorType
from .reverse import filled, vjp
from .vjp_elementwise import compare, where


def kept(reduced: Value, x: Value, axes: tuple[int, ...]) -> Value:
    """A reduced value in the rank of its operand x: the reduced axes have size 1."""
    shape = tuple(1 if i in axes else s for i, s in enumerate(x.shape))
    return reduced if reduced.shape == shape else emit("reshape", reduced, shape=shape)


def over_count(ct: Value, x: Value, axes: tuple[int, ...]) -> Value:
    """ct divided by the number of elements that a reduction of x over the axes takes together."""
    sizes = tuple(x.shape[i] for i in axes)
    count = math.prod(sizes)
    if isinstance(count, int):
        if ct.dtype.bits < 32:  # 1 / count has too few digits in a 16-bit float
            return emit("cast", emit("cast", ct, dtype=float32) * (1.0 / max(count, 1)), dtype=ct.dtype)
        return ct * (1.0 / max(count, 1))
    ones = filled(TensorType(sizes, ct.dtype), 1.0)  # a size that is known only at run time
    return ct / emit("reduce_sum", ones, axes=tuple(range(len(sizes))), keepdims=False)


def _extremum(ct: Value, out: Value, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    hit = emit("cast", emit("eq", x, kept(out, x, axes)), dtype=x.dtype)
    return hit * (kept(ct, x, axes) / emit("reduce_sum", hit, axes=axes, keepdims=True))


def _logsumexp(ct: Value, out: Value, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    top = kept(out, x, axes)
    finite = where(compare("eq", top, -math.inf), 0.0, top)  # a row of -inf has weights 0, not NaN
    return kept(ct, x, axes) * emit("exp", x - finite)


def _product(ct: Value, out: Value, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    """Each element times the product of all others, from both sides: right where elements are zero."""
    rest = tuple(i for i in range(x.rank) if i not in axes)
    perm = rest + axes
    line = emit("reshape", emit("transpose", x, perm=perm),
                shape=(*(x.shape[i] for i in rest), math.prod(x.shape[i] for i in axes)))
    before = emit("cumprod", line, axis=len(rest), exclusive=True, reverse=False)
    after = emit("cumprod", line, axis=len(rest), exclusive=True, reverse=True)
    others = emit("reshape", before * after, shape=tuple(x.shape[i] for i in perm))
    inverse = tuple(perm.index(i) for i in range(x.rank))
    return kept(ct, x, axes) * emit("transpose", others, perm=inverse)


vjp("reduce_sum", lambda ct, out, x, axes, keepdims: kept(ct, x, axes))
vjp("reduce_mean", lambda ct, out, x, axes, keepdims: over_count(kept(ct, x, axes), x, axes))
vjp("reduce_max", _extremum)
vjp("reduce_min", _extremum)
vjp("reduce_prod", _product)
vjp("logsumexp", _logsumexp)


# --- along an axis ---------------------------------------------------------------------------------------


def _cumsum(ct: Value, out: Value, x: Value, axis: int, exclusive: bool, reverse: bool) -> Value:
    return emit("cumsum", ct, axis=axis, exclusive=exclusive, reverse=not reverse)


def _cumprod(ct: Value, out: Value, x: Value, axis: int, exclusive: bool, reverse: bool) -> Value:
    """Right where elements are zero, in second order too, as nothing is divided by x.

    With p_k the product of the elements before k, dx_k = p_k S_k where S_k = ct_k + x_{k+1} S_{k+1}, a linear
    recurrence from the far end. It is solved by doubling (Hillis & Steele, "Data parallel algorithms", 1986): after
    step d, S_k takes in the next 2d cotangents, and a_k is the product of the factors up to them.
    """
    before = emit("cumprod", x, axis=axis, exclusive=True, reverse=reverse)
    factor = ahead(x, 1, axis, reverse)
    total = ahead(ct, 1, axis, reverse) if exclusive else ct
    step = 1
    while step < x.shape[axis]:
        total = total + factor * ahead(total, step, axis, reverse)
        factor = factor * ahead(factor, step, axis, reverse)
        step *= 2
    return before * total


def ahead(x: Value, step: int, axis: int, reverse: bool) -> Value:
    """x_{k + step} in the place of x_k, zeros at the far end; `reverse` counts from the other side."""
    none: Any = (0,) * x.rank
    at = none[:axis] + (step,) + none[axis + 1:]
    cut = none[:axis] + (-step,) + none[axis + 1:]
    low, high = (at, cut) if reverse else (cut, at)
    return emit("pad", x, low=low, high=high, interior=none, value=0.0)


vjp("cumsum", _cumsum)
vjp("cumprod", _cumprod)
