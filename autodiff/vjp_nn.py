"""Derivatives of the big ops, written out where that is cheaper than through their decompositions.

16-bit floats are computed in f32 and rounded once, as the forward ops do. What an op does not return (the
statistics of a norm, the weights of attention) is recomputed: a few flops instead of an array that lives from the
forward to the backward pass.

Sources: softmax and cross-entropy, Bridle 1990; batch norm, Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3;
layer norm has the same form over other axes; attention, Dao et al. 2022 (arXiv:2205.14135), appendix B.2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..ir.context import emit
from ..ir.dtypes import float32, int32
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .reverse import Cotangents, vjp
from .vjp_elementwise import compare, where
from .vjp_index import clamped
from .vjp_matmul import cast, contract
from .vjp_reduce import over_count

Gradients = list["Value | None"]


def wide(x: Value) -> Value:
    return cast(x, float32) if x.dtype.is_float and x.dtype.bits < 32 else x


def total(x: Value, axes: tuple[int, ...]) -> Value:
    return emit("reduce_sum", x, axes=axes, keepdims=True)


def mean(x: Value, axes: tuple[int, ...]) -> Value:
    return emit("reduce_mean", x, axes=axes, keepdims=True)


# --- softmax ---------------------------------------------------------------------------------------------


def _softmax(ct: Value, out: Value, x: Value, axis: int) -> Value:
    ct, p = wide(ct), wide(out)
    return cast(p * (ct - total(ct * p, (axis,))), x.dtype)


def _log_softmax(ct: Value, out: Value, x: Value, axis: int) -> Value:
    ct = wide(ct)
    return cast(ct - emit("exp", wide(out)) * total(ct, (axis,)), x.dtype)


vjp("softmax", _softmax)
vjp("log_softmax", _log_softmax)

# --- norms -----------------------------------------------------------------------------------------------
# With n = (x - mean) * r and r = 1 / sqrt(variance + eps), and g the cotangent of n:
# dx = r * (g - mean(g) - n * mean(g * n)).


def _standardized(x: Value, axes: tuple[int, ...], eps: float) -> tuple[Value, Value]:
    """n and r."""
    centered = x - mean(x, axes)
    r = emit("rsqrt", mean(emit("square", centered), axes) + eps)
    return centered * r, r


def _through_statistics(g: Value, n: Value, r: Value, axes: tuple[int, ...]) -> Value:
    return r * (g - mean(g, axes) - n * mean(g * n, axes))


def _layer_norm(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    (ct,), (x, scale, bias), rank = cotangents, node.operands, node.operands[0].rank
    assert ct is not None
    axes = tuple(range(rank - node.attrs["axes"], rank))
    batch = tuple(range(rank - node.attrs["axes"]))
    ct = wide(ct)
    n, r = _standardized(wide(x), axes, node.attrs["eps"])
    return [
        cast(_through_statistics(ct * wide(scale), n, r, axes), x.dtype) if needed[0] else None,
        cast(emit("reduce_sum", ct * n, axes=batch), scale.dtype) if needed[1] else None,
        cast(emit("reduce_sum", ct, axes=batch), bias.dtype) if needed[2] else None,
    ]


def _rms_norm(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    (ct,), (x, scale), rank = cotangents, node.operands, node.operands[0].rank
    assert ct is not None
    ct, last, batch = wide(ct), (rank - 1,), tuple(range(rank - 1))
    x_wide = wide(x)
    r = emit("rsqrt", mean(emit("square", x_wide), last) + node.attrs["eps"])
    n, g = x_wide * r, ct * wide(scale)
    return [
        cast(r * (g - n * mean(g * n, last)), x.dtype) if needed[0] else None,
        cast(emit("reduce_sum", ct * n, axes=batch), scale.dtype) if needed[1] else None,
    ]


def _per_channel(x: Value, rank: int) -> Value:
    return emit("reshape", x, shape=(1, x.type.size, *(1,) * (rank - 2)))


def _over_channels(x: Value) -> Value:
    """(N, C, ...) summed to (C,)."""
    return emit("reduce_sum", x, axes=(0, *range(2, x.rank)))


def _group_norm(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    (ct,), (x, scale, bias) = cotangents, node.operands
    assert ct is not None
    ct, groups, (batch, channels, *spatial) = wide(ct), node.attrs["groups"], x.shape
    split = (batch, groups, channels // groups, *spatial)
    axes = tuple(range(2, len(split)))
    n, r = _standardized(emit("reshape", wide(x), shape=split), axes, node.attrs["eps"])
    flat_n = emit("reshape", n, shape=x.shape)
    dx = dscale = None
    if needed[0]:
        g = emit("reshape", ct * _per_channel(wide(scale), x.rank), shape=split)
        dx = cast(emit("reshape", _through_statistics(g, n, r, axes), shape=x.shape), x.dtype)
    if needed[1]:
        dscale = cast(_over_channels(ct * flat_n), scale.dtype)
    return [dx, dscale, cast(_over_channels(ct), bias.dtype) if needed[2] else None]


def _batch_norm(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    """The statistics are results of the op, so nothing is recomputed, and the sums over the batch that dx needs are
    the gradients of scale and bias: two reductions in all."""
    (x, scale, _), (_, mu, variance), (ct, ct_mu, ct_variance) = node.operands, node.results, cotangents
    rank, axes = x.rank, (0, *range(2, x.rank))
    centered = wide(x) - _per_channel(mu, rank)
    r = _per_channel(emit("rsqrt", variance + node.attrs["eps"]), rank)
    n = centered * r
    dx = dscale = dbias = None
    if ct is not None:
        ct = wide(ct)
        dbias, dscale = _over_channels(ct), _over_channels(ct * n)
        pulled = over_count(_per_channel(dbias, rank) + n * _per_channel(dscale, rank), x, axes)
        dx = _per_channel(wide(scale), rank) * r * (ct - pulled)
    if ct_mu is not None:
        dx = _plus(dx, over_count(_per_channel(ct_mu, rank), x, axes))
    if ct_variance is not None:
        dx = _plus(dx, over_count(_per_channel(ct_variance, rank) * 2.0, x, axes) * centered)
    return [g if g is None else cast(g, v.dtype) for g, v in zip((dx, dscale, dbias), node.operands)]


def _plus(x: Value | None, y: Value) -> Value:
    return y if x is None else x + y


fill("vjp", "layer_norm", _layer_norm)
fill("vjp", "rms_norm", _rms_norm)
fill("vjp", "group_norm", _group_norm)
fill("vjp", "batch_norm", _batch_norm)

# --- attention -------------------------------------------------------------------------------------------


def attention_weights(q: Value, k: Value, mask: tuple[Value, ...], factor: float, causal: bool) -> Value:
    """softmax(q kᵀ * factor + mask), (..., queries, keys), f32 for 16-bit operands; 0 for a query that sees no key."""
    inner = q.dtype if q.dtype.bits >= 32 else float32
    scores = emit("matmul", q, k, transpose_y=True, out_dtype=inner) * factor
    for m in mask:
        scores = where(m, scores, -np.inf) if m.dtype.is_bool else scores + cast(m, inner)
    if causal:
        plane = scores.shape[-2:]
        query, key = (emit("iota", shape=plane, axis=axis, dtype=int32) for axis in (0, 1))
        scores = where(emit("le", key, query), scores, -np.inf)
    last = scores.rank - 1
    if not mask:  # a causal query sees the first key at least
        return emit("softmax", scores, axis=last)
    blind = compare("eq", emit("reduce_max", scores, axes=(last,), keepdims=True), -np.inf)
    return where(blind, 0.0, emit("softmax", where(blind, 0.0, scores), axis=last))


def _attention(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    """With P the weights and out = P V: dV = Pᵀ ct, dP = ct Vᵀ, dS = P * (dP - rowsum(ct * out)), dQ = dS K,
    dK = dSᵀ Q."""
    (ct,), (q, k, v, *mask) = cotangents, node.operands
    assert ct is not None
    scale = node.attrs["scale"]
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    p = attention_weights(q, k, tuple(mask), factor, node.attrs["causal"])
    grads: Gradients = [None] * len(node.operands)
    if needed[2]:
        grads[2] = contract("matmul", p, ct, v, transpose_x=True, transpose_y=False)
    if not (needed[0] or needed[1] or any(needed[3:])):
        return grads
    dp = emit("matmul", ct, v, transpose_y=True, out_dtype=p.dtype)
    ds = p * (dp - total(wide(ct) * wide(node.result), (p.rank - 1,)))
    if needed[0]:
        grads[0] = contract("matmul", ds * factor, k, q, transpose_x=False, transpose_y=False)
    if needed[1]:
        grads[1] = contract("matmul", ds * factor, q, k, transpose_x=True, transpose_y=False)
    for i, m in enumerate(mask, start=3):
        grads[i] = cast(ds, m.dtype) if needed[i] else None
    return grads


fill("vjp", "attention", _attention)

# --- losses ----------------------------------------------------------------------------------------------


def _cross_entropy(ct: Value, out: Value, logits: Value, labels: Value, label_smoothing: float,
                   ignore_index: int | None) -> Value:
    """softmax - target, where the target is the label mixed with the uniform distribution."""
    classes, dtype = logits.shape[-1], logits.dtype
    if ignore_index is not None and _holds(labels, ignore_index):
        ct = where(compare("eq", labels, ignore_index), 0.0, ct)
    p = emit("softmax", wide(logits), axis=logits.rank - 1)
    column = emit("reshape", cast(clamped(labels, classes), int32), shape=(*labels.shape, 1))
    hit = emit("eq", column, emit("iota", shape=(classes,), axis=0, dtype=int32))
    difference = where(hit, p - (1.0 - label_smoothing), p)
    if label_smoothing:
        difference = difference - over_count(emit("constant", value=np.asarray(label_smoothing, p.dtype.np)),
                                             logits, (logits.rank - 1,))
    return cast(emit("reshape", wide(ct), shape=(*ct.shape, 1)) * difference, dtype)


def _holds(labels: Value, number: int) -> bool:
    info: Any = np.iinfo(labels.dtype.np)
    return bool(info.min <= number <= info.max)


vjp("cross_entropy", _cross_entropy, None)
