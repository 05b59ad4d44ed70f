"""The building blocks of neural networks: convolution, pooling, normalisation, attention, cross-entropy.

Layouts are (batch, channels, *spatial) of any spatial rank. `nn.functional` has the same and more in the terms of
layers; these are the ops themselves.
"""

from __future__ import annotations

from typing import Any

from ..ir.dtypes import as_dtype
from ..ir.errors import AttributeValueError, DTypeError, ShapeError
from ..ir.location import user_location
from .dispatch import apply, as_tensor, cast, pair, promoted
from .tensor import Tensor


def _spatial(name: str, x: Tensor) -> int:
    if x.ndim < 3:
        raise ShapeError(f"{name}: {x.type} needs at least three axes, (batch, channels, *spatial)", user_location())
    return x.ndim - 2


def _padding(padding: Any, rank: int) -> tuple[tuple[int, int], ...]:
    """(low, high) for each spatial axis, from an int, an int per axis, or pairs."""
    if not hasattr(padding, "__index__") and len(padding) == rank and all(not hasattr(p, "__index__") for p in padding):
        lows, highs = (tuple(p[side] for p in padding) for side in (0, 1))
        if any(len(p) != 2 for p in padding):
            raise AttributeValueError(f"padding is {padding!r}; expected pairs (low, high)", user_location())
        return tuple(zip(pair(lows, rank, "padding"), pair(highs, rank, "padding")))
    return tuple((p, p) for p in pair(padding, rank, "padding"))


def conv(x: Any, w: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
         out_dtype: Any = None) -> Tensor:
    """Convolution (correlation, as in every deep-learning library).

    Args:
        x: (N, C, *spatial).
        w: (O, C / groups, *kernel).
        stride, dilation: an int, or one per spatial axis.
        padding: an int, one per axis, or pairs (low, high); zeros are added.
        groups: the channels are cut into so many parts that do not see each other.

    Returns:
        (N, O, *out), out = floor((size + low + high - dilation * (kernel - 1) - 1) / stride) + 1.
    """
    x, w = promoted(x, w)
    rank = _spatial("conv", x)
    result: Tensor = apply("conv", x, w, stride=pair(stride, rank, "stride"), padding=_padding(padding, rank),
                           dilation=pair(dilation, rank, "dilation"), groups=int(groups),
                           out_dtype=None if out_dtype is None else as_dtype(out_dtype))
    return result


def conv_transpose(x: Any, w: Any, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, dilation: Any = 1,
                   groups: int = 1) -> Tensor:
    """Transposed convolution: the gradient of `conv` in its input, each element of x places a kernel.

    Args:
        x: (N, C, *spatial).
        w: (C, O / groups, *kernel).
        stride, padding, dilation, groups: of the convolution that this is the transpose of.
        output_padding: rows and columns added at the high end, less than the stride or the dilation.

    Returns:
        (N, O, *out), out = (size - 1) * stride - low - high + dilation * (kernel - 1) + output_padding + 1.
    """
    x, w = promoted(x, w)
    rank = _spatial("conv_transpose", x)
    steps, gaps, extra = (pair(v, rank, n) for v, n in ((stride, "stride"), (dilation, "dilation"),
                                                        (output_padding, "output_padding")))
    pads = _padding(padding, rank)
    if w.ndim != x.ndim:
        raise ShapeError(f"conv_transpose: {x.type} and {w.type} need as many axes", user_location())
    for e, s, d in zip(extra, steps, gaps):
        if not 0 <= e < max(s, d):
            raise AttributeValueError(f"output_padding {e} must be less than the stride {s} or the dilation {d}",
                                      user_location())
    spatial = tuple((n - 1) * s - lo - hi + d * (k - 1) + e + 1 for n, s, (lo, hi), d, k, e in
                    zip(x.shape[2:], steps, pads, gaps, w.shape[2:], extra))
    result: Tensor = apply("conv_input_grad", x, w, input_spatial=spatial, stride=steps, padding=pads, dilation=gaps,
                           groups=int(groups))
    return result


def max_pool(x: Any, window: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> Tensor:
    """The largest of each window of (N, C, *spatial); stride None: the window. Padding never wins."""
    x = as_tensor(x)
    rank = _spatial("max_pool", x)
    size = pair(window, rank, "window")
    y: Tensor = apply("max_pool", x, window=size, stride=size if stride is None else pair(stride, rank, "stride"),
                      padding=_padding(padding, rank), dilation=pair(dilation, rank, "dilation"))[0]
    return y


def avg_pool(x: Any, window: Any, stride: Any = None, padding: Any = 0, count_include_pad: bool = True) -> Tensor:
    """The mean of each window of (N, C, *spatial); stride None: the window; padding counts as zeros, or not at all."""
    x = as_tensor(x)
    rank = _spatial("avg_pool", x)
    size = pair(window, rank, "window")
    y: Tensor = apply("avg_pool", x, window=size, stride=size if stride is None else pair(stride, rank, "stride"),
                      padding=_padding(padding, rank), count_include_pad=bool(count_include_pad))
    return y


def _parameters(x: Any, *parameters: Any) -> tuple[Tensor, ...]:
    """x, and its scale and bias in the dtype of x."""
    x = as_tensor(x)
    return (x, *(cast(as_tensor(p), x.dtype) for p in parameters))


def layer_norm(x: Any, scale: Any, bias: Any, axes: int = 1, eps: float = 1e-5) -> Tensor:
    """x normalised over its last `axes` axes, times scale plus bias, both of the shape of those axes."""
    result: Tensor = apply("layer_norm", *_parameters(x, scale, bias), axes=axes, eps=eps)
    return result


def rms_norm(x: Any, scale: Any, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x * x) + eps) * scale over the last axis."""
    result: Tensor = apply("rms_norm", *_parameters(x, scale), eps=eps)
    return result


def group_norm(x: Any, scale: Any, bias: Any, groups: int, eps: float = 1e-5) -> Tensor:
    """x (N, C, ...) normalised over groups of channels and all spatial axes, times scale plus bias, both (C,)."""
    result: Tensor = apply("group_norm", *_parameters(x, scale, bias), groups=groups, eps=eps)
    return result


def batch_norm(x: Any, scale: Any, bias: Any, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, variance) of x (N, C, ...) normalised with the statistics of this batch, times scale plus bias.

    Mean and (biased) variance are (C,), in float32 for 16-bit x.
    """
    y, mean, variance = apply("batch_norm", *_parameters(x, scale, bias), eps=eps)
    return y, mean, variance


def attention(q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ * scale + mask) v on (..., length, features); leading axes broadcast.

    Args:
        mask: bool (True: visible) or numbers to add, broadcast to (..., queries, keys).
        causal: query i sees keys 0..i.
        scale: None is 1 / sqrt(features).
    """
    q, k, v = promoted(q, k, v)
    masks = []
    if mask is not None:
        mask = as_tensor(mask)
        masks = [mask if mask.dtype.is_bool else cast(mask, q.dtype)]
    result: Tensor = apply("attention", q, k, v, *masks, scale=scale, causal=bool(causal))
    return result


def cross_entropy(logits: Any, labels: Any, label_smoothing: float = 0.0, ignore_index: int | None = None) -> Tensor:
    """-log softmax(logits)[label] of each example: logits (..., classes), labels (...) integers -> (...).

    An example with the label `ignore_index` gives 0; `label_smoothing` mixes in the mean over the classes.
    """
    logits, labels = as_tensor(logits), as_tensor(labels)
    if not labels.dtype.is_integer:
        raise DTypeError(f"cross_entropy: labels are class numbers of an integer dtype, got {labels.type}",
                         user_location())
    result: Tensor = apply("cross_entropy", logits, labels, label_smoothing=float(label_smoothing),
                           ignore_index=ignore_index)
    return result
