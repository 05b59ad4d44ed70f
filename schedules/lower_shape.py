"""Lowering of ops that move elements, and of those without operands.

All are index arithmetic: the element at an index of the result is an element of an operand at another index. Reads that
padding or another operand hides are clamped into range instead of branched around, so every load is legal and the loop
stays a vector loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from ..ir import ops as _ops  # noqa: F401  (declares the ops whose slots are filled here)
from ..ir.dims import Dim, Size
from ..ir.graph import Node
from ..ir.opdef import fill
from ..ir.ops_create import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL
from .loops_index import Index, clamp, flatten, opaque, unflatten, within
from .lower_slots import Pointwise, cast, compute_dtype, const, let
from .sizes import at_least, expression

Idx = tuple[Index, ...]
Load = Callable[[int, Idx], Any]
FREE = 0.25


def moves(name: str, fn: Callable[[Node, Idx], Idx]) -> None:
    """Fills the slot of an op with one operand whose element at `fn(node, idx)` is the result's at idx."""
    fill("lower", name, Pointwise(lambda node, idx, load: load(0, fn(node, idx)), FREE))


def where(condition: Any, x: Any, y: Any) -> Any:
    """Select with a condition that may be known."""
    if isinstance(condition, bool):
        return x() if condition else y()
    return tirx.Select(condition, x(), y())


def both(*conditions: Any) -> Any:
    """The conjunction of conditions that may be known."""
    open_ones = [c for c in conditions if c is not True]
    if any(c is False for c in open_ones):
        return False
    return True if not open_ones else tirx.all(*open_ones) if len(open_ones) > 1 else open_ones[0]


def reshape(node: Node, idx: Idx) -> Idx:
    return unflatten(flatten(idx, node.result.shape), node.operands[0].shape)


def transpose(node: Node, idx: Idx) -> Idx:
    at: list[Any] = [None] * len(idx)
    for i, p in zip(idx, node.attrs["perm"]):
        at[p] = i
    return tuple(at)


def broadcast_to(node: Node, idx: Idx) -> Idx:
    operand = node.operands[0]
    aligned = idx[len(idx) - operand.rank:]
    return tuple(Index({}, 0) if size == 1 else i for i, size in zip(aligned, operand.shape))


def slice_at(node: Node, idx: Idx) -> Idx:
    return tuple(i * stride + start for i, start, stride in zip(idx, node.attrs["starts"], node.attrs["strides"]))


def reverse(node: Node, idx: Idx) -> Idx:
    sizes = node.operands[0].shape
    return tuple(size - 1 - i if axis in node.attrs["axes"] else i for axis, (i, size) in enumerate(zip(idx, sizes)))


moves("reshape", reshape)
moves("transpose", transpose)
moves("broadcast_to", broadcast_to)
moves("slice", slice_at)
moves("reverse", reverse)


def concat(node: Node, idx: Idx, load: Load) -> Any:
    axis = node.attrs["axis"]
    result: Any = None
    starts = list(itertools.accumulate((x.shape[axis] for x in node.operands), initial=0))
    for k in reversed(range(len(node.operands))):
        size = starts[k + 1] - starts[k]
        if size == 0:
            continue
        here = within(idx[axis], starts[k], starts[k + 1] - 1)
        if here is False:
            continue
        value = load(k, (*idx[:axis], clamp(idx[axis] - starts[k], 0, size - 1), *idx[axis + 1:]))
        if result is None or here is True:
            result = value
        else:
            place = idx[axis].expr()
            place = tirx.const(place, "int64") if isinstance(place, int) else place
            result = let(tirx.Select(place < expression(starts[k + 1]), value, result))
    return result


def pad(node: Node, idx: Idx, load: Load) -> Any:
    operand = node.operands[0]
    fill_value = const(np.asarray(node.attrs["value"]).astype(operand.dtype.np), compute_dtype(operand.dtype))
    if operand.type.size == 0:
        return fill_value
    inside, at = [], []
    for i, low, gap, size in zip(idx, node.attrs["low"], node.attrs["interior"], operand.shape):
        position = i - low
        inside.append(within(position, 0, (size - 1) * (gap + 1)))
        clamped = clamp(position, 0, (size - 1) * (gap + 1))
        if gap:
            clamped, rest = clamped.divided(gap + 1)
            inside.append(within(rest, 0, 0))
        at.append(clamped)
    return where(both(*inside), lambda: load(0, tuple(at)), lambda: fill_value)


fill("lower", "concat", Pointwise(concat, 1.0))
fill("lower", "pad", Pointwise(pad, 1.0))


# Gathers -----------------------------------------------------------------------------------------------------------

def looked_up(value: Any, size: Size, at: Idx) -> Index:
    """A run-time index clamped into [0, size), as an index; `at`: where it was read, from which it varies with the
    loops."""
    dtype = str(value.ty.dtype)
    axes = frozenset().union(*(i.axes for i in at)) if at else frozenset()
    if isinstance(size, Dim):
        value, limit, zero = let(cast(value, "int64")), expression(size - 1), tirx.const(0, "int64")
        clamped = tirx.Select(value > limit, limit, value)
        return opaque(let(tirx.Select(clamped < zero, zero, clamped)), 0, size - 1, axes)
    top = max(size - 1, 0)
    value = let(value)
    signed = not dtype.startswith("uint")
    limit = const(min(top, 2 ** (int(dtype[3:]) - 1) - 1 if signed else 2 ** int(dtype[4:]) - 1), dtype)
    # not Min and Max: TVM's simplifier fails on some nests of them over 64-bit vectors
    clamped = tirx.Select(value > limit, limit, value)
    value = tirx.Select(value < const(0, dtype), const(0, dtype), clamped) if signed else clamped
    return opaque(let(cast(value, "int32" if top < 1 << 31 else "int64")), 0, top, axes)


def take(node: Node, idx: Idx, load: Load) -> Any:
    axis = node.attrs["axis"]
    x, indices = node.operands
    at = idx[axis:axis + indices.rank]
    row = looked_up(load(1, at), x.shape[axis], at)
    return load(0, (*idx[:axis], row, *idx[axis + indices.rank:]))


def take_along_axis(node: Node, idx: Idx, load: Load) -> Any:
    axis = node.attrs["axis"]
    row = looked_up(load(1, idx), node.operands[0].shape[axis], idx)
    return load(0, (*idx[:axis], row, *idx[axis + 1:]))


def gather_nd(node: Node, idx: Idx, load: Load) -> Any:
    x, indices = node.operands
    depth, lead = indices.shape[-1], indices.rank - 1
    rows = []
    for i in range(depth):
        at = (*idx[:lead], Index({}, i))
        rows.append(looked_up(load(1, at), x.shape[i], at))
    return load(0, (*rows, *idx[lead:]))


def block_start(load: Load, k: int, size: Size, block: Size) -> Index:
    """The run-time start of a block of a dynamic slice, clamped so that the block lies inside."""
    return looked_up(load(k, ()), size - block + 1, ())


def dynamic_slice(node: Node, idx: Idx, load: Load) -> Any:
    x = node.operands[0]
    starts = [block_start(load, k + 1, n, size) for k, (n, size) in enumerate(zip(x.shape, node.attrs["sizes"]))]
    return load(0, tuple(i + start for i, start in zip(idx, starts)))


def one_hot(node: Node, idx: Idx, load: Load) -> Any:
    value = load(0, idx[:-1])
    dtype = compute_dtype(node.result.dtype)
    kind = str(value.ty.dtype)
    bits = int(kind.lstrip("uint"))
    top = 2 ** (bits if kind.startswith("u") else bits - 1) - 1
    place = idx[-1].expr()
    place = const(place, kind) if isinstance(place, int) else cast(place, kind)
    hit = value == place
    if not at_least(top, node.attrs["depth"] - 1):
        hit = tirx.And(hit, idx[-1].expr() <= top)
    return tirx.Select(hit, const(1, dtype), const(0, dtype))


fill("lower", "take", Pointwise(take, 1.0))
fill("lower", "take_along_axis", Pointwise(take_along_axis, 1.0))
fill("lower", "gather_nd", Pointwise(gather_nd, 1.0))
fill("lower", "dynamic_slice", Pointwise(dynamic_slice, 1.0))
fill("lower", "one_hot", Pointwise(one_hot, 1.0, exposes=True))


# Without operands --------------------------------------------------------------------------------------------------

def iota(node: Node, idx: Idx, load: Load) -> Any:
    value = idx[node.attrs["axis"]].expr()
    dtype = compute_dtype(node.result.dtype)
    if isinstance(value, int):
        return const(np.asarray(value).astype(node.result.dtype.np), dtype)
    return cast(value, dtype)


def size(node: Node, idx: Idx, load: Load) -> Any:
    value = node.attrs["of"]
    return tirx.const(value, "int64") if isinstance(value, int) else expression(value)


def constant(node: Node, idx: Idx, load: Load) -> Any:
    """An immediate: for constants of one element (larger ones are buffers)."""
    return const(np.asarray(node.attrs["value"]).reshape(-1)[0], compute_dtype(node.result.dtype))


def random_bits(node: Node, idx: Idx, load: Load) -> Any:
    """Philox4x32-10 of the element's block: every lane runs the ten rounds and keeps its own word."""
    u64 = lambda v: const(v, "uint64")  # noqa: E731
    state = [load(0, (Index({}, i),)) for i in range(2)]
    position = flatten(idx, node.result.shape)
    block, word = position.divided(4)
    number = block.expr()
    number = u64(number) if isinstance(number, int) else cast(number, "uint64")
    counter = let(number + state[1] + u64(node.attrs["offset"]))
    low = u64(0xFFFFFFFF)
    c = [let(counter & low), let(counter >> u64(32)), u64(0), u64(0)]
    k = [let(state[0] & low), let(state[0] >> u64(32))]
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = (let(c[2 * i] * u64(m)) for i, m in enumerate(PHILOX_MULTIPLIERS))
        c = [let((p1 >> u64(32)) ^ c[1] ^ k[0]), let(p1 & low), let((p0 >> u64(32)) ^ c[3] ^ k[1]), let(p0 & low)]
        k = [let((key + u64(w)) & low) for key, w in zip(k, PHILOX_WEYL)]
    which = word.expr()
    if isinstance(which, int):
        return cast(c[which], "uint32")
    picked = c[3]
    for i in (2, 1, 0):
        picked = tirx.Select(which == i, c[i], picked)
    return cast(let(picked), "uint32")


fill("lower", "iota", Pointwise(iota, FREE, exposes=True))
fill("lower", "size", Pointwise(size, FREE))
fill("lower", "constant", Pointwise(constant, 0.0))
fill("lower", "random_bits", Pointwise(random_bits, 40.0))

SCALAR_SIZE = 1


def is_immediate(node: Node) -> bool:
    """A constant that is written into kernels as a number."""
    return node.op.name == "constant" and math.prod(node.result.shape) == SCALAR_SIZE
