"""What the ops that write a kernel of their own share: parameters, loops, vectors.

Such a kernel sees each operand and result as one row of elements (`Row`), read and written in the compute dtype.
Indices are 64-bit here; TVM narrows them where they fit 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..ir.dims import Dim, Size
from ..ir.graph import Node, Value
from . import loops
from .lower_slots import cast, compute_dtype, read, storage_dtype, written
from .sizes import expression, expressions, hint, trunc_div, trunc_mod

SERIAL_WORK = 40_000  # steps below which waking other threads costs more than it saves


def key_dtype(dtype: str) -> str:
    """The dtype in which elements are compared: LLVM orders bools as signed."""
    return "int8" if dtype == "bool" else compute_dtype(dtype)


def index(value: Any) -> Any:
    """A number or expression as a 64-bit index."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else tirx.Cast("int64", expression(value))


@dataclass(frozen=True)
class Row:
    """A parameter as one row of elements."""

    value: Value
    buffer: Any

    def load(self, at: Any) -> Any:
        """The element at a flat position, in the compute dtype."""
        return read(self.buffer[at], self.value.dtype)

    def key(self, at: Any) -> Any:
        """The element at a flat position as it is compared."""
        return cast(self.load(at), key_dtype(self.value.dtype))

    def store(self, at: Any, element: Any) -> None:
        T.buffer_store(self.buffer, written(element, self.value.dtype), [at])

    def add(self, at: Any, element: Any) -> None:
        self.store(at, self.load(at) + element)


def write_kernel(node: Node, name: str, body: Callable[[list[Row], list[Row]], None],
                 inplace: Sequence[tuple[int, int]] = ()) -> Any:
    """The PrimFunc over the operands and results of a node; `body(operands, results)` emits its statements.

    `inplace` lists (operand, result) pairs that share one parameter. A kernel without results to write does nothing.
    """
    shared = {result: operand for operand, result in inplace}
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            operands = [_parameter(f"p{i}", v) for i, v in enumerate(node.operands)]
            results = [operands[shared[i]] if i in shared else _parameter(f"r{i}", v)
                       for i, v in enumerate(node.results)]
            if any(v.type.size for v in node.results):
                body([_row(v, b) for v, b in zip(node.operands, operands)],
                     [_row(v, b) for v, b in zip(node.results, results)])
            else:
                T.evaluate(0)
    return builder.get()


def _parameter(name: str, v: Value) -> Any:
    return T.arg(name, tirx.decl_buffer(expressions(v.shape), storage_dtype(v.dtype), name,
                                        data_alignment=v.dtype.itemsize))


def _row(v: Value, buffer: Any) -> Row:
    if v.rank != 1:
        buffer = T.decl_buffer((expression(v.type.size),), buffer.dtype, data=buffer.data, align=v.dtype.itemsize)
    return Row(v, buffer)


@contextmanager
def loop(extent: Any, kind: str = "serial") -> Iterator[Any]:
    """A loop giving its 64-bit variable; one of a single step gives 0 and no loop."""
    if isinstance(extent, int) and extent == 1:
        yield index(0)
    else:
        with getattr(T, kind)(index(extent)) as i:
            yield i


def parallel(extent: Any, work: Any, target: Any) -> Any:
    """A loop over independent steps: parallel if all of them together are `work` enough."""
    return loop(extent, "parallel" if target.threads > 1 and hint(work) > SERIAL_WORK else "serial")


def at_most(lanes: int, extent: Size) -> int:
    """Lanes of vectors along an axis: no more than it has elements, if that is known."""
    return min(lanes, extent) if isinstance(extent, int) else lanes


def lanes_of(values: Sequence[Value], target: Any) -> int:
    """Elements of a vector of the widest of the values as computed with."""
    bits = max(64 if compute_dtype(v.dtype) in ("float64", "int64", "uint64") else 32 for v in values)
    return max(target.vector_bits // bits, 1)


def each_vector(extent: Size, lanes: int, body: Callable[[Any, int], None]) -> None:
    """Runs `body(start, lanes)` over an axis in whole vectors, then once for the rest."""
    if isinstance(extent, Dim):
        loops.each_vector(extent, lanes, body)
        return
    whole, rest = divmod(extent, lanes)
    if whole:
        with loop(whole) as block:
            body(block * lanes, lanes)
    if rest:
        body(index(whole * lanes), rest)


@contextmanager
def lane_loop(lanes: int) -> Iterator[Any]:
    """The loop over the lanes of a vector."""
    if lanes == 1:
        yield index(0)
    else:
        with T.vectorized(index(lanes)) as lane:
            yield lane


def local(lanes: int, dtype: str) -> Any:
    """A small buffer in registers."""
    return T.alloc_buffer((lanes,), dtype, scope="local")


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements under a condition."""
    with T.If(condition), T.Then():
        yield


def around(shape: Sequence[Any], axis: int) -> tuple[Any, Any, Any]:
    """(elements before, size of, elements after) an axis."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1:])


def split_index(flat: Any, shape: Sequence[Size]) -> list[Any]:
    """The coordinates of a flat row-major position."""
    parts = []
    for size in reversed(shape):
        if isinstance(size, Dim):
            parts.append(trunc_mod(flat, size))
            flat = trunc_div(flat, size)
            continue
        parts.append(flat % size if size != 1 else index(0))
        flat = flat // size
    return parts[::-1]


def join_index(parts: Sequence[Any], shape: Sequence[Size]) -> Any:
    """The flat row-major position of coordinates."""
    flat = index(0)
    for part, size in zip(parts, shape):
        flat = flat * size + part
    return flat
