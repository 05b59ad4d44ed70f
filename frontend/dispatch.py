"""How a call of a function becomes a node: operands to tensors, dtypes to a common one, results to tensors.

Type promotion happens here and nowhere else. Tensors and NumPy arrays promote by `ir.dtypes.promote` (the array API
standard; an integer with a float gives that float). Python numbers are *weak*: they take the dtype of the tensors
they meet, so `x_f32 * 2.0` and `x_bf16 + 1` keep theirs; only a float that meets integers makes them float32, and an
int that meets bools makes them int64. NumPy's float64 scalars are Python floats, and weak too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir import ops as _ops  # noqa: F401 -- fills the registry
from ..ir.dims import Dim
from ..ir.dtypes import DType, as_dtype, bool_, float32, int64, promote
from ..ir.errors import AttributeValueError, DTypeError, ShapeError, TraceError
from ..ir.graph import Graph
from ..ir.location import user_location
from ..ir.types import as_shape
from . import eager
from .tensor import Tensor, _hooks, to_array

CONSTANT_SIZE = 1024
"""Arrays of up to so many elements that are used in a trace are written into the graph."""


def apply(name: str, *operands: Any, regions: Sequence[Graph] = (), **attrs: Any) -> Any:
    """Emits one node with tensors as operands; gives a tensor, or a tuple for an op with several results.

    Outside a trace the op runs at once.
    """
    builder = eager.builder()
    results = builder.emit(name, [lift_into(builder, x) for x in operands], attrs, regions)
    trace = builder if builder is not eager.eager_builder() else None
    if trace is not None and hasattr(trace, "shielded"):
        results = trace.shielded(results)
    if len(results) == 1:
        return Tensor._of(results[0], trace)
    return tuple(Tensor._of(v, trace) for v in results)


def lift_into(builder: Any, tensor: Tensor) -> Any:
    """The value that stands for a tensor in a builder. One that is no trace (a pass's) takes its own and constants."""
    if hasattr(builder, "lift"):
        return builder.lift(tensor)
    if tensor._trace is None:
        return builder.emit("constant", (), {"value": tensor.numpy()})[0]
    if tensor._trace is not builder:
        raise TraceError(f"the traced tensor {tensor.type} does not belong to the graph that is being built",
                         user_location())
    return tensor._value


def constant(value: Any, dtype: DType) -> Tensor:
    """A tensor of a number or small array, which in a trace is part of the graph."""
    result: Tensor = apply("constant", value=np.asarray(value, dtype=dtype.np))
    return result


def is_weak(x: Any) -> bool:
    """Whether x is a Python number, whose dtype gives way to that of the tensors it meets."""
    return isinstance(x, (bool, int, float)) and not isinstance(x, np.bool_)


def as_tensor(x: Any, dtype: Any = None) -> Tensor:
    """A tensor from whatever can be one; of `dtype` if given (cast if need be).

    Raises:
        DTypeError: x holds elements of no supported dtype.
        TraceError: x is a size known only at run time.
    """
    if isinstance(x, Tensor):
        tensor = x
    elif isinstance(x, Dim):
        raise TraceError(f"the size {x} is known only at run time and cannot be computed with; fix it: "
                         "td.spec with a number", user_location())
    else:
        if isinstance(x, (list, tuple)) and any(isinstance(leaf, Tensor) and leaf.is_tracer for leaf in _leaves(x)):
            from_list: Callable[..., Tensor] = _hooks["stack"]
            tensor = from_list(x)
        else:
            tensor = _from_data(x, dtype)
    if dtype is not None and tensor.dtype != as_dtype(dtype):
        return cast(tensor, as_dtype(dtype))
    return tensor


def _leaves(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from _leaves(y)
    else:
        yield x


def _from_data(x: Any, dtype: Any) -> Tensor:
    if dtype is not None and is_weak(x):
        return constant(x, as_dtype(dtype))
    array = to_array(x)
    builder = eager.builder()
    if builder is eager.eager_builder():
        return Tensor._from_array(array)
    if array.size <= CONSTANT_SIZE or not hasattr(builder, "literal"):
        return constant(array.copy(), as_dtype(array.dtype))
    tensor: Tensor = builder.literal(x if isinstance(x, np.ndarray) else None, array)
    return tensor


def cast(x: Tensor, dtype: DType) -> Tensor:
    """x in another dtype."""
    return x if x.dtype == dtype else apply("cast", x, dtype=dtype)


def common_dtype(operands: Sequence[Any], floating: bool = False) -> DType:
    """The dtype that tensors, arrays and Python numbers promote to; with `floating`, integers become float32.

    Raises:
        DTypeError: an operand holds elements of no supported dtype.
    """
    dtype: DType | None = None
    weak = [x for x in operands if is_weak(x)]
    for x in operands:
        if is_weak(x):
            continue
        own = x.dtype if isinstance(x, Tensor) else as_dtype(x.dtype)
        dtype = own if dtype is None else promote(dtype, own)
    for x in weak:
        if isinstance(x, bool):
            dtype = dtype or bool_
        elif isinstance(x, int):
            dtype = int64 if dtype is None or dtype.is_bool else dtype
        else:
            dtype = float32 if dtype is None or not dtype.is_float else dtype
    assert dtype is not None
    return float32 if floating and not dtype.is_float else dtype


def promoted(*operands: Any, floating: bool = False) -> list[Tensor]:
    """The operands as tensors of their common dtype."""
    ready = [x if isinstance(x, Tensor) or is_weak(x) else as_tensor(x) for x in operands]
    first = ready[0]
    if isinstance(first, Tensor) and all(isinstance(x, Tensor) and x.dtype == first.dtype for x in ready) and not (
            floating and not first.dtype.is_float):
        return ready
    dtype = common_dtype(ready, floating)
    return [x if isinstance(x, Tensor) and x.dtype == dtype else _to_dtype(x, dtype) for x in ready]


def _to_dtype(x: Any, dtype: DType) -> Tensor:
    if isinstance(x, Tensor):
        return cast(x, dtype)
    if dtype.is_integer and not isinstance(x, bool):
        info = np.iinfo(dtype.np) if dtype.bits >= 8 else None
        if info is not None and not info.min <= x <= info.max:
            raise DTypeError(f"the number {x} does not fit the dtype {dtype} of the tensor it meets; cast the tensor "
                             "first, e.g. to int64", user_location())
    return constant(x, dtype)


def unary(name: str, x: Any, floating: bool = False) -> Tensor:
    """An elementwise op of one operand; with `floating` integers become float32 first."""
    x = as_tensor(x)
    if floating and not x.dtype.is_float:
        x = cast(x, float32)
    result: Tensor = apply(name, x)
    return result


def binary(name: str, x: Any, y: Any, floating: bool = False) -> Tensor:
    """An elementwise op of two operands, brought to their common dtype."""
    result: Tensor = apply(name, *promoted(x, y, floating=floating))
    return result


# Arguments -----------------------------------------------------------------------------------------------------


def normalize_axis(axis: Any, ndim: int) -> int:
    """An axis in [0, ndim); negative ones count from the end.

    Raises:
        AttributeValueError: out of range, or not an int.
    """
    try:
        index = axis.__index__()
    except (AttributeError, TypeError):
        raise AttributeValueError(f"an axis is an int, not {axis!r}", user_location()) from None
    if not -ndim <= index < ndim:
        raise AttributeValueError(f"axis {index} is out of range for a tensor of {ndim} axes", user_location())
    return int(index % ndim)


def normalize_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Sorted axes in [0, ndim) from None (all), an int or a sequence of ints.

    Raises:
        AttributeValueError: out of range, or one stands twice.
    """
    if axis is None:
        return tuple(range(ndim))
    if not isinstance(axis, (tuple, list)):
        return (normalize_axis(axis, ndim),)
    axes = tuple(sorted(normalize_axis(a, ndim) for a in axis))
    if len(set(axes)) != len(axes):
        raise AttributeValueError(f"an axis stands twice in {tuple(axis)}", user_location())
    return axes


def normalize_shape(shape: Any) -> tuple[Any, ...]:
    """A shape from an int, a Dim or a sequence of them.

    Raises:
        ShapeError: a size is negative or not an integer.
    """
    try:
        return as_shape(shape)
    except (TypeError, AttributeError):
        raise ShapeError(f"{shape!r} is no shape: give ints", user_location()) from None
    except ShapeError as error:
        error.where = error.where or user_location()
        raise


def pair(value: Any, count: int, what: str) -> tuple[int, ...]:
    """One int for each of `count` axes, from an int or a sequence.

    Raises:
        AttributeValueError: a sequence of another length.
    """
    if hasattr(value, "__index__"):
        return (int(value.__index__()),) * count
    values = tuple(value)
    if len(values) != count or not all(hasattr(v, "__index__") for v in values):
        raise AttributeValueError(f"{what} is {value!r}; expected an int or {count} ints", user_location())
    return tuple(int(v.__index__()) for v in values)


def assign(tensor: Tensor, value: Any) -> None:
    """`Tensor.assign`: broadcast and cast, then hand to the current builder."""
    new = as_tensor(value) if not is_weak(value) else constant(value, tensor.dtype)
    if new.dtype != tensor.dtype:
        new = cast(new, tensor.dtype)
    if new.shape != tensor.shape:
        if not all(isinstance(s, int) for s in new.shape) or len(new.shape) > len(tensor.shape):
            raise ShapeError(f"assign: a value of type {new.type} does not fit the tensor {tensor.type}",
                             user_location())
        try:
            new = apply("broadcast_to", new, shape=tensor.shape)
        except ShapeError:
            raise ShapeError(f"assign: a value of type {new.type} does not fit the tensor {tensor.type}",
                             user_location()) from None
    eager.builder().assign(tensor, new)


_hooks["assign"] = assign
