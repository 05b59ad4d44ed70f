"""`Tensor`: the one class of arrays.

A tensor wraps a value of the IR. A *concrete* tensor's value carries an array; a *tracer*'s belongs to a trace that
is being recorded. The operators and methods are those of the functions of the same name and are attached in
`methods`, so that each exists once.

Semantics are NumPy's, by the array API standard where they differ. Tensors do not change, with one exception:
`x.assign(value)` replaces the elements, for parameters and state. Elements of a tensor that has been given to a
compiled function, or has a role, are replaced in place, so the compiled code reads and writes them without a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir import context
from ..ir.dtypes import DType, as_dtype, float32, int64
from ..ir.errors import AttributeValueError, DTypeError, GradientError, ShapeError, TraceError
from ..ir.graph import Value
from ..ir.location import user_location
from ..ir.types import TensorType
from . import eager
from .eager import Concrete, array_type, copy_aligned, empty_aligned
from .pending import Elsewhere, Pending, Source, waiting

Binary = Callable[..., "Tensor"]


class Tensor:
    """A dense array of one dtype.

    Args:
        data: a number, nested lists of numbers, a NumPy array or a tensor. It is copied.
        dtype: default: the array's own; of Python numbers, float32, int64 or bool.
        requires_grad: whether `backward()` accumulates into `.grad` of this tensor. Floating dtypes only.
        role: "parameter" or "state" for what training updates in place; None otherwise.

    Attributes:
        grad: the gradient that `backward()` accumulated, a tensor, or None.

    Raises:
        DTypeError: the elements have no dtype that Treadle supports.
    """

    __slots__ = ("__weakref__", "_baked", "_role", "_trace", "_value", "grad", "name")
    __array_priority__ = 100  # NumPy arrays leave `array + tensor` to this class

    _value: Any
    _trace: Any
    grad: Tensor | None

    def __init__(self, data: Any, dtype: Any = None, *, requires_grad: bool = False, role: str | None = None,
                 name: str = ""):
        array = to_array(data, dtype)
        self._start(Concrete(copy_aligned(array), array_type(array)), None)
        self.role = role
        self.name = name
        if requires_grad:
            self.requires_grad = True

    def _start(self, value: Value, trace: Any) -> None:
        self._value = value
        self._trace = trace
        self._baked = False
        self._role: str | None = None
        self.grad = None
        self.name = ""

    @classmethod
    def _of(cls, value: Value, trace: Any = None) -> Tensor:
        """Wraps a value; `trace` is the builder that it belongs to, None for a concrete one."""
        tensor = Tensor.__new__(Tensor)
        tensor._start(value, trace)
        return tensor

    @classmethod
    def _later(cls, source: Source, *, requires_grad: bool = False, role: str | None = None, name: str = "") -> Any:
        """A tensor whose elements are made when they are first asked for."""
        tensor = cls.__new__(cls)
        tensor._start(Pending(source), None)
        tensor._role, tensor.name = role, name
        if requires_grad:
            tensor.requires_grad = True
        return tensor

    def _park(self, where: str) -> None:
        """Gives up the elements: whoever asks for them is told where they are."""
        old: Concrete = self._value
        value = Pending(Elsewhere(old.type, self.name, where))
        value.tracked, value.owner = old.tracked, old.owner
        self._value = value

    @classmethod
    def _from_array(cls, array: np.ndarray) -> Tensor:
        """Wraps an array without a copy."""
        return cls._of(Concrete(array, array_type(array)))

    # What it is -------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[Any, ...]:
        """A tuple of ints; in a trace with symbolic dimensions also of `Dim`s."""
        return self._value.type.shape

    @property
    def dtype(self) -> DType:
        """The element type; compares equal to its name, `x.dtype == "float32"`."""
        return self._value.type.dtype

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self._value.type.shape)

    @property
    def size(self) -> Any:
        """How many elements it has."""
        return self._value.type.size

    @property
    def nbytes(self) -> Any:
        """Bytes of its elements."""
        return self._value.type.nbytes

    @property
    def type(self) -> TensorType:
        """Shape and dtype as the IR writes them."""
        return self._value.type

    @property
    def is_tracer(self) -> bool:
        """Whether it stands for a value of a trace, and so has no elements yet."""
        return self._trace is not None

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow to or through it. Settable on concrete tensors of floating dtype."""
        return self._trace is None and self._value.tracked

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if self._trace is not None:
            raise TraceError("requires_grad cannot be set on a traced tensor; in a trace name what to differentiate "
                             "by: td.grad(fn, argnums=...)", user_location())
        if wanted and not self.dtype.is_float:
            raise GradientError(f"a tensor of dtype {self.dtype} cannot require a gradient; cast it to a floating "
                                "dtype", user_location())
        if self._value.producer is not None:
            if not wanted:
                raise GradientError("requires_grad can be turned off only on a tensor that was not computed from "
                                    "others; use x.detach()", user_location())
            return
        eager.records.freezes += 1
        self._value.tracked = bool(wanted)
        self._value.owner = weakref.ref(self) if wanted else None

    @property
    def role(self) -> str | None:
        """"parameter" or "state" for what is updated in place, in memory of its own; None for the rest."""
        return self._role

    @role.setter
    def role(self, role: str | None) -> None:
        if role not in (None, "parameter", "state"):
            raise AttributeValueError(f"a tensor's role is 'parameter', 'state' or None, not {role!r}")
        if role is not None and not waiting(self._value):
            self._pin()
        self._role = role

    @property
    def is_leaf(self) -> bool:
        """Whether it was not computed from a tensor that requires a gradient."""
        return self._value.producer is None

    def backward(self, gradient: Any = None) -> None:
        """Accumulates the gradient of this scalar into `.grad` of every leaf that requires one.

        Args:
            gradient: the cotangent, for a tensor that is not a scalar.

        Raises:
            GradientError: not a scalar and no cotangent given, not floating, or nothing to differentiate by.
        """
        _hooks["backward"](self, gradient)

    # Its elements -----------------------------------------------------------------------------------------------

    def numpy(self, copy: bool = True) -> np.ndarray:
        """The elements as a NumPy array: a copy of its own, or with `copy=False` a read-only view.

        Raises:
            TraceError: the tensor is traced.
        """
        array = self._elements("its elements (numpy)", "return it from the traced function")
        if copy:
            return array.copy()
        view = array.view()
        view.flags.writeable = False
        return view

    def _elements(self, what: str, instead: str) -> np.ndarray:
        if self._trace is not None:
            self._trace.refuse(self, what, instead)
        elif context.current_or_none() is not None:
            _hooks["read"](self, what)
        array: np.ndarray = self._value.array
        return array

    def item(self) -> Any:
        """The only element as a Python number."""
        array = self._elements("its number (item)", "return it from the traced function")
        if array.size != 1:
            raise ShapeError(f"item() needs a tensor of one element, not {self.type}", user_location())
        return array.item() if array.dtype.kind in "biuf" else float(array.reshape(()).astype(np.float64))

    def tolist(self) -> Any:
        """The elements as nested lists of Python numbers."""
        array = self._elements("its elements (tolist)", "return it from the traced function")
        return (array if array.dtype.kind in "biuf" else array.astype(np.float32)).tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._elements("its elements (a NumPy function)", "td.* functions of the same name")
        if copy is False and (dtype is None or np.dtype(dtype) == array.dtype):
            return self.numpy(copy=False)
        return np.array(array, dtype=dtype)

    def __dlpack__(self, **options: Any) -> Any:
        return self._elements("its memory", "return it from the traced function").__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    def __bool__(self) -> bool:
        array = self._elements("its truth (if, while, and, or, not, assert)",
                               "td.where for elements, td.cond for branches, td.while_loop for loops, and & | ~ for "
                               "logic")
        if array.size != 1:
            raise ShapeError(f"the truth of a tensor of {array.size} elements is ambiguous; use .any() or .all()",
                             user_location())
        return bool(array)

    def __int__(self) -> int:
        return int(self._elements("an int", "x.astype('int64')").item())

    def __float__(self) -> float:
        return float(self._elements("a float", "x.astype('float32')").astype(np.float64).item())

    def __index__(self) -> int:
        array = self._elements("an index (range, a shape, a list index)",
                               "td.take or x[i] to select, td.scan or td.while_loop to repeat")
        if not self.dtype.is_integer:
            raise DTypeError(f"a tensor of dtype {self.dtype} is no index", user_location())
        return int(array.item())

    def __len__(self) -> int:
        if not self.shape:
            raise ShapeError("a tensor without axes has no length", user_location())
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Tensor]:
        if not self.shape:
            raise ShapeError("a tensor without axes cannot be iterated over", user_location())
        if not isinstance(self.shape[0], int):
            raise TraceError(f"the length {self.shape[0]} is known only at run time: a Python loop cannot go over "
                             "it; use td.scan", user_location())
        return (self[i] for i in range(self.shape[0]))

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = fresh = _rebuild(*self.__reduce__()[1])
        return fresh

    def __reduce__(self) -> Any:
        return (_rebuild, (self.numpy(), self.is_leaf and self.requires_grad, self.role, self.name))

    def __repr__(self) -> str:
        if self._trace is not None:
            return f"tensor(traced {self.type})"
        if waiting(self._value) and isinstance(self._value.source, Elsewhere):
            return f"tensor({self.type} that {self._value.source.where})"
        array = self._value.array
        text = np.array2string(array, separator=", ", prefix="tensor(", threshold=200)
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"tensor({text}, dtype={self.dtype}{grad})"

    # Changing it ------------------------------------------------------------------------------------------------

    def assign(self, value: Any) -> Tensor:
        """Replaces the elements; inside a trace, the update happens when the compiled function runs.

        Args:
            value: a tensor, array or number of this shape (or one that broadcasts to it). It is cast to this dtype.

        Returns:
            This tensor.

        Raises:
            ShapeError: the shape does not fit.
            TraceError: this tensor is itself traced.
        """
        if self._trace is not None:
            raise TraceError("assign() changes a parameter or state, not a traced value: give the new value another "
                             "name", user_location())
        _hooks["assign"](self, value)
        return self

    def _overwrite(self, array: np.ndarray) -> None:
        """Puts new elements in. Records that read the old ones are told that they are gone."""
        old: Concrete = self._value
        if old.producer is not None and old.tracked:
            raise GradientError("assign() needs a tensor that was not computed from one that requires a gradient; "
                                "use x.detach() first", user_location())
        if waiting(old):
            self._renew(copy_aligned(array))
        elif old.mutable:
            np.copyto(old.array, array, casting="no")  # type: ignore[arg-type]
            if old.recorded or self._baked:
                self._renew(old.array)  # type: ignore[arg-type]
        else:
            self._renew(array.copy())

    def _renew(self, array: np.ndarray) -> None:
        """A new value for this tensor; the old one's elements are gone."""
        old: Concrete = self._value
        fresh = Concrete(array, old.type)
        fresh.tracked, fresh.owner, fresh.mutable = old.tracked, old.owner, old.mutable
        if old.recorded and old.mutable:
            old.array = None
        self._value = fresh
        if self._baked:
            _hooks["changed"]()

    def _pin(self) -> np.ndarray:
        """The array, from now on at a fixed, aligned, exclusive place: compiled code may update it."""
        value: Concrete = self._elements_value()
        array: np.ndarray = value.array  # type: ignore[assignment]
        if value.mutable and array.ctypes.data % eager.ALIGNMENT == 0 and array.flags.c_contiguous:
            return array
        if value.producer is not None:
            raise GradientError("a tensor that was computed from one that requires a gradient cannot be updated in "
                                "place; use x.detach()", user_location())
        array = copy_aligned(array)
        fresh = Concrete(array, value.type)
        fresh.tracked, fresh.owner, fresh.mutable = value.tracked, value.owner, True
        self._value = fresh
        return array

    def _elements_value(self) -> Concrete:
        self._elements("its memory", "return it from the traced function")
        value: Concrete = self._value
        return value

    if TYPE_CHECKING:  # attached in `methods`
        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        __add__: Binary
        __radd__: Binary
        __sub__: Binary
        __rsub__: Binary
        __mul__: Binary
        __rmul__: Binary
        __truediv__: Binary
        __rtruediv__: Binary
        __floordiv__: Binary
        __rfloordiv__: Binary
        __mod__: Binary
        __rmod__: Binary
        __pow__: Binary
        __rpow__: Binary
        __matmul__: Binary
        __rmatmul__: Binary
        __and__: Binary
        __or__: Binary
        __xor__: Binary
        __lshift__: Binary
        __rshift__: Binary
        __lt__: Binary
        __le__: Binary
        __gt__: Binary
        __ge__: Binary
        def __eq__(self, other: object) -> Tensor: ...  # type: ignore[override]
        def __ne__(self, other: object) -> Tensor: ...  # type: ignore[override]
        __neg__: Binary
        __pos__: Binary
        __abs__: Binary
        __invert__: Binary


# Set by the modules above: methods whose subject (gradients, promotion) is theirs.
_hooks: dict[str, Callable[..., Any]] = {}


def _rebuild(array: np.ndarray, requires_grad: bool, role: str | None, name: str) -> Tensor:
    return Tensor(array, requires_grad=requires_grad, role=role, name=name)


def to_array(data: Any, dtype: Any = None) -> np.ndarray:
    """Numbers, nested lists, arrays, tensors and DLPack exporters as a NumPy array, without a copy where possible.

    Python floats become float32, ints int64, bools bool.

    Raises:
        DTypeError: no supported dtype holds the elements.
        ShapeError: lists of different lengths.
    """
    wanted = None if dtype is None else as_dtype(dtype)
    if isinstance(data, Tensor):
        array = data._elements("its elements (tensor, asarray)", "x.astype, td.asarray(x) outside a trace")
    elif isinstance(data, (np.ndarray, np.generic)):
        array = np.asarray(data)
    elif hasattr(data, "__array__"):
        array = np.asarray(data)
    elif hasattr(data, "__dlpack__"):
        array = np.from_dlpack(data)
    else:
        array = _from_python(data)
        if wanted is None and array.dtype == np.float64:
            array = array.astype(np.float32)
    if wanted is not None and array.dtype != wanted.np:
        if array.dtype.kind in "OUSVcmM" and array.dtype.isbuiltin != 2:
            as_dtype(array.dtype)
        array = array.astype(wanted.np)
    as_dtype(array.dtype)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _from_python(data: Any) -> np.ndarray:
    try:
        if isinstance(data, (list, tuple)):
            return np.asarray(_unwrap(data))
        return np.asarray(data)
    except ValueError as error:
        raise ShapeError(f"the nested lists are not a rectangular array: {error}", user_location()) from None
    except OverflowError as error:
        raise DTypeError(f"a number does not fit a dtype: {error}", user_location()) from None


def _unwrap(data: Any) -> Any:
    """Nested lists with the tensors inside as arrays."""
    if isinstance(data, (list, tuple)):
        return [_unwrap(x) for x in data]
    if isinstance(data, Tensor):
        return data._elements("its elements (tensor, asarray)", "td.stack")
    return data


def default_dtype(scalar: Any) -> DType:
    """The dtype that a Python number has on its own."""
    if isinstance(scalar, bool):
        return as_dtype("bool")
    return int64 if isinstance(scalar, int) else float32


__all__ = ["Tensor", "array_type", "copy_aligned", "default_dtype", "empty_aligned", "to_array"]
