"""How ops that move elements are split: along every dimension that they carry over as it is.

A reshape joins or parts groups of dimensions. Two dimensions of a group, one of either side, go together if as many
elements are counted before them: cutting a row-major block along its first dimension cuts it into consecutive runs,
whatever the dimensions after it are called; and cutting it along a later one cuts each run of the former. Where a later
dimension has no counterpart but begins within one, that one is split in blocks: (3, heads, dim) split by heads is, as
one dimension, three blocks each of which is split. Slices and concatenations that keep blocks whole take them or
put them together.
"""

from __future__ import annotations

import math
from typing import Any

from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .rules import Factors, Label, Local, Shard, without
from .sharding import split

LINEAR = (frozenset({0}),)


def _linear(node: Node, *sets: frozenset[int]) -> tuple[frozenset[int], ...]:
    return (sets or LINEAR) if node.results[0].dtype.is_float else ()


def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest groups of consecutive dimensions, (of the old shape, of the new), that hold the same elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        i, j = i + len(left), j + len(right)
        while math.prod(old[k] for k in left) != math.prod(new[k] for k in right):
            if math.prod(old[k] for k in left) < math.prod(new[k] for k in right) and i < len(old) or j >= len(new):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


def reshape_factors(node: Node) -> Factors:
    (x,), y = node.operands, node.result
    first: list[Label] = [None] * x.rank
    second: list[Label] = [None] * y.rank
    views: dict[Label, tuple[tuple[int | None, ...], tuple[int | None, ...]]] = {}
    sizes = all(isinstance(s, int) and s > 0 for s in (*x.shape, *y.shape))
    for number, (left, right) in enumerate(reshape_groups(x.shape, y.shape) if sizes else []):
        starts = [_starts(dims, v.shape) for dims, v in ((left, x), (right, y))]
        for i, before in starts[0].items():
            for j, other in starts[1].items():
                if before == other:
                    first[i] = second[j] = (number, before)
                elif before < other < before * x.shape[i] and _blocks(before, other, x.shape[i], starts[0]):
                    views[number, other] = (split(i, other // before),), (split(j),)
                elif other < before < other * y.shape[j] and _blocks(other, before, y.shape[j], starts[1]):
                    views[number, before] = (split(i),), (split(j, before // other),)
    return Factors((tuple(first),), (tuple(second),), linear=_linear(node), views=views)


def _starts(dims: list[int], shape: tuple[Any, ...]) -> dict[int, int]:
    """Dimension -> how many elements of the group's earlier dimensions there are, those of extent 1 left out."""
    found, before = {}, 1
    for k in dims:
        if shape[k] > 1:
            found[k] = before
            before *= shape[k]
    return found


def _blocks(before: int, inside: int, size: int, starts: dict[int, int]) -> bool:
    """Whether what begins behind `inside` elements cuts a dimension into blocks."""
    return inside % before == 0 and size % (inside // before) == 0 and inside not in starts.values()


def _own_shape(ctx: Local, x: Value) -> Any:
    return ctx.emit(x, shape=ctx.types[0].shape)


def transpose_factors(node: Node) -> Factors:
    perm = node.attrs["perm"]
    return Factors((tuple(range(len(perm))),), (tuple(perm),), linear=_linear(node))


def broadcast_factors(node: Node) -> Factors:
    (x,), y = node.operands, node.result
    shift = y.rank - x.rank
    operand = tuple(i + shift if x.shape[i] == y.shape[i + shift] else None for i in range(x.rank))
    return Factors((operand,), (tuple(range(y.rank)),), linear=_linear(node))


def concat_factors(node: Node) -> Factors:
    """Along the other dimensions; and along its own in blocks, each operand as many as it has of the common size."""
    axis = node.attrs["axis"]
    labels = without(range(node.result.rank), axis)
    sizes = [v.shape[axis] for v in (*node.operands, node.result)]
    views: dict[Label, Any] = {}
    if all(isinstance(n, int) and n for n in sizes) and node.result.rank:
        block = math.gcd(*sizes)
        *operands, result = (split(axis, n // block) for n in sizes)
        views["blocks"] = tuple(operands), (result,)
    return Factors((labels,) * len(node.operands), (labels,), views=views,
                   linear=_linear(node, frozenset(range(len(node.operands)))))


def _untouched(node: Node, touched: Any, views: dict[Label, Any] | None = None) -> Factors:
    labels = without(range(node.result.rank), *touched)
    return Factors((labels,), (labels,), linear=_linear(node), views=views or {})


def slice_factors(node: Node) -> Factors:
    """Whole along what is cut; or in blocks, of which some are taken."""
    x, views = node.operands[0], {}
    touched = []
    kept = zip(x.shape, node.attrs["starts"], node.attrs["limits"], node.attrs["strides"])
    for i, (n, start, limit, step) in enumerate(kept):
        if (start, limit, step) != (0, n, 1):
            touched.append(i)
            block = math.gcd(start, limit, n) if step == 1 else 0
            if block and limit > start:
                views["blocks", i] = (split(i, n // block),), (split(i, (limit - start) // block),)
    return _untouched(node, touched, views)


def slice_local(ctx: Local, x: Value) -> Any:
    starts, limits = list(ctx.node.attrs["starts"]), list(ctx.node.attrs["limits"])
    for i, n in enumerate(x.shape):
        if (ranks := ctx.ranks(("blocks", i))) > 1:
            starts[i], limits[i] = starts[i] // ranks, limits[i] // ranks
        elif ctx.ranks(i) > 1:
            limits[i] = n
    return ctx.emit(x, starts=tuple(starts), limits=tuple(limits))


def pad_factors(node: Node) -> Factors:
    attrs, (x,), views = node.attrs, node.operands, {}
    padded = [i for i in range(node.result.rank) if attrs["low"][i] or attrs["high"][i] or attrs["interior"][i]]
    for i in padded:
        low, high, n = attrs["low"][i], attrs["high"][i], x.shape[i]
        block = math.gcd(low, high, n) if min(low, high) >= 0 and not attrs["interior"][i] and n else 0
        if block:
            views["blocks", i] = (split(i, n // block),), (split(i, (low + n + high) // block),)
    made = _untouched(node, padded, views)
    return made if attrs["value"] == 0 else Factors(made.operands, made.results, views=views)


def pad_local(ctx: Local, x: Value) -> Any:
    scale = [ctx.ranks(("blocks", i)) for i in range(x.rank)]
    return ctx.emit(x, low=tuple(n // k for n, k in zip(ctx.node.attrs["low"], scale)),
                    high=tuple(n // k for n, k in zip(ctx.node.attrs["high"], scale)))


def reverse_factors(node: Node) -> Factors:
    return _untouched(node, node.attrs["axes"])


def dynamic_slice_factors(node: Node) -> Factors:
    x, *starts = node.operands
    labels = tuple(i if size == n else None for i, (size, n) in enumerate(zip(node.attrs["sizes"], x.shape)))
    return Factors((labels, *((),) * len(starts)), (labels,), linear=_linear(node))


def dynamic_slice_local(ctx: Local, x: Value, *starts: Value) -> Any:
    return ctx.emit(x, *starts, sizes=ctx.types[0].shape)


def dynamic_update_slice_factors(node: Node) -> Factors:
    x, update, *starts = node.operands
    labels = tuple(i if size == n else None for i, (size, n) in enumerate(zip(update.shape, x.shape)))
    return Factors((labels, labels, *((),) * len(starts)), (labels,), linear=_linear(node, frozenset({0, 1})))


def barrier_factors(node: Node) -> Factors:
    labels = tuple(tuple((k, i) for i in range(v.rank)) for k, v in enumerate(node.operands))
    return Factors(labels, labels)


fill("shard", "reshape", Shard(reshape_factors, _own_shape))
fill("shard", "transpose", Shard(transpose_factors))
fill("shard", "broadcast_to", Shard(broadcast_factors, _own_shape))
fill("shard", "concat", Shard(concat_factors))
fill("shard", "slice", Shard(slice_factors, slice_local))
fill("shard", "pad", Shard(pad_factors, pad_local))
fill("shard", "reverse", Shard(reverse_factors))
fill("shard", "dynamic_slice", Shard(dynamic_slice_factors, dynamic_slice_local))
fill("shard", "dynamic_update_slice", Shard(dynamic_update_slice_factors))
fill("shard", "barrier", Shard(barrier_factors))
