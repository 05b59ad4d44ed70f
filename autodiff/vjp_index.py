"""Derivatives of gathers, scatters and sorting.

A gather and the scatter that adds are each other's transposes. They differ at an index outside its axis, which a
gather clamps and a scatter drops: so the transpose of a gather clamps first, and the transpose of a scatter gives
zeros there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..ir.context import emit
from ..ir.dtypes import int32
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from ..ir.types import TensorType
from .reverse import Cotangents, filled, vjp, zeros_like
from .vjp_elementwise import compare, where


def clamped(indices: Value, size: Any) -> Value:
    """Indices as a gather along an axis of this size reads them."""
    most = int(np.iinfo(indices.dtype.np).max)
    return emit("clip", indices, lo=0, hi=max(min(size - 1, most), 0) if isinstance(size, int) else None)


def inside(indices: Value, size: Any) -> Value:
    """Whether a scatter along an axis of this size keeps an index."""
    positive = compare("ge", indices, 0)
    if not isinstance(size, int) or size > np.iinfo(indices.dtype.np).max:
        return positive
    return emit("logical_and", positive, compare("lt", indices, size))


# --- along one axis --------------------------------------------------------------------------------------


def _take(ct: Value, out: Value, x: Value, indices: Value, axis: int) -> Value:
    return emit("scatter_add", zeros_like(x), clamped(indices, x.shape[axis]), ct, axis=axis)


def _scatter_add(ct: Value, out: Value, x: Value, indices: Value, updates: Value, axis: int) -> Value:
    after = updates.rank - axis - indices.rank
    mask = emit("reshape", inside(indices, x.shape[axis]), shape=(*indices.shape, *(1,) * after))
    return where(mask, emit("take", ct, indices, axis=axis), 0.0)


def _take_along(ct: Value, out: Value, x: Value, indices: Value, axis: int) -> Value:
    return emit("scatter_add_along_axis", zeros_like(x), clamped(indices, x.shape[axis]), ct, axis=axis)


def _scatter_add_along(ct: Value, out: Value, x: Value, indices: Value, updates: Value, axis: int) -> Value:
    return where(inside(indices, x.shape[axis]), emit("take_along_axis", ct, indices, axis=axis), 0.0)


def _passed(ct: Value, *rest: Value, **attrs: Any) -> Value:
    return ct


vjp("take", _take, None)
vjp("scatter_add", _passed, None, _scatter_add)
vjp("take_along_axis", _take_along, None)
vjp("scatter_add_along_axis", _passed, None, _scatter_add_along)

# --- index vectors ---------------------------------------------------------------------------------------


def _bounds(x: Value, indices: Value) -> Value:
    """The largest index along each of the axes that the index vectors address, in their dtype."""
    most = np.iinfo(indices.dtype.np).max
    sizes = x.shape[:indices.shape[-1]]
    last = [min(s - 1, most) if isinstance(s, int) else most for s in sizes]
    return emit("constant", value=np.asarray(last, indices.dtype.np))


def _gather_nd(ct: Value, out: Value, x: Value, indices: Value) -> Value:
    clamped = emit("minimum", emit("clip", indices, lo=0, hi=None), _bounds(x, indices))
    return emit("scatter_add_nd", zeros_like(x), clamped, ct)


def _scatter_add_nd(ct: Value, out: Value, x: Value, indices: Value, updates: Value) -> Value:
    kept = emit("logical_and", compare("ge", indices, 0), emit("le", indices, _bounds(x, indices)))
    mask = emit("reduce_all", kept, axes=(indices.rank - 1,), keepdims=False)
    return where(_over_rows(mask, updates), emit("gather_nd", ct, indices), 0.0)


def _over_rows(mask: Value, updates: Value) -> Value:
    """A mask over index vectors in the rank of the updates, one for each row of these."""
    return emit("reshape", mask, shape=(*mask.shape, *(1,) * (updates.rank - mask.rank)))


def _scatter_nd_x(ct: Value, out: Value, x: Value, indices: Value, updates: Value) -> Value:
    return emit("scatter_nd", ct, indices, zeros_like(updates))


def _scatter_nd_updates(ct: Value, out: Value, x: Value, indices: Value, updates: Value) -> Value:
    """Only the update that was kept has a gradient: each leaves its number, and the one that finds its own has won."""
    rows = indices.shape[:-1]
    numbers = emit("reshape", emit("iota", shape=(math.prod(rows),), axis=0, dtype=int32), shape=rows)
    board = filled(TensorType(x.shape[:indices.shape[-1]], int32), -1)
    left = emit("gather_nd", emit("scatter_nd", board, indices, numbers), indices)
    return where(_over_rows(emit("eq", left, numbers), updates), emit("gather_nd", ct, indices), 0.0)


vjp("gather_nd", _gather_nd, None)
vjp("scatter_add_nd", _passed, None, _scatter_add_nd)
vjp("scatter_nd", _scatter_nd_x, None, _scatter_nd_updates)

# --- blocks at a run-time place --------------------------------------------------------------------------


def _dynamic_slice(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    (ct,), (x, *starts) = cotangents, node.operands
    if ct is None:
        return [None] * len(node.operands)
    return [emit("dynamic_update_slice", zeros_like(x), ct, *starts), *[None] * len(starts)]


def _dynamic_update_slice(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    (ct,), (_, update, *starts) = cotangents, node.operands
    grads: list[Value | None] = [None] * len(node.operands)
    if ct is not None and needed[0]:
        grads[0] = emit("dynamic_update_slice", ct, zeros_like(update), *starts)
    if ct is not None and needed[1]:
        grads[1] = emit("dynamic_slice", ct, *starts, sizes=update.shape)
    return grads


fill("vjp", "dynamic_slice", _dynamic_slice)
fill("vjp", "dynamic_update_slice", _dynamic_update_slice)

# --- order -----------------------------------------------------------------------------------------------


def _ordered(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    """sort and top_k read x at the indices they return: their rule is that of take_along_axis."""
    (x,), (_, indices), (ct, _) = node.operands, node.results, cotangents
    if ct is None:
        return [None]
    return [emit("scatter_add_along_axis", zeros_like(x), indices, ct, axis=node.attrs["axis"])]


fill("vjp", "sort", _ordered)
fill("vjp", "top_k", _ordered)
