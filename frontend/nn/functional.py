"""Layers and losses as functions; what the modules call."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...ir.dims import Dim
from ...ir.dtypes import promote
from ...ir.errors import AttributeValueError, DTypeError, ShapeError
from .. import functions as F
from .. import random
from ..tensor import Tensor

SQRT_HALF = math.sqrt(0.5)


# -- activations


def relu(x: Tensor) -> Tensor:
    """max(x, 0); its gradient at 0 is 0."""
    return F.relu(x)


def relu6(x: Tensor) -> Tensor:
    """min(max(x, 0), 6)."""
    return F.clip(x, 0, 6)


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """x where positive, else negative_slope * x."""
    return F.where(x > 0, x, x * negative_slope)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """x where positive, else alpha * (exp(x) - 1) (Clevert, Unterthiner & Hochreiter 2016)."""
    # the inner minimum keeps exp from overflowing where its branch is not taken: inf * 0 in the gradient
    return F.where(x > 0, x, alpha * F.expm1(F.minimum(x, 0)))


def selu(x: Tensor) -> Tensor:
    """Self-normalising ELU (Klambauer et al. 2017)."""
    return 1.0507009873554805 * elu(x, 1.6732632423543772)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x * Phi(x) (Hendrycks & Gimpel 2016); `approximate="tanh"` is the tanh form of GPT-2."""
    if approximate == "tanh":
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1.0 + F.tanh(inner))
    if approximate != "none":
        raise AttributeValueError(f'gelu: approximate is "none" or "tanh", not {approximate!r}')
    return 0.5 * x * (1.0 + F.erf(x * SQRT_HALF))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), also called swish."""
    return x * F.sigmoid(x)


def mish(x: Tensor) -> Tensor:
    """x * tanh(softplus(x)) (Misra 2019)."""
    return x * F.tanh(F.softplus(x))


def hardsigmoid(x: Tensor) -> Tensor:
    """clip(x / 6 + 1/2, 0, 1)."""
    return F.clip(x / 6 + 0.5, 0, 1)


def hardswish(x: Tensor) -> Tensor:
    """x * hardsigmoid(x) (Howard et al. 2019)."""
    return x * hardsigmoid(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return F.sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    return F.tanh(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return F.softplus(x)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`."""
    return F.softmax(x, axis=dim)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """log(softmax(x)) along `dim`."""
    return F.log_softmax(x, axis=dim)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """First half times the sigmoid of the second half of `dim` (Dauphin et al. 2017)."""
    first, second = F.split(x, 2, axis=dim)
    return first * F.sigmoid(second)


# -- layers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; x (..., in), weight (out, in), bias (out,)."""
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"linear: the last dimension of x {x.shape} must be {weight.shape[1]}, "
                         f"as the weight {weight.shape} takes")
    y = F.matmul(x, weight, transpose_y=True) if x.ndim > 1 else F.matmul(weight, x)
    return y if bias is None else y + bias


def embedding(indices: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of `weight` (rows, dim) at integer `indices` (...): (..., dim). `padding_idx` gets no gradient."""
    if not indices.dtype.is_integer:
        raise DTypeError(f"embedding: indices must be integers, got {indices.dtype}; cast with .astype('int64')")
    rows = F.take(weight, indices, axis=0)
    if padding_idx is None:
        return rows
    return F.where(F.expand_dims(indices == padding_idx, -1), F.stop_gradient(rows), rows)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """While training, zeroes each element with probability p and scales the others by 1 / (1 - p)."""
    if not 0.0 <= p <= 1.0:
        raise AttributeValueError(f"dropout: p must lie in [0, 1], got {p}")
    if not training or p == 0.0:
        return x
    if p == 1.0:
        return x * 0
    keep = random.bernoulli(1.0 - p, x.shape)
    return F.where(keep, x * (1.0 / (1.0 - p)), F.zeros((), dtype=x.dtype))


def layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    """Zero mean, unit variance over the trailing dimensions; then scale and shift, where given."""
    shape = tuple(normalized_shape)
    if tuple(x.shape[x.ndim - len(shape):]) != shape:
        raise ShapeError(f"layer_norm: x {x.shape} does not end with {shape}")
    weight = F.ones(shape, dtype=x.dtype) if weight is None else weight
    bias = F.zeros(shape, dtype=x.dtype) if bias is None else bias
    return F.layer_norm(x, weight, bias, axes=len(shape), eps=eps)


def batch_norm(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
               bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Batch normalisation of (N, C, ...); while training the running statistics are moved in place."""
    channels = x.shape[1]
    weight = F.ones((channels,), dtype=x.dtype) if weight is None else weight
    bias = F.zeros((channels,), dtype=x.dtype) if bias is None else bias
    column = (channels,) + (1,) * (x.ndim - 2)
    if not training:
        assert running_mean is not None and running_var is not None
        scale = weight * F.rsqrt(running_var + eps)
        shift = bias - running_mean * scale
        return x * scale.reshape(column).astype(x.dtype) + shift.reshape(column).astype(x.dtype)
    y, mean, var = F.batch_norm(x, weight, bias, eps=eps)
    if running_mean is not None and running_var is not None:
        count = math.prod(x.shape) // channels
        if isinstance(count, Dim):  # a number of the run: the last of 0, 1... count - 1
            last = F.arange(count)[-1].astype(var.dtype)
            unbiased = F.stop_gradient(var) * ((last + 1.0) / F.maximum(last, 1.0))
        else:
            unbiased = F.stop_gradient(var) * (count / max(count - 1, 1))
        running_mean.assign(running_mean + momentum * (F.stop_gradient(mean) - running_mean))
        running_var.assign(running_var + momentum * (unbiased - running_var))
    return y


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False,
                                 scale: float | None = None) -> Tensor:
    """softmax(q kᵀ * scale + mask) v; q (..., n, d), k and v (..., m, d). A bool mask is True where it may look."""
    return F.attention(q, k, v, mask, causal=causal, scale=scale)


# -- losses


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return F.mean(loss)
    if reduction == "sum":
        return F.sum(loss)
    if reduction == "none":
        return loss
    raise AttributeValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')


def _same_shape(name: str, x: Tensor, y: Tensor) -> None:
    if tuple(x.shape) != tuple(y.shape):
        raise ShapeError(f"{name}: prediction {x.shape} and target {y.shape} must have the same shape")


def mse_loss(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """(prediction - target)²."""
    _same_shape("mse_loss", prediction, target)
    return _reduce(F.square(prediction - target), reduction)


def l1_loss(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """|prediction - target|."""
    _same_shape("l1_loss", prediction, target)
    return _reduce(F.abs(prediction - target), reduction)


def huber_loss(prediction: Tensor, target: Tensor, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """Quadratic up to `delta`, linear beyond (Huber 1964)."""
    _same_shape("huber_loss", prediction, target)
    error = F.abs(prediction - target)
    within = F.minimum(error, delta)
    return _reduce(within * (error - 0.5 * within), reduction)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100,
                  weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """-log softmax(logits)[label] over the last dimension.

    Args:
        logits: (..., classes), floating point.
        labels: (...), integers in [0, classes), or (..., classes) probabilities.
        label_smoothing: weight of the uniform distribution mixed into the target.
        ignore_index: examples with this label count neither in the sum nor in the mean.
        weight: (classes,): weight of each class in sum and mean.
        reduction: "mean" (over the examples that count), "sum" or "none".
    """
    logits, labels = F.asarray(logits), F.asarray(labels)
    if not labels.dtype.is_integer:
        return _soft_cross_entropy(logits, labels, label_smoothing, weight, reduction)
    if tuple(logits.shape[:-1]) != tuple(labels.shape):
        raise ShapeError(f"cross_entropy: logits {logits.shape} need labels of shape {logits.shape[:-1]}, "
                         f"got {labels.shape}; classes are the last dimension")
    counted = labels != ignore_index
    if weight is not None:
        return _weighted_cross_entropy(logits, labels, counted, label_smoothing, weight, reduction)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=ignore_index)
    if reduction == "mean":
        return F.sum(loss) / F.sum(counted.astype(loss.dtype))
    return _reduce(loss, reduction)


def _soft_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float, weight: Tensor | None,
                        reduction: str) -> Tensor:
    _same_shape("cross_entropy with probabilities", logits, target)
    target = target * (1.0 - label_smoothing) + label_smoothing / logits.shape[-1]
    weighted = target if weight is None else target * weight
    loss = -F.sum(weighted * F.log_softmax(logits, axis=-1), axis=-1)
    return _reduce(loss, reduction)


def _weighted_cross_entropy(logits: Tensor, labels: Tensor, counted: Tensor, label_smoothing: float, weight: Tensor,
                            reduction: str) -> Tensor:
    safe = F.where(counted, labels, F.zeros_like(labels))
    picked = F.take(weight, safe, axis=0) * counted.astype(weight.dtype)
    logp = F.log_softmax(logits, axis=-1)
    hard = -F.squeeze(F.take_along_axis(logp, F.expand_dims(safe, -1), axis=-1), -1) * picked
    smooth = -F.sum(logp * weight, axis=-1) * counted.astype(logp.dtype) / logits.shape[-1]
    loss = (1.0 - label_smoothing) * hard + label_smoothing * smooth
    return F.sum(loss) / F.sum(picked) if reduction == "mean" else _reduce(loss, reduction)


def nll_loss(log_probabilities: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """-log_probabilities[label] over the last dimension; labels (...) are integers."""
    if tuple(log_probabilities.shape[:-1]) != tuple(labels.shape):
        raise ShapeError(f"nll_loss: log probabilities {log_probabilities.shape} need labels of shape "
                         f"{log_probabilities.shape[:-1]}, got {labels.shape}")
    counted = labels != ignore_index
    safe = F.where(counted, labels, F.zeros_like(labels))
    weight = counted.astype(log_probabilities.dtype)
    loss = -F.squeeze(F.take_along_axis(log_probabilities, F.expand_dims(safe, -1), axis=-1), -1) * weight
    return F.sum(loss) / F.sum(weight) if reduction == "mean" else _reduce(loss, reduction)


def binary_cross_entropy_with_logits(logits: Tensor, target: Tensor, pos_weight: Tensor | None = None,
                                     reduction: str = "mean") -> Tensor:
    """-(t log s(x) + (1 - t) log(1 - s(x))) for logits x, without overflow; `pos_weight` weighs the first term."""
    _same_shape("binary_cross_entropy_with_logits", logits, target)
    target = target.astype(promote(logits.dtype, target.dtype))
    factor = 1.0 if pos_weight is None else 1.0 + (pos_weight - 1.0) * target
    loss = (1.0 - target) * logits + factor * F.softplus(-logits)
    return _reduce(loss, reduction)


def kl_div(log_probabilities: Tensor, target: Tensor, log_target: bool = False, reduction: str = "batchmean") -> Tensor:
    """Kullback-Leibler divergence of the prediction (as logs) from the target, sum over the last dimension.

    `reduction="batchmean"` divides by the number of rows, which is the mathematical definition.
    """
    _same_shape("kl_div", log_probabilities, target)
    if log_target:
        loss = F.exp(target) * (target - log_probabilities)
    else:
        positive = target > 0
        safe = F.where(positive, target, F.ones_like(target))
        loss = F.where(positive, target * (F.log(safe) - log_probabilities), F.zeros_like(target))
    if reduction == "batchmean":
        return F.sum(loss) / log_probabilities.shape[0]
    return _reduce(loss, reduction)
