"""A graph whose shapes depend on data, as a sequence of graphs whose shapes do not.

`bind_size` makes a name stand for an element that the graph computes. Whatever has that name in its shape can be run
only once the element is there, so the graph is split into *phases*: the first holds what needs no such size, the next
what needs those that the first counts, and so on. Each phase is an ordinary graph with symbolic sizes, compiled once
for all values. A size that does not follow from the shapes of a phase's inputs is given to it by an input of shape
[size, 0], which has no elements.

What costs nothing (constants, counters, views of inputs) is repeated in every phase that uses it. Storage is taken over
in the last phase: a program that fails half-way has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .builder import GraphBuilder
from .dims import Dim, Size
from .dtypes import as_dtype
from .graph import Graph, Node, Value
from .types import TensorType

UINT8 = as_dtype("uint8")


@dataclass(frozen=True)
class Count:
    """A size that a phase counts: the name, the slot of the count, its bound, and what messages call it."""

    name: str
    slot: int
    most: Size | None
    what: str


@dataclass
class Phase:
    """One graph of the sequence.

    Attributes:
        inputs: what each input is: ("input", i) of the whole, ("slot", k), or ("size", name).
        outputs: the slot that each output goes to.
        counts: the sizes that are known after it.
    """

    graph: Graph
    inputs: list[tuple[str, Any]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)


@dataclass(frozen=True)
class Phases:
    """The sequence; `outputs`: the slot of each output of the whole."""

    phases: list[Phase]
    outputs: list[int]
    slots: int


def names_in(attr: Any) -> Iterator[str]:
    """The names of sizes in an attribute or shape."""
    if isinstance(attr, Dim):
        yield from attr.names
    elif isinstance(attr, (tuple, list)):
        for part in attr:
            yield from names_in(part)


def names_used(node: Node) -> set[str]:
    """The names of sizes that a node needs to know, its regions included."""
    attrs = [v for k, v in node.attrs.items() if not (node.op.name == "bind_size" and k == "size")]
    shapes = () if node.op.name == "bind_size" else tuple(v.shape for v in node.results)
    found = {*names_in(attrs), *names_in(shapes)}
    for region in node.regions:
        found.update(names_in(tuple(v.shape for v in region.inputs)))
        for inner in region.nodes:
            found |= names_used(inner)
    return found


def is_split(graph: Graph) -> bool:
    """Whether a graph has sizes that it counts itself."""
    return any(node.op.name == "bind_size" for node in graph.nodes)


def split(graph: Graph) -> Phases:
    """The phases of a graph."""
    return _Split(graph).run()


class _Split:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.names = {node: names_used(node) for node in graph.nodes}
        self.binds = {str(n.attrs["size"]): n for n in graph.nodes if n.op.name == "bind_size"}
        self.nodes = self._live()
        self.free: set[Node] = set()
        self.level: dict[Node, int] = {}
        for node in self.nodes:
            self.level[node] = self._level(node)
            if _is_free(node, self.free):
                self.free.add(node)
        self.last = max(self.level.values(), default=0)
        self.order = {v: i for i, v in enumerate((*graph.inputs, *(v for n in graph.nodes for v in n.results)))}
        self.slots: dict[Value, int] = {}

    def _live(self) -> list[Node]:
        """What outputs, effects, and sizes that something needs depend on; `bind_size` has a result nobody reads."""
        live, names = set(self.graph.outputs), set()
        kept = []
        for node in reversed(self.graph.nodes):
            bound = node.op.name == "bind_size"
            wanted = str(node.attrs["size"]) in names or node.attrs["most"] == 0 if bound else (
                node.op.has("effect") or any(v in live for v in node.results))  # a bound of 0: a condition
            if wanted:
                kept.append(node)
                live.update(node.operands)
                names |= self.names[node]
        return kept[::-1]

    def _level(self, node: Node) -> int:
        levels = [self.level[v.producer] for v in node.operands if v.producer is not None]
        levels += [self.level[self.binds[name]] + 1 for name in self.names[node] if name in self.binds]
        return max(levels, default=0)

    def run(self) -> Phases:
        wanted = self._crossing()
        phases = [self._phase(k, wanted) for k in range(self.last + 1)]
        outputs = [phases[-1].outputs[i] for i in range(len(self.graph.outputs))]
        return Phases(phases, outputs, 1 + max(s for p in phases for s in p.outputs))

    def _members(self, phase: int) -> list[Node]:
        """The nodes of a phase, with free ones of earlier phases that it uses; in order."""
        members: set[Node] = set()
        needed = list(self.graph.outputs) if phase == self.last else []
        for node in self.nodes:
            if self.level[node] == phase and node.op.name != "bind_size" and node not in self.free:
                members.add(node)
                needed += node.operands
            elif self.level[node] == phase and node.op.name == "bind_size":
                needed += node.operands
        while needed:
            producer = needed.pop().producer
            if producer is not None and producer in self.free and producer not in members:
                members.add(producer)
                needed += producer.operands
        return [n for n in self.nodes if n in members]

    def _crossing(self) -> list[set[Value]]:
        """The values that each phase gives: counts, and what later phases read."""
        given: list[set[Value]] = [set() for _ in range(self.last + 1)]
        for phase in range(self.last + 1):
            members = self._members(phase)
            made = {v for n in members for v in n.results}
            read: Iterable[Value] = (v for n in members for v in n.operands)
            if phase == self.last:
                read = (*read, *self.graph.outputs)
            for value in read:
                if value.producer is not None and value not in made:
                    given[self.level[value.producer]].add(value)
        for node in self.nodes:
            if node.op.name == "bind_size":
                given[self.level[node]].add(node.operands[0])
        return given

    def _phase(self, number: int, wanted: Sequence[set[Value]]) -> Phase:
        members = self._members(number)
        phase = Phase(Graph(f"{self.graph.name}_{number}"))
        final = number == self.last
        with GraphBuilder(phase.graph.name) as builder:
            mapping = self._inputs(phase, builder, members, self.graph.outputs if final else (), wanted[number])
            _name_sizes(phase, builder, {name for n in members for name in self.names[n]})
            for node in members:
                with builder.at(node.loc):
                    made = builder.emit(node.op.name, [mapping[v] for v in node.operands], node.attrs, node.regions)
                for old, new in zip(node.results, made):
                    new.name = old.name
                    mapping[old] = new
            if final:
                self._outputs(phase, builder, mapping)
            for value in sorted(wanted[number], key=self.order.__getitem__):
                builder.own_output(mapping[value])
                self.slots[value] = len(self.slots)
                phase.outputs.append(self.slots[value])
        phase.graph = builder.graph
        phase.counts = [Count(str(n.attrs["size"]), self.slots[n.operands[0]], n.attrs["most"], n.attrs["what"])
                        for n in self.nodes if n.op.name == "bind_size" and self.level[n] == number]
        return phase

    def _inputs(self, phase: Phase, builder: GraphBuilder, members: Sequence[Node], outputs: Sequence[Value],
                wanted: Iterable[Value]) -> dict[Value, Value]:
        made = {v for n in members for v in n.results}
        read = dict.fromkeys(v for v in (*(v for n in members for v in n.operands), *outputs, *wanted) if v not in made)
        if outputs:  # what is taken over has to be an input there, read or not
            read.update(dict.fromkeys(self.graph.inputs[i] for i in self.graph.aliases.values()))
        place = {v: i for i, v in enumerate(self.graph.inputs)}
        mapping: dict[Value, Value] = {}
        for value in sorted(read, key=lambda v: (0, place[v]) if v in place else (1, self.slots[v])):
            role = self.graph.roles[place[value]] if value in place else "data"
            mapping[value] = builder.input(value.type, value.name, role)
            phase.inputs.append(("input", place[value]) if value in place else ("slot", self.slots[value]))
        return mapping

    def _outputs(self, phase: Phase, builder: GraphBuilder, mapping: Mapping[Value, Value]) -> None:
        """The outputs of the whole, which the last phase gives."""
        first = len(self.slots)
        for i, value in enumerate(self.graph.outputs):
            alias = mapping[self.graph.inputs[self.graph.aliases[i]]] if i in self.graph.aliases else None
            builder.own_output(mapping[value], alias)
            phase.outputs.append(first + i)
            self.slots[Value(value.type)] = first + i


def _is_free(node: Node, free: set[Node]) -> bool:
    """Whether a node costs nothing to repeat: it moves elements of inputs at most."""
    return (node.op.has("constant") or node.op.has("view")) and all(
        v.producer is None or v.producer in free for v in node.operands)


def _name_sizes(phase: Phase, builder: GraphBuilder, names: set[str]) -> None:
    """Inputs without elements for the sizes that no input has as an axis."""
    inputs = list(builder.graph.inputs)
    names = names | {name for v in inputs for name in names_in(v.shape)}
    for name in sorted(names - {str(n) for v in inputs for n in v.shape if isinstance(n, Dim)}):
        builder.input(TensorType((Dim(name), 0), UINT8), f"size_{name}")
        phase.inputs.append(("size", name))


def to_json(phases: Phases) -> dict[str, Any]:
    """Everything but the graphs, as plain data."""
    return {"outputs": phases.outputs, "slots": phases.slots, "phases": [
        {"inputs": [list(i) for i in p.inputs], "outputs": p.outputs,
         "counts": [{"name": c.name, "slot": c.slot, "most": None if c.most is None else str(c.most), "what": c.what}
                    for c in p.counts]} for p in phases.phases]}
