"""The slot `onnx`: how each op of the IR is said in ONNX.

    @exports("tanh")
    def tanh(out, node, x):
        return out.op("Tanh", x)

A rule gets the writer, the IR node and what stands for its operands, and gives what stands for its result (a tuple for
several). An op without a rule is written by its decomposition into others (`ir/decompose_rules.py`). The rules are in
the files `export_*.py` of this folder; a user's own op gets one by `ir.opdef.fill("onnx", name, rule)`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from ...ir import decompose_rules as _decompositions  # noqa: F401  (fills the slots)
from ...ir.builder import GraphBuilder
from ...ir.dtypes import as_dtype
from ...ir.graph import Graph, Node, Value
from ...ir.opdef import fill
from ...ir.ops_collective import COMMUNICATION
from .export_writer import Ref, Writer

Rule = Callable[..., Any]
FILES = ("shape", "math", "integers", "reduce", "nn", "window", "index", "control", "random")
F32 = as_dtype("float32")
BEYOND = dict.fromkeys(
    COMMUNICATION, "ONNX knows no other processes: export the graph as it was before it was partitioned")
"""Ops that ONNX cannot say, with the reason."""


def exports(*names: str) -> Callable[[Rule], Rule]:
    """Puts the decorated rule into the slot `onnx` of ops."""
    def declare(rule: Rule) -> Rule:
        for name in names:
            fill("onnx", name, rule)
        return rule
    return declare


def in_f32(rule: Rule) -> Rule:
    """A rule of several steps, made to serve 16-bit floats: they are widened before, the results rounded after."""
    @functools.wraps(rule)
    def run(out: Writer, node: Node, *refs: Ref) -> Any:
        if not any(r.dtype.is_float and r.dtype.bits < 32 for r in refs):
            return rule(out, node, *refs)
        made = rule(out, node, *(out.cast(r, F32) if r.dtype.is_float and r.dtype.bits < 32 else r for r in refs))
        listed = [made] if isinstance(made, Ref) else made
        back = tuple(out.cast(r, v.dtype) if r.dtype.is_float else r for r, v in zip(listed, node.results))
        return back[0] if isinstance(made, Ref) else back
    return run


def load_rules() -> None:
    """Imports the files of rules, once."""
    for name in FILES:
        importlib.import_module(f"{__package__}.export_{name}")


def fused(out: Writer, node: Node) -> Ref | None:
    """What stands for a node that ends a group of nodes which one ONNX op says."""
    from . import export_fuse  # uses the rules, which this module must not import before they register
    return export_fuse.fused(out, node)


def write_node(out: Writer, node: Node) -> None:
    """Writes one IR node: by its rule, or by the rules of what it decomposes into."""
    out.node = node
    refs = [out.refs[v] for v in node.operands]
    rule = node.op.slots.get("onnx")
    group = fused(out, node) if len(node.results) == 1 else None
    if group is not None:
        results: Sequence[Ref] = (group,)
    elif rule is not None:
        made = rule(out, node, *refs)
        results = (made,) if isinstance(made, Ref) else made
    elif "decompose" in node.op.slots:
        results = decomposed(out, node, refs)
    elif node.op.name in BEYOND:
        raise out.fail(BEYOND[node.op.name])
    else:
        raise out.fail(f"the op has neither an ONNX rule nor a decomposition. Attach a rule with "
                       f"treadle.ir.opdef.fill('onnx', {node.op.name!r}, rule), or leave the op out")
    for value, ref in zip(node.results, results, strict=True):
        assert ref.dtype == value.dtype, f"{node.op.name}: the rule gives {ref} for {value}"
        out.refs[value] = ref


def write_graph(out: Writer, graph: Graph, refs: Sequence[Ref]) -> list[Ref]:
    """Writes the nodes of a graph into a scope; gives what stands for its outputs."""
    out.bind(graph, refs)
    outer = out.node
    for node in graph.nodes:
        write_node(out, node)
    out.node = outer
    return [out.refs[v] for v in graph.outputs]


def decomposed(out: Writer, node: Node, refs: Sequence[Ref]) -> list[Ref]:
    """Writes a node by its decomposition."""
    extra = {"regions": node.regions} if node.op.has("regions") else {}

    def body(*operands: Value) -> Any:
        return node.op.slots["decompose"](*operands, **node.attrs, **extra)

    return through_ir(out, node, body, refs)


def through_ir(out: Writer, node: Node, body: Callable[..., Any], refs: Sequence[Ref]) -> list[Ref]:
    """Writes what a function of IR values emits, called with the operands of a node."""
    with GraphBuilder(node.op.name) as builder, builder.at(node.loc):
        made = body(*(builder.input(v.type) for v in node.operands))
        builder.output(*([made] if isinstance(made, Value) else made))
    return write_graph(out, builder.graph, refs)
