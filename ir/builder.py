"""The only way to make a node.

`make_node` completes the attributes, infers the result types and notes the user's source line.
A `Builder` decides what happens to the node: `GraphBuilder` appends it to a graph; the frontend's eager
builder runs it.

    with GraphBuilder("axpy") as b:
        x = b.input(TensorType((8,), "float32"), "x")
        y = b.input(TensorType((8,), "float32"), "y")
        b.output(x * 2.0 + y)
    graph = b.graph
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import context
from .context import as_value, emit
from .errors import ArgumentsError, TraceError, TreadleError
from .graph import ROLES, Graph, Node, Value
from .location import Loc, user_location
from .opdef import OpDef, op
from .types import TensorType

__all__ = ["Builder", "GraphBuilder", "as_value", "build", "copy_into", "emit", "make_node", "replay"]


def make_node(record: OpDef, operands: Sequence[Value], attrs: Mapping[str, Any],
              regions: Sequence[Graph] = (), loc: Loc | None = None) -> Node:
    """A node with complete attributes and inferred result types.

    Raises:
        ShapeError, DTypeError, AttributeValueError: from the op's type rule; the message names the op and
            its operand types, and `where` is the user's line.
    """
    try:
        _check_operands(record, operands)
        full = record.complete_attrs(attrs)
        extra = {"regions": tuple(regions)} if record.has("regions") else {}
        types = record.infer(*(v.type for v in operands), **full, **extra)
    except TreadleError as error:
        if error.where is None:
            error.where = loc
            if not error.message.startswith(record.name):
                error.message = f"{record.name}: {error.message}"
            error.args = (error.message,)
        raise
    return Node(record, operands, full, (types,) if isinstance(types, TensorType) else types, regions, loc)


def _check_operands(record: OpDef, operands: Sequence[Value]) -> None:
    least = len(record.operands) - record.variadic
    if len(operands) < least or (len(operands) > least and not record.variadic):
        raise ArgumentsError(f"takes the operands ({', '.join(record.operands)}), got {len(operands)}")


class Builder:
    """Where emitted nodes go. Use as a context manager to make it the current builder."""

    def __init__(self) -> None:
        self._locations: list[Loc | None] = []

    def emit(self, name: str, operands: Sequence[Value], attrs: Mapping[str, Any],
             regions: Sequence[Graph] = ()) -> tuple[Value, ...]:
        """Makes a node of the op `name` and takes it in; gives its results."""
        loc = self._locations[-1] if self._locations else user_location()
        node = make_node(op(name), operands, attrs, regions, loc)
        self.take(node)
        return node.results

    def take(self, node: Node) -> None:
        """Receives a node that was just made."""
        raise TraceError("use a GraphBuilder or a trace: the base Builder keeps no nodes")

    @contextmanager
    def at(self, loc: Loc | None) -> Iterator[None]:
        """Nodes emitted inside carry this source line (rules work on behalf of the user's node)."""
        self._locations.append(loc)
        try:
            yield
        finally:
            self._locations.pop()

    def __enter__(self) -> Any:
        context.push(self)
        return self

    def __exit__(self, *exc: object) -> None:
        context.pop(self)


class GraphBuilder(Builder):
    """Records a graph."""

    def __init__(self, name: str = "main"):
        super().__init__()
        self.graph = Graph(name)

    def take(self, node: Node) -> None:
        self.graph.nodes.append(node)

    def input(self, type: TensorType, name: str = "", role: str = "data") -> Value:
        """Adds an input of the given type, name and role (one of ROLES)."""
        if role not in ROLES:
            raise ArgumentsError(f"an input's role is one of {', '.join(ROLES)}, not {role!r}")
        value = Value(type, name)
        self.graph.inputs.append(value)
        self.graph.roles.append(role)
        return value

    def output(self, *values: Value, alias: Value | None = None) -> None:
        """Adds outputs; `alias` is the input whose storage a single output takes over."""
        if alias is not None:
            self.graph.aliases[len(self.graph.outputs)] = self.graph.inputs.index(alias)
        self.graph.outputs.extend(values)

    def own_output(self, value: Value, alias: Value | None = None) -> None:
        """Adds an output that has memory of its own: of an input, and of what is an output already, a copy."""
        if value in self.graph.inputs or value in self.graph.outputs:
            (value,) = self.emit("identity", [value], {})
        self.output(value, alias=alias)


def copy_into(graph: Graph, operands: Sequence[Value], into: Builder | None = None) -> list[Value]:
    """Emits a copy of a graph's nodes into a builder (the current one by default), inputs replaced.

    Returns the values that stand for the graph's outputs.
    """
    mapping = dict(zip(graph.inputs, operands, strict=True))
    replay(graph.nodes, mapping, into or context.current())
    return [mapping[v] for v in graph.outputs]


def replay(nodes: Sequence[Node], mapping: dict[Value, Value], builder: Builder) -> None:
    """Emits copies of nodes, their operands replaced by `mapping`, which receives their results."""
    for node in nodes:
        with builder.at(node.loc):
            results = builder.emit(node.op.name, [mapping[v] for v in node.operands], node.attrs, node.regions)
        for old, new in zip(node.results, results, strict=True):
            new.name = new.name or old.name
            mapping[old] = new


def build(name: str, fn: Any, *types: TensorType) -> Graph:
    """The graph of `fn(*values)` (one value or a sequence), for given input types. For rules and tests."""
    with GraphBuilder(name) as builder:
        results = fn(*(builder.input(t) for t in types))
        builder.output(*([results] if isinstance(results, Value) else results))
    return builder.graph
