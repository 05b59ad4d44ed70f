"""Gather, scatter, sort: ops that move elements to or from places that data decides.

An index outside its axis (a negative one too) is clamped by the gathers and dropped by the scatters, so that no
program reads or writes out of bounds. The frontend turns Python's negative indices into positive ones.
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
    check_flag,
    check_index,
    check_ints,
    check_same_dtype,
    define,
    f32,
    fail_attr,
    fail_shape,
    in_f32,
    is_narrow,
    listing,
    per_element,
    same_size,
    shape_text,
)

INT64 = as_dtype("int64")


def _gather_bytes(node: Any) -> Any:
    """Only the elements that are looked up are read."""
    return 2 * node.results[0].type.nbytes + sum(v.type.nbytes for v in node.operands[1:])


def _check_equal_shapes(got: TensorType, expected: Any, what: str) -> None:
    if got.rank != len(expected) or not all(map(same_size, got.shape, expected)):
        fail_shape(f"{what} has the type {got}; expected the shape {shape_text(expected)}")


def _check_not_empty(size: Any, x: TensorType, indices: TensorType) -> None:
    if size == 0 and indices.size != 0:
        fail_shape(f"cannot take the elements {indices} of {x}: the axis is empty")


def add_rows(x: Any, index: Any, updates: Any) -> Any:
    """x (n, width) with row i of updates (m, width) added to row index[i]; rows outside are dropped."""
    out = x.copy()
    inside = (index >= 0) & (index < len(x))
    index, updates = index[inside], updates[inside]
    if index.size and updates.size:
        order = np.argsort(index, kind="stable")
        index = index[order]
        first = np.flatnonzero(np.concatenate([[True], index[1:] != index[:-1]]))
        out[index[first]] += np.add.reduceat(updates[order], first, axis=0)
    return out


@in_f32
def _scatter_rows(x: Any, updates: Any, index: Any = None) -> Any:
    """`add_rows` on arrays of any rank: the leading axes of x are flattened into rows, as `index` counts them."""
    width = math.prod(updates.shape[index.ndim:])
    rows = math.prod(x.shape) // width if width else 0
    flat = add_rows(x.reshape(rows, width), index.reshape(-1), updates.reshape(index.size, width))
    return flat.reshape(x.shape)


# One axis --------------------------------------------------------------------------------------------------------

def take_shape(x: TensorType, indices: TensorType, axis: int) -> tuple[Any, ...]:
    return (*x.shape[:axis], *indices.shape, *x.shape[axis + 1:])


def take_infer(x: TensorType, indices: TensorType, axis: Any) -> TensorType:
    check_index(indices)
    check_axis(axis, x.rank)
    _check_not_empty(x.shape[axis], x, indices)
    return x.with_shape(take_shape(x, indices, axis))


def clamped(indices: Any, size: int) -> Any:
    return np.clip(indices.astype(np.int64), 0, max(size - 1, 0))


def take_reference(x: Any, indices: Any, axis: Any) -> Any:
    if not indices.size:
        return np.empty((*x.shape[:axis], *indices.shape, *x.shape[axis + 1:]), x.dtype)
    return np.take(x, clamped(indices, x.shape[axis]), axis)


define("take", "x indices", take_infer, take_reference, "Slices of x along an axis, in the order of an array of "
       "indices: embedding lookup.", attrs={"axis": 0}, nbytes=_gather_bytes)


def scatter_add_infer(x: TensorType, indices: TensorType, updates: TensorType, axis: Any) -> TensorType:
    check_index(indices)
    check_compute(x)
    check_same_dtype(x, updates)
    check_axis(axis, x.rank)
    _check_equal_shapes(updates, take_shape(x, indices, axis), f"updates of {listing(x, indices)} along axis {axis}")
    return x


def scatter_add_reference(x: Any, indices: Any, updates: Any, axis: Any) -> Any:
    index = indices.astype(np.int64)
    lead = tuple(range(axis, axis + index.ndim))
    rows = np.moveaxis(updates, lead, tuple(range(index.ndim)))
    return np.moveaxis(_scatter_rows(np.moveaxis(x, axis, 0), rows, index=index), 0, axis)


define("scatter_add", "x indices updates", scatter_add_infer, scatter_add_reference,
       "x with slices of updates added along an axis at indices; repeated indices add up. Transpose of take.",
       attrs={"axis": 0}, flops=lambda node: node.operands[2].type.size)


# One index for each element --------------------------------------------------------------------------------------

def _check_along(x: TensorType, indices: TensorType, axis: Any) -> None:
    check_index(indices)
    check_axis(axis, x.rank)
    if indices.rank != x.rank or any(i != axis and not same_size(a, b)
                                     for i, (a, b) in enumerate(zip(x.shape, indices.shape))):
        fail_shape(f"{listing(x, indices)} must agree in every axis but {axis}")


def take_along_axis_infer(x: TensorType, indices: TensorType, axis: Any) -> TensorType:
    _check_along(x, indices, axis)
    _check_not_empty(x.shape[axis], x, indices)
    return x.with_shape(indices.shape)


def take_along_axis_reference(x: Any, indices: Any, axis: Any) -> Any:
    if not indices.size:
        return np.empty(indices.shape, x.dtype)
    return np.take_along_axis(x, clamped(indices, x.shape[axis]), axis)


define("take_along_axis", "x indices", take_along_axis_infer, take_along_axis_reference,
       "Element by element: the element of x at indices along an axis, and at its own place along the others.",
       attrs={"axis": REQUIRED}, nbytes=_gather_bytes)


def scatter_add_along_axis_infer(x: TensorType, indices: TensorType, updates: TensorType, axis: Any) -> TensorType:
    _check_along(x, indices, axis)
    check_compute(x)
    check_same_dtype(x, updates)
    _check_equal_shapes(updates, indices.shape, f"updates at {indices}")
    return x


def scatter_add_along_axis_reference(x: Any, indices: Any, updates: Any, axis: Any) -> Any:
    index = indices.astype(np.int64)
    strides = [math.prod(x.shape[i + 1:]) for i in range(x.ndim)]
    flat = sum((p * s for i, (p, s) in enumerate(zip(np.indices(index.shape, sparse=True), strides)) if i != axis),
               index * strides[axis])
    inside = (index >= 0) & (index < x.shape[axis])
    return _scatter_rows(x, updates, index=np.where(inside, flat, -1))


define("scatter_add_along_axis", "x indices updates", scatter_add_along_axis_infer, scatter_add_along_axis_reference,
       "x with updates added element by element at indices along an axis. Transpose of take_along_axis.",
       attrs={"axis": REQUIRED}, flops=lambda node: node.operands[2].type.size)


# Index vectors ---------------------------------------------------------------------------------------------------

def gather_nd_shape(x: TensorType, indices: TensorType) -> tuple[Any, ...]:
    """indices (..., k) with k <= rank of x: its last axis addresses the first k axes of x."""
    check_index(indices)
    depth = indices.shape[-1] if indices.rank else None
    if not isinstance(depth, int) or not 1 <= depth <= x.rank:
        fail_shape(f"the last axis of the indices {indices} holds an index vector; expected 1 to {x.rank} entries "
                   f"for {x}")
    return (*indices.shape[:-1], *x.shape[depth:])


def gather_nd_infer(x: TensorType, indices: TensorType) -> TensorType:
    shape = gather_nd_shape(x, indices)
    for size in x.shape[:indices.shape[-1]]:
        _check_not_empty(size, x, indices)
    return x.with_shape(shape)


def gather_nd_reference(x: Any, indices: Any) -> Any:
    depth = indices.shape[-1]
    if not indices.size:
        return np.empty((*indices.shape[:-1], *x.shape[depth:]), x.dtype)
    return x[tuple(clamped(indices[..., i], x.shape[i]) for i in range(depth))]


define("gather_nd", "x indices", gather_nd_infer, gather_nd_reference,
       "Slices x[i_1, ..., i_k] for the index vectors in the last axis of indices.", nbytes=_gather_bytes)


def scatter_nd_infer(x: TensorType, indices: TensorType, updates: TensorType) -> TensorType:
    check_same_dtype(x, updates)
    _check_equal_shapes(updates, gather_nd_shape(x, indices), f"updates of {listing(x, indices)}")
    return x


def scatter_add_nd_infer(x: TensorType, indices: TensorType, updates: TensorType) -> TensorType:
    check_compute(x)
    return scatter_nd_infer(x, indices, updates)


def _flat_rows(x: Any, indices: Any) -> Any:
    """Row numbers of index vectors in x with its first k axes flattened; -1 outside."""
    depth = indices.shape[-1]
    index = indices.astype(np.int64)
    inside = ((index >= 0) & (index < np.array(x.shape[:depth]))).all(-1)
    strides = np.array([math.prod(x.shape[i + 1:depth]) for i in range(depth)], np.int64)
    return np.where(inside, index @ strides, -1)


def scatter_add_nd_reference(x: Any, indices: Any, updates: Any) -> Any:
    return _scatter_rows(x, updates, index=_flat_rows(x, indices))


def scatter_nd_reference(x: Any, indices: Any, updates: Any) -> Any:
    rows = math.prod(x.shape[:indices.shape[-1]])
    index = _flat_rows(x, indices).reshape(-1)
    if not updates.size or not rows:
        return x.copy()
    out = x.copy().reshape(rows, -1)
    out[index[index >= 0]] = updates.reshape(index.size, -1)[index >= 0]
    return out.reshape(x.shape)


define("scatter_add_nd", "x indices updates", scatter_add_nd_infer, scatter_add_nd_reference,
       "x with updates added to the slices x[i_1, ..., i_k]; repeated indices add up. Transpose of gather_nd.",
       flops=lambda node: node.operands[2].type.size)
define("scatter_nd", "x indices updates", scatter_nd_infer, scatter_nd_reference,
       "x with the slices x[i_1, ..., i_k] replaced by updates; of repeated indices the last wins.")


# Blocks at a run-time place --------------------------------------------------------------------------------------

def _check_starts(x: TensorType, starts: tuple[TensorType, ...]) -> None:
    check_index(*starts)
    if len(starts) != x.rank or any(s.rank for s in starts):
        fail_shape(f"{x} needs {x.rank} scalar starts, got {listing(*starts) or 'none'}")


def _check_block(x: TensorType, shape: Any, what: str) -> None:
    if len(shape) != x.rank or any(isinstance(a, int) and isinstance(b, int) and a > b
                                   for a, b in zip(shape, x.shape)):
        fail_shape(f"{what} {shape_text(shape)} does not fit into {x}")


def dynamic_slice_infer(x: TensorType, *starts: TensorType, sizes: Any) -> TensorType:
    _check_starts(x, starts)
    check_ints("sizes", sizes, x.rank, least=0)
    _check_block(x, sizes, "a block of the shape")
    return x.with_shape(sizes)


def _block(x: Any, starts: Any, sizes: Any) -> tuple[slice, ...]:
    first = [min(max(int(s), 0), n - size) for s, n, size in zip(starts, x.shape, sizes)]
    return tuple(slice(s, s + size) for s, size in zip(first, sizes))


define("dynamic_slice", "x *starts", dynamic_slice_infer, lambda x, *starts, sizes: x[_block(x, starts, sizes)].copy(),
       "The block of x of a fixed size at a run-time place, which is clamped so that the block lies inside.",
       attrs={"sizes": REQUIRED}, nbytes=lambda node: 2 * node.result.type.nbytes)


def dynamic_update_slice_infer(x: TensorType, update: TensorType, *starts: TensorType) -> TensorType:
    _check_starts(x, starts)
    check_same_dtype(x, update)
    _check_block(x, update.shape, "an update of the shape")
    return x


def dynamic_update_slice_reference(x: Any, update: Any, *starts: Any) -> Any:
    out = x.copy()
    out[_block(x, starts, update.shape)] = update
    return out


define("dynamic_update_slice", "x update *starts", dynamic_update_slice_infer, dynamic_update_slice_reference,
       "x with a block at a run-time place replaced; the place is clamped so that the block lies inside.")


# One-hot and order -----------------------------------------------------------------------------------------------

def one_hot_infer(indices: TensorType, depth: Any, dtype: Any) -> TensorType:
    check_index(indices)
    check_ints("(depth,)", (depth,), 1, least=0)
    return TensorType((*indices.shape, depth), check_dtype_attr(dtype))


def one_hot_reference(indices: Any, depth: Any, dtype: Any) -> Any:
    return (indices[..., None] == np.arange(depth)).astype(as_dtype(dtype).np)


define("one_hot", "indices", one_hot_infer, one_hot_reference, "1 at the index along a new last axis of size depth, "
       "0 elsewhere; an index outside gives zeros.", attrs={"depth": REQUIRED, "dtype": REQUIRED},
       flops=per_element(), undifferentiable="integer operand")


def order(x: Any, axis: int, descending: bool) -> Any:
    """Indices that sort x along an axis, stably. NaN counts as the largest value."""
    key = x.astype(f32) if is_narrow(x.dtype) else x
    if not descending:
        return np.argsort(key, axis=axis, kind="stable")
    backwards = np.argsort(np.flip(key, axis), axis=axis, kind="stable")
    return x.shape[axis] - 1 - np.flip(backwards, axis)


def sort_infer(x: TensorType, axis: Any, descending: Any) -> tuple[TensorType, ...]:
    check_compute(x)
    check_axis(axis, x.rank)
    check_flag(descending=descending)
    return x, x.with_dtype(INT64)


def sort_reference(x: Any, axis: Any, descending: Any) -> Any:
    index = order(x, axis, descending).astype(np.int64)
    return np.take_along_axis(x, index, axis), index


def _sort_flops(node: Any) -> Any:
    size = node.operands[0].shape[node.attrs["axis"]]
    return node.operands[0].type.size * (max(size, 2).bit_length() if isinstance(size, int) else 10)


define("sort", "x", sort_infer, sort_reference, "(values, i64 indices) of x in order along an axis. Stable: equal "
       "values keep their order. NaN counts as the largest value.", attrs={"axis": REQUIRED, "descending": False},
       flops=_sort_flops)


def top_k_infer(x: TensorType, k: Any, axis: Any, largest: Any) -> tuple[TensorType, ...]:
    check_compute(x)
    check_axis(axis, x.rank)
    check_flag(largest=largest)
    check_ints("(k,)", (k,), 1, least=0)
    size = x.shape[axis]
    if isinstance(size, int) and k > size:
        fail_attr(f"k is {k}, but axis {axis} of {x} has {size} elements")
    shape = (*x.shape[:axis], k, *x.shape[axis + 1:])
    return x.with_shape(shape), TensorType(shape, INT64)


def top_k_reference(x: Any, k: Any, axis: Any, largest: Any) -> Any:
    index = np.take(order(x, axis, largest), np.arange(k), axis).astype(np.int64)
    return np.take_along_axis(x, index, axis), index


define("top_k", "x", top_k_infer, top_k_reference, "(values, i64 indices) of the k largest or smallest along an axis, "
       "best first; the first of equals comes first. NaN counts as the largest value.",
       attrs={"k": REQUIRED, "axis": REQUIRED, "largest": True}, flops=_sort_flops)
