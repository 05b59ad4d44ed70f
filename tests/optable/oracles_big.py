"""Oracles of shape ops, indexing, contraction, windows, networks, creation, control. See oracles.py."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .oracles import ORACLES, oracle

# Shape: each result element is looked up by its index -----------------------------------------------------------------


def looked_up(shape: Any, dtype: Any, fn: Any) -> Any:
    out = np.empty(shape, dtype)
    for index in np.ndindex(*shape):
        out[index] = fn(*index)
    return out


ORACLES["reshape"] = lambda x, shape: np.array(x.ravel().tolist(), x.dtype).reshape(shape)


@oracle("concat")
def concat(*xs: Any, axis: int) -> Any:
    slabs = [slab for x in xs for slab in np.moveaxis(x, axis, 0)]
    rest = np.delete(xs[0].shape, axis)
    return np.moveaxis(np.array(slabs, xs[0].dtype).reshape(len(slabs), *rest), 0, axis)


@oracle("transpose")
def transpose(x: Any, perm: Any) -> Any:
    return looked_up([x.shape[p] for p in perm], x.dtype, lambda *i: x[tuple(i[perm.index(a)] for a in range(x.ndim))])


@oracle("broadcast_to")
def broadcast_to(x: Any, shape: Any) -> Any:
    skip = len(shape) - x.ndim
    return looked_up(shape, x.dtype, lambda *i: x[tuple(0 if n == 1 else p for n, p in zip(x.shape, i[skip:]))])


@oracle("slice")
def slice_(x: Any, starts: Any, limits: Any, strides: Any) -> Any:
    places = [range(*triple) for triple in zip(starts, limits, strides)]
    return looked_up([len(p) for p in places], x.dtype, lambda *i: x[tuple(p[j] for p, j in zip(places, i))])


@oracle("pad")
def pad(x: Any, low: Any, high: Any, interior: Any, value: Any) -> Any:
    shape = [lo + hi + (n + g * (n - 1) if n else 0) for n, lo, hi, g in zip(x.shape, low, high, interior)]
    out = np.full(shape, value, x.dtype)
    for index in np.ndindex(*x.shape):
        place = tuple(lo + i * (g + 1) for i, lo, g in zip(index, low, interior))
        if all(0 <= p < n for p, n in zip(place, shape)):
            out[place] = x[index]
    return out


@oracle("reverse")
def reverse(x: Any, axes: Any) -> Any:
    return looked_up(x.shape, x.dtype, lambda *i: x[tuple(n - 1 - p if a in axes else p
                                                          for a, (p, n) in enumerate(zip(i, x.shape)))])


# Indexing --------------------------------------------------------------------------------------------------------

def clamp(i: Any, size: int) -> int:
    return min(max(int(i), 0), size - 1)


@oracle("take")
def take(x: Any, indices: Any, axis: int) -> Any:
    r = indices.ndim
    return looked_up((*x.shape[:axis], *indices.shape, *x.shape[axis + 1:]), x.dtype,
                     lambda *i: x[(*i[:axis], clamp(indices[i[axis:axis + r]], x.shape[axis]), *i[axis + r:])])


@oracle("scatter_add")
def scatter_add(x: Any, indices: Any, updates: Any, axis: int) -> Any:
    out, r = x.copy(), indices.ndim
    for i in np.ndindex(*updates.shape):
        place = int(indices[i[axis:axis + r]])
        if 0 <= place < x.shape[axis]:
            out[(*i[:axis], place, *i[axis + r:])] += updates[i]
    return out


@oracle("take_along_axis")
def take_along_axis(x: Any, indices: Any, axis: int) -> Any:
    return looked_up(indices.shape, x.dtype,
                     lambda *i: x[(*i[:axis], clamp(indices[i], x.shape[axis]), *i[axis + 1:])])


@oracle("scatter_add_along_axis")
def scatter_add_along_axis(x: Any, indices: Any, updates: Any, axis: int) -> Any:
    out = x.copy()
    for i in np.ndindex(*indices.shape):
        if 0 <= indices[i] < x.shape[axis]:
            out[(*i[:axis], int(indices[i]), *i[axis + 1:])] += updates[i]
    return out


@oracle("gather_nd")
def gather_nd(x: Any, indices: Any) -> Any:
    out = np.empty((*indices.shape[:-1], *x.shape[indices.shape[-1]:]), x.dtype)
    for i in np.ndindex(*indices.shape[:-1]):
        out[i] = x[tuple(clamp(p, n) for p, n in zip(indices[i], x.shape))]
    return out


def scatter_nd(add: bool) -> Any:
    def run(x: Any, indices: Any, updates: Any) -> Any:
        out = x.copy()
        for i in np.ndindex(*indices.shape[:-1]):
            place = tuple(map(int, indices[i]))
            if all(0 <= p < n for p, n in zip(place, x.shape)):
                out[place] = out[place] + updates[i] if add else updates[i]
        return out
    return run


ORACLES["scatter_add_nd"], ORACLES["scatter_nd"] = scatter_nd(True), scatter_nd(False)


@oracle("dynamic_slice")
def dynamic_slice(x: Any, *starts: Any, sizes: Any) -> Any:
    first = [clamp(s, n - size + 1) for s, n, size in zip(starts, x.shape, sizes)]
    return looked_up(sizes, x.dtype, lambda *i: x[tuple(f + p for f, p in zip(first, i))])


@oracle("dynamic_update_slice")
def dynamic_update_slice(x: Any, update: Any, *starts: Any) -> Any:
    out = x.copy()
    first = [clamp(s, n - size + 1) for s, n, size in zip(starts, x.shape, update.shape)]
    for i in np.ndindex(*update.shape):
        out[tuple(f + p for f, p in zip(first, i))] = update[i]
    return out


@oracle("one_hot")
def one_hot(indices: Any, depth: int, dtype: Any) -> Any:
    return looked_up((*indices.shape, depth), np.int64, lambda *i: int(indices[i[:-1]] == i[-1]))


# Contraction and windows -----------------------------------------------------------------------------------------

@oracle("matmul")
def matmul(x: Any, y: Any, transpose_x: bool, transpose_y: bool, out_dtype: Any) -> Any:
    if x.dtype.kind in "iu":
        x, y = x.astype(np.int64), y.astype(np.int64)
    return np.einsum(f"...{'ki' if transpose_x else 'ik'},...{'jk' if transpose_y else 'kj'}->...ij", x, y)


def taps(spatial: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """(place in the input, place in the kernel, place in the output) of every product of a convolution."""
    out = [(n + lo + hi - d * (k - 1) - 1) // s + 1
           for n, k, s, (lo, hi), d in zip(spatial, kernel, stride, padding, dilation)]
    for o in np.ndindex(*out):
        for k in np.ndindex(*kernel):
            place = tuple(a * s + b * d - lo for a, b, s, d, (lo, _) in zip(o, k, stride, dilation, padding))
            if all(0 <= p < n for p, n in zip(place, spatial)):
                yield (slice(None), slice(None), *place), (slice(None), slice(None), *k), (slice(None), slice(None), *o)


def blocks(channels: int, outputs: int, groups: int) -> Any:
    for g in range(groups):
        yield (slice(g * channels // groups, (g + 1) * channels // groups),
               slice(g * outputs // groups, (g + 1) * outputs // groups))


def in_both_layouts(activations: Any, results: Any) -> Any:
    """An oracle for both layouts from one for channels first."""
    def decorate(first: Any) -> Any:
        @functools.wraps(first)
        def both(*args: Any, channels_last: bool = False, **attrs: Any) -> Any:
            if not channels_last:
                return first(*args, **attrs)
            given = first(*(np.moveaxis(x, -1, 1) if i in activations else x for i, x in enumerate(args)), **attrs)
            listed = given if isinstance(given, tuple) else (given,)
            return tuple(np.moveaxis(y, 1, -1) if i in results else y for i, y in enumerate(listed))
        return both
    return decorate


@oracle("conv")
@in_both_layouts((0,), (0,))
def conv(x: Any, w: Any, stride: Any, padding: Any, dilation: Any, groups: int, out_dtype: Any) -> Any:
    out = [(n + lo + hi - d * (k - 1) - 1) // s + 1
           for n, k, s, (lo, hi), d in zip(x.shape[2:], w.shape[2:], stride, padding, dilation)]
    y = np.zeros((x.shape[0], w.shape[0], *out))
    for i, k, o in taps(x.shape[2:], w.shape[2:], stride, padding, dilation):
        for c, f in blocks(x.shape[1], w.shape[0], groups):
            y[o][:, f] += x[i][:, c] @ w[k][f].T
    return y


@oracle("conv_input_grad")
@in_both_layouts((0,), (0,))
def conv_input_grad(dy: Any, w: Any, input_spatial: Any, stride: Any, padding: Any, dilation: Any, groups: int,
                    out_dtype: Any) -> Any:
    dx = np.zeros((dy.shape[0], w.shape[1] * groups, *input_spatial))
    for i, k, o in taps(input_spatial, w.shape[2:], stride, padding, dilation):
        for c, f in blocks(dx.shape[1], w.shape[0], groups):
            dx[i][:, c] += dy[o][:, f] @ w[k][f]
    return dx


@oracle("conv_weight_grad")
@in_both_layouts((0, 1), ())
def conv_weight_grad(x: Any, dy: Any, kernel_spatial: Any, stride: Any, padding: Any, dilation: Any, groups: int,
                     out_dtype: Any) -> Any:
    dw = np.zeros((dy.shape[1], x.shape[1] // groups, *kernel_spatial))
    for i, k, o in taps(x.shape[2:], kernel_spatial, stride, padding, dilation):
        for c, f in blocks(x.shape[1], dy.shape[1], groups):
            dw[k][f] += dy[o][:, f].T @ x[i][:, c]
    return dw


def pooled(x: Any, window: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """(result shape, {place in the result: places in the input})."""
    out = [(n + lo + hi - d * (k - 1) - 1) // s + 1
           for n, k, s, (lo, hi), d in zip(x, window, stride, padding, dilation)]
    seen: dict[Any, list[Any]] = {o: [] for o in np.ndindex(*out)}
    for i, _, o in taps(x, window, stride, padding, dilation):
        seen[o[2:]].append(i[2:])
    return out, seen


@oracle("max_pool")
@in_both_layouts((0,), (0, 1))
def max_pool(x: Any, window: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    out, seen = pooled(x.shape[2:], window, stride, padding, dilation)
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    y, index = np.full((*x.shape[:2], *out), lowest, x.dtype), np.full((*x.shape[:2], *out), -1)
    for lead in np.ndindex(*x.shape[:2]):
        for o, places in seen.items():
            values = [x[(*lead, *p)] for p in places]
            if values:
                best = next((j for j, v in enumerate(values) if v != v), None)
                best = values.index(max(values)) if best is None else best
                y[(*lead, *o)] = values[best]
                index[(*lead, *o)] = np.ravel_multi_index(places[best], x.shape[2:])
    return y, index


@oracle("max_pool_grad")
@in_both_layouts((0, 1), (0,))
def max_pool_grad(dy: Any, indices: Any, input_spatial: Any) -> Any:
    dx = np.zeros((*dy.shape[:2], math.prod(input_spatial)), dy.dtype)
    for i in np.ndindex(*dy.shape):
        if indices[i] >= 0:
            dx[(*i[:2], indices[i])] += dy[i]
    return dx.reshape(*dy.shape[:2], *input_spatial)


@oracle("avg_pool")
@in_both_layouts((0,), (0,))
def avg_pool(x: Any, window: Any, stride: Any, padding: Any, count_include_pad: bool) -> Any:
    out, seen = pooled(x.shape[2:], window, stride, padding, (1,) * len(window))
    y = np.zeros((*x.shape[:2], *out))
    for o, places in seen.items():
        count = math.prod(window) if count_include_pad else max(len(places), 1)
        for p in places:
            y[(..., *o)] += x[(..., *p)] / count
    return y


@oracle("avg_pool_grad")
@in_both_layouts((0,), (0,))
def avg_pool_grad(dy: Any, input_spatial: Any, window: Any, stride: Any, padding: Any, count_include_pad: bool) -> Any:
    _, seen = pooled(input_spatial, window, stride, padding, (1,) * len(window))
    dx = np.zeros((*dy.shape[:2], *input_spatial))
    for o, places in seen.items():
        for p in places:
            dx[(..., *p)] += dy[(..., *o)] / (math.prod(window) if count_include_pad else len(places))
    return dx


# Networks --------------------------------------------------------------------------------------------------------

def log_sum(x: Any, axis: int) -> Any:
    return np.logaddexp.reduce(x, axis=axis, keepdims=True)


ORACLES["softmax"] = lambda x, axis: np.exp(x - log_sum(x, axis))
ORACLES["log_softmax"] = lambda x, axis: x - log_sum(x, axis)


def moments(x: Any, axes: Any) -> tuple[Any, Any]:
    return x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)


@oracle("layer_norm")
def layer_norm(x: Any, scale: Any, bias: Any, axes: int, eps: float) -> Any:
    mean, variance = moments(x, tuple(range(-axes, 0)))
    return (x - mean) * (variance + eps) ** -0.5 * scale + bias


ORACLES["rms_norm"] = lambda x, scale, eps: x * ((x**2).mean(-1, keepdims=True) + eps) ** -0.5 * scale


def broadcastable(v: Any, x: Any) -> Any:
    return v.reshape(-1, *(1,) * (x.ndim - 2))


@oracle("group_norm")
def group_norm(x: Any, scale: Any, bias: Any, groups: int, eps: float) -> Any:
    parts = []
    for part in np.split(x, groups, axis=1):
        mean, variance = moments(part, tuple(range(1, x.ndim)))
        parts.append((part - mean) / (variance + eps) ** 0.5)
    return np.concatenate(parts, 1) * broadcastable(scale, x) + broadcastable(bias, x)


@oracle("batch_norm")
def batch_norm(x: Any, scale: Any, bias: Any, eps: float) -> Any:
    mean, variance = moments(x, (0, *range(2, x.ndim)))
    y = (x - mean) / (variance + eps) ** 0.5 * broadcastable(scale, x) + broadcastable(bias, x)
    return y, mean.ravel(), variance.ravel()


@oracle("attention")
def attention(q: Any, k: Any, v: Any, *mask: Any, scale: Any, causal: bool) -> Any:
    scores = np.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    for m in mask:
        scores = np.where(m, scores, -np.inf) if m.dtype == bool else scores + m
    if causal:
        later = np.arange(k.shape[-2])[None, :] > np.arange(q.shape[-2])[:, None]
        scores = np.where(later, -np.inf, scores)
    weights = np.where(scores == -np.inf, 0, np.exp(scores - log_sum(scores, -1)))
    return np.einsum("...ij,...jd->...id", weights, v)


@oracle("cross_entropy")
def cross_entropy(logits: Any, labels: Any, label_smoothing: float, ignore_index: Any) -> Any:
    classes = logits.shape[-1]
    out = np.zeros(labels.shape)
    for i in np.ndindex(*labels.shape):
        if labels[i] != ignore_index:
            target = np.full(classes, label_smoothing / classes)
            target[clamp(labels[i], classes)] += 1 - label_smoothing
            out[i] = -(target * (logits[i] - np.logaddexp.reduce(logits[i]))).sum()
    return out


# Creation --------------------------------------------------------------------------------------------------------

ORACLES["constant"] = lambda value: value
ORACLES["size"] = lambda of: np.int64(of)
ORACLES["true_places"] = lambda mask, size: np.array(([i for i, m in enumerate(mask) if m] + [0] * size)[:size], int)
ORACLES["iota"] = lambda shape, axis, dtype: looked_up(shape, np.int64, lambda *i: i[axis])


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python's integers, as in the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@oracle("random_bits")
def random_bits(state: Any, offset: int, shape: Any) -> Any:
    key, start = int(state[0]), int(state[1])
    words: list[int] = []
    while len(words) < math.prod(shape):
        counter = (start + offset + len(words) // 4) % 2**64
        words += philox([counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32])
    return np.array(words[:math.prod(shape)], np.uint32).reshape(shape)


# Control: the programs of samples_big.py, in Python -----------------------------------------------------------------

ORACLES["cond"] = lambda pred, a, b: (np.sin(a) * b, a) if pred else (a - b, b)


ORACLES["remat"] = lambda a, b: (np.sin(a) * b, a + b)
ORACLES["barrier"] = lambda *xs: xs


@oracle("while_loop")
def while_loop(i: Any, x: Any, n: Any, c: Any, n_carry: int) -> Any:
    for _ in range(int(n)):
        x = np.sin(x) * c
    return n, x


@oracle("scan")
def scan(h: Any, xs: Any, w: Any, length: int, reverse: bool, **_: Any) -> Any:
    ys = np.zeros((length, *h.shape))
    for i in range(length)[::-1] if reverse else range(length):
        h = np.tanh(h @ w + xs[i])
        ys[i] = h**2
    return h, ys
