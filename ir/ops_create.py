"""Ops without data operands: constants, counters, random bits.

Random numbers come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a pure function of key and counter, so that a rerun, a recomputed activation and a resumed run draw the same.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .ops_common import (
    REQUIRED,
    TensorType,
    as_dtype,
    check_axis,
    check_compute,
    check_dtype_attr,
    check_shape_attr,
    define,
    fail_attr,
    fail_dtype,
    fail_shape,
    per_element,
)


def constant_infer(value: Any) -> TensorType:
    if not isinstance(value, np.ndarray):
        fail_attr(f"value is a {type(value).__name__}; expected a NumPy array")
    return TensorType(value.shape, as_dtype(value.dtype))


define("constant", "", constant_infer, lambda value: value, "An array known when compiling.",
       attrs={"value": REQUIRED}, traits=["constant"], undifferentiable="no operands")


def iota_infer(shape: Any, axis: Any, dtype: Any) -> TensorType:
    result = TensorType(check_shape_attr(shape), check_dtype_attr(dtype))
    check_axis(axis, result.rank)
    check_compute(result)
    if result.dtype.is_bool:
        fail_dtype("counts in an integer or floating-point dtype, not bool")
    return result


def iota_reference(shape: Any, axis: Any, dtype: Any) -> Any:
    column = np.arange(shape[axis]).astype(as_dtype(dtype).np)
    return np.broadcast_to(column.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape).copy()


define("iota", "", iota_infer, iota_reference, "0, 1, 2... along an axis.",
       attrs={"shape": REQUIRED, "axis": 0, "dtype": REQUIRED}, traits=["constant"], undifferentiable="no operands")

# Random bits -----------------------------------------------------------------------------------------------------

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
MASK = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox on four counter words and two key words, each an array of u64 below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * np.uint64(PHILOX_MULTIPLIERS[0]), c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & MASK, (p0 >> HALF) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + np.uint64(PHILOX_WEYL[0])) & MASK, (k1 + np.uint64(PHILOX_WEYL[1])) & MASK
    return c0, c1, c2, c3


def random_bits_infer(state: TensorType, offset: Any, shape: Any) -> TensorType:
    if state.dtype != "uint64":
        fail_dtype(f"the state is u64[2] (key, counter), got {state}")
    if state.shape != (2,):
        fail_shape(f"the state is u64[2] (key, counter), got {state}")
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**63:
        fail_attr(f"offset is {offset!r}; expected an int in [0, 2**63)")
    return TensorType(check_shape_attr(shape), as_dtype("uint32"))


def random_bits_reference(state: Any, offset: Any, shape: Any) -> Any:
    """Word i % 4 of the block at counter state[1] + offset + i // 4 is element i (row-major)."""
    size = math.prod(shape)
    block = np.arange((size + 3) // 4, dtype=np.uint64) + state[1] + np.uint64(offset)
    zero = np.zeros_like(block)
    words = philox4x32((block & MASK, block >> HALF, zero, zero), (state[0] & MASK, state[0] >> HALF))
    return np.stack(words, axis=-1).reshape(-1)[:size].reshape(shape).astype(np.uint32)


define("random_bits", "state", random_bits_infer, random_bits_reference,
       "Uniform 32-bit words: Philox4x32-10 with key state[0] and the 64-bit counter state[1] + offset + i // 4 "
       "(upper half 0); element i is word i % 4.", attrs={"offset": 0, "shape": REQUIRED}, traits=["random"],
       flops=per_element(20), undifferentiable="random integers")
