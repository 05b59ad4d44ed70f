"""Simplifications of ops that move elements: chains collapse, idle ones vanish, transposes become matmul flags."""

from __future__ import annotations

import math
from typing import Any

from .builder import emit
from .graph import Node, Value
from .simplify_match import Rule, fill_like, made_by, spread, uniform


def source_of(value: Value, name: str) -> Value | None:
    """x, if the value is `name(x)`."""
    return value.producer.operands[0] if value.producer and made_by(value, name) else None


def attrs_of(value: Value) -> dict[str, Any]:
    assert value.producer is not None
    return value.producer.attrs


def idle(node: Node) -> Value | None:
    """A view that leaves its operand as it is."""
    (x,), attrs = node.operands, node.attrs
    unchanged = {
        "reshape": lambda: attrs["shape"] == x.shape,
        "broadcast_to": lambda: attrs["shape"] == x.shape,
        "transpose": lambda: attrs["perm"] == tuple(range(x.rank)),
        "reverse": lambda: all(x.shape[a] == 1 for a in attrs["axes"]),
        "slice": lambda: not any(attrs["starts"]) and attrs["limits"] == x.shape and set(attrs["strides"]) <= {1},
        "pad": lambda: not any((*attrs["low"], *attrs["high"], *attrs["interior"])),
    }
    return x if unchanged[node.op.name]() else None


def of_uniform(node: Node) -> Value | None:
    """Equal elements stay equal wherever they are moved."""
    (x,) = node.operands
    value = uniform(x)
    if value is None or (node.op.name == "broadcast_to" and x.rank == 0):
        return None
    return fill_like(value, node)


def chain(node: Node) -> Value | None:
    """Two reshapes, broadcasts or transposes in a row are one."""
    (x,) = node.operands
    source = source_of(x, node.op.name)
    if source is None:
        return None
    if node.op.name == "transpose":
        return emit("transpose", source, perm=tuple(attrs_of(x)["perm"][p] for p in node.attrs["perm"]))
    return emit(node.op.name, source, **node.attrs)


def cast_of_view(node: Node) -> Value | None:
    """Data moves in the narrower dtype: a narrowing cast goes before a view..."""
    (x,), dtype = node.operands, node.attrs["dtype"]
    view = x.producer
    if not view or view.op.name not in WHOLE_VIEWS or dtype.bits >= x.dtype.bits:
        return None
    return emit(view.op.name, emit("cast", view.operands[0], dtype=dtype), **view.attrs)


def view_of_cast(node: Node) -> Value | None:
    """... and a widening one after it."""
    (x,) = node.operands
    source = source_of(x, "cast")
    if source is None or source.dtype.bits >= x.dtype.bits:
        return None
    return emit("cast", emit(node.op.name, source, **node.attrs), dtype=x.dtype)


def reverse_twice(node: Node) -> Value | None:
    (x,) = node.operands
    source = source_of(x, "reverse")
    if source is None:
        return None
    return emit("reverse", source, axes=tuple(sorted(set(attrs_of(x)["axes"]) ^ set(node.attrs["axes"]))))


def transpose_units(node: Node) -> Value | None:
    """A transpose that keeps the order of all axes longer than 1 is a reshape: nothing moves in memory."""
    (x,), perm = node.operands, node.attrs["perm"]
    long = [p for p in perm if x.shape[p] != 1]
    return emit("reshape", x, shape=node.result.shape) if long == sorted(long) else None


def broadcast_reshaped(node: Node) -> Value | None:
    """A reshape that only adds leading axes of size 1 is part of the broadcast."""
    (x,) = node.operands
    source = source_of(x, "reshape")
    if source is None or x.shape != (1,) * (x.rank - source.rank) + source.shape:
        return None
    return emit("broadcast_to", source, shape=node.attrs["shape"])


# --- slices ----------------------------------------------------------------------------------------------


def slice_slice(node: Node) -> Value | None:
    """Of forward slices."""
    (x,), outer = node.operands, node.attrs
    source = source_of(x, "slice")
    if source is None or node.result.type.size == 0:
        return None
    inner = attrs_of(x)
    if min((*inner["strides"], *outer["strides"]), default=1) < 1:
        return None
    starts = tuple(a + s * b for a, s, b in zip(inner["starts"], inner["strides"], outer["starts"]))
    limits = tuple(a + s * (b - 1) + 1 for a, s, b in zip(inner["starts"], inner["strides"], outer["limits"]))
    return emit("slice", source, starts=starts, limits=limits,
                strides=tuple(a * b for a, b in zip(inner["strides"], outer["strides"])))


def slice_concat(node: Node) -> Value | None:
    """A slice that lies within one of the joined pieces."""
    (x,), attrs = node.operands, node.attrs
    if not x.producer or not made_by(x, "concat"):
        return None
    axis = attrs_of(x)["axis"]
    start, limit = attrs["starts"][axis], attrs["limits"][axis]
    if attrs["strides"][axis] < 1 or not all(isinstance(p.shape[axis], int) for p in x.producer.operands):
        return None
    offset = 0
    for piece in x.producer.operands:
        end = offset + piece.shape[axis]
        if offset <= start and limit <= end and start < limit:
            moved = {name: (*attrs[name][:axis], attrs[name][axis] - offset, *attrs[name][axis + 1:])
                     for name in ("starts", "limits")}
            return emit("slice", piece, **moved, strides=attrs["strides"])
        offset = end
    return None


def slice_pad(node: Node) -> Value | None:
    """A slice that does not touch the padding."""
    (x,), attrs = node.operands, node.attrs
    source = source_of(x, "pad")
    if source is None:
        return None
    low, gaps = attrs_of(x)["low"], attrs_of(x)["interior"]
    inside = all(isinstance(size, int) and stride > 0 and gap == 0 and lo <= start and limit <= lo + size
                 for size, stride, gap, lo, start, limit in
                 zip(source.shape, attrs["strides"], gaps, low, attrs["starts"], attrs["limits"]))
    if not inside:
        return None
    return emit("slice", source, strides=attrs["strides"],
                starts=tuple(s - lo for s, lo in zip(attrs["starts"], low)),
                limits=tuple(s - lo for s, lo in zip(attrs["limits"], low)))


# --- concatenation ---------------------------------------------------------------------------------------


def concat_pieces(node: Node) -> Value | None:
    """One piece is itself; nested joins are one join; empty pieces go; neighbouring slices of one value meet."""
    axis = node.attrs["axis"]
    pieces: list[Value] = []
    for x in node.operands:
        nested = x.producer is not None and made_by(x, "concat") and attrs_of(x)["axis"] == axis
        pieces.extend(x.producer.operands if nested and x.producer else (x,))
    pieces = [p for p in pieces if p.shape[axis] != 0] or pieces[:1]
    joined: list[Value] = []
    for piece in pieces:
        met = _meeting(joined[-1], piece, axis) if joined else None
        joined[-1 if met is not None else len(joined):] = [met if met is not None else piece]
    if len(joined) == 1:
        return joined[0]
    return emit("concat", *joined, axis=axis) if len(joined) < len(node.operands) or pieces != list(
        node.operands) else None


def _meeting(x: Value, y: Value, axis: int) -> Value | None:
    """The slice that covers x and y, if they are slices of one value and y goes on where x ends."""
    source = source_of(x, "slice")
    if source is None or source is not source_of(y, "slice"):
        return None
    a, b = attrs_of(x), attrs_of(y)
    elsewhere = all(a[k][i] == b[k][i] for k in ("starts", "limits", "strides") for i in range(x.rank) if i != axis)
    if not elsewhere or not a["strides"][axis] == b["strides"][axis] == 1 or a["limits"][axis] != b["starts"][axis]:
        return None
    limits = (*a["limits"][:axis], b["limits"][axis], *a["limits"][axis + 1:])
    return emit("slice", source, starts=a["starts"], limits=limits, strides=a["strides"])


# --- padding ---------------------------------------------------------------------------------------------


def pad_pad(node: Node) -> Value | None:
    (x,), outer = node.operands, node.attrs
    source = source_of(x, "pad")
    if source is None:
        return None
    inner = attrs_of(x)
    grows = min((*inner["low"], *inner["high"], *outer["low"], *outer["high"]), default=0) >= 0
    if inner["value"] != outer["value"] or any((*inner["interior"], *outer["interior"])) or not grows:
        return None
    return emit("pad", source, low=tuple(a + b for a, b in zip(inner["low"], outer["low"])),
                high=tuple(a + b for a, b in zip(inner["high"], outer["high"])),
                interior=outer["interior"], value=outer["value"])


def add_pads(node: Node) -> Value | None:
    """Two zero-padded neighbours added are their concatenation, padded: the gradient of a split is a join."""
    x, y = node.operands
    if x.shape != y.shape:
        return None
    first, second = _padded_axis(x), _padded_axis(y)
    if first is None or second is None or first[0] != second[0]:
        return None
    axis = first[0]
    if first[1] > second[1]:
        (x, first), (y, second) = (y, second), (x, first)
    piece, other = source_of(x, "pad"), source_of(y, "pad")
    assert piece is not None and other is not None
    if first[1] + piece.shape[axis] != second[1]:
        return None
    joined = emit("concat", piece, other, axis=axis)
    return emit("pad", joined, **{**attrs_of(x), "high": attrs_of(y)["high"]})


def add_scatter(node: Node) -> Value | None:
    """x + scatter_add(0, i, u) = scatter_add(x, i, u): the gradient of a table that is also read elsewhere."""
    for x, y in (node.operands, node.operands[::-1]):
        scatter = y.producer
        if x.shape == y.shape and scatter and scatter.op.name in SCATTERS and uniform(scatter.operands[0]) == 0:
            return emit(scatter.op.name, x, *scatter.operands[1:], **scatter.attrs)
    return None


def _padded_axis(x: Value) -> tuple[int, int] | None:
    """(axis, padding before), if x is a value padded with zeros along one axis."""
    if not made_by(x, "pad"):
        return None
    attrs = attrs_of(x)
    axes = [i for i, (lo, hi) in enumerate(zip(attrs["low"], attrs["high"])) if lo or hi]
    if len(axes) != 1 or any(attrs["interior"]) or attrs["value"] != 0:
        return None
    (axis,) = axes
    return (axis, attrs["low"][axis]) if min(attrs["low"][axis], attrs["high"][axis]) >= 0 else None


# --- contractions ----------------------------------------------------------------------------------------


def transposed_operand(node: Node) -> Value | None:
    """A transpose of the last two axes becomes a flag."""
    operands, attrs = list(node.operands), dict(node.attrs)
    for i, flag in enumerate(("transpose_x", "transpose_y")):
        x = operands[i]
        source = source_of(x, "transpose")
        if source is not None and attrs_of(x)["perm"] == (*range(x.rank - 2), x.rank - 1, x.rank - 2):
            operands[i], attrs[flag] = source, not attrs[flag]
    return emit("matmul", *operands, **attrs) if operands != list(node.operands) else None


def broadcast_batch(node: Node) -> Value | None:
    """matmul broadcasts batches by itself: a matrix is not repeated where the other operand has the batch."""
    for i, x in enumerate(node.operands):
        source = source_of(x, "broadcast_to")
        if source is None or source.rank < 2 or source.shape[-2:] != x.shape[-2:]:
            continue
        operands = [source if j == i else v for j, v in enumerate(node.operands)]
        small = emit("matmul", *operands, **node.attrs)
        if small.shape == node.result.shape:
            return small
        if math.prod(small.shape) != math.prod(node.result.shape):
            return spread(small, node.result.shape)
    return None


# --- run-time places that are known ----------------------------------------------------------------------


def known_slice(node: Node) -> Value | None:
    """A dynamic slice at constant places is a slice."""
    x, *starts = node.operands
    places = [uniform(s) for s in starts]
    if any(p is None for p in places) or not x.type.is_static:
        return None
    sizes = node.attrs["sizes"]
    first = tuple(min(max(p, 0), n - size) for p, n, size in zip(places, x.shape, sizes))
    return emit("slice", x, starts=first, limits=tuple(a + s for a, s in zip(first, sizes)), strides=(1,) * x.rank)


def whole_update(node: Node) -> Value | None:
    """An update of the whole shape replaces everything."""
    x, update, *_ = node.operands
    return update if update.shape == x.shape else None


WHOLE_VIEWS = frozenset({"reshape", "transpose", "reverse", "broadcast_to"})  # no element is left out
SCATTERS = frozenset({"scatter_add", "scatter_add_along_axis", "scatter_add_nd"})

VIEW_RULES: dict[str, tuple[Rule, ...]] = {
    "cast": (cast_of_view,),
    "reshape": (idle, of_uniform, chain, view_of_cast),
    "broadcast_to": (idle, of_uniform, chain, broadcast_reshaped),
    "transpose": (idle, of_uniform, chain, transpose_units, view_of_cast),
    "reverse": (idle, of_uniform, reverse_twice, view_of_cast),
    "slice": (idle, of_uniform, slice_slice, slice_concat, slice_pad, view_of_cast),
    "concat": (concat_pieces,),
    "pad": (idle, pad_pad),
    "add": (add_pads, add_scatter),
    "matmul": (transposed_operand, broadcast_batch),
    "dynamic_slice": (known_slice,),
    "dynamic_update_slice": (whole_update,),
}

