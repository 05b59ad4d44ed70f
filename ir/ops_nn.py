"""Big ops of neural networks. They stay whole until lowering; each has a decomposition (ir/decompose_rules.py).

Results have the dtype of the first operand; everything between is computed in f32 for 16-bit floats.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .ops_common import (
    REQUIRED,
    Shape,
    TensorType,
    as_dtype,
    broadcast_shapes,
    broadcasts_to,
    check_axis,
    check_flag,
    check_index,
    check_ints,
    check_same_dtype,
    define,
    f32,
    fail_attr,
    fail_dtype,
    fail_shape,
    in_f32,
    is_narrow,
    listing,
    per_element,
    same_size,
    shape_text,
)
from .ops_elementwise import POLYNOMIAL, check_accepts


def check_eps(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or eps < 0:
        fail_attr(f"eps is {eps!r}; expected a number >= 0")


def check_parameters(x: TensorType, shape: Shape, **parameters: TensorType) -> None:
    """Scale and bias of a normalisation: the dtype of x, and the given shape."""
    for name, parameter in parameters.items():
        check_same_dtype(x, parameter)
        if parameter.rank != len(shape) or not all(map(same_size, parameter.shape, shape)):
            fail_shape(f"{name} is {parameter}; expected the shape {shape_text(shape)} for {x}")


# Softmax ---------------------------------------------------------------------------------------------------------

def softmax_infer(x: TensorType, axis: Any) -> TensorType:
    check_accepts("float", x)
    check_axis(axis, x.rank)
    return x


def _shifted(x: Any, axis: Any) -> Any:
    return x - np.max(x, axis=axis, keepdims=True, initial=-np.inf)


@in_f32
def softmax_reference(x: Any, axis: Any) -> Any:
    e = np.exp(_shifted(x, axis))
    return e / np.sum(e, axis=axis, keepdims=True)


@in_f32
def log_softmax_reference(x: Any, axis: Any) -> Any:
    z = _shifted(x, axis)
    return z - np.log(np.sum(np.exp(z), axis=axis, keepdims=True))


define("softmax", "x", softmax_infer, softmax_reference, "exp(x) / sum(exp(x)) along an axis, without overflow.",
       attrs={"axis": REQUIRED}, flops=per_element(POLYNOMIAL + 4))
define("log_softmax", "x", softmax_infer, log_softmax_reference, "Logarithm of softmax, without overflow.",
       attrs={"axis": REQUIRED}, flops=per_element(POLYNOMIAL + 4))


# Normalisation ---------------------------------------------------------------------------------------------------

def normalized(x: Any, axes: Any, eps: Any) -> tuple[Any, Any, Any]:
    """x with mean 0 and variance 1 over axes, the mean and the (biased) variance."""
    mean = np.mean(x, axis=axes, keepdims=True, dtype=x.dtype)
    centered = x - mean
    variance = np.mean(centered * centered, axis=axes, keepdims=True, dtype=x.dtype)
    return centered / np.sqrt(variance + x.dtype.type(eps)), mean, variance


def layer_norm_infer(x: TensorType, scale: TensorType, bias: TensorType, axes: Any, eps: Any) -> TensorType:
    check_accepts("float", x)
    check_eps(eps)
    check_ints("(axes,)", (axes,), 1, least=1)
    if axes > x.rank:
        fail_attr(f"axes is {axes}: normalises over that many trailing axes, but {x} has {x.rank}")
    check_parameters(x, x.shape[x.rank - axes:], scale=scale, bias=bias)
    return x


@in_f32
def layer_norm_reference(x: Any, scale: Any, bias: Any, axes: Any, eps: Any) -> Any:
    return normalized(x, tuple(range(x.ndim - axes, x.ndim)), eps)[0] * scale + bias


define("layer_norm", "x scale bias", layer_norm_infer, layer_norm_reference,
       "x normalised over its last `axes` axes, times scale plus bias (both of the shape of those axes).",
       attrs={"axes": 1, "eps": 1e-5}, flops=per_element(8))


def rms_norm_infer(x: TensorType, scale: TensorType, eps: Any) -> TensorType:
    check_accepts("float", x)
    check_eps(eps)
    if not x.rank:
        fail_shape(f"needs at least rank 1, got {x}")
    check_parameters(x, x.shape[-1:], scale=scale)
    return x


@in_f32
def rms_norm_reference(x: Any, scale: Any, eps: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=x.dtype) + x.dtype.type(eps)) * scale


define("rms_norm", "x scale", rms_norm_infer, rms_norm_reference,
       "x / sqrt(mean(x*x) + eps) * scale over the last axis.", attrs={"eps": 1e-6}, flops=per_element(5))


def check_channels(x: TensorType) -> None:
    if x.rank < 2:
        fail_shape(f"needs at least rank 2, (batch, channels, ...), got {x}")


def group_norm_infer(x: TensorType, scale: TensorType, bias: TensorType, groups: Any, eps: Any) -> TensorType:
    check_accepts("float", x)
    check_eps(eps)
    check_channels(x)
    check_ints("(groups,)", (groups,), 1, least=1)
    if isinstance(x.shape[1], int) and x.shape[1] % groups:
        fail_shape(f"the {x.shape[1]} channels of {x} are not a multiple of groups={groups}")
    check_parameters(x, x.shape[1:2], scale=scale, bias=bias)
    return x


def per_channel(parameter: Any, rank: int) -> Any:
    return parameter.reshape(1, -1, *(1,) * (rank - 2))


@in_f32
def group_norm_reference(x: Any, scale: Any, bias: Any, groups: Any, eps: Any) -> Any:
    grouped = x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    y = normalized(grouped, 2, eps)[0].reshape(x.shape)
    return y * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)


define("group_norm", "x scale bias", group_norm_infer, group_norm_reference,
       "x (N, C, ...) normalised over groups of channels and all spatial axes, times scale plus bias (both (C,)).",
       attrs={"groups": REQUIRED, "eps": 1e-5}, flops=per_element(8))


def statistics_dtype(dtype: Any) -> Any:
    """The dtype of batch statistics: f32 for 16-bit floats, whose digits would not carry a running mean."""
    return as_dtype("float32") if is_narrow(as_dtype(dtype).np) else as_dtype(dtype)


def batch_norm_infer(x: TensorType, scale: TensorType, bias: TensorType, eps: Any) -> tuple[TensorType, ...]:
    check_accepts("float", x)
    check_eps(eps)
    check_channels(x)
    check_parameters(x, x.shape[1:2], scale=scale, bias=bias)
    moment = TensorType(x.shape[1:2], statistics_dtype(x.dtype))
    return x, moment, moment


def batch_norm_reference(x: Any, scale: Any, bias: Any, eps: Any) -> Any:
    inner = statistics_dtype(x.dtype).np
    axes = (0, *range(2, x.ndim))
    y, mean, variance = normalized(x.astype(inner, copy=False), axes, eps)
    y = y * per_channel(scale.astype(inner), x.ndim) + per_channel(bias.astype(inner), x.ndim)
    return y.astype(x.dtype, copy=False), mean.reshape(-1), variance.reshape(-1)


define("batch_norm", "x scale bias", batch_norm_infer, batch_norm_reference,
       "(y, mean, variance) of x (N, C, ...) normalised over all axes but the channels, times scale plus bias (both "
       "(C,)). The statistics are (C,), biased, and f32 for 16-bit x.", attrs={"eps": 1e-5}, flops=per_element(8))


# Attention -------------------------------------------------------------------------------------------------------

def attention_infer(q: TensorType, k: TensorType, v: TensorType, *mask: TensorType, scale: Any,
                    causal: Any) -> TensorType:
    check_accepts("float", q)
    check_same_dtype(q, k, v)
    check_flag(causal=causal)
    if min(q.rank, k.rank, v.rank) < 2:
        fail_shape(f"{listing(q, k, v)}: queries, keys and values need at least rank 2, (..., length, features)")
    if not same_size(q.shape[-1], k.shape[-1]) or not same_size(k.shape[-2], v.shape[-2]):
        fail_shape(f"{listing(q, k, v)}: queries and keys need one feature size, keys and values one length")
    if scale is None and not isinstance(q.shape[-1], int):
        fail_attr(f"scale is None, but the feature size of {q} is symbolic; give a number")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        fail_attr(f"scale is {scale!r}; expected a number or None, for 1 / sqrt(features)")
    lead = broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    _check_mask((*lead, q.shape[-2], k.shape[-2]), q, mask)
    return q.with_shape((*lead, q.shape[-2], v.shape[-1]))


def _check_mask(scores: Shape, q: TensorType, mask: tuple[TensorType, ...]) -> None:
    if len(mask) > 1:
        fail_shape(f"takes one mask at most, got {listing(*mask)}")
    for m in mask:
        if not m.dtype.is_bool and m.dtype != q.dtype:
            fail_dtype(f"the mask is {m}; expected bool (True: visible), or {q.dtype} to add to the scores")
        if not broadcasts_to(m.shape, scores):
            fail_shape(f"the mask {m} does not broadcast to the scores {shape_text(scores)}")


@in_f32
def attention_reference(q: Any, k: Any, v: Any, *mask: Any, scale: Any, causal: Any) -> Any:
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) * q.dtype.type(factor)
    for m in mask:
        scores = np.where(m, scores, -np.inf) if m.dtype == bool else scores + m
    if causal:
        scores = np.where(np.tri(q.shape[-2], k.shape[-2], dtype=bool), scores, -np.inf)
    scores = scores.astype(q.dtype, copy=False)
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(peak == -np.inf, q.dtype.type(0), peak))
    total = np.sum(weights, axis=-1, keepdims=True)
    return np.matmul(weights / np.where(total == 0, q.dtype.type(1), total), v)


def _attention_flops(node: Any) -> Any:
    q, k, v = (o.type for o in node.operands[:3])
    pairs = math.prod(node.result.shape[:-1]) * k.shape[-2]
    return pairs * (2 * q.shape[-1] + 2 * v.shape[-1] + POLYNOMIAL) // (2 if node.attrs["causal"] else 1)


define("attention", "q k v *mask", attention_infer, attention_reference,
       "softmax(q k^T * scale + mask) v on (..., length, features); leading axes broadcast. A bool mask says what is "
       "visible, one of q's dtype is added; causal: query i sees keys 0..i. A query that sees no key gives 0. "
       "scale None: 1 / sqrt(features).",
       attrs={"scale": None, "causal": False}, flops=_attention_flops)


# Cross-entropy ---------------------------------------------------------------------------------------------------

def cross_entropy_infer(logits: TensorType, labels: TensorType, label_smoothing: Any,
                        ignore_index: Any) -> TensorType:
    check_accepts("float", logits)
    check_index(labels)
    if not logits.rank or labels.rank != logits.rank - 1 or not all(map(same_size, labels.shape, logits.shape)):
        fail_shape(f"logits {logits} with labels {labels}: expected labels of the shape "
                   f"{shape_text(logits.shape[:-1])}, class numbers below the last size of the logits")
    if logits.shape[-1] == 0:
        fail_shape(f"logits {logits} have no classes")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)) \
            or not 0 <= label_smoothing <= 1:
        fail_attr(f"label_smoothing is {label_smoothing!r}; expected a number in [0, 1]")
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        fail_attr(f"ignore_index is {ignore_index!r}; expected an int or None")
    return logits.with_shape(logits.shape[:-1])


def cross_entropy_reference(logits: Any, labels: Any, label_smoothing: Any, ignore_index: Any) -> Any:
    dtype = logits.dtype
    wide = logits.astype(f32) if is_narrow(dtype) else logits
    log_p = wide - np.max(wide, axis=-1, keepdims=True, initial=-np.inf)
    log_p = log_p - np.log(np.sum(np.exp(log_p), axis=-1, keepdims=True))
    index = np.clip(labels.astype(np.int64), 0, logits.shape[-1] - 1)
    loss = -np.take_along_axis(log_p, index[..., None], -1)[..., 0]
    if label_smoothing:
        loss = loss * wide.dtype.type(1 - label_smoothing) \
            - np.mean(log_p, axis=-1) * wide.dtype.type(label_smoothing)
    if ignore_index is not None:
        loss = np.where(labels == ignore_index, wide.dtype.type(0), loss)
    return loss.astype(dtype, copy=False)


define("cross_entropy", "logits labels", cross_entropy_infer, cross_entropy_reference,
       "-log softmax(logits)[label] for each example, classes in the last axis. label_smoothing mixes in the mean over "
       "classes; an example with the label ignore_index gives 0; other labels are clamped into range.",
       attrs={"label_smoothing": 0.0, "ignore_index": None},
       flops=lambda node: node.operands[0].type.size * (POLYNOMIAL + 4))
