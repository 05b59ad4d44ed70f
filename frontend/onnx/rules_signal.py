"""Fourier transforms and what goes with them.

A complex tensor has a last axis of two: real and imaginary part. A transform of up to `DENSE` points is a product with
a matrix of cosines and sines, which the schedules of matrix products run at full speed; a longer one is split into two
by a factor of its length (Cooley & Tukey, 1965).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import functions as F
from ..dispatch import apply, as_tensor
from ..tensor import Tensor
from .dtypes import attribute_dtype
from .node import OnnxNode
from .rules import onnx_rule
from .rules_shape import axis_of, number_of, slice_axis
from .values import tensor

DENSE = 1024
"""Transforms of at most so many points are one matrix product."""

Complex = tuple[Tensor, Tensor | None]
"""Real and imaginary part, of one shape; the points are the last axis. None: zero."""


def waves(rows: int, columns: int, period: int, dtype: Any) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi row * column / period."""
    turns = np.outer(np.arange(rows), np.arange(columns)) % period
    angle = 2 * np.pi * turns / period
    return as_tensor(np.cos(angle).astype(dtype.np)), as_tensor(np.sin(angle).astype(dtype.np))


def turned(x: Complex, cos: Tensor, sin: Tensor, sign: float) -> Complex:
    """x * (cos + i * sign * sin)."""
    real, imaginary = x
    if imaginary is None:
        return real * cos, real * sin * sign
    return real * cos - imaginary * sin * sign, imaginary * cos + real * sin * sign


def multiplied(x: Complex, cos: Tensor, sin: Tensor, sign: float) -> Complex:
    """x @ (cos + i * sign * sin)."""
    real, imaginary = x
    if imaginary is None:
        return F.matmul(real, cos), F.matmul(real, sin) * sign
    return (F.matmul(real, cos) - F.matmul(imaginary, sin) * sign,
            F.matmul(imaginary, cos) + F.matmul(real, sin) * sign)


def transform(x: Complex, sign: float, bins: int | None = None) -> Complex:
    """sum over n of x[n] exp(sign * 2 pi i k n / points), for k below `bins` (default: all)."""
    real = x[0]
    points = real.shape[-1]
    bins = points if bins is None else bins
    factor = split_factor(points)
    if points <= DENSE or factor == 1:
        return multiplied(x, *waves(points, bins, points, real.dtype), sign)
    lead, rest = real.shape[:-1], points // factor
    # n = rest * n1 + n2 and k = k1 + factor * k2
    columns = _map(x, lambda p: F.swapaxes(F.reshape(p, (*lead, factor, rest)), -1, -2))   # (..., n2, n1)
    inner = transform(columns, sign)                                                       # (..., n2, k1)
    inner = turned(inner, *waves(rest, factor, points, real.dtype), sign)
    outer = transform(_map(inner, lambda p: F.swapaxes(p, -1, -2)), sign)                  # (..., k1, k2)
    whole = _map(outer, lambda p: F.reshape(F.swapaxes(p, -1, -2), (*lead, points)))
    return _map(whole, lambda p: slice_axis(p, len(lead), 0, bins)) if bins < points else whole


def _map(x: Complex, fn: Any) -> Complex:
    return fn(x[0]), None if x[1] is None else fn(x[1])


def split_factor(points: int) -> int:
    """The factor of a number that is nearest to its square root."""
    return next((f for f in range(math.isqrt(points), 1, -1) if points % f == 0), 1)


def parts_of(x: Tensor) -> Complex:
    """The parts of x (..., 1 or 2)."""
    return x[..., 0], x[..., 1] if x.shape[-1] == 2 else None


def joined(x: Complex) -> Tensor:
    """Both parts along a new last axis."""
    return F.stack([x[0], F.zeros_like(x[0]) if x[1] is None else x[1]], -1)


def with_length(x: Tensor, size: int) -> Tensor:
    """The last axis cut, or padded with zeros."""
    missing = size - x.shape[-1]
    if missing == 0:
        return x
    result: Tensor = apply("pad", x, low=(0,) * x.ndim, high=(*(0,) * (x.ndim - 1), missing), interior=(0,) * x.ndim,
                           value=0)
    return result


def dft_along(node: OnnxNode, x: Tensor, axis: int, length: Any) -> Tensor:
    """The transform of x (..., 1 or 2) along an axis, as the node's attributes say."""
    inverse, onesided = bool(node.attr("inverse", 0)), bool(node.attr("onesided", 0))
    size = x.shape[axis]
    if length is None:
        points = 2 * (size - 1) if inverse and onesided else size
    else:
        points = int(number_of(node, length, "dft_length"))
    if not isinstance(points, int):
        raise node.fail(f"the length {points} of the transform is known only at run time; give the input a fixed size")
    bins = points // 2 + 1 if onesided else points
    kept = _map(parts_of(x), lambda p: with_length(F.moveaxis(p, axis, -1), bins if inverse else points))
    if inverse and onesided:
        return F.expand_dims(F.moveaxis(real_inverse(kept, points), -1, axis), -1)
    y = transform(kept, 1.0 if inverse else -1.0, bins)
    if inverse:
        y = _map(y, lambda p: p / points)
    return joined(_map(y, lambda p: F.moveaxis(p, -1, axis)))


def real_inverse(x: Complex, points: int) -> Tensor:
    """The real signal of so many points from the first half of its transform."""
    real, imaginary = x
    bins = points // 2 + 1
    cos, sin = waves(bins, points, points, real.dtype)
    twice = np.full((bins, 1), 2.0)
    twice[0] = 1.0
    if points % 2 == 0:
        twice[-1] = 1.0
    weight = as_tensor((twice / points).astype(real.dtype.np))
    y = F.matmul(real, cos * weight)
    return y if imaginary is None else y - F.matmul(imaginary, sin * weight)


@onnx_rule("DFT", since=17, static=(1,))
def dft_attribute(node: OnnxNode, x: Any, length: Any = None) -> Tensor:
    x = tensor(x)
    return dft_along(node, x, axis_of(node, int(node.attr("axis", 1)), x.ndim), length)


@onnx_rule("DFT", since=20, static=(1, 2))
def dft(node: OnnxNode, x: Any, length: Any = None, axis: Any = None) -> Tensor:
    x = tensor(x)
    place = -2 if axis is None else int(number_of(node, axis, "axis"))
    return dft_along(node, x, axis_of(node, place, x.ndim), length)


@onnx_rule("STFT", since=17, static=(1, 3))
def stft(node: OnnxNode, x: Any, step: Any, window: Any = None, length: Any = None) -> Tensor:
    """x (batch, samples, 1 or 2) to (batch, frames, bins, 2): the transforms of overlapping frames times the window."""
    x, hop = tensor(x), int(number_of(node, step, "frame_step"))
    if length is not None:
        size = int(number_of(node, length, "frame_length"))
    elif window is not None:
        size = tensor(window).shape[0]
    else:
        raise node.fail("it needs a window or a frame_length")
    frames = (x.shape[1] - size) // hop + 1
    index = F.reshape(F.arange(frames) * hop, (frames, 1)) + F.arange(size)

    def cut(part: Tensor) -> Tensor:
        framed = apply("take", part, index, axis=1)                          # (batch, frames, size)
        return framed if window is None else framed * tensor(window)

    bins = size // 2 + 1 if node.attr("onesided", 1) else size
    return joined(transform(_map(parts_of(x), cut), -1.0, bins))


@onnx_rule("MelWeightMatrix", since=17, static=(0, 1, 2, 3, 4))
def mel_weight_matrix(node: OnnxNode, bins: Any, length: Any, rate: Any, lower: Any, upper: Any) -> np.ndarray:
    """Triangles over the bins of a spectrum, evenly spaced on the mel scale: (length // 2 + 1, bins)."""
    count, points, samples, low, high = (number_of(node, v, name) for v, name in (
        (bins, "num_mel_bins"), (length, "dft_length"), (rate, "sample_rate"), (lower, "lower_edge_hertz"),
        (upper, "upper_edge_hertz")))
    mels = [2595 * math.log10(1 + edge / 700) for edge in (low, high)]
    edges = mels[0] + np.arange(count + 2) * ((mels[1] - mels[0]) / (count + 2))
    places = np.floor((points + 1) * (700 * (10 ** (edges / 2595) - 1)) / samples).astype(int)
    spectrum = np.arange(points // 2 + 1)[:, None]
    left, centre, right = (places[i:i + count] for i in range(3))
    rising = np.where(centre > left, (spectrum - left) / np.maximum(centre - left, 1), spectrum == centre)
    falling = (right - spectrum) / np.maximum(right - centre, 1)
    up = (spectrum >= left) & (spectrum <= centre)
    down = (spectrum >= centre) & (spectrum < right) & (right > centre)
    weights = np.where(down, falling, np.where(up, rising, 0.0))
    return np.asarray(weights.astype(attribute_dtype(node, "output_datatype", F.asarray(0.0).dtype).np))
