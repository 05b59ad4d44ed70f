"""How elementwise ops and reductions are split, and what has no operands.

Elementwise: a dimension of the result goes with the dimensions that broadcast to it; one of extent 1 stays whole. The
linear ones pass partial sums through, a product one factor of which is whole.
"""

from __future__ import annotations

import math

from ..ir.graph import Node, Value
from ..ir.opdef import all_ops, fill
from .rules import Factors, Label, Labels, Local, Shard, whole

# op -> its linear sets of operands
LINEAR: dict[str, tuple[tuple[int, ...], ...]] = {
    "neg": ((0,),), "identity": ((0,),), "stop_gradient": ((0,),), "annotate": ((0,),),
    "add": ((0, 1),), "sub": ((0, 1),), "mul": ((0,), (1,)), "div": ((0,),), "where": ((1, 2),),
}


def broadcast_labels(value: Value, rank: int, shape: tuple[object, ...]) -> Labels:
    """Labels 0, 1... of the result's dimensions, for an operand that is broadcast to it."""
    shift = rank - value.rank
    return tuple(i + shift if size != 1 or shape[i + shift] == 1 else None for i, size in enumerate(value.shape))


def _linear_sets(node: Node) -> tuple[frozenset[int], ...]:
    """A sum of rounded numbers is not the rounded sum: a cast passes partial sums only where it widens."""
    if node.op.name == "cast":
        source, result = node.operands[0].dtype, node.result.dtype
        return (frozenset({0}),) if source.is_float and result.is_float and result.bits >= source.bits else ()
    if not node.result.dtype.is_float:
        return ()
    return tuple(map(frozenset, LINEAR.get(node.op.name, ())))


def elementwise_factors(node: Node) -> Factors:
    shape = node.result.shape
    result = tuple(range(len(shape)))
    return Factors(tuple(broadcast_labels(v, len(shape), shape) for v in node.operands), (result,) * len(node.results),
                   linear=_linear_sets(node))


def creation_factors(node: Node) -> Factors:
    """Constants and counters are made whole; a split reader takes its part, which fuses into one loop."""
    return whole(node)


# Reductions --------------------------------------------------------------------------------------------------------


def _reduced(node: Node) -> tuple[Labels, Labels, list[Label]]:
    """Labels of operand and result, and those of the reduced dimensions."""
    axes, rank = node.attrs["axes"], node.operands[0].rank
    if node.attrs["keepdims"]:
        result: Labels = tuple(None if i in axes else i for i in range(rank))
    else:
        result = tuple(i for i in range(rank) if i not in axes)
    return tuple(range(rank)), result, list(axes)


def sum_factors(node: Node) -> Factors:
    operand, result, reduced = _reduced(node)
    linear = (frozenset({0}),) if node.result.dtype.is_float else ()
    return Factors((operand,), (result,), summed=frozenset(reduced), linear=linear)


def mean_local(ctx: Local, x: Value) -> Value:
    """The rank's share of the mean: the mean of its part (behind the end it has zeros), by how much of all that is."""
    (mean,) = ctx.emit(x)
    (whole,) = ctx.node.operands
    share = math.prod(x.shape[axis] / whole.shape[axis] for axis in ctx.node.attrs["axes"] if ctx.ranks(axis) > 1)
    return mean if share == 1 else mean * share


def extreme_factors(kind: str) -> object:
    def factors(node: Node) -> Factors:
        operand, result, reduced = _reduced(node)
        return Factors((operand,), (result,), combined=dict.fromkeys(reduced, kind))
    return factors


def unreduced_factors(node: Node) -> Factors:
    """Only dimensions that are not reduced are split; to split the others too, the op is decomposed first."""
    operand, result, reduced = _reduced(node)
    return Factors((tuple(None if i in reduced else i for i in operand),), (result,))


def _fill() -> None:
    for name, record in all_ops().items():
        if "shard" not in record.slots and record.has("elementwise"):
            fill("shard", name, Shard(elementwise_factors))
    for name in ("constant", "iota", "random_bits", "size"):
        fill("shard", name, Shard(creation_factors))
    fill("shard", "reduce_sum", Shard(sum_factors))
    fill("shard", "reduce_mean", Shard(sum_factors, mean_local))
    fill("shard", "reduce_max", Shard(extreme_factors("max")))  # type: ignore[arg-type]
    fill("shard", "reduce_min", Shard(extreme_factors("min")))  # type: ignore[arg-type]
    for name in ("reduce_prod", "reduce_any", "reduce_all", "logsumexp"):
        fill("shard", name, Shard(unreduced_factors))
    fill("shard", "annotate", Shard(elementwise_factors, lambda ctx, x: x))


_fill()
