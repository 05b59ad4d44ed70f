"""Matrix multiplication."""

from __future__ import annotations

from typing import Any

import numpy as np

from .ops_common import (
    NARROW,
    DType,
    TensorType,
    as_dtype,
    broadcast_shapes,
    check_dtype_attr,
    check_flag,
    check_rank,
    check_same_dtype,
    define,
    fail_dtype,
    fail_shape,
    listing,
    same_size,
)


def accumulated_dtype(x: TensorType, y: TensorType, out_dtype: Any) -> DType:
    """The result dtype of a contraction: `out_dtype`, or that of the operands.

    A storage dtype (8-bit float, 4-bit integer) needs an `out_dtype` that is computed in.
    """
    check_same_dtype(x, y)
    if x.dtype.is_bool:
        fail_dtype(f"has no meaning on bool, got {listing(x, y)}; cast first, e.g. to int32")
    result = x.dtype if out_dtype is None else check_dtype_attr(out_dtype, "out_dtype")
    if result.is_bool or result.is_float != x.dtype.is_float or result.bits < max(x.dtype.bits, 8):
        fail_dtype(f"cannot give {result} for {listing(x, y)}; out_dtype is at least as wide, of the same kind"
                   + ("" if out_dtype is not None else f": set out_dtype, e.g. {wider(x.dtype)}"))
    if result in ("float8_e4m3fn", "float8_e5m2"):
        fail_dtype(f"does not accumulate in {result}; set out_dtype=float32 and cast the result")
    return result


def wider(dtype: DType) -> str:
    return "float32" if dtype.is_float else "int32"


def accumulator(dtype: np.dtype, out: np.dtype) -> np.dtype:
    """The NumPy dtype a contraction is computed in: f32 for narrower floats, the result's for the rest."""
    return np.dtype(np.float32) if dtype in NARROW and out != np.float64 else out


def matmul_infer(x: TensorType, y: TensorType, transpose_x: Any, transpose_y: Any, out_dtype: Any) -> TensorType:
    check_flag(transpose_x=transpose_x, transpose_y=transpose_y)
    check_rank(x, 2, "the first operand")
    check_rank(y, 2, "the second operand")
    dtype = accumulated_dtype(x, y, out_dtype)
    m, kx = x.shape[-2:][::-1] if transpose_x else x.shape[-2:]
    ky, n = y.shape[-2:][::-1] if transpose_y else y.shape[-2:]
    if not same_size(kx, ky):
        flags = "".join(f", {name}=True" for name, on in
                        (("transpose_x", transpose_x), ("transpose_y", transpose_y)) if on)
        fail_shape(f"the inner sizes of {listing(x, y)}{flags} differ: {kx} and {ky}")
    return TensorType((*broadcast_shapes(x.shape[:-2], y.shape[:-2]), m, n), dtype)


def matmul_reference(x: Any, y: Any, transpose_x: Any, transpose_y: Any, out_dtype: Any) -> Any:
    out = x.dtype if out_dtype is None else as_dtype(out_dtype).np
    inner = accumulator(x.dtype, out)
    x, y = x.astype(inner, copy=False), y.astype(inner, copy=False)
    product = np.matmul(np.swapaxes(x, -1, -2) if transpose_x else x, np.swapaxes(y, -1, -2) if transpose_y else y)
    return product.astype(out, copy=False)


def matmul_flops(node: Any) -> Any:
    inner = node.operands[0].shape[-2 if node.attrs["transpose_x"] else -1]
    return 2 * node.result.type.size * inner


define("matmul", "x y", matmul_infer, matmul_reference,
       "Product of the matrices in the last two axes, each transposed first if flagged; leading axes broadcast. "
       "Narrow floats accumulate in f32 and round once to `out_dtype`, by default the operands' dtype.",
       attrs={"transpose_x": False, "transpose_y": False, "out_dtype": None}, traits=["contraction"],
       flops=matmul_flops)
