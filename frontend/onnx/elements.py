"""Elements of traced tensors that follow from sizes and constants.

Exporters compute shapes with the ops that compute everything else, so a number that is known may come as an element of
a tensor: of a `Concat` of a count and a constant, say. It is found in the graph that was traced so far.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ...ir.dims import Size
from ...ir.errors import ShapeError
from ...ir.graph import Node, Value
from ..recording import Trace
from ..tensor import Tensor

DEPTH = 32
"""How far back a size is looked for."""

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def element(x: Tensor, at: int = 0) -> Size | None:
    """An element (by its place in row-major order) of a traced integer tensor; None if data decide it."""
    trace = x._trace
    if not isinstance(trace, Trace) or not x.dtype.is_integer:
        return None
    constants = {value: t for t, value in trace.captures.values() if t.role is None and not t.requires_grad}
    try:
        return _element(x._value, at, constants, DEPTH)
    except ShapeError:  # sizes that do not divide
        return None


def _element(value: Value, at: int, constants: dict[Value, Tensor], depth: int) -> Size | None:
    node = value.producer
    if node is None:
        return int(constants[value].numpy(copy=False).reshape(-1)[at]) if value in constants else None
    name = node.op.name
    if name == "constant":
        return int(node.attrs["value"].reshape(-1)[at])
    if name == "size":
        size: Size = node.attrs["of"]
        return size
    if depth == 0 or not value.type.is_static or not all(v.dtype.is_integer for v in node.operands):
        return None
    if name in ARITHMETIC:
        parts = [_element(v, at if v.type == value.type else 0, constants, depth - 1) for v in node.operands
                 if v.type == value.type or v.type.size == 1]
        return None if None in parts or len(parts) != 2 else ARITHMETIC[name](*parts)
    found = _source(node, at)
    return None if found is None else _element(*found, constants, depth - 1)


def _source(node: Node, at: int) -> tuple[Value, int] | None:
    """The operand that an element is moved from, and its place there."""
    x, name = node.operands[0] if node.operands else None, node.op.name
    if x is None:
        return None
    if name in ("reshape", "cast", "identity", "stop_gradient") or name == "broadcast_to" and x.type.size == 1:
        return x, at if name != "broadcast_to" else 0
    if x.rank != 1:
        return None
    if name == "concat":
        for part in node.operands:
            if at < part.shape[0]:
                return part, at
            at -= part.shape[0]
    if name == "slice":
        return x, node.attrs["starts"][0] + at * node.attrs["strides"][0]
    return None


def elements(x: Tensor) -> np.ndarray | None:
    """All elements of a traced tensor, if they follow from sizes and constants, as an array of objects."""
    if x.ndim > 1 or not isinstance(x.size, int) or x.size > DEPTH or x._trace is None:
        return None
    found = [element(x, i) for i in range(x.size)]
    if any(size is None for size in found):
        return None
    array = np.empty(len(found), object)
    array[:] = found
    return array.reshape(x.shape)
