"""The text form of a graph. `parse.parse` reads it back to an equal graph.

    graph main(%x: f32[8,784] data, %w: f32[784,10] parameter) -> (f32[8,10]) {
      %0 = matmul(%x, %w) : f32[8,10]
      %1 = reduce_max(%0) {axes=(1,), keepdims=true} : f32[8,1]
      return %1
    }

Attributes that have their default value are left out. Arrays of up to 16 elements are printed as
numbers, larger ones as the base64 of their zlib-compressed bytes. Outputs that take over an input's
storage are written `return %3 -> %w`.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

from . import context
from .dims import Dim
from .dtypes import DType, as_dtype
from .graph import Graph, Node, Value
from .opdef import REQUIRED
from .types import TensorType

INLINE_ELEMENTS = 16


def print_graph(graph: Graph) -> str:
    """The text of a graph; `str(graph)` is the same."""
    return "\n".join(_graph_lines(graph, ""))


class _Names:
    """Unique printable names: the value's own where it is free, else a number."""

    def __init__(self) -> None:
        self.of: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.count = 0

    def define(self, value: Value) -> str:
        name = "".join(c if c.isalnum() or c in "_." else "_" for c in value.name)
        if not name or name.isdigit():
            name = str(self.count)
            self.count += 1
        base, repeats = name, 0
        while name in self.taken:
            name = f"{base}_{repeats}"
            repeats += 1
        self.taken.add(name)
        self.of[value] = name
        return f"%{name}"

    def use(self, value: Value) -> str:
        # a value from outside is a broken graph; it must still print, for the error message
        return f"%{self.of[value]}" if value in self.of else f"%<undefined {value.name}>"


def _graph_lines(graph: Graph, indent: str) -> list[str]:
    names = _Names()
    inputs = ", ".join(f"{names.define(v)}: {v.type} {role}"
                       for v, role in zip(graph.inputs, graph.roles, strict=True))
    outputs = ", ".join(str(t) for t in graph.output_types)
    lines = [f"{indent}graph {graph.name}({inputs}) -> ({outputs}) {{"]
    for node in graph.nodes:
        lines += _node_lines(node, names, indent + "  ")
    returned = []
    for i, value in enumerate(graph.outputs):
        alias = f" -> {names.use(graph.inputs[graph.aliases[i]])}" if i in graph.aliases else ""
        returned.append(names.use(value) + alias)
    lines.append(f"{indent}  return {', '.join(returned)}".rstrip())
    lines.append(f"{indent}}}")
    return lines


def _node_lines(node: Node, names: _Names, indent: str) -> list[str]:
    operands = ", ".join(names.use(v) for v in node.operands)
    results = ", ".join(names.define(v) for v in node.results)
    types = ", ".join(str(v.type) for v in node.results)
    shown = [f"{k}={attr_text(v)}" for k, v in node.attrs.items() if not _is_default(node.op.attrs.get(k), v)]
    attrs = f" {{{', '.join(shown)}}}" if shown else ""
    head = f"{indent}{results} = {node.op.name}({operands}){attrs}"
    if not node.regions:
        return [f"{head} : {types}"]
    lines = [f"{head} ["]
    for region in node.regions:
        lines += _graph_lines(region, indent + "  ")
    lines.append(f"{indent}] : {types}")
    return lines


def node_text(node: Node) -> str:
    """One node on one line, operands with their types: for error messages."""
    operands = ", ".join(map(repr, node.operands))
    return f"{node.op.name}({operands}) -> {', '.join(str(v.type) for v in node.results)}"


def _is_default(default: Any, value: Any) -> bool:
    if default is REQUIRED or isinstance(value, np.ndarray):
        return False
    return type(default) is type(value) and default == value


def attr_text(value: Any) -> str:
    """An attribute's value as the text form writes it."""
    if value is None:
        return "none"
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, DType):
        return f"dtype {value.short}"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Dim):
        return f"`{value}`"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (tuple, list)):
        inner = ", ".join(attr_text(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, np.ndarray):
        return array_text(value)
    raise TypeError(f"an attribute cannot hold {value!r} of type {type(value).__name__}")


def array_text(array: np.ndarray) -> str:
    """`f32[3] <1.0, 2.0, 3.0>`, or base64 of the compressed bytes for more than 16 elements."""
    dtype = as_dtype(array.dtype)
    head = str(TensorType(array.shape, dtype))
    if array.size > INLINE_ELEMENTS:
        data = zlib.compress(np.ascontiguousarray(array).tobytes(), 1)
        return f"{head} <zlib {base64.b64encode(data).decode()}>"
    return f"{head} <{', '.join(_number(x, dtype) for x in array.reshape(-1))}>"


def _number(x: Any, dtype: DType) -> str:
    if dtype.is_bool:
        return "true" if x else "false"
    if dtype.is_float and np.isnan(np.float64(x)):
        return "nan"  # the payload of a NaN is not part of a program
    return repr(float(x)) if dtype.is_float else str(int(x))


context.set_printer(print_graph)
