"""What flows between the rules while a model is traced.

A value is one of

* a `Tensor`: elements that exist at run time only;
* *known*: a NumPy array. Shape arithmetic is folded as it is met: `Shape` gives a known array, and what is computed
  from known arrays is known again. One that depends on symbolic sizes is an object array of ints and `Dim`s (its ONNX
  dtype is int64). Strings are known always, as no kernel computes with them;
* a Python list: a sequence;
* None: an operand that is absent, or an optional without a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from ...ir.dims import Dim
from ...ir.dtypes import DType, as_dtype, int64
from .. import functions as td
from ..data_sizes import size_tensor
from ..dispatch import as_tensor
from ..tensor import Tensor
from .elements import elements

Known = np.ndarray
OnnxValue: TypeAlias = "Tensor | np.ndarray | list[Any] | None"


def is_known(value: Any) -> bool:
    """Whether the elements are known while tracing."""
    return isinstance(value, (np.ndarray, np.generic))


def known(value: Any) -> np.ndarray | None:
    """The elements of a known value; None for a tensor."""
    return np.asarray(value) if is_known(value) else None


def is_text(value: Any) -> bool:
    """Whether a known value holds strings."""
    if not is_known(value):
        return False
    if value.dtype.kind in "US":
        return True
    return value.dtype == object and value.size > 0 and all(isinstance(x, (str, bytes)) for x in value.reshape(-1))


def is_symbolic(value: Any) -> bool:
    """Whether a known value contains sizes that are known at run time only."""
    return is_known(value) and value.dtype == object and any(isinstance(x, Dim) for x in value.reshape(-1))


def plain(array: Any) -> np.ndarray:
    """An object array of plain ints as the int64 array that it is; others as they are."""
    array = np.asarray(array)
    if array.dtype == object and all(isinstance(x, (int, np.integer)) for x in array.reshape(-1)):
        return array.astype(np.int64)
    return array


def dims_array(sizes: Sequence[Any]) -> np.ndarray:
    """A shape as a known value: int64, or an object array where a size is symbolic."""
    if not any(isinstance(s, Dim) for s in sizes):
        return np.array([int(s) for s in sizes], np.int64)
    array = np.empty(len(sizes), object)
    array[:] = list(sizes)
    return array


def tensor(value: Any) -> Tensor:
    """A tensor of any value that has elements; a known one becomes a constant.

    Symbolic sizes become numbers that the compiled function computes from its arguments' shapes.
    """
    if isinstance(value, Tensor):
        return value
    array = plain(value)
    if array.dtype != object:
        return as_tensor(array)
    if is_text(array):
        raise TypeError("strings cannot be computed with: no kernel takes them")
    if array.ndim == 0:
        return size_tensor(array.item())
    return td.reshape(td.stack([size_tensor(x) for x in array.reshape(-1)]), array.shape)


def dtype_of(value: Any) -> DType:
    """The element type of a tensor or known value."""
    if isinstance(value, Tensor):
        return value.dtype
    array = np.asarray(value)
    return int64 if array.dtype == object else as_dtype(array.dtype)


def shape_of(value: Any) -> tuple[Any, ...]:
    """The shape of a tensor or known value: ints and `Dim`s."""
    return tuple(value.shape)


def require_known(node: Any, value: Any, what: str) -> np.ndarray:
    """The elements of an operand that decides a shape or how the program looks.

    Outside a trace every tensor's elements can be read. In one, the elements of a tensor that was computed from the
    inputs are asked for by `node.need`: the program is cut there if it may be.

    Raises:
        OnnxError: the operand depends on data, and the model is not compiled in parts.
    """
    if is_known(value):
        return plain(value)
    if isinstance(value, Tensor):
        found = elements(value)
        if found is not None:
            return plain(found)
        array: np.ndarray = node.need(value, what)
        return array
    raise node.fail(f"the operand {what!r} is missing")


def require_ints(node: Any, value: Any, what: str) -> list[Any]:
    """`require_known` as a flat list of ints and Dims."""
    return list(require_known(node, value, what).reshape(-1).tolist())
