"""How the big ops are split while they stay whole: by batch, head and channel.

To split one along a dimension over which it normalises (the classes of a softmax, the batch of a batch norm) it is
decomposed first, and the rules of the parts do the rest: see `solve.py`.
"""

from __future__ import annotations

from typing import Any

from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .rules import Factors, Labels, Local, Shard, whole


def norm_factors(node: Node) -> Factors:
    """layer_norm, rms_norm: every dimension before the normalised ones."""
    x, *parameters = node.operands
    lead = x.rank - (node.attrs["axes"] if "axes" in node.attrs else 1)
    labels: Labels = tuple(i if i < lead else None for i in range(x.rank))
    return Factors((labels, *((None,) * v.rank for v in parameters)), (labels,))


def batch_norm_factors(node: Node) -> Factors:
    labels: Labels = tuple("c" if i == 1 else None for i in range(node.operands[0].rank))
    return Factors((labels, ("c",), ("c",)), (labels, ("c",), ("c",)))


def group_norm_factors(node: Node) -> Factors:
    labels: Labels = tuple({0: "n", 1: "c"}.get(i) for i in range(node.operands[0].rank))
    return Factors((labels, ("c",), ("c",)), (labels,), limits={"c": node.attrs["groups"]})


def group_norm_local(ctx: Local, *operands: Value) -> Any:
    return ctx.emit(*operands, groups=ctx.node.attrs["groups"] // ctx.ranks("c"))


def attention_factors(node: Node) -> Factors:
    """Batch and heads; and, where no query looks at its position, the queries."""
    q, k, v, *masks = node.operands
    shape = (*node.result.shape[:-1], k.shape[-2])  # of the scores

    def lead(value: Value) -> Labels:
        shift = len(shape) - value.rank
        return tuple(i + shift if value.shape[i] == shape[i + shift] else None for i in range(value.rank - 2))

    query = None if node.attrs["causal"] else "q"
    mask = tuple((*lead(m), query if m.rank > 1 and m.shape[-2] == shape[-2] else None, None)[-m.rank:] for m in masks)
    return Factors(((*lead(q), query, None), (*lead(k), None, None), (*lead(v), None, None), *mask),
                   ((*range(len(shape) - 2), query, None),))


def cross_entropy_factors(node: Node) -> Factors:
    labels: Labels = tuple(range(node.operands[1].rank))
    return Factors(((*labels, None), labels), (labels,))


def pool_factors(node: Node) -> Factors:
    """Batch and channels; the indices of max_pool count within a plane."""
    def labels(value: Value) -> Labels:
        spatial = (None,) * (value.rank - 2)
        return ("n", *spatial, "c") if node.attrs["channels_last"] else ("n", "c", *spatial)

    linear = (frozenset({0}),) if node.op.name in ("avg_pool", "avg_pool_grad", "max_pool_grad") else ()
    return Factors(tuple(map(labels, node.operands)), tuple(map(labels, node.results)), linear=linear)


fill("shard", "layer_norm", Shard(norm_factors))
fill("shard", "rms_norm", Shard(norm_factors))
fill("shard", "batch_norm", Shard(batch_norm_factors))
fill("shard", "group_norm", Shard(group_norm_factors, group_norm_local))
fill("shard", "attention", Shard(attention_factors))
fill("shard", "cross_entropy", Shard(cross_entropy_factors))
for _name in ("max_pool", "max_pool_grad", "avg_pool", "avg_pool_grad"):
    fill("shard", _name, Shard(pool_factors))
# A collective in a graph that is partitioned again, and loops and branches (whose bodies run whole on every rank, on
# whole operands): correct, and no faster than one rank.
# (What data decide, such as the number of places that hold, is the same number everywhere then.)
for _name in ("true_places", "bind_size", "cond", "while_loop", "scan", "remat", "all_reduce", "all_gather",
              "reduce_scatter", "all_to_all", "axis_index", "send", "recv", "start", "wait"):
    fill("shard", _name, Shard(whole))
