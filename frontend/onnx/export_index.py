"""Export of gathers, scatters, blocks at a run-time place, one-hot and sorting.

An index outside its axis is clamped by Treadle's gathers and dropped by its scatters; in ONNX it is an error. The graph
computes the clamped index where it might be outside: not for one that is in range by what made it (a constant, argmax,
the order of a sort...), and not for an index that the caller passes in, where an error is the better answer. The option
`clamp` of `save` decides for all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.dims import Dim, Size
from ...ir.graph import Node, Value
from ...ir.phases import names_in
from .export_math import both
from .export_ranges import MOVES, wrapped
from .export_rules import exports
from .export_shape import (
    counting,
    expand,
    filled,
    reshape,
    scalar_size,
    squeeze,
    take_slice,
    transpose,
    unsqueeze,
)
from .export_writer import INT64, Ref, Writer


def trusted(out: Writer, index: Value, size: Size, negative: bool = False) -> bool:
    """Whether an index needs no clamping; with `negative` it may count from the end."""
    if out.model.clamp is not None:
        return not out.model.clamp
    return out.model.known.within(index, size, negative)


def unwrapped(out: Writer, index: Value, size: Size) -> Ref | None:
    """The index before negative ones were counted from the end, which ONNX's gathers do themselves; None if it was
    computed in another way, or may lie outside."""
    found = wrapped(index, size)
    if found is not None:
        return out.refs[found] if found in out.refs and trusted(out, found, size, negative=True) else None
    node = index.producer
    if node is None or node.op.name not in MOVES:
        return None
    inner = unwrapped(out, node.operands[0], size)
    if inner is None:
        return None
    return node.op.slots["onnx"](out, node, inner)


def as_index(out: Writer, ref: Ref) -> Ref:
    """The index in a dtype that ONNX takes."""
    return ref if ref.dtype in ("int64", "int32") else out.cast(ref, INT64)


def inside(out: Writer, ref: Ref, size: Size) -> Ref:
    """The index clamped into an axis."""
    if ref.dtype == "uint64":  # the upper half of them would be negative
        limit = out.cast(scalar_size(out, size), "uint64")
        ref = out.op("Min", ref, limit)
    ref = as_index(out, ref)
    last = out.op("Sub", scalar_size(out, size), out.const(np.int64(1))) if isinstance(size, Dim) \
        else out.const(np.int64(max(size - 1, 0)))
    if out.opset >= 12:
        made = out.op("Clip", ref, out.like(0, ref), out.cast(last, ref.dtype))
    else:
        wide = out.cast(ref, INT64)
        low = out.op("Where", both(out, "Less", wide, 0), out.like(0, wide), wide)
        made = out.op("Where", out.op("Less", last, low), last, low)
    return made


def gather_index(out: Writer, value: Value, ref: Ref, size: Size) -> Ref:
    """The index of a gather."""
    origin = unwrapped(out, value, size)
    if origin is not None:
        return as_index(out, origin)
    return as_index(out, ref) if trusted(out, value, size) else inside(out, ref, size)


def empty(out: Writer, node: Node) -> Ref | None:
    """The result of a gather that takes nothing, at once."""
    shape = node.result.shape
    return filled(out, 0, shape, node.result.dtype) if 0 in shape else None


@exports("true_places")
def true_places(out: Writer, node: Node, mask: Ref) -> Ref:
    size, places = node.attrs["size"], squeeze(out, out.op("NonZero", mask), [0])
    if out.model.counted.keys() & names_in(size):  # it is their number
        return places
    padded = out.op("Concat", places, filled(out, 0, (size,), INT64), axis=0)
    return take_slice(out, padded, [0], out.ints(0), out.size(size))


def gather_rule(name: str, kind: str) -> None:
    """The gathers along an axis: of whole slices, and element by element."""
    @exports(name)
    def rule(out: Writer, node: Node, x: Ref, index: Ref) -> Ref:
        axis = node.attrs["axis"]
        nothing = empty(out, node)
        if nothing is not None:
            return nothing
        size = node.operands[0].shape[axis]
        return out.op(kind, x, gather_index(out, node.operands[1], index, size), axis=axis)


gather_rule("take", "Gather")
gather_rule("take_along_axis", "GatherElements")


def sizes_vector(out: Writer, sizes: Sequence[Size], less: int = 0) -> Ref:
    """Sizes of axes as an int64 vector, less a number."""
    if not any(isinstance(s, Dim) for s in sizes):
        return out.ints(*(max(int(s) - less, 0) for s in sizes))
    vector = out.shape(sizes)
    return both(out, "Sub", vector, less) if less else vector


@exports("gather_nd")
def gather_nd(out: Writer, node: Node, x: Ref, index: Ref) -> Ref:
    nothing = empty(out, node)
    if nothing is not None:
        return nothing
    index = out.cast(index, INT64)
    depth = node.operands[1].shape[-1]
    sizes = node.operands[0].shape[:depth]
    if not all(trusted(out, node.operands[1], s) for s in sizes):
        index = out.op("Max", index, out.like(0, index)) if out.opset >= 12 else \
            out.op("Where", both(out, "Less", index, 0), out.like(0, index), index)
        last = sizes_vector(out, sizes, 1)
        index = out.op("Where", out.op("Less", last, index), last, index)
    return out.op("GatherND", x, index)


# Scatters --------------------------------------------------------------------------------------------------------

def scatter_rows(out: Writer, x: Ref, shape: Sequence[Size], index: Ref, index_shape: Sequence[Size], updates: Ref,
                 add: bool, dropped: bool) -> Ref:
    """x (rows, *rest) with updates (*index_shape, *rest) added to, or put into, the rows of an int64 index.

    With `dropped` the index may lie outside; it then names one more row, which is cut off again.
    """
    rest = tuple(shape[1:])
    count: Size = math.prod(index_shape)
    flat = reshape(out, index, index_shape, (count,))
    updates = reshape(out, updates, (*index_shape, *rest), (count, *rest))
    if dropped:
        rows = scalar_size(out, shape[0])
        lost = out.op("Or", both(out, "Less", flat, 0), out.op("Not", out.op("Less", flat, rows)))
        flat = out.op("Where", lost, rows, flat)
        x = out.op("Concat", x, filled(out, 0, (1, *rest), x.dtype), axis=0)
    column = reshape(out, flat, (count,), (count, *(1,) * len(rest)))
    column = expand(out, column, (count, *(1,) * len(rest)), (count, *rest))
    made = scatter_elements(out, x, column, updates, 0, add)
    return take_slice(out, made, [0], out.ints(0), out.size(shape[0])) if dropped else made


def scatter_elements(out: Writer, x: Ref, index: Ref, updates: Ref, axis: int, add: bool) -> Ref:
    """ScatterElements, which runs in order, so the last of repeated indices wins."""
    if add:
        out.needs(16, "adding at indices (the gradient of a lookup)")
        dtype = x.dtype
        if not dtype.is_float and dtype.bits < 32:
            x, updates = out.cast(x, "int32"), out.cast(updates, "int32")
        made = out.op("ScatterElements", x, index, updates, axis=axis, reduction="add")
        return out.cast(made, dtype)
    made = out.op("ScatterElements", x, index, updates, axis=axis)
    return made


def widened(out: Writer, *refs: Ref) -> tuple[Ref, ...]:
    """16-bit floats as f32: sums are rounded once."""
    return tuple(out.cast(r, "float32") if r.dtype.is_float and r.dtype.bits < 32 else r for r in refs)


@exports("scatter_add")
def scatter_add(out: Writer, node: Node, x: Ref, index: Ref, updates: Ref) -> Ref:
    operand, indices, given = node.operands
    axis, dtype = node.attrs["axis"], x.dtype
    if 0 in operand.shape or 0 in given.shape:
        return x
    x, updates = widened(out, x, updates)
    rank, width = operand.rank, indices.rank
    front = [axis, *(i for i in range(rank) if i != axis)]
    lead = list(range(axis, axis + width))
    shape = tuple(operand.shape[i] for i in front)
    rows = transpose(out, updates, [*lead, *(i for i in range(given.rank) if i not in lead)])
    loose = not trusted(out, indices, operand.shape[axis])
    made = scatter_rows(out, transpose(out, x, front), shape, out.cast(index, INT64), indices.shape, rows, True, loose)
    return out.cast(transpose(out, made, [front.index(i) for i in range(rank)]), dtype)


@exports("scatter_add_along_axis")
def scatter_add_along_axis(out: Writer, node: Node, x: Ref, index: Ref, updates: Ref) -> Ref:
    operand, indices, given = node.operands
    axis, dtype = node.attrs["axis"], x.dtype
    if 0 in operand.shape or 0 in given.shape:
        return x
    x, updates = widened(out, x, updates)
    size = operand.shape[axis]
    if trusted(out, indices, size):
        return out.cast(scatter_elements(out, x, as_index(out, index), updates, axis, True), dtype)
    index = out.cast(index, INT64)
    place = inside(out, index, size)
    updates = out.op("Where", out.op("Equal", place, index), updates, out.like(0, updates))
    return out.cast(scatter_elements(out, x, place, updates, axis, True), dtype)


def scatter_blocks(out: Writer, node: Node, x: Ref, index: Ref, updates: Ref, add: bool) -> Ref:
    """Index vectors as the numbers of rows of x with its first axes flattened; outside is row -1."""
    operand, indices, given = node.operands
    depth = indices.shape[-1]
    lead, rest = operand.shape[:depth], operand.shape[depth:]
    if 0 in operand.shape or 0 in given.shape:
        return x
    index = out.cast(index, INT64)
    strides: list[Any] = [math.prod(lead[i + 1:]) for i in range(depth)]
    flat = out.op("Mul", index, out.shape(strides)) if strides != [1] else index
    from .export_reduce import reduce
    last = indices.rank - 1
    flat = reduce(out, "ReduceSum", flat, [last], False)
    loose = not all(trusted(out, indices, s) for s in lead)
    if loose:
        low = both(out, "Less", index, 0)
        wrong = out.op("Or", low, out.op("Not", out.op("Less", index, out.shape(lead))))
        some = reduce(out, "ReduceMax", out.cast(wrong, "int32"), [last], False)
        flat = out.op("Where", out.cast(some, "bool"), out.const(np.int64(-1)), flat)
    rows: Size = math.prod(lead)
    made = scatter_rows(out, reshape(out, x, operand.shape, (rows, *rest)), (rows, *rest), flat, indices.shape[:-1],
                        updates, add, loose)
    return reshape(out, made, (rows, *rest), operand.shape)


@exports("scatter_add_nd")
def scatter_add_nd(out: Writer, node: Node, x: Ref, index: Ref, updates: Ref) -> Ref:
    dtype = x.dtype
    x, updates = widened(out, x, updates)
    return out.cast(scatter_blocks(out, node, x, index, updates, True), dtype)


@exports("scatter_nd")
def scatter_nd(out: Writer, node: Node, x: Ref, index: Ref, updates: Ref) -> Ref:
    return scatter_blocks(out, node, x, index, updates, False)


# Blocks at a run-time place --------------------------------------------------------------------------------------

def starts_vector(out: Writer, starts: Sequence[Ref], shape: Sequence[Size], sizes: Sequence[Size]) -> Ref:
    """The starts as an int64 vector, clamped so that the block lies inside."""
    columns = [unsqueeze(out, out.cast(s, INT64), [0]) for s in starts]
    vector = columns[0] if len(columns) == 1 else out.op("Concat", *columns, axis=0)
    room = sizes_vector(out, [n - s for n, s in zip(shape, sizes)])
    vector = out.op("Where", both(out, "Less", vector, 0), out.like(0, vector), vector)
    return out.op("Where", out.op("Less", room, vector), room, vector)


@exports("dynamic_slice")
def dynamic_slice(out: Writer, node: Node, x: Ref, *starts: Ref) -> Ref:
    shape, sizes = node.operands[0].shape, node.attrs["sizes"]
    if not starts:
        return x
    if 0 in sizes:
        return filled(out, 0, sizes, x.dtype)
    first = starts_vector(out, starts, shape, sizes)
    return take_slice(out, x, range(len(shape)), first, out.op("Add", first, out.shape(sizes)))


@exports("dynamic_update_slice")
def dynamic_update_slice(out: Writer, node: Node, x: Ref, update: Ref, *starts: Ref) -> Ref:
    """The update and a mask of it, padded to the shape of x."""
    shape, sizes = node.operands[0].shape, node.operands[1].shape
    if not starts:
        return update
    if 0 in sizes:
        return x
    first = starts_vector(out, starts, shape, sizes)
    after = out.op("Sub", out.op("Sub", out.shape(shape), out.shape(sizes)), first)
    pads = out.op("Concat", first, after, axis=0)
    mask = out.op("Pad", filled(out, 1, sizes, "int32"), pads)
    return out.op("Where", out.cast(mask, "bool"), out.op("Pad", update, pads), x)


# One-hot and order -----------------------------------------------------------------------------------------------

@exports("one_hot")
def one_hot(out: Writer, node: Node, index: Ref) -> Ref:
    """By comparison: OneHot would count negative indices from the end."""
    rank = node.operands[0].rank
    wide = out.cast(index, INT64)
    same = out.op("Equal", unsqueeze(out, wide, [rank]), counting(out, node.attrs["depth"]))
    return out.cast(same, node.attrs["dtype"])


def best(out: Writer, x: Ref, count: Size, axis: int, largest: bool) -> tuple[Ref, Ref]:
    """TopK: values and indices, in order."""
    return out.op("TopK", x, out.size(count), results=2, axis=axis, largest=int(largest), sorted=1)


@exports("sort")
def sort(out: Writer, node: Node, x: Ref) -> tuple[Ref, Ref]:
    axis = node.attrs["axis"]
    return best(out, x, node.operands[0].shape[axis], axis, node.attrs["descending"])


@exports("top_k")
def top_k(out: Writer, node: Node, x: Ref) -> tuple[Ref, Ref]:
    return best(out, x, node.attrs["k"], node.attrs["axis"], node.attrs["largest"])
