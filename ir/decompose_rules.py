"""The slot `decompose`: big ops rewritten into simpler ones.

`rule(*operands, **attrs)` emits the simpler ops and returns the value that replaces the result (a tuple for an op
with several results). 16-bit floats are widened to f32 and the result rounded once, as the references do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ops  # noqa: F401  (the records whose slots are filled)
from .builder import emit
from .dtypes import as_dtype
from .graph import Value
from .opdef import fill

F32 = as_dtype("float32")
INT64 = as_dtype("int64")


def decomposes(name: str) -> Callable[..., Any]:
    """Puts the decorated rule into the slot `decompose` of an op."""
    return lambda rule: fill("decompose", name, rule)


def widened(rule: Callable[..., Value]) -> Callable[..., Value]:
    """A rule for f32 and f64, made to serve 16-bit floats by casting to f32 and back."""
    @functools.wraps(rule)
    def run(*operands: Value, **attrs: Any) -> Value:
        dtype = operands[0].dtype
        return cast(rule(*(wide(v) for v in operands), **attrs), dtype)
    return run


def wide(x: Value) -> Value:
    return cast(x, F32) if x.dtype.is_float and x.dtype.bits < 32 else x


def cast(x: Value, dtype: Any) -> Value:
    return x if x.dtype == dtype else emit("cast", x, dtype=as_dtype(dtype))


def reshape(x: Value, *shape: Any) -> Value:
    return emit("reshape", x, shape=tuple(shape))


def reduce(kind: str, x: Value, axes: tuple[int, ...], keepdims: bool = True) -> Value:
    return emit(f"reduce_{kind}", x, axes=axes, keepdims=keepdims)


def scalar(x: Any, like: Value) -> Value:
    return emit("constant", value=np.asarray(x, dtype=like.dtype.np))


# Softmax ---------------------------------------------------------------------------------------------------------

@decomposes("softmax")
@widened
def softmax_decompose(x: Value, axis: int) -> Value:
    e = emit("exp", x - reduce("max", x, (axis,)))
    return e / reduce("sum", e, (axis,))


@decomposes("log_softmax")
@widened
def log_softmax_decompose(x: Value, axis: int) -> Value:
    z = x - reduce("max", x, (axis,))
    return z - emit("log", reduce("sum", emit("exp", z), (axis,)))


@decomposes("logsumexp")
@widened
def logsumexp_decompose(x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    peak = reduce("max", x, axes)
    peak = emit("where", emit("isfinite", peak), peak, scalar(0, peak))
    total = emit("log", reduce("sum", emit("exp", x - peak), axes)) + peak
    return total if keepdims else reshape(total, *(s for i, s in enumerate(x.shape) if i not in axes))


# Normalisation ---------------------------------------------------------------------------------------------------

def normalized(x: Value, axes: tuple[int, ...], eps: float) -> tuple[Value, Value, Value]:
    mean = reduce("mean", x, axes)
    centered = x - mean
    variance = reduce("mean", emit("square", centered), axes)
    return centered / emit("sqrt", variance + eps), mean, variance


def per_channel(parameter: Value, rank: int) -> Value:
    return reshape(parameter, 1, parameter.shape[0], *(1,) * (rank - 2))


@decomposes("layer_norm")
@widened
def layer_norm_decompose(x: Value, scale: Value, bias: Value, axes: int, eps: float) -> Value:
    return normalized(x, tuple(range(x.rank - axes, x.rank)), eps)[0] * scale + bias


@decomposes("rms_norm")
@widened
def rms_norm_decompose(x: Value, scale: Value, eps: float) -> Value:
    return x / emit("sqrt", reduce("mean", emit("square", x), (x.rank - 1,)) + eps) * scale


@decomposes("group_norm")
@widened
def group_norm_decompose(x: Value, scale: Value, bias: Value, groups: int, eps: float) -> Value:
    batch, channels, *spatial = x.shape
    grouped = reshape(x, batch, groups, channels // groups, *spatial)
    y = reshape(normalized(grouped, tuple(range(2, grouped.rank)), eps)[0], *x.shape)
    return y * per_channel(scale, x.rank) + per_channel(bias, x.rank)


@decomposes("batch_norm")
def batch_norm_decompose(x: Value, scale: Value, bias: Value, eps: float) -> tuple[Value, Value, Value]:
    y, mean, variance = normalized(wide(x), (0, *range(2, x.rank)), eps)
    y = y * per_channel(wide(scale), x.rank) + per_channel(wide(bias), x.rank)
    channels = x.shape[1]
    return cast(y, x.dtype), reshape(mean, channels), reshape(variance, channels)


# Attention -------------------------------------------------------------------------------------------------------

@decomposes("attention")
def attention_decompose(q: Value, k: Value, v: Value, *mask: Value, scale: float | None, causal: bool) -> Value:
    """Scores, weights and their sum in f32 for 16-bit operands; -inf where a key is not visible."""
    inner = F32 if q.dtype.bits < 32 else q.dtype
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    scores = emit("matmul", q, k, transpose_y=True, out_dtype=None if inner == q.dtype else inner) * factor
    hidden = scalar(-np.inf, scores)
    for m in mask:
        scores = emit("where", m, scores, hidden) if m.dtype.is_bool else scores + cast(m, inner)
    if causal:
        plane = scores.shape[-2:]
        query, key = (emit("iota", shape=plane, axis=axis, dtype=INT64) for axis in (0, 1))
        scores = emit("where", emit("le", key, query), scores, hidden)
    last = (scores.rank - 1,)
    peak = reduce("max", scores, last)
    weights = emit("exp", scores - emit("where", emit("eq", peak, hidden), scalar(0, peak), peak))
    total = reduce("sum", weights, last)
    weights = weights / emit("where", emit("eq", total, scalar(0, total)), scalar(1, total), total)
    return cast(emit("matmul", weights, cast(v, inner)), q.dtype)


# Cross-entropy ---------------------------------------------------------------------------------------------------

@decomposes("cross_entropy")
def cross_entropy_decompose(logits: Value, labels: Value, label_smoothing: float,
                            ignore_index: int | None) -> Value:
    log_p = emit("log_softmax", wide(logits), axis=logits.rank - 1)
    index = reshape(labels, *labels.shape, 1)
    picked = emit("take_along_axis", log_p, index, axis=logits.rank - 1)
    loss = emit("neg", reshape(picked, *labels.shape))
    if label_smoothing:
        mean = reduce("mean", log_p, (logits.rank - 1,), keepdims=False)
        loss = loss * float(1 - label_smoothing) - mean * float(label_smoothing)
    if ignore_index is not None and fits(ignore_index, labels.dtype):
        ignored = emit("eq", labels, scalar(ignore_index, labels))
        loss = emit("where", ignored, scalar(0, loss), loss)
    return cast(loss, logits.dtype)


def fits(number: int, dtype: Any) -> bool:
    info = np.iinfo(dtype.np)
    return bool(info.min <= number <= info.max)


# Order -----------------------------------------------------------------------------------------------------------

@decomposes("top_k")
def top_k_decompose(x: Value, k: int, axis: int, largest: bool) -> tuple[Value, ...]:
    """The first k of the sorted axis."""
    zeros, ones = (0,) * x.rank, (1,) * x.rank
    limits = tuple(k if i == axis else s for i, s in enumerate(x.shape))
    return tuple(emit("slice", v, starts=zeros, limits=limits, strides=ones)
                 for v in emit("sort", x, axis=axis, descending=largest))


# Sizes that data decide --------------------------------------------------------------------------------------------

@decomposes("true_places")
def true_places_decompose(mask: Value, size: Any) -> Value:
    """Each true element knows its place in the result: how many are true before it. The others go nowhere."""
    (n,) = mask.shape
    before = emit("cumsum", cast(mask, INT64), axis=0) - 1
    place = emit("where", mask, before, emit("broadcast_to", scalar(-1, before), shape=(n,)))
    empty = emit("broadcast_to", scalar(0, before), shape=(size,))
    return emit("scatter_nd", empty, reshape(place, n, 1), emit("iota", shape=(n,), axis=0, dtype=INT64))
