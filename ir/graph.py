"""Values, nodes, graphs.

A graph is a list of nodes in an order in which they can run; every value has one producer (or is an
input) and never changes. Ops with control flow hold nested graphs, their *regions*, which are closed:
what a region needs from outside is an operand of its node.

Only a builder (`ir/builder.py`) makes nodes, so a node's result types are always inferred, never claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import context
from .dims import Dim
from .location import Loc
from .opdef import OpDef
from .types import TensorType

ROLES = ("data", "parameter", "state", "constant", "scalar")


class Value:
    """A typed, immutable result of a node, or an input of a graph (then `producer` is None).

    Arithmetic on values emits nodes into the current builder, so that rules read as mathematics;
    Python scalars become constants of the value's dtype.
    """

    __slots__ = ("type", "name", "producer", "index", "__weakref__")

    def __init__(self, type: TensorType, name: str = "", producer: Node | None = None, index: int = 0):
        self.type = type
        self.name = name
        self.producer = producer
        self.index = index

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.type.shape

    @property
    def dtype(self) -> Any:
        return self.type.dtype

    @property
    def rank(self) -> int:
        return self.type.rank

    def __repr__(self) -> str:
        return f"%{self.name or '?'}: {self.type}"

    def __add__(self, other: Any) -> Value:
        return context.binary("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return context.binary("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return context.binary("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return context.binary("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return context.binary("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return context.binary("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return context.binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return context.binary("div", other, self)

    def __pow__(self, other: Any) -> Value:
        return context.binary("pow", self, other)

    def __neg__(self) -> Value:
        return context.emit("neg", self)


class Node:
    """One application of an op. `attrs` are complete: every attribute of the record is present."""

    __slots__ = ("op", "operands", "attrs", "results", "regions", "loc", "__weakref__")

    def __init__(self, op: OpDef, operands: Sequence[Value], attrs: Mapping[str, Any],
                 result_types: Sequence[TensorType], regions: Sequence[Graph] = (), loc: Loc | None = None):
        self.op = op
        self.operands = tuple(operands)
        self.attrs = dict(attrs)
        self.regions = tuple(regions)
        self.loc = loc
        self.results = tuple(Value(t, "", self, i) for i, t in enumerate(result_types))

    @property
    def result(self) -> Value:
        """The only result."""
        (only,) = self.results
        return only

    @property
    def flops(self) -> Any:
        return self.op.flops(self)

    @property
    def nbytes(self) -> Any:
        return self.op.nbytes(self)

    def __repr__(self) -> str:
        return f"<{self.op.name}({', '.join(map(repr, self.operands))})>"


class Graph:
    """Inputs, nodes in order, outputs.

    Attributes:
        roles: of each input, one of ROLES.
        aliases: output index -> index of the input whose storage that output takes over.
        meta: notes that are not part of the program and not compared (e.g. the tensors bound to inputs).
    """

    __slots__ = ("name", "inputs", "roles", "nodes", "outputs", "aliases", "meta", "__weakref__")

    def __init__(self, name: str, inputs: Sequence[Value] = (), roles: Sequence[str] | None = None,
                 nodes: Sequence[Node] = (), outputs: Sequence[Value] = (),
                 aliases: Mapping[int, int] | None = None, meta: Mapping[str, Any] | None = None):
        self.name = name
        self.inputs = list(inputs)
        self.roles = list(roles) if roles is not None else ["data"] * len(self.inputs)
        self.nodes = list(nodes)
        self.outputs = list(outputs)
        self.aliases = dict(aliases or {})
        self.meta = dict(meta or {})

    @property
    def input_types(self) -> tuple[TensorType, ...]:
        return tuple(v.type for v in self.inputs)

    @property
    def output_types(self) -> tuple[TensorType, ...]:
        return tuple(v.type for v in self.outputs)

    @property
    def dims(self) -> frozenset[str]:
        """Names of the symbolic sizes of the inputs."""
        return frozenset(n for v in self.inputs for s in v.shape if isinstance(s, Dim) for n in s.names)

    def walk(self) -> Iterator[Node]:
        """Every node, those of nested regions included, outer first."""
        for node in self.nodes:
            yield node
            for region in node.regions:
                yield from region.walk()

    def uses(self) -> dict[Value, list[Node]]:
        """The nodes that read each value (this level only; a node twice if it reads a value twice)."""
        readers: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for operand in node.operands:
                readers.setdefault(operand, []).append(node)
        return readers

    def __str__(self) -> str:
        return context.print_graph(self)

    def __repr__(self) -> str:
        return f"<graph {self.name}: {len(self.inputs)} inputs, {len(self.nodes)} nodes, {len(self.outputs)} outputs>"

    def __eq__(self, other: object) -> bool:
        """Equal programs: the same text. Source locations and `meta` are not compared."""
        return isinstance(other, Graph) and (self is other or str(self) == str(other))

    __hash__ = object.__hash__


class Module:
    """Named graphs and the constants that they share (name -> array)."""

    def __init__(self, graphs: Mapping[str, Graph], constants: Mapping[str, Any] | None = None):
        self.graphs = dict(graphs)
        self.constants = dict(constants or {})

    def __getitem__(self, name: str) -> Graph:
        return self.graphs[name]

    def __str__(self) -> str:
        return "\n\n".join(str(g) for g in self.graphs.values())
