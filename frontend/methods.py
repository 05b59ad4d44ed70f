"""The operators and methods of `Tensor`: one table, each entry a function of `functions_*`.

Attached here rather than written into the class, because the functions need the class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..ir.dims import Dim
from . import functions as F
from .dispatch import apply, is_weak
from .functions_index import At, getitem, setitem
from .recording import current_trace
from .tensor import Tensor

OPERATORS: dict[str, Callable[..., Any]] = {
    "add": F.add, "sub": F.subtract, "mul": F.multiply, "truediv": F.divide, "floordiv": F.floor_divide,
    "mod": F.remainder, "pow": F.power, "matmul": F.matmul, "and": F.bitwise_and, "or": F.bitwise_or,
    "xor": F.bitwise_xor, "lshift": F.left_shift, "rshift": F.right_shift,
}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "lt": F.less, "le": F.less_equal, "gt": F.greater, "ge": F.greater_equal, "eq": F.equal, "ne": F.not_equal,
}
METHODS = (
    "abs", "all", "any", "argmax", "argmin", "argsort", "astype", "clip", "cos", "cumprod", "cumsum", "dot", "erf",
    "exp", "expand_dims", "flatten", "flip", "floor", "isfinite", "isnan", "log", "log1p", "logsumexp", "matmul", "max",
    "maximum", "mean", "min", "minimum", "moveaxis", "norm", "outer", "pad", "permute", "pow", "prod", "ptp", "ravel",
    "reciprocal", "relu", "repeat", "reshape", "roll", "round", "rsqrt", "sigmoid", "sign", "sin", "softmax", "sort",
    "split", "sqrt", "square", "squeeze", "std", "sum", "swapaxes", "take", "take_along_axis", "tanh", "tile",
    "transpose", "tril", "triu", "unsqueeze", "var",
)


def _is_operand(x: Any) -> bool:
    return isinstance(x, (Tensor, np.ndarray, np.generic, Dim)) or is_weak(x)


def _operator(function: Callable[..., Any], name: str, reflected: bool = False) -> Callable[..., Any]:
    def forward(self: Tensor, other: Any) -> Any:
        return function(self, other) if _is_operand(other) else NotImplemented

    def backward(self: Tensor, other: Any) -> Any:
        return function(other, self) if _is_operand(other) else NotImplemented

    method = backward if reflected else forward
    method.__name__ = name
    method.__doc__ = function.__doc__
    return method


def clone(self: Tensor) -> Tensor:
    """A copy with memory of its own; gradients flow through it."""
    result: Tensor = apply("identity", self)
    if not result.is_tracer and not self.is_tracer and np.may_share_memory(result._value.array, self._value.array):
        result._value.array = result._value.array.copy()
    return result


def detach(self: Tensor) -> Tensor:
    """The same elements, which gradients take for a constant."""
    if self.is_tracer or current_trace() is not None:
        return F.stop_gradient(self)
    array = self._value.array
    return Tensor._from_array(array.copy() if self._value.mutable else array)


def contiguous(self: Tensor) -> Tensor:
    """This tensor: the order of elements in memory is the compiler's business."""
    return self


def to(self: Tensor, dtype: Any) -> Tensor:
    """This tensor in another dtype."""
    return F.astype(self, dtype)


def view(self: Tensor, *shape: Any) -> Tensor:
    """`reshape`, by PyTorch's name."""
    return F.reshape(self, *shape)


def attach() -> None:
    """Puts every operator and method on the class."""
    for name, function in OPERATORS.items():
        setattr(Tensor, f"__{name}__", _operator(function, f"__{name}__"))
        setattr(Tensor, f"__r{name}__", _operator(function, f"__r{name}__", reflected=True))
    for name, function in COMPARISONS.items():
        setattr(Tensor, f"__{name}__", _operator(function, f"__{name}__"))
    for name, function in (("neg", F.negative), ("pos", F.positive), ("abs", F.abs), ("invert", F.bitwise_not)):
        setattr(Tensor, f"__{name}__", function)
    for name in METHODS:
        setattr(Tensor, name, getattr(F, name))
    for name, function in (("__getitem__", getitem), ("__setitem__", setitem)):
        setattr(Tensor, name, function)
    for method in (clone, detach, contiguous, to, view):
        setattr(Tensor, method.__name__, method)
    for name, getter, doc in (
            ("at", At, "x.at[index].set(v), .add(v): a copy with some elements replaced."),
            ("T", lambda x: F.transpose(x), "The axes in reverse order."),
            ("mT", F.matrix_transpose, "The last two axes exchanged.")):
        setattr(Tensor, name, property(getter, doc=doc))


attach()
