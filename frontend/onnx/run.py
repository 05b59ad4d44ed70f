"""Running an ONNX graph on our tensors: node by node, each by its rule.

This happens inside a trace as well as outside, so one walk serves eager mode, tracing, compiling and gradients. A
`Frame` holds the values of one graph by name; the frame of a subgraph sees the one around it, the frame of a function
does not. An op without a rule that is a function (of the model, or by its definition in the standard) is replaced by
its body.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import onnx

from ...ir.errors import OnnxError, TreadleError
from ...ir.location import Loc
from .. import eager
from ..recording import current_trace
from ..tensor import Tensor
from .constraints import check_types
from .fold import fold_symbolic
from .functions import FunctionBody, standard_body
from .node import NeedsValue, OnnxNode, array_of, dense_of
from .rules import OnnxRule, find_rule
from .values import dtype_of, is_known, is_symbolic, is_text, plain, tensor

FOLD_ELEMENTS = 1 << 16
"""Known operands with more elements than this are computed with at run time (or by the passes)."""
DEPTH = 64
"""How deep functions may call each other."""


DATA_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
               ValueError)
"""What Python raises where operands and attributes are not what an op's definition says."""


class NodeLoc(Loc):
    """The ONNX node that made a node of the graph."""

    def __str__(self) -> str:
        return f"{self.file}: {self.function}"


_open_sizes: ContextVar[bool] = ContextVar("open_sizes", default=True)


@contextmanager
def open_sizes(allowed: bool) -> Iterator[None]:
    """Whether sizes that data decide become symbolic; see `Context`."""
    token = _open_sizes.set(allowed)
    try:
        yield
    finally:
        _open_sizes.reset(token)


class Context:
    """What all frames of one run share.

    Attributes:
        label: what messages call the model.
        functions: the model's own, by (domain, name, overload).
        max_elements: a tensor with more is refused before it is made.
        wrappers: modules that run a node in its rule's place, by its first output; see `OnnxModule.wrap`.
        answers: elements of tensors that decide shapes, in the order in which they are asked for; see `staged`.
        open_sizes: sizes that data decide become symbolic in a trace; otherwise they are asked for like other elements.
        counted: the nodes that have such sizes.
    """

    def __init__(self, label: str, functions: Mapping[tuple[str, str, str], onnx.FunctionProto], max_elements: int,
                 wrappers: Mapping[str, Sequence[Any]] | None = None, counted: dict[str, None] | None = None):
        self.label = label
        self.wrappers = wrappers or {}
        self.functions = functions
        self.max_elements = max_elements
        self.answers: list[np.ndarray] = []
        self.asked = 0
        self.depth = 0
        self.trace = current_trace()
        self.open_sizes = _open_sizes.get()
        self.counted: dict[str, None] = {} if counted is None else counted
        self._told: dict[Any, np.ndarray] = {}

    def answer(self, value: Tensor) -> np.ndarray | None:
        """The elements of a tensor of the outermost trace, if they are among the answers."""
        key = value._value
        if key not in self._told and value._trace is self.trace and self.asked < len(self.answers):
            self._told[key] = self.answers[self.asked]
            self.asked += 1
        return self._told.get(key)

    def is_outermost(self, value: Tensor) -> bool:
        """Whether a tensor exists outside of all loops and branches."""
        return value._trace is self.trace


class Frame:
    """The values of a graph that is being run.

    Attributes:
        env: by name.
        nodes: those of the graph.
        hoisted: names that the graphs inside store, but the module holds.
        parent: the frame around a subgraph's.
        opsets: the version of each domain.
        attributes: of the function call that this frame belongs to.
    """

    def __init__(self, context: Context, opsets: Mapping[str, int], parent: Frame | None = None,
                 attributes: Mapping[str, onnx.AttributeProto] | None = None):
        self.context = context
        self.opsets = opsets
        self.parent = parent
        inherited = None if parent is None else parent.attributes
        self.attributes: Mapping[str, onnx.AttributeProto] | None = inherited if attributes is None else attributes
        self.env: dict[str, Any] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.hoisted: frozenset[str] = frozenset() if parent is None else parent.hoisted

    def lookup(self, name: str) -> Any:
        """The value of a name, here or around.

        Raises:
            OnnxError: nothing of that name has been computed.
        """
        frame: Frame | None = self
        while frame is not None:
            if name in frame.env:
                return frame.env[name]
            frame = frame.parent
        raise OnnxError(f"{self.context.label}: {name!r} is used before it is computed, or nothing computes it")

    def subgraph(self, graph: onnx.GraphProto, node: OnnxNode) -> Subgraph:
        """A graph attribute, which sees the names of this frame."""
        return Subgraph(graph, self, node)

    def node(self, proto: onnx.NodeProto) -> OnnxNode:
        """A node of this frame's graph; references to attributes of the function are resolved."""
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        attributes = {}
        for attribute in proto.attribute:
            if not attribute.ref_attr_name:
                attributes[attribute.name] = attribute
            elif self.attributes is not None and attribute.ref_attr_name in self.attributes:
                given = onnx.AttributeProto()
                given.CopyFrom(self.attributes[attribute.ref_attr_name])
                given.name = attribute.name
                attributes[attribute.name] = given
        return OnnxNode(proto, self.opsets.get(domain, 1), self, attributes)

    def run(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Runs nodes in their order."""
        self.nodes = list(nodes)
        for proto in self.nodes:
            self.step(proto)

    def step(self, proto: onnx.NodeProto) -> None:
        """Runs one node."""
        node = self.node(proto)
        operands = [self.lookup(name) if name else None for name in proto.input]
        results = self.run_wrapped(node, operands)
        for name, result in zip(proto.output, results):
            if name:
                self.env[name] = result

    def run_wrapped(self, node: OnnxNode, operands: Sequence[Any]) -> Sequence[Any]:
        """The results of a node, or what the modules wrapped around it make of it."""
        run = functools.partial(run_node, node, operands)
        for wrapper in self.context.wrappers.get(node.outputs[0], ()) if node.outputs else ():
            run = functools.partial(wrapper, run, operands)
        return run()


class Subgraph:
    """A graph attribute of a node: `sub(*values)` runs it and gives the list of its outputs."""

    def __init__(self, graph: onnx.GraphProto, frame: Frame, node: OnnxNode):
        self.graph, self.frame, self.node = graph, frame, node
        self.inputs = [i.name for i in graph.input]
        self.outputs = [o.name for o in graph.output]

    def __call__(self, *values: Any) -> list[Any]:
        if len(values) != len(self.inputs):
            raise self.node.fail(f"its subgraph {self.graph.name!r} takes {len(self.inputs)} values, not {len(values)}")
        frame = Frame(self.frame.context, self.frame.opsets, self.frame)
        for initializer in self.graph.initializer:
            if initializer.name not in frame.hoisted:
                frame.env[initializer.name] = array_of(initializer)
        for sparse in self.graph.sparse_initializer:
            frame.env[sparse.values.name] = dense_of(sparse)
        frame.env.update(zip(self.inputs, values))
        frame.run(n for n in self.graph.node if not (n.op_type == "Constant" and n.output[0] in frame.hoisted))
        return [frame.lookup(name) for name in self.outputs]


def run_node(node: OnnxNode, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of a node, from its rule or its body.

    Raises:
        OnnxError: there is neither, or the operands do not fit; the node is named.
    """
    context: Context = node.frame.context
    body = _own_function(node)
    rule = None if body is not None else find_rule(node.op_type, node.domain, node.opset)
    if body is None and rule is None:
        body = standard_body(node, operands)
    if body is not None:
        return _call(node, body, operands)
    if rule is None:
        raise node.fail(f"there is no rule for this op at opset {node.opset}" + _why_not(node))
    check_types(node, operands)
    try:
        with eager.builder().at(NodeLoc(context.label, 0, str(node))):
            results = apply_rule(node, rule, operands)
    except OnnxError:
        raise
    except TreadleError as error:
        raise OnnxError(f"{node}: {error.message}") from error
    except DATA_ERRORS as error:
        raise OnnxError(f"{node}: its operands or attributes do not fit: {type(error).__name__}: {error}") from error
    _check_sizes(node, results, context.max_elements)
    return results


def _why_not(node: OnnxNode) -> str:
    if node.domain not in node.frame.opsets:
        return f"; the model does not import the domain {node.domain!r}, and defines no such function"
    return "; `treadle onnx check` lists all such nodes of a model"


def _own_function(node: OnnxNode) -> FunctionBody | None:
    functions = node.frame.context.functions
    if not functions:
        return None
    found = functions.get((node.domain, node.op_type, node.proto.overload))
    return None if found is None else FunctionBody(found)


def apply_rule(node: OnnxNode, rule: OnnxRule, operands: Sequence[Any]) -> list[Any]:
    """The results of a rule as a list; folded where every operand is known."""
    given = [x for x in operands if x is not None]
    all_known = bool(given) and all(is_known(x) for x in given)
    if all_known and any(is_symbolic(x) for x in given):
        folded = fold_symbolic(node, operands)
        if folded is not None:
            return _listed(folded)
    operands = settled(operands)
    if all_known and rule.fold and not any(is_text(x) or is_symbolic(x) for x in given) \
            and sum(x.size for x in given) <= FOLD_ELEMENTS and _result_is_small(node, operands):
        with eager.eager_builder():
            return [_known(r) for r in _listed(rule.function(node, *operands))]
    return _listed(rule.function(node, *operands))


def settled(operands: Sequence[Any]) -> list[Any]:
    """Object arrays that hold plain ints as arrays of the integer dtype of their neighbours, int64 by default."""
    if not any(is_known(x) and x.dtype == object for x in operands):
        return list(operands)
    narrow = any(dtype_of(x) == "int32" for x in operands if isinstance(x, (Tensor, np.ndarray)) and not is_text(x))
    return [plain(x).astype(np.int32) if narrow and is_known(x) and x.dtype == object and plain(x).dtype != object
            else plain(x) if is_known(x) else x for x in operands]


def _known(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.numpy(copy=False)
    return [_known(r) for r in result] if isinstance(result, list) else result


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def _result_is_small(node: OnnxNode, operands: Sequence[Any]) -> bool:
    """Whether what an op makes of known operands, which say how large it is, is worth keeping as an array."""
    op = node.op_type
    if op in ("Expand", "ConstantOfShape", "Tile", "Reshape", "OneHot"):
        sizes = np.abs(np.asarray(operands[min(len(operands) - 1, 1)], np.float64)).reshape(-1)
        base = operands[0].size if op in ("Tile", "OneHot") else 1.0
        return bool(base * np.prod(sizes) <= FOLD_ELEMENTS)
    if op == "Range":
        start, limit, step = (float(np.asarray(x).reshape(-1)[0]) for x in operands)
        return step != 0 and abs(limit - start) / abs(step) <= FOLD_ELEMENTS
    return op not in ("Resize", "Upsample", "Pad", "CenterCropPad", "AffineGrid", "HannWindow", "HammingWindow",
                      "BlackmanWindow", "MelWeightMatrix", "DFT", "STFT")


def _check_sizes(node: OnnxNode, results: Sequence[Any], limit: int) -> None:
    for result in results:
        if isinstance(result, Tensor) and result.type.is_static and result.size > limit:
            raise node.fail(f"its result {result.type} has more than {limit:,} elements; if that is meant, "
                            "load the model with a higher max_elements")


def _call(node: OnnxNode, body: FunctionBody, operands: Sequence[Any]) -> list[Any]:
    """Runs a function's body on the operands."""
    context: Context = node.frame.context
    if context.depth >= DEPTH:
        raise node.fail(f"functions call each other more than {DEPTH} deep: one calls itself")
    proto = body.proto
    if len(operands) > len(proto.input):
        raise node.fail(f"the function takes {len(proto.input)} operands, not {len(operands)}")
    attributes = dict(node.defaults()) if body.opsets else {}
    attributes.update({a.name: a for a in proto.attribute_proto})
    attributes.update(node._attributes)
    opsets = dict(body.opsets or {}) or {i.domain if i.domain != "ai.onnx" else "": i.version
                                         for i in proto.opset_import}
    frame = Frame(context, {**node.frame.opsets, **opsets}, None, attributes)
    frame.env.update(dict.fromkeys(proto.input))
    frame.env.update(zip(proto.input, operands))
    context.depth += 1
    try:
        frame.run(proto.node)
    except NeedsValue:
        raise
    except OnnxError as error:
        raise OnnxError(f"{node}: in its function body: {error.message}") from error
    finally:
        context.depth -= 1
    return [frame.lookup(name) if node.wants(i) else None for i, name in enumerate(proto.output)]


@contextmanager
def eager_limit(max_elements: int) -> Iterator[None]:
    """What runs at once (eager mode, and what is folded) makes no tensor with more elements."""
    builder = eager.eager_builder()
    before, builder.max_elements = builder.max_elements, max_elements
    try:
        yield
    finally:
        builder.max_elements = before


def concrete(value: Any) -> Any:
    """A value as the caller of a model gets it: known values as tensors."""
    if isinstance(value, list):
        return [concrete(v) for v in value]
    if value is None or is_text(value):
        return value
    return tensor(plain(value) if is_known(value) else value)
