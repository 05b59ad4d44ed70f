"""Convolution and pooling layers of one to three spatial dimensions: (N, C, *spatial)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.errors import AttributeValueError, ShapeError
from .. import functions as F
from ..tensor import Tensor
from . import init
from .layers import parameter
from .module import Module

Sizes = int | Sequence[int]


def _tuple(value: Sizes, rank: int, name: str) -> tuple[int, ...]:
    sizes = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(sizes) != rank:
        raise AttributeValueError(f"{name} needs {rank} numbers, got {sizes}")
    return sizes


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Any:
    """Pairs (before, after) from a number, numbers, pairs, "valid" or "same" (stride 1)."""
    if value == "valid":
        return tuple((0, 0) for _ in kernel)
    if value == "same":
        if any(s != 1 for s in stride):
            raise AttributeValueError('padding="same" needs stride 1')
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((s // 2, s - s // 2) for s in spans)
    values = (value,) * len(kernel) if isinstance(value, int) else tuple(value)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in values)


class _Conv(Module):
    rank = 0
    transposed = False

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Any = 0,
                 dilation: Sizes = 1, groups: int = 1, bias: bool = True, output_padding: Sizes = 0):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ShapeError(f"{type(self).__name__}: {in_channels} and {out_channels} channels do not divide into "
                             f"{groups} groups")
        self.kernel_size = _tuple(kernel_size, self.rank, "kernel_size")
        self.stride = _tuple(stride, self.rank, "stride")
        self.dilation = _tuple(dilation, self.rank, "dilation")
        self.padding = _padding(padding, self.kernel_size, self.dilation, self.stride)
        self.output_padding = _tuple(output_padding, self.rank, "output_padding")
        self.groups = groups
        self.in_channels, self.out_channels = in_channels, out_channels
        channels = (in_channels, out_channels // groups) if self.transposed else (out_channels, in_channels // groups)
        fan_in = channels[1] * math.prod(self.kernel_size)
        bound = init.uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        self.weight = parameter((*channels, *self.kernel_size), bound)
        self.register_parameter("bias", parameter((out_channels,), bound) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.rank + 2 or x.shape[1] != self.in_channels:
            raise ShapeError(f"{type(self).__name__} takes (N, {self.in_channels}"
                             f"{', size' * self.rank}), got {x.shape}")
        options: dict[str, Any] = dict(stride=self.stride, padding=self.padding, dilation=self.dilation,
                                       groups=self.groups)
        if self.transposed:
            y = F.conv_transpose(x, self.weight, output_padding=self.output_padding, **options)
        else:
            y = F.conv(x, self.weight, **options)
        return y if self.bias is None else y + self.bias.reshape((-1,) + (1,) * self.rank)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class Conv1d(_Conv):
    """Convolution of (N, in_channels, L); weight (out_channels, in_channels / groups, k). Options as torch's."""

    rank = 1


class Conv2d(_Conv):
    """Convolution of (N, in_channels, H, W); weight (out_channels, in_channels / groups, kh, kw)."""

    rank = 2


class Conv3d(_Conv):
    """Convolution of (N, in_channels, D, H, W); weight (out_channels, in_channels / groups, kd, kh, kw)."""

    rank = 3


class ConvTranspose1d(_Conv):
    """Transposed convolution (the gradient of Conv1d); weight (in_channels, out_channels / groups, k)."""

    rank, transposed = 1, True


class ConvTranspose2d(_Conv):
    """Transposed convolution (the gradient of Conv2d); weight (in_channels, out_channels / groups, kh, kw)."""

    rank, transposed = 2, True


class ConvTranspose3d(_Conv):
    """Transposed convolution (the gradient of Conv3d); weight (in_channels, out_channels / groups, kd, kh, kw)."""

    rank, transposed = 3, True


class _Pool(Module):
    rank = 0

    def __init__(self, kernel_size: Sizes, stride: Sizes | None = None, padding: Any = 0):
        super().__init__()
        self.kernel_size = _tuple(kernel_size, self.rank, "kernel_size")
        self.stride = self.kernel_size if stride is None else _tuple(stride, self.rank, "stride")
        self.padding = _padding(padding, self.kernel_size, (1,) * self.rank, self.stride)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class _MaxPool(_Pool):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool(x, self.kernel_size, stride=self.stride, padding=self.padding)


class _AvgPool(_Pool):
    def __init__(self, kernel_size: Sizes, stride: Sizes | None = None, padding: Any = 0,
                 count_include_pad: bool = True):
        super().__init__(kernel_size, stride, padding)
        self.count_include_pad = count_include_pad

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool(x, self.kernel_size, stride=self.stride, padding=self.padding,
                          count_include_pad=self.count_include_pad)


class MaxPool1d(_MaxPool):
    """Maximum over windows of (N, C, L)."""

    rank = 1


class MaxPool2d(_MaxPool):
    """Maximum over windows of (N, C, H, W)."""

    rank = 2


class MaxPool3d(_MaxPool):
    """Maximum over windows of (N, C, D, H, W)."""

    rank = 3


class AvgPool1d(_AvgPool):
    """Mean over windows of (N, C, L)."""

    rank = 1


class AvgPool2d(_AvgPool):
    """Mean over windows of (N, C, H, W)."""

    rank = 2


class AvgPool3d(_AvgPool):
    """Mean over windows of (N, C, D, H, W)."""

    rank = 3


class AdaptiveAvgPool(Module):
    """Mean over windows that divide each spatial dimension into `output_size` nearly equal parts; any rank.

    Window i of n over a size s is [floor(i s / n), ceil((i + 1) s / n)), as in torch.
    """

    def __init__(self, output_size: Sizes = 1):
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        rank = x.ndim - 2
        for axis, parts in zip(range(2, x.ndim), _tuple(self.output_size, rank, "output_size"), strict=True):
            size = x.shape[axis]
            if size % parts == 0:
                split = (*x.shape[:axis], parts, size // parts, *x.shape[axis + 1:])
                x = F.mean(x.reshape(split), axis=axis + 1)
                continue
            windows = [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]
            lead = (slice(None),) * axis
            means = [F.mean(x[lead + (slice(a, b),)], axis=axis, keepdims=True) for a, b in windows]
            x = F.concatenate(means, axis=axis)
        return x


AdaptiveAvgPool1d = AdaptiveAvgPool2d = AdaptiveAvgPool3d = AdaptiveAvgPool


class GlobalAvgPool(Module):
    """Mean over all spatial dimensions: (N, C, ...) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.mean(x, axis=tuple(range(2, x.ndim)))
