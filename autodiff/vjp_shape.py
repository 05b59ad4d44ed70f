"""Derivatives of the ops that move elements: each is undone, or scattered back."""

from __future__ import annotations

from typing import Any

from ..ir.context import emit
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .reverse import Cotangents, vjp


def _transpose(ct: Value, out: Value, x: Value, perm: tuple[int, ...]) -> Value:
    return emit("transpose", ct, perm=tuple(perm.index(i) for i in range(len(perm))))


def _concat(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    (ct,), axis = cotangents, node.attrs["axis"]
    grads: list[Value | None] = []
    start: Any = 0
    for operand, wanted in zip(node.operands, needed):
        limit = start + operand.shape[axis]
        grads.append(_along(ct, axis, start, limit) if ct is not None and wanted else None)
        start = limit
    return grads


def _along(x: Value, axis: int, start: Any, limit: Any) -> Value:
    starts = tuple(start if i == axis else 0 for i in range(x.rank))
    limits = tuple(limit if i == axis else s for i, s in enumerate(x.shape))
    return emit("slice", x, starts=starts, limits=limits, strides=(1,) * x.rank)


def _slice(ct: Value, out: Value, x: Value, starts: Any, limits: Any, strides: Any) -> Value:
    """Spread over the places it was read from. A negative stride reads backwards: turn the cotangent round."""
    backwards = tuple(i for i, step in enumerate(strides) if step < 0)
    if backwards:
        ct = emit("reverse", ct, axes=backwards)
    low, high, interior = [], [], []
    for size, count, start, step in zip(x.shape, out.shape, starts, strides):
        covered = (count - 1) * abs(step) + 1 if count != 0 else 0
        first = start if step > 0 or count == 0 else start + (count - 1) * step
        low.append(first if count != 0 else 0)
        interior.append(abs(step) - 1)
        high.append(size - low[-1] - covered)
    return emit("pad", ct, low=tuple(low), high=tuple(high), interior=tuple(interior), value=0.0)


def _pad(ct: Value, out: Value, x: Value, low: Any, high: Any, interior: Any, value: float) -> Value:
    """The places that x went to. Negative padding cropped x: those elements get zeros."""
    crop_low, crop_high = tuple(max(-a, 0) for a in low), tuple(max(-b, 0) for b in high)
    if any(crop_low) or any(crop_high):
        zeros = (0,) * x.rank
        ct = emit("pad", ct, low=crop_low, high=crop_high, interior=zeros, value=0.0)
    starts = tuple(max(a, 0) for a in low)
    strides = tuple(i + 1 for i in interior)
    limits = tuple(a + (s - 1) * step + 1 if s != 0 else a for a, s, step in zip(starts, x.shape, strides))
    return emit("slice", ct, starts=starts, limits=limits, strides=strides)


vjp("reshape", lambda ct, out, x, shape: emit("reshape", ct, shape=x.shape))
vjp("transpose", _transpose)
vjp("broadcast_to", lambda ct, out, x, shape: ct)
vjp("reverse", lambda ct, out, x, axes: emit("reverse", ct, axes=axes))
vjp("slice", _slice)
vjp("pad", _pad)
fill("vjp", "concat", _concat)
