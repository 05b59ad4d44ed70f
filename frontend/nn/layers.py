"""Layers without a window: linear, embedding, dropout, normalisation, activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.errors import ShapeError
from .. import functions as F
from ..tensor import Tensor
from . import functional, init
from .module import Module
from .parameter import Parameter


def _bound(fan_in: int) -> init.Initializer:
    width = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
    return init.uniform(-width, width)


def parameter(shape: Sequence[int], initializer: init.Initializer, dtype: Any = "float32") -> Parameter:
    """A trainable parameter of the given shape, drawn by an initialiser when its elements are first asked for."""
    later = getattr(initializer, "later", None)
    return Parameter(initializer(shape, dtype)) if later is None else Parameter.later(later(shape, dtype))


class Identity(Module):
    """Gives its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Linear(Module):
    """`x @ weight.T + bias`: (..., in_features) -> (..., out_features); weight is (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: Any = "float32"):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = parameter((out_features, in_features), _bound(in_features), dtype)
        self.register_parameter("bias", parameter((out_features,), _bound(in_features), dtype) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def product_weights(self) -> dict[str, bool]:
        return {"weight": False}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Bilinear(Module):
    """`x1 @ weight[o] @ x2 + bias[o]` for each output feature o; weight is (out, in1, in2)."""

    def __init__(self, in1_features: int, in2_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = parameter((out_features, in1_features, in2_features), _bound(in1_features))
        self.register_parameter("bias", parameter((out_features,), _bound(in1_features)) if bias else None)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        y = F.einsum("...i,oij,...j->...o", x1, self.weight, x2)
        return y if self.bias is None else y + self.bias


class Embedding(Module):
    """Rows of a table: integer indices of any shape (...) -> (..., embedding_dim).

    The row `padding_idx`, if given, starts at zero and gets no gradient.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, dtype: Any = "float32"):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = parameter((num_embeddings, embedding_dim), init.normal(blank=self.padding_idx), dtype)

    def forward(self, indices: Tensor) -> Tensor:
        return functional.embedding(indices, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Dropout(Module):
    """While training, zeroes each element with probability `p` and scales the others by 1/(1-p)."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LayerNorm(Module):
    """Normalises over the trailing dimensions `normalized_shape` (Ba, Kiros & Hinton 2016)."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
                 bias: bool = True):
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps
        self.register_parameter("weight", parameter(self.normalized_shape, init.constant(1)) if elementwise_affine
                                else None)
        self.register_parameter("bias", parameter(self.normalized_shape, init.constant(0))
                                if elementwise_affine and bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class RMSNorm(Module):
    """Divides by the root of the mean square of the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = parameter((dim,), init.constant(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, eps=self.eps)


class GroupNorm(Module):
    """Normalises groups of channels of (N, C, ...) (Wu & He 2018)."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        if num_channels % num_groups:
            raise ShapeError(f"GroupNorm: {num_channels} channels do not divide into {num_groups} groups")
        self.num_groups, self.eps = num_groups, eps
        self.num_channels = num_channels
        self.register_parameter("weight", parameter((num_channels,), init.constant(1)) if affine else None)
        self.register_parameter("bias", parameter((num_channels,), init.constant(0)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.ones((self.num_channels,), dtype=x.dtype) if self.weight is None else self.weight
        bias = F.zeros((self.num_channels,), dtype=x.dtype) if self.bias is None else self.bias
        return F.group_norm(x, scale, bias, groups=self.num_groups, eps=self.eps)


class InstanceNorm(GroupNorm):
    """Normalises each channel of each example of (N, C, ...) (Ulyanov, Vedaldi & Lempitsky 2016)."""

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = False):
        super().__init__(num_features, num_features, eps, affine)


class BatchNorm(Module):
    """Normalises channels of (N, C, ...) over the batch (Ioffe & Szegedy 2015); any spatial rank.

    In training mode it uses the batch's statistics and moves `running_mean` and `running_var` (the
    unbiased one) by `momentum` towards them; in evaluation mode it uses the running ones.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True,
                 track_running_stats: bool = True):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.register_parameter("weight", parameter((num_features,), init.constant(1)) if affine else None)
        self.register_parameter("bias", parameter((num_features,), init.constant(0)) if affine else None)
        tracked = track_running_stats
        self.register_buffer("running_mean", Tensor(np.zeros(num_features, np.float32)) if tracked else None)
        self.register_buffer("running_var", Tensor(np.ones(num_features, np.float32)) if tracked else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ShapeError(f"BatchNorm({self.num_features}) takes (N, {self.num_features}, ...), got {x.shape}")
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                     self.training or self.running_mean is None, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


BatchNorm1d = BatchNorm2d = BatchNorm3d = BatchNorm


class Flatten(Module):
    """Joins the dimensions `start_dim` to `end_dim` into one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1):
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        start, end = self.start_dim % x.ndim, self.end_dim % x.ndim
        return x.reshape((*x.shape[:start], math.prod(x.shape[start:end + 1]), *x.shape[end + 1:]))


def _activation(name: str, function: Any, **options: Any) -> type[Module]:
    """A module class for an activation; options become keyword arguments with these defaults."""

    def __init__(self: Any, **given: Any) -> None:
        Module.__init__(self)
        if unknown := given.keys() - options.keys():
            raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}; it has: {', '.join(options)}")
        self.options = {**options, **given}

    def forward(self: Any, x: Tensor) -> Tensor:
        return function(x, **self.options)

    doc = f"The activation `functional.{function.__name__}` as a module."
    return type(name, (Module,), {"__init__": __init__, "forward": forward, "__doc__": doc, "__module__": __name__})


ReLU = _activation("ReLU", functional.relu)
ReLU6 = _activation("ReLU6", functional.relu6)
LeakyReLU = _activation("LeakyReLU", functional.leaky_relu, negative_slope=0.01)
ELU = _activation("ELU", functional.elu, alpha=1.0)
SELU = _activation("SELU", functional.selu)
GELU = _activation("GELU", functional.gelu, approximate="none")
SiLU = _activation("SiLU", functional.silu)
Mish = _activation("Mish", functional.mish)
Sigmoid = _activation("Sigmoid", functional.sigmoid)
Tanh = _activation("Tanh", functional.tanh)
Softplus = _activation("Softplus", functional.softplus)
Hardsigmoid = _activation("Hardsigmoid", functional.hardsigmoid)
Hardswish = _activation("Hardswish", functional.hardswish)
Softmax = _activation("Softmax", functional.softmax, dim=-1)
LogSoftmax = _activation("LogSoftmax", functional.log_softmax, dim=-1)
