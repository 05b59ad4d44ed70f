"""Recomputation: trade arithmetic for memory.

A `remat` region (what `checkpoint` in the frontend makes) keeps nothing but its operands for the backward pass. Its
rule runs the region again, on operands that went through a barrier together with the arriving cotangents: the barrier
keeps the common-subexpression pass from merging the two runs, and as its operands include the cotangents, no
scheduler can start the second run before the backward pass has come this far.

Chen et al., "Training deep nets with sublinear memory cost" (arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ir.builder import GraphBuilder, copy_into
from ..ir.context import emit
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .reverse import Cotangents, backward


def remat(body: Callable[..., Any], operands: Sequence[Value], name: str = "checkpoint") -> tuple[Value, ...]:
    """Emits `body(*operands)` as a region that is recomputed for its gradient. The body may use its arguments only."""
    with GraphBuilder(name) as builder:
        results = body(*(builder.input(v.type, v.name) for v in operands))
        builder.output(*([results] if isinstance(results, Value) else results))
    return several(emit("remat", *operands, regions=(builder.graph,)))


def several(results: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    return (results,) if isinstance(results, Value) else results


def _remat(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    arriving = [i for i, ct in enumerate(cotangents) if ct is not None]
    held = several(emit("barrier", *node.operands, *(ct for ct in cotangents if ct is not None)))
    operands, cts = held[:len(node.operands)], held[len(node.operands):]
    outputs = copy_into(node.regions[0], operands)
    found = iter(backward([outputs[i] for i in arriving], cts, [v for v, wanted in zip(operands, needed) if wanted]))
    return [next(found) if wanted else None for wanted in needed]


def _barrier(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    return list(cotangents)


fill("vjp", "remat", _remat)
fill("vjp", "barrier", _barrier)
