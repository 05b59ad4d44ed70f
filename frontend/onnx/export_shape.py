"""Export of the ops that move elements, and the helpers for it that other rules use.

A reshape says with ONNX's own 0 ("as it was") and -1 ("what is left") what it can, so that dynamic sizes need no
arithmetic; where that does not do, sizes are computed from the inputs' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.dims import Dim, Size
from ...ir.dtypes import as_dtype
from ...ir.graph import Node
from .export_rules import exports
from .export_writer import FAR, INT64, Ref, Writer

NEAR = -FAR
LISTED = 64
"""Vectors 0, 1, 2... up to this length are written as constants, longer ones as Range."""


def reshape(out: Writer, x: Ref, before: Sequence[Size], after: Sequence[Size]) -> Ref:
    """x of the shape `before` under the shape `after`."""
    before, after = tuple(before), tuple(after)
    if before == after:
        return x
    array = out.array_of(x)
    if array is not None and not any(isinstance(s, Dim) for s in after):
        return out.const(array.reshape(after))
    inserted = _inserted(before, after)
    if inserted is not None:
        return unsqueeze(out, x, inserted)
    removed = _inserted(after, before)
    if removed is not None:
        return squeeze(out, x, removed)
    target, literal = _target(out, before, after)
    return out.op("Reshape", x, target, allowzero=1 if literal and out.opset >= 14 else None)


def _inserted(short: Sequence[Size], long: Sequence[Size]) -> list[int] | None:
    """The axes of size 1 that make the long shape from the short one; None if it takes more than that."""
    axes, at = [], 0
    for i, size in enumerate(long):
        if at < len(short) and short[at] == size:
            at += 1
        elif size == 1:
            axes.append(i)
        else:
            return None
    return axes if at == len(short) and axes else None


def _target(out: Writer, before: Sequence[Size], after: Sequence[Size]) -> tuple[Ref, bool]:
    """What Reshape is told, and whether a 0 in it means a size of 0."""
    if 0 in after:
        if out.opset < 14:
            return _empty_target(out, before, after), False
        return out.shape(after), True
    sizes = [0 if isinstance(s, Dim) and i < len(before) and before[i] == s else s for i, s in enumerate(after)]
    left = [i for i, s in enumerate(sizes) if isinstance(s, Dim)]
    if len(left) > 1:
        return out.shape(after), True
    return out.ints(*(-1 if i in left else int(s) for i, s in enumerate(sizes))), False


def _empty_target(out: Writer, before: Sequence[Size], after: Sequence[Size]) -> Ref:
    """Before opset 14, 0 means "as it was"; -1 stands for a zero at another place."""
    moved = [i for i, s in enumerate(after) if s == 0 and not (i < len(before) and before[i] == 0)]
    if len(moved) > 1 or any(isinstance(s, Dim) for s in after):
        raise out.fail("the reshape of an empty tensor cannot be said before opset 14: save with opset=14 or above")
    return out.ints(*(-1 if i in moved else int(s) for i, s in enumerate(after)))


def unsqueeze(out: Writer, x: Ref, axes: Sequence[int]) -> Ref:
    """x with axes of size 1 at these places of the result."""
    return _with_axes(out, "Unsqueeze", x, axes)


def squeeze(out: Writer, x: Ref, axes: Sequence[int]) -> Ref:
    """x without these axes of size 1."""
    return _with_axes(out, "Squeeze", x, axes)


def _with_axes(out: Writer, kind: str, x: Ref, axes: Sequence[int]) -> Ref:
    """Axes are an operand from opset 13 on, before that an attribute."""
    return out.op(kind, x, out.ints(*axes)) if out.opset >= 13 else out.op(kind, x, axes=list(axes))


def transpose(out: Writer, x: Ref, perm: Sequence[int]) -> Ref:
    """x with its axes in another order; two transpositions are one."""
    source, before = out.model.turned.get(x.name, (x, tuple(range(len(perm)))))
    order = [before[p] for p in perm]
    if order == list(range(len(order))):
        return source
    made = out.op("Transpose", source, perm=order)
    out.model.turned[made.name] = (source, tuple(order))
    return made


def swap_last(out: Writer, x: Ref, rank: int) -> Ref:
    """x with its last two axes exchanged."""
    return transpose(out, x, [*range(rank - 2), rank - 1, rank - 2])


def expand(out: Writer, x: Ref, before: Sequence[Size], after: Sequence[Size]) -> Ref:
    """x repeated to a shape."""
    if tuple(before) == tuple(after):
        return x
    return out.op("Expand", x, out.shape(after))


def filled(out: Writer, number: Any, shape: Sequence[Size], dtype: Any) -> Ref:
    """A tensor of one number."""
    return expand(out, out.const(np.asarray(number).astype(as_dtype(dtype).np)), (), shape)


def take_slice(out: Writer, x: Ref, axes: Sequence[int], starts: Ref, ends: Ref, steps: Sequence[int] = ()) -> Ref:
    """Elements from starts to ends (int64 vectors) of some axes."""
    return out.op("Slice", x, starts, ends, out.ints(*axes), out.ints(*steps) if steps else None)


def scalar_size(out: Writer, size: Size) -> Ref:
    """A size as an int64 scalar."""
    if not isinstance(size, Dim):
        return out.const(np.int64(size))
    return out.shared(("scalar", size), lambda first: squeeze(first, first.size(size), [0]))


def counting(out: Writer, size: Size, dtype: Any = INT64) -> Ref:
    """The vector 0, 1, 2... of a dtype."""
    if not isinstance(size, Dim) and size <= LISTED:
        return out.const(np.arange(size).astype(as_dtype(dtype).np))
    limit = scalar_size(out, size)
    numbers = out.shared(("range", size), lambda first: first.op(
        "Range", first.const(np.int64(0)), limit, first.const(np.int64(1))))
    return out.cast(numbers, dtype)


# Rules -----------------------------------------------------------------------------------------------------------

@exports("identity", "stop_gradient")
def identity(out: Writer, node: Node, x: Ref) -> Ref:
    return x


@exports("barrier")
def barrier(out: Writer, node: Node, *xs: Ref) -> tuple[Ref, ...]:
    return xs


@exports("constant")
def constant(out: Writer, node: Node) -> Ref:
    return out.const(node.attrs["value"])


@exports("cast")
def cast(out: Writer, node: Node, x: Ref) -> Ref:
    target = node.attrs["dtype"]
    small = ("int4", "uint4", "float8_e4m3fn", "float8_e5m2")
    if x.dtype in small and target != "float32" and not target.is_float:
        x = out.cast(x, "float32" if x.dtype.is_float else "int8" if x.dtype == "int4" else "uint8")
    if target in ("int4", "uint4"):
        x = wrapped_to_four_bits(out, x, target)
    return out.cast(x, target)


def wrapped_to_four_bits(out: Writer, x: Ref, target: Any) -> Ref:
    """Integers modulo 16 in the range of a 4-bit dtype, into which a runtime may saturate."""
    if x.dtype.is_float:
        x = out.cast(x, "int32")
    wide = out.cast(x, "int32")
    if x.dtype in ("bool", "int4", "uint4"):
        return wide
    low = 8 if target == "int4" else 0
    shifted = out.op("Mod", out.op("Add", wide, out.like(low, wide)), out.like(16, wide))
    return out.cast(out.op("Sub", shifted, out.like(low, wide)), "int8" if low else "uint8")


@exports("reshape")
def reshape_rule(out: Writer, node: Node, x: Ref) -> Ref:
    return reshape(out, x, node.operands[0].shape, node.attrs["shape"])


@exports("transpose")
def transpose_rule(out: Writer, node: Node, x: Ref) -> Ref:
    return transpose(out, x, node.attrs["perm"])


@exports("broadcast_to")
def broadcast_to(out: Writer, node: Node, x: Ref) -> Ref:
    return expand(out, x, node.operands[0].shape, node.attrs["shape"])


@exports("concat")
def concat(out: Writer, node: Node, *xs: Ref) -> Ref:
    if len(xs) == 1:
        return xs[0]
    return out.op("Concat", *xs, axis=node.attrs["axis"])


@exports("slice")
def slice_rule(out: Writer, node: Node, x: Ref) -> Ref:
    shape = node.operands[0].shape
    chosen = [(axis, start, limit, step) for axis, (size, start, limit, step) in enumerate(
        zip(shape, node.attrs["starts"], node.attrs["limits"], node.attrs["strides"]))
        if (start, step) != (0, 1) or limit != size]
    if not chosen:
        return x
    axes, starts, limits, steps = zip(*chosen)
    ends = [FAR if step > 0 and limit == shape[axis] else NEAR if isinstance(limit, int) and limit < 0 else limit
            for axis, limit, step in zip(axes, limits, steps)]
    return take_slice(out, x, axes, out.shape(starts), out.shape(ends), () if set(steps) == {1} else steps)


@exports("reverse")
def reverse(out: Writer, node: Node, x: Ref) -> Ref:
    axes = node.attrs["axes"]
    if not axes:
        return x
    count = len(axes)
    return take_slice(out, x, axes, out.ints(*[-1] * count), out.ints(*[NEAR] * count), [-1] * count)


@exports("pad")
def pad(out: Writer, node: Node, x: Ref) -> Ref:
    shape = list(node.operands[0].shape)
    low, high, interior = (node.attrs[k] for k in ("low", "high", "interior"))
    fill = out.like(node.attrs["value"], x)
    for axis, gap in enumerate(interior):
        if gap:
            x = spread_apart(out, x, shape, axis, gap, fill)
            size = shape[axis]
            shape[axis] = size * (gap + 1) - gap if isinstance(size, Dim) or size else size
    return pad_edges(out, x, low, high, fill)


def spread_apart(out: Writer, x: Ref, shape: Sequence[Size], axis: int, gap: int, fill: Ref) -> Ref:
    """x with `gap` values between neighbours of an axis: a new axis is padded and merged."""
    after = [*shape[:axis], shape[axis] * (gap + 1), *shape[axis + 1:]]
    x = unsqueeze(out, x, [axis + 1])
    high = [0] * (len(shape) + 1)
    high[axis + 1] = gap
    x = pad_edges(out, x, [0] * len(high), high, fill)
    x = reshape(out, x, [*shape[:axis + 1], gap + 1, *shape[axis + 1:]], after)
    if shape[axis] == 0:
        return x
    return take_slice(out, x, [axis], out.ints(0), out.ints(-gap))


def pad_edges(out: Writer, x: Ref, low: Sequence[int], high: Sequence[int], fill: Ref | None) -> Ref:
    """x padded with a scalar, or cropped where a number is negative."""
    grow = [max(n, 0) for n in (*low, *high)]
    if any(grow):
        x = out.op("Pad", x, out.ints(*grow), fill)
    cut = [i for i, (lo, hi) in enumerate(zip(low, high)) if lo < 0 or hi < 0]
    if not cut:
        return x
    starts = [max(-low[i], 0) for i in cut]
    ends = [min(high[i], 0) or FAR for i in cut]
    return take_slice(out, x, cut, out.ints(*starts), out.ints(*ends))


@exports("size")
def size(out: Writer, node: Node) -> Ref:
    return scalar_size(out, node.attrs["of"])


@exports("bind_size")
def bind_size(out: Writer, node: Node, count: Ref) -> Ref:
    """From here on the size is read from the count. (ONNX cannot check that it is within its bound.)"""
    name = str(node.attrs["size"])
    out.model.counted[name] = reshape(out, out.cast(count, INT64), (), (1,))
    return out.const(np.zeros((0, 0), np.uint8))


@exports("iota")
def iota(out: Writer, node: Node) -> Ref:
    shape, axis, dtype = (node.attrs[k] for k in ("shape", "axis", "dtype"))
    if not any(isinstance(s, Dim) for s in shape) and math.prod(shape) <= LISTED:
        numbers = np.arange(shape[axis]).astype(dtype.np).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return out.const(np.broadcast_to(numbers, shape).copy())
    column = counting(out, shape[axis], dtype)
    after = [s if i == axis else 1 for i, s in enumerate(shape)]
    return expand(out, reshape(out, column, (shape[axis],), after), after, shape)
