"""Derivatives of the matrix product, in all four transposition forms.

With X, Y the operands as they enter the product, out = X Y gives dX = ct Yᵀ and dY = Xᵀ ct. The flags say
where a matrix is stored transposed, so each gradient is one matmul with other flags: nothing is transposed
in memory.
"""

from __future__ import annotations

import math
from typing import Any

from ..ir.context import emit
from ..ir.graph import Value
from .reverse import vjp


def contract(name: str, x: Value, y: Value, like: Value, **attrs: Any) -> Value:
    """A contraction (matmul, conv...) that gives a gradient in the dtype of its operand `like`, rounded once.

    The factors differ in dtype where the forward op has an `out_dtype`: they meet in the narrower of the two, so that
    16-bit operands make 16-bit gradients, but never in an 8-bit storage format, which would lose the cotangent.
    """
    if x.dtype != y.dtype:
        dtype = min((v.dtype for v in (x, y) if v.dtype.bits >= 16), key=lambda d: d.bits)
        x, y = cast(x, dtype), cast(y, dtype)
    if like.dtype.bits < x.dtype.bits:
        return cast(emit(name, x, y, **attrs), like.dtype)
    return emit(name, x, y, out_dtype=like.dtype, **attrs)


def cast(x: Value, dtype: Any) -> Value:
    return x if x.dtype == dtype else emit("cast", x, dtype=dtype)


def _product(x: Value, y: Value, tx: bool, ty: bool, like: Value) -> Value:
    return contract("matmul", x, y, like, transpose_x=tx, transpose_y=ty)


def _matmul_x(ct: Value, out: Value, x: Value, y: Value, transpose_x: bool, transpose_y: bool,
              out_dtype: Any) -> Value:
    if transpose_x:
        return _product(y, ct, transpose_y, True, x)
    return _product(ct, y, False, not transpose_y, x)


def _matmul_y(ct: Value, out: Value, x: Value, y: Value, transpose_x: bool, transpose_y: bool,
              out_dtype: Any) -> Value:
    if y.rank == 2 and x.rank > 2 and not transpose_x:
        # A weight shared by a batch: sum over the batch inside one tall product, not after many.
        x, ct = _flat_rows(x), _flat_rows(ct)
    if transpose_y:
        return _product(ct, x, True, transpose_x, y)
    return _product(x, ct, not transpose_x, False, y)


def _flat_rows(x: Value) -> Value:
    """(batch..., rows, columns) -> (batch * rows, columns)."""
    return emit("reshape", x, shape=(math.prod(x.shape[:-1]), x.shape[-1]))


vjp("matmul", _matmul_x, _matmul_y)
