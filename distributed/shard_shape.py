"""How ops that move elements are split: along every dimension that they carry over as it is.

A reshape keeps, of each group of dimensions that it joins or parts, the first: cutting a row-major block along its
first dimension cuts it into consecutive runs, whatever the dimensions after it are called.
"""

from __future__ import annotations

import math
from typing import Any

from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .rules import Factors, Label, Local, Shard, without

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
    sizes = all(isinstance(s, int) and s > 0 for s in (*x.shape, *y.shape))
    for number, (left, right) in enumerate(reshape_groups(x.shape, y.shape) if sizes else []):
        heads = [next((k for k in dims if v.shape[k] > 1), None) for dims, v in ((left, x), (right, y))]
        if heads[0] is not None and heads[1] is not None:
            first[heads[0]] = second[heads[1]] = number
    return Factors((tuple(first),), (tuple(second),), linear=_linear(node))


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
    labels = without(range(node.result.rank), node.attrs["axis"])
    return Factors((labels,) * len(node.operands), (labels,),
                   linear=_linear(node, frozenset(range(len(node.operands)))))


def _untouched(node: Node, touched: Any) -> Factors:
    labels = without(range(node.result.rank), *touched)
    return Factors((labels,), (labels,), linear=_linear(node))


def slice_factors(node: Node) -> Factors:
    x = node.operands[0]
    kept = zip(x.shape, node.attrs["starts"], node.attrs["limits"], node.attrs["strides"])
    return _untouched(node, [i for i, (n, start, limit, step) in enumerate(kept) if (start, limit, step) != (0, n, 1)])


def slice_local(ctx: Local, x: Value) -> Any:
    limits = tuple(n if ctx.ranks(i) > 1 else limit
                   for i, (n, limit) in enumerate(zip(x.shape, ctx.node.attrs["limits"])))
    return ctx.emit(x, limits=limits)


def pad_factors(node: Node) -> Factors:
    attrs = node.attrs
    padded = [i for i in range(node.result.rank) if attrs["low"][i] or attrs["high"][i] or attrs["interior"][i]]
    made = _untouched(node, padded)
    return made if attrs["value"] == 0 else Factors(made.operands, made.results)


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
fill("shard", "pad", Shard(pad_factors))
fill("shard", "reverse", Shard(reverse_factors))
fill("shard", "dynamic_slice", Shard(dynamic_slice_factors, dynamic_slice_local))
fill("shard", "dynamic_update_slice", Shard(dynamic_update_slice_factors))
fill("shard", "barrier", Shard(barrier_factors))
