"""The ops of the table in torch: `ANSWERS[op](*tensors, **attrs) -> tensor or tuple`. Needs the extra `oracle`.

Imported only by the recorder (record.py) and by tests marked `oracle`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F


def both_sides(padding: Any) -> list[int]:
    """Our ((low, high), ...) in the order of F.pad: last axis first."""
    return [n for pair in reversed(padding) for n in pair]


def conv(x: Any, w: Any, stride: Any, padding: Any, dilation: Any, groups: int, out_dtype: Any = None) -> Any:
    fn = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return fn(F.pad(x, both_sides(padding)), w, stride=stride, dilation=dilation, groups=groups)


def conv_input_grad(dy: Any, w: Any, input_spatial: Any, groups: int, **attrs: Any) -> Any:
    x = torch.zeros(dy.shape[0], w.shape[1] * groups, *input_spatial, dtype=dy.dtype)
    return torch.func.vjp(lambda v: conv(v, w, groups=groups, **attrs), x)[1](dy)[0]


def conv_weight_grad(x: Any, dy: Any, kernel_spatial: Any, groups: int, **attrs: Any) -> Any:
    w = torch.zeros(dy.shape[1], x.shape[1] // groups, *kernel_spatial, dtype=dy.dtype)
    return torch.func.vjp(lambda v: conv(x, v, groups=groups, **attrs), w)[1](dy)[0]


def max_pool(x: Any, window: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    fn = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    padded = F.pad(x, both_sides(padding), value=-math.inf)
    y, index = fn(padded, window, stride, 0, dilation, return_indices=True)
    place = torch.unravel_index(index, padded.shape[2:])
    flat = torch.zeros_like(index)
    inside = torch.ones_like(index, dtype=torch.bool)
    for p, (low, _), n in zip(place, padding, x.shape[2:]):
        inside &= (p >= low) & (p < low + n)
        flat = flat * n + p - low
    return y, torch.where(inside, flat, -1).to(torch.int32)


def max_pool_grad(dy: Any, indices: Any, input_spatial: Any) -> Any:
    flat = torch.zeros(*dy.shape[:2], math.prod(input_spatial) + 1, dtype=dy.dtype)
    spot = torch.where(indices < 0, math.prod(input_spatial), indices).long().flatten(2)
    return flat.scatter_add(2, spot, dy.flatten(2))[..., :-1].reshape(*dy.shape[:2], *input_spatial)


def avg_pool(x: Any, window: Any, stride: Any, padding: Any, count_include_pad: bool) -> Any:
    fn = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    mean = fn(F.pad(x, both_sides(padding)), window, stride)
    if count_include_pad:
        return mean
    share = fn(F.pad(torch.ones(1, 1, *x.shape[2:], dtype=x.dtype), both_sides(padding)), window, stride)
    return torch.where(share > 0, mean / share, 0)


def avg_pool_grad(dy: Any, input_spatial: Any, **attrs: Any) -> Any:
    x = torch.zeros(*dy.shape[:2], *input_spatial, dtype=dy.dtype)
    return torch.func.vjp(lambda v: avg_pool(v, **attrs), x)[1](dy)[0]


def layer_norm(x: Any, scale: Any, bias: Any, axes: int, eps: float) -> Any:
    return F.layer_norm(x, x.shape[x.dim() - axes:], scale, bias, eps)


def batch_norm(x: Any, scale: Any, bias: Any, eps: float) -> Any:
    axes = [0, *range(2, x.dim())]
    return (F.batch_norm(x, None, None, scale, bias, training=True, eps=eps), x.mean(axes),
            x.var(axes, correction=0))


def attention(q: Any, k: Any, v: Any, *mask: Any, scale: Any, causal: bool) -> Any:
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    k, v = (t.expand(*lead, *t.shape[-2:]) for t in (k, v))
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril() if causal else None
    if mask and causal:
        mask, causal = (mask[0] & visible,), False
    return F.scaled_dot_product_attention(q, k, v, *mask, scale=scale, is_causal=causal)


def cross_entropy(logits: Any, labels: Any, label_smoothing: float, ignore_index: Any) -> Any:
    ignore = -(10**9) if ignore_index is None else ignore_index
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long(), reduction="none",
                           label_smoothing=label_smoothing, ignore_index=ignore)
    return flat.reshape(labels.shape)


def matmul(x: Any, y: Any, transpose_x: bool, transpose_y: bool, out_dtype: Any) -> Any:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def reduced(fn: Any) -> Any:
    return lambda x, axes, keepdims: fn(x, axes, keepdim=keepdims) if axes else fn(x[None], 0)


ANSWERS = {
    "conv": conv, "conv_input_grad": conv_input_grad, "conv_weight_grad": conv_weight_grad,
    "max_pool": max_pool, "max_pool_grad": max_pool_grad, "avg_pool": avg_pool, "avg_pool_grad": avg_pool_grad,
    "softmax": lambda x, axis: torch.softmax(x, axis),
    "log_softmax": lambda x, axis: torch.log_softmax(x, axis),
    "logsumexp": reduced(torch.logsumexp),
    "layer_norm": layer_norm,
    "rms_norm": lambda x, scale, eps: F.rms_norm(x, x.shape[-1:], scale, eps),
    "group_norm": lambda x, scale, bias, groups, eps: F.group_norm(x, groups, scale, bias, eps),
    "batch_norm": batch_norm,
    "attention": attention,
    "cross_entropy": cross_entropy,
    "matmul": matmul,
    "erf": torch.erf, "erfc": torch.erfc, "sigmoid": torch.sigmoid, "softplus": F.softplus,
    "sort": lambda x, axis, descending: torch.sort(x, dim=axis, descending=descending, stable=True),
}


def answer(op: str, args: Any, attrs: Any) -> list[Any]:
    """torch's answer as NumPy arrays."""
    attrs = {k: v for k, v in attrs.items() if k != "channels_last"}  # see `comparable`
    result = ANSWERS[op](*(torch.from_numpy(a.copy()) for a in args), **attrs)
    return [t.numpy() for t in (result if isinstance(result, (tuple, list)) else (result,))]


def comparable(op: str, sample: Any) -> bool:
    """Whether torch defines the op on this sample as we do."""
    if op == "attention" and sample.label == "hidden":
        return False  # a query that sees nothing: torch's answer depends on its kernel
    if op == "batch_norm" and sample.args[0].shape[1] == 0:
        return False
    if op == "group_norm" and sample.args[0].shape[0] == 0:
        return False
    if sample.attrs.get("channels_last"):
        return False
    return sample.smooth and sample.label != "labels outside"
