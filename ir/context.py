"""The current builder of this thread.

Rules (VJPs, decompositions) and `Value` arithmetic emit into whichever builder is current: one that
records a graph, or the eager one that also runs each node. This module holds the stack, and the two
hooks by which `graph.py` reaches emission and printing without importing what imports it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import TraceError

if TYPE_CHECKING:
    from .builder import Builder
    from .graph import Graph, Value


class _Stack(threading.local):
    def __init__(self) -> None:
        self.builders: list[Builder] = []


_stack = _Stack()
_printer: list[Any] = []


def push(builder: Builder) -> None:
    _stack.builders.append(builder)


def pop(builder: Builder) -> None:
    if not _stack.builders or _stack.builders[-1] is not builder:
        raise TraceError("builders must be closed in the reverse order of opening")
    _stack.builders.pop()


def current() -> Builder:
    """The innermost builder that is open on this thread."""
    if not _stack.builders:
        raise TraceError("no builder is open: emit nodes inside `with GraphBuilder(...)` or a trace")
    return _stack.builders[-1]


def current_or_none() -> Builder | None:
    return _stack.builders[-1] if _stack.builders else None


def depth() -> int:
    """How many builders are open on this thread."""
    return len(_stack.builders)


def emit(name: str, *operands: Value, regions: tuple[Graph, ...] = (), **attrs: Any) -> Any:
    """Emits one node into the current builder; gives its result, or a tuple for an op with several."""
    results = current().emit(name, operands, attrs, regions)
    return results[0] if len(results) == 1 else results


def binary(name: str, x: Any, y: Any) -> Value:
    """A binary op where one side may be a Python scalar."""
    dtype = x.dtype if hasattr(x, "producer") else y.dtype
    return emit(name, as_value(x, dtype), as_value(y, dtype))


def as_value(x: Any, dtype: Any) -> Value:
    """`x` itself if it is a value, else a scalar constant of the dtype."""
    if hasattr(x, "producer"):
        return x
    return emit("constant", value=np.asarray(x, dtype=dtype.np))


def set_printer(printer: Any) -> None:
    _printer[:] = [printer]


def print_graph(graph: Graph) -> str:
    return _printer[0](graph)
