"""From one sharding to another by the cheapest sequence of collectives.

The steps along one mesh axis: gather a split dimension, cut a whole one (free), move the split to another dimension
(all-to-all), sum a partial sum (all-reduce) or sum and cut it (reduce-scatter), and make a whole value a partial sum
(the first rank keeps it). Values have few dimensions and meshes few axes, so the shortest path through all shardings
is found outright.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.graph import Value
from ..ir.types import TensorType
from .cost import Cluster
from .mesh import Mesh, MeshError
from .sharding import PARTIAL, WHOLE, Sharding, blocks_of, dim_of


@dataclass(frozen=True)
class Step:
    """One step: `kind` is a collective's name, or `cut`, or `mask` (whole -> partial sum, on one rank)."""

    kind: str
    axis: str
    source: int  # placements along the axis
    target: int
    result: Sharding


def transition(cluster: Cluster, axis: str, ranks: int, whole: float, source: int, target: int) -> float:
    """Seconds to bring a value of `whole` bytes from one placement along an axis to another."""
    if source == target or ranks < 2:
        return 0.0
    if source == WHOLE:
        return cluster.touch(whole if target == PARTIAL else whole / ranks)
    if source == PARTIAL:
        return (cluster.all_reduce if target == WHOLE else cluster.reduce_scatter)(axis, ranks, whole)
    if target >= 0 and _moves(source, target):
        return cluster.all_to_all(axis, ranks, whole)
    return cluster.all_gather(axis, ranks, whole) + (0.0 if target == WHOLE else cluster.touch(whole))


def _moves(source: int, target: int) -> bool:
    """Whether an all-to-all takes a split from one dimension to another; blocks are gathered and cut again."""
    return dim_of(source) != dim_of(target) and blocks_of(source) == blocks_of(target) == 1


def filled_with(v: Value) -> Any:
    """The number that all elements of a value are: nobody has to send such a value. None: they may differ."""
    if v.producer is None or v.producer.op.name != "broadcast_to":
        return None
    source = v.producer.operands[0].producer
    if source is None or source.op.name != "constant" or np.size(source.attrs["value"]) != 1:
        return None
    return np.asarray(source.attrs["value"]).reshape(())[()]


KINDS: dict[tuple[object, object], str] = {
    (WHOLE, "split"): "cut", (WHOLE, PARTIAL): "mask", (PARTIAL, WHOLE): "all_reduce",
    (PARTIAL, "split"): "reduce_scatter", ("split", WHOLE): "all_gather", ("split", "split"): "all_to_all",
}


def _kind(source: int, target: int) -> str | None:
    def name(placement: int) -> object:
        return "split" if placement >= 0 else placement
    if source >= 0 and target >= 0 and not _moves(source, target):
        return None
    return KINDS.get((name(source), name(target)))


def _inner(sharding: Sharding, axis: str, mesh: Mesh) -> bool:
    """Whether no other axis cuts what this one has left: only then can its parts be put together."""
    dim = dim_of(sharding.placement(axis))
    return sharding.order(dim, mesh)[-1][0] == axis


def _fits(type: TensorType, sharding: Sharding, axis: str, mesh: Mesh, padded: bool) -> bool:
    """Whether an axis can cut what it cuts in this sharding; `padded`: padding is allowed."""
    dim = dim_of(sharding.placement(axis))
    return _inner(sharding, axis, mesh) and (sharding.fits(dim, type.shape[dim], mesh)
                                             or padded and sharding.pads(dim, type.shape[dim], mesh))


def _steps(sharding: Sharding, type: TensorType, mesh: Mesh, axes: tuple[str, ...], goal: Sharding) -> Iterator[Step]:
    for axis in axes:
        source = sharding.placement(axis)
        if source >= 0 and not _inner(sharding, axis, mesh):
            continue
        for target in dict.fromkeys((WHOLE, PARTIAL, *range(type.rank), goal.placement(axis))):
            kind = _kind(source, target)
            if kind == "all_to_all" and sharding.pads(dim_of(source), type.shape[dim_of(source)], mesh):
                continue
            if source == target or kind is None:
                continue
            result = sharding.placed(axis, target)
            if target < 0 or _fits(type, result, axis, mesh, kind != "all_to_all" and target == goal.placement(axis)):
                yield Step(kind, axis, source, target, result)


def _whole_bytes(type: TensorType, sharding: Sharding, mesh: Mesh, axis: str) -> float:
    """Bytes of what the ranks along an axis hold together: the other axes' splits stay."""
    return float(type.nbytes) / math.prod(mesh[other] for other in sharding.split_axes if other != axis)


def path(type: TensorType, source: Sharding, target: Sharding, mesh: Mesh, cluster: Cluster) -> tuple[Step, ...]:
    """The cheapest steps from one sharding of a value to another. Along axes of one rank nothing has to be sent.

    Raises:
        MeshError: there is none (a partial sum of integers...).
    """
    return _search(type, source, target, mesh, cluster)[1]


def seconds(type: TensorType, source: Sharding, target: Sharding, mesh: Mesh, cluster: Cluster) -> float:
    """What `path` costs."""
    return _search(type, source, target, mesh, cluster)[0]


@functools.lru_cache(maxsize=8192)
def _search(type: TensorType, source: Sharding, target: Sharding, mesh: Mesh,
            cluster: Cluster) -> tuple[float, tuple[Step, ...]]:
    axes = tuple(a for a in mesh.names if source.placement(a) != target.placement(a)
                 or source.placement(a) >= 0)  # one that stays may have to make room for another
    order = itertools.count()
    queue: list[tuple[float, int, int, Sharding, tuple[Step, ...]]] = [(0.0, 0, next(order), source, ())]
    done: set[Sharding] = set()
    while queue:
        cost, _, _, here, steps = heapq.heappop(queue)
        if here == target:
            return cost, steps
        if here in done:
            continue
        done.add(here)
        for step in _steps(here, type, mesh, axes, target):
            if step.result in done:
                continue
            whole = _whole_bytes(type, here, mesh, step.axis)
            more = transition(cluster, step.axis, mesh[step.axis], whole, step.source, step.target)
            heapq.heappush(queue, (cost + more, len(steps) + 1, next(order), step.result, (*steps, step)))
    raise MeshError(f"a value {type} cannot be brought from {source} to {target} on the mesh {mesh}")
