"""Running operations at once.

Eager mode is a builder like the one that records a graph: `take(node)` runs the op's reference kernel and puts the
arrays on the node's results. A node is kept (its results point back to it) only if a gradient may be wanted: some
operand is *tracked*. So the record that `loss.backward()` walks is ordinary IR, the rules are the ones that
differentiate graphs, and what they emit while this builder is current runs at once, and is recorded in its turn.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from ..ir import context
from ..ir.builder import Builder
from ..ir.dtypes import DType, as_dtype
from ..ir.errors import GradientError, ShapeError, TraceError
from ..ir.graph import Node, Value
from ..ir.interp import run_node
from ..ir.types import TensorType
from . import grad_mode

ALIGNMENT = 64
_UNDIFFERENTIATED = frozenset({"constant", "iota", "random_bits", "stop_gradient"})


class Concrete(Value):
    """A value with its array.

    Attributes:
        array: the elements; None once `Tensor.assign` has replaced them (the old ones are gone).
        tracked: a gradient with respect to it, or to what it was computed from, may be wanted.
        owner: of a leaf that requires a gradient, a weak reference to the tensor whose `.grad` is to be set.
        mutable: the array is updated in place (parameters, state): results must not share its memory.
        recorded: a kept node reads it.
    """

    __slots__ = ("array", "mutable", "owner", "recorded", "tracked")

    def __init__(self, array: np.ndarray | None, type: TensorType, producer: Node | None = None, index: int = 0):
        super().__init__(type, "", producer, index)
        self.array = array
        self.tracked = producer is not None and type.dtype.is_float
        self.owner: weakref.ref[Any] | None = None
        self.mutable = False
        self.recorded = False


class _Counter:
    """How often something happened that compiled calls look for only if it has: a leaf entered a record (which an
    update in place invalidates), a tensor's `requires_grad` was set."""

    leaves = 0
    freezes = 0


records = _Counter()
_types: dict[tuple[tuple[Any, ...], Any], TensorType] = {}


def array_type(array: np.ndarray) -> TensorType:
    """The type of an array; one object per type, so that comparing is cheap.

    Raises:
        DTypeError: the array's dtype is none of Treadle's.
    """
    key = (array.shape, array.dtype)
    found = _types.get(key)
    if found is None:
        found = _types[key] = TensorType(array.shape, as_dtype(array.dtype))
    return found


def interned(type: TensorType) -> TensorType:
    """The one object that stands for a static type: its `id` names the type in the keys of compiled calls."""
    return _types.setdefault((type.shape, type.dtype.np), type)


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised row-major array that starts at a multiple of 64 bytes: a cache line, a full vector."""
    dtype = dtype.np if isinstance(dtype, DType) else np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + count].view(dtype).reshape(shape)


def copy_aligned(array: np.ndarray) -> np.ndarray:
    """A copy in aligned, row-major memory."""
    fresh = empty_aligned(array.shape, array.dtype)
    np.copyto(fresh, array, casting="no")
    return fresh


class EagerBuilder(Builder):
    """Runs each node when it is made.

    Attributes:
        max_elements: a result with more is refused before it is allocated; None: whatever fits.
    """

    max_elements: int | None = None

    def take(self, node: Node) -> None:
        """Runs the node's reference kernel; keeps the node if an operand is tracked."""
        if self.max_elements is not None:
            for value in node.results:
                if value.type.is_static and value.type.size > self.max_elements:
                    raise ShapeError(f"{node.op.name} would make {value.type}, more than {self.max_elements:,} "
                                     "elements", node.loc)
        arrays = [_array(v, node) for v in node.operands]
        results = run_node(node, arrays)
        keep = (grad_mode.is_grad_enabled() and node.op.undifferentiable is None
                and node.op.name not in _UNDIFFERENTIATED
                and any(v.tracked for v in node.operands))  # type: ignore[attr-defined]
        values = []
        for i, (array, declared) in enumerate(zip(results, node.results)):
            for operand in node.operands:
                if operand.mutable and np.may_share_memory(array, operand.array):  # type: ignore[attr-defined]
                    array = np.array(array)
                    break
            values.append(Concrete(array, array_type(array) if declared.type.is_static else declared.type,
                                   node if keep else None, i))
        if keep:
            for operand in node.operands:
                if operand.producer is None and not operand.recorded:  # type: ignore[attr-defined]
                    operand.recorded = True  # type: ignore[attr-defined]
                    records.leaves += 1
        node.results = tuple(values)

    def lift(self, tensor: Any) -> Concrete:
        """The value of a concrete tensor."""
        if tensor._trace is not None:
            tensor._trace.leaked(tensor)
        return tensor._value

    def assign(self, tensor: Any, value: Any) -> None:
        """Replaces a tensor's elements now."""
        tensor._overwrite(self.lift(value).array)

    def offset(self, state: Any) -> int:
        """Where the next random draw from a Philox state starts; see `random`."""
        return 0

    def advance(self, state: Any, count: int) -> None:
        """Moves a Philox state past a draw."""
        array = np.array(self.lift(state).array)
        array[1] = (int(array[1]) + count) % 2**64
        state._overwrite(array)


def _array(value: Value, node: Node) -> np.ndarray:
    if not isinstance(value, Concrete):
        raise TraceError(f"{node.op.name}: the operand {value!r} belongs to a trace and has no elements; "
                         "return it from the traced function instead", node.loc)
    array = value.array
    if array is None:
        raise GradientError(f"{node.op.name} needs the elements of {value!r}, which were replaced since by assign() or "
                            "an optimizer step; call backward() before the update", node.loc)
    return array


class _Local(threading.local):
    def __init__(self) -> None:
        self.builder = EagerBuilder()


_local = _Local()


def builder() -> Any:
    """The builder that frontend operations go to: the innermost open one, or this thread's eager one."""
    return context.current_or_none() or _local.builder


def eager_builder() -> EagerBuilder:
    """This thread's eager builder."""
    return _local.builder
