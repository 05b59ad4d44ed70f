"""How gathers, scatters and sorts are split.

Along the axis that indices address, a rank has a run of rows: a gather there takes what it has and zeros for the
rest, a partial sum (the vocabulary-parallel embedding of Megatron-LM, arXiv:1909.08053, section 3); a scatter drops
what lies elsewhere, as it drops every index outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ir.context import emit
from ..ir.dtypes import int64
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .rules import Factors, Labels, Local, Shard, without

ROWS = frozenset({"rows"})


def _own_rows(ctx: Local, indices: Value, rows: int, clamp: bool) -> tuple[Value, Value]:
    """Indices counted from the rank's first row, and which of them it has."""
    index = indices if indices.dtype == int64 else emit("cast", indices, dtype=int64)
    if clamp:
        index = emit("clip", index, lo=0, hi=ctx.node.operands[0].shape[ctx.node.attrs["axis"]] - 1)
    index = index - ctx.index("rows") * rows
    first, end = (emit("constant", value=np.asarray(n, np.int64)) for n in (0, rows))
    return index, emit("logical_and", emit("ge", index, first), emit("lt", index, end))


# take, scatter_add -------------------------------------------------------------------------------------------------


def _along(node: Node) -> tuple[Labels, Labels, Labels]:
    """Labels of x, of the indices, and of what is looked up or added."""
    x, indices, axis = node.operands[0], node.operands[1], node.attrs["axis"]
    table: Labels = tuple("rows" if i == axis else ("x", i) for i in range(x.rank))
    index: Labels = tuple(("i", i) for i in range(indices.rank))
    return table, index, (*table[:axis], *index, *table[axis + 1:])


def take_factors(node: Node) -> Factors:
    table, index, found = _along(node)
    is_float = node.result.dtype.is_float
    return Factors((table, index), (found,), summed=frozenset({"rows"}), ordered=ROWS,
                   linear=(frozenset({0}),) if is_float else ())


def take_local(ctx: Local, x: Value, indices: Value) -> Any:
    axis = ctx.node.attrs["axis"]
    if "rows" not in ctx.axes:
        return ctx.emit(x, indices)
    index, inside = _own_rows(ctx, indices, x.shape[axis], clamp=True)
    (found,) = ctx.emit(x, index)
    mask = emit("reshape", inside, shape=(*(1,) * axis, *indices.shape, *(1,) * (x.rank - axis - 1)))
    return emit("where", mask, found, zero(found))


def zero(like: Value) -> Value:
    """A scalar 0 of the dtype of a value."""
    made: Value = emit("constant", value=np.zeros((), like.dtype.np))
    return made


def scatter_add_factors(node: Node) -> Factors:
    table, index, added = _along(node)
    sets = (frozenset({0, 2}),) if node.result.dtype.is_float else ()
    return Factors((table, index, added), (table,), summed=frozenset(index), addends=dict.fromkeys(index, (0,)),
                   linear=sets, ordered=ROWS)


def scatter_add_local(ctx: Local, x: Value, indices: Value, updates: Value) -> Any:
    if "rows" not in ctx.axes:
        return ctx.emit(x, indices, updates)
    index, _ = _own_rows(ctx, indices, x.shape[ctx.node.attrs["axis"]], clamp=False)
    return ctx.emit(x, index, updates)


# take_along_axis, scatter_add_along_axis ---------------------------------------------------------------------------


def _each(node: Node) -> tuple[Labels, Labels]:
    rank, axis = node.operands[0].rank, node.attrs["axis"]
    return (tuple("rows" if i == axis else i for i in range(rank)),
            tuple("picked" if i == axis else i for i in range(rank)))


def take_along_axis_factors(node: Node) -> Factors:
    table, index = _each(node)
    is_float = node.result.dtype.is_float
    return Factors((table, index), (index,), summed=frozenset({"rows"}), ordered=ROWS,
                   linear=(frozenset({0}),) if is_float else ())


def take_along_axis_local(ctx: Local, x: Value, indices: Value) -> Any:
    if "rows" not in ctx.axes:
        return ctx.emit(x, indices)
    index, inside = _own_rows(ctx, indices, x.shape[ctx.node.attrs["axis"]], clamp=True)
    (found,) = ctx.emit(x, index)
    return emit("where", inside, found, zero(found))


def scatter_add_along_axis_factors(node: Node) -> Factors:
    table, index = _each(node)
    sets = (frozenset({0, 2}),) if node.result.dtype.is_float else ()
    return Factors((table, index, index), (table,), summed=frozenset({"picked"}), addends={"picked": (0,)},
                   linear=sets, ordered=ROWS)


# The rest ----------------------------------------------------------------------------------------------------------


def one_hot_factors(node: Node) -> Factors:
    (indices,) = node.operands
    index: Labels = tuple(range(indices.rank))
    return Factors((index,), ((*index, "rows"),), ordered=ROWS)


def one_hot_local(ctx: Local, indices: Value) -> Any:
    depth = ctx.types[0].shape[-1]
    index = _own_rows(ctx, indices, depth, clamp=False)[0] if "rows" in ctx.axes else indices
    return ctx.emit(index, depth=depth)


def gather_nd_factors(node: Node) -> Factors:
    x, indices = node.operands
    depth, lead = indices.shape[-1], indices.rank - 1
    index: Labels = tuple(("i", i) for i in range(lead))
    rest: Labels = tuple(("x", i) for i in range(depth, x.rank))
    linear = (frozenset({0}),) if node.result.dtype.is_float else ()
    return Factors(((*(None,) * depth, *rest), (*index, None)), ((*index, *rest),), linear=linear)


def scatter_nd_factors(node: Node) -> Factors:
    x, indices, _ = node.operands
    depth, lead = indices.shape[-1], indices.rank - 1
    adds = node.op.name == "scatter_add_nd"
    index: Labels = tuple(("i", i) if adds else None for i in range(lead))
    rest: Labels = tuple(("x", i) for i in range(depth, x.rank))
    table: Labels = (*(None,) * depth, *rest)
    labels = [label for label in index if label is not None]
    linear = (frozenset({0, 2}),) if node.result.dtype.is_float else ()
    return Factors((table, (*index, None), (*index, *rest)), (table,), summed=frozenset(labels),
                   addends=dict.fromkeys(labels, (0,)), linear=linear)


def along_axis_factors(node: Node) -> Factors:
    """Ops that work along one axis (sort, cumsum, argmax...): whole there, split along the others."""
    (x,), axis = node.operands, node.attrs["axis"]
    labels = without(range(x.rank), axis)
    results: list[Labels] = []
    for v in node.results:
        results.append(labels if v.rank == x.rank else tuple(i for i in range(x.rank) if i != axis))
    linear = (frozenset({0}),) if node.op.name == "cumsum" and node.result.dtype.is_float else ()
    return Factors((labels,), tuple(results), linear=linear)


fill("shard", "take", Shard(take_factors, take_local))
fill("shard", "scatter_add", Shard(scatter_add_factors, scatter_add_local))
fill("shard", "take_along_axis", Shard(take_along_axis_factors, take_along_axis_local))
fill("shard", "scatter_add_along_axis", Shard(scatter_add_along_axis_factors, scatter_add_local))
fill("shard", "one_hot", Shard(one_hot_factors, one_hot_local))
fill("shard", "gather_nd", Shard(gather_nd_factors))
fill("shard", "scatter_nd", Shard(scatter_nd_factors))
fill("shard", "scatter_add_nd", Shard(scatter_nd_factors))
for _name in ("sort", "top_k", "cumsum", "cumprod", "argmax", "argmin", "softmax", "log_softmax"):
    fill("shard", _name, Shard(along_axis_factors))
