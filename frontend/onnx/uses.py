"""How the stored arrays of a model are used: what is a weight, what decides shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx

from ...ir.dtypes import as_dtype
from ...ir.errors import DTypeError
from .reader import subgraphs
from .rules import OnnxRule, find_rule

FOLLOWED = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Gather", "Slice", "Add",
            "Sub", "Mul", "Div", "Neg", "Expand", "Where", "Split", "ReduceProd", "Min", "Max", "Floor", "Ceil"}
"""Ops that a value which decides shapes may have gone through."""


class Uses:
    """Who reads the values of a graph, in it and in its subgraphs.

    Attributes:
        readers: name -> (node, number of the operand).
        static: names that decide shapes or how the program looks, however indirectly.
    """

    def __init__(self, graph: onnx.GraphProto, opsets: Mapping[str, int], functions: Mapping[Any, Any]):
        self.opsets = opsets
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.makers: dict[str, onnx.NodeProto] = {}
        self._own = {key[:2] for key in functions}
        self._walk(graph.node)
        self.static = self._decide_shapes()

    def _walk(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            for number, name in enumerate(node.input):
                if name:
                    self.readers.setdefault(name, []).append((node, number))
            for name in node.output:
                self.makers[name] = node
            for inner in subgraphs(node):
                self._walk(inner.node)

    def rule(self, node: onnx.NodeProto) -> OnnxRule | None:
        """The rule that a node will be run by."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type) in self._own:
            return None
        return find_rule(node.op_type, domain, self.opsets.get(domain, 1))

    def _decide_shapes(self) -> set[str]:
        """From the operands that rules declare static, back through shape arithmetic."""
        pending = [name for name, uses in self.readers.items()
                   if any((rule := self.rule(node)) is not None and number in rule.static for node, number in uses)]
        found = set(pending)
        while pending:
            maker = self.makers.get(pending.pop())
            if maker is None or maker.op_type not in FOLLOWED:
                continue
            fresh = [n for n in maker.input if n and n not in found]
            found.update(fresh)
            pending.extend(fresh)
        return found

    def kind(self, name: str, array: np.ndarray) -> str:
        """What an initializer is: a "parameter" that training changes, a "buffer", or "known" while tracing."""
        if name in self.static or not is_float(array):
            return "known"
        roles = [(rule, number) for node, number in self.readers.get(name, ()) if (rule := self.rule(node)) is not None]
        if any(number in rule.state for rule, number in roles):
            return "buffer"
        if array.size > 1 or any(number in rule.weights for rule, number in roles):
            return "parameter"
        return "parameter" if array.ndim and self._is_bias(name) else "known"

    def _is_bias(self, name: str) -> bool:
        """Whether a single element is added to what a product gives."""
        for node, number in self.readers.get(name, ()):
            if node.op_type == "Add" and node.domain in ("", "ai.onnx") and len(node.input) == 2:
                other = self.makers.get(node.input[1 - number])
                if other is not None and other.op_type in ("MatMul", "Conv", "Gemm", "ConvTranspose"):
                    return True
        return False


def inner_tensors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """What the graphs inside a graph store, in initializers and `Constant` nodes, where a name occurs once only."""
    found: dict[str, onnx.TensorProto] = {}
    taken = {o for node in graph.node for o in node.output} | {t.name for t in graph.initializer}
    pending = [inner for node in graph.node for inner in subgraphs(node)]
    again: set[str] = set()
    while pending:
        inner = pending.pop()
        here = {t.name: t for t in inner.initializer}
        for node in inner.node:
            pending.extend(subgraphs(node))
            value = next((a for a in node.attribute if a.name == "value" and a.HasField("t")), None)
            if node.op_type == "Constant" and value is not None and len(node.output) == 1:
                here[node.output[0]] = value.t
            else:
                again.update(o for o in node.output if o in taken)
                taken.update(node.output)
        again.update(name for name in here if name in taken)
        taken.update(here)
        found.update(here)
    return {name: tensor for name, tensor in found.items() if name not in again}


def is_float(array: np.ndarray) -> bool:
    """Whether an array holds floats of a dtype that kernels compute with."""
    try:
        return as_dtype(array.dtype).is_float
    except DTypeError:
        return False


def names_used(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """The names that nodes read, in their subgraphs too."""
    found: set[str] = set()
    for node in nodes:
        found.update(node.input)
        for inner in subgraphs(node):
            found |= names_used(inner.node) | {o.name for o in inner.output}
    return found
