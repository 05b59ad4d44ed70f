"""A graph as a chain of layers, and a run of layers as a stage with a forward and a backward program.

What matters of a loss's graph are the nodes that depend on data and parameters both; the others (masks from the
batch, a transposed weight) are computed again wherever they are wanted. Between two such nodes the graph can be cut
if one single value crosses: there ends a layer. The residual stream of a transformer is such a value; so is the
input of every layer of a plain net.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..ir.builder import GraphBuilder, replay
from ..ir.errors import AttributeValueError
from ..ir.graph import Graph, Node, Value
from .chain import Cut, Layer, cut
from .cost import Cluster

BACKWARD_WORK = 2.0  # of the forward pass


@dataclass(frozen=True)
class Chain:
    """A graph's layers. `crossing[i]`: the value that layer i hands to the next; the last hands out the loss."""

    graph: Graph
    layers: tuple[Layer, ...]
    crossing: tuple[Value, ...]


@dataclass(frozen=True)
class Stage:
    """A run of layers as a graph of its own.

    Attributes:
        graph: inputs: what it is handed (unless it is the first stage), then inputs of the whole graph.
        inputs: their numbers in the whole graph.
        handed: whether the first input comes from the stage before.
    """

    graph: Graph
    inputs: tuple[int, ...]
    handed: bool


def _spine(graph: Graph, data: Collection[int]) -> set[Node]:
    """Nodes that depend on the data and on other inputs."""
    kinds: dict[Value, frozenset[bool]] = {v: frozenset({i in data}) for i, v in enumerate(graph.inputs)}
    found = set()
    for node in graph.nodes:
        mixed: frozenset[bool] = frozenset().union(*(kinds[v] for v in node.operands))
        kinds.update(dict.fromkeys(node.results, mixed))
        if len(mixed) == 2:
            found.add(node)
    return found


def chain_of(graph: Graph, data: Collection[int], cluster: Cluster | None = None) -> Chain:
    """The layers of a graph with one output, the loss. `data`: the inputs that are the batch.

    A layer's parameters count four times (gradient and two moments); its activations are what it computes.
    """
    cluster = cluster or Cluster()
    spine = _spine(graph, data)
    order = [n for n in graph.nodes if n in spine]
    last = {v: i for i, n in enumerate(order) for v in n.operands}
    last.update(dict.fromkeys(graph.outputs, len(order)))
    layers, crossing, start = [], [], 0
    live: set[Value] = set()
    seen: set[Value] = set()
    for i, node in enumerate(order):
        live |= set(node.results)
        live = {v for v in live if last.get(v, -1) > i}
        if len(live) == 1 and (i + 1 == len(order) or next(iter(live)).dtype.is_float):
            layers.append(_layer(graph, order[start:i + 1], next(iter(live)), seen, data, cluster))
            crossing.append(next(iter(live)))
            start = i + 1
    return Chain(graph, tuple(layers), tuple(crossing))


def _layer(graph: Graph, nodes: Sequence[Node], out: Value, seen: set[Value], data: Collection[int],
           cluster: Cluster) -> Layer:
    read = {v for n in nodes for v in n.operands if v.producer is None} - seen
    seen |= read
    own = sum(float(v.type.nbytes) for i, v in enumerate(graph.inputs) if v in read and i not in data)
    seconds = sum(max(float(n.flops) / cluster.flops, cluster.touch(float(n.nbytes))) for n in nodes)
    kept = sum(float(v.type.nbytes) for n in nodes for v in n.results)
    return Layer(seconds, BACKWARD_WORK * seconds, 4 * own, kept, float(out.type.nbytes), nodes[0].op.name)


def stages_of(chain: Chain, count: int, memory: float = float("inf"), kept: Sequence[int] | None = None,
              ) -> tuple[list[Stage], Cut]:
    """The graph cut into stages whose slowest is as fast as can be.

    Raises:
        AttributeValueError: the graph has fewer layers, or no cut fits in memory.
    """
    if len(chain.layers) < count:
        raise AttributeValueError(f"{chain.graph.name} can be cut into {len(chain.layers)} stages at most, not "
                                  f"{count}: only between layers that hand on a single tensor")
    found = cut(chain.layers, count, memory, kept)
    ends = [*(b - 1 for b in found.bounds[1:]), len(chain.layers) - 1]
    handed: Value | None = None
    stages: list[Stage] = []
    for end in ends:
        out = chain.crossing[end]
        stages.append(_stage(chain.graph, handed, out, len(stages)))
        handed = out
    return stages, found


def _stage(graph: Graph, handed: Value | None, out: Value, number: int) -> Stage:
    nodes = needed(graph, [out], stop=() if handed is None else (handed,))
    read = {v for n in nodes for v in n.operands}
    numbers = [i for i, v in enumerate(graph.inputs) if v in read]
    with GraphBuilder(f"{graph.name}_stage{number}") as builder:
        mapping: dict[Value, Value] = {}
        if handed is not None:
            mapping[handed] = builder.input(handed.type, "handed")
        for i in numbers:
            mapping[graph.inputs[i]] = builder.input(graph.inputs[i].type, graph.inputs[i].name, graph.roles[i])
        replay(nodes, mapping, builder)
        builder.output(mapping[out])
    return Stage(builder.graph, tuple(numbers), handed is not None)


def needed(graph: Graph, outputs: Sequence[Value], stop: Collection[Value] = ()) -> list[Node]:
    """The nodes that some values depend on, in order; not beyond the values `stop`."""
    wanted, found = set(outputs), []
    for node in reversed(graph.nodes):
        if any(v in wanted and v not in stop for v in node.results):
            wanted.update(node.operands)
            found.append(node)
    return found[::-1]


# Forward and backward ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """A stage's two programs.

    Attributes:
        forward: gives the stage's result, then what the backward pass keeps; `forward_inputs`: numbers of the inputs.
        backward: takes what was kept, then inputs of the joint graph by number, gives the other outputs.
    """

    forward: Graph
    backward: Graph
    forward_inputs: tuple[int, ...]
    backward_inputs: tuple[int, ...]
    kept: int


def halves(graph: Graph) -> Halves:
    """A joint graph of forward and backward pass, whose first output is the stage's result, taken apart.

    Constants, and a rank's place in the mesh, are not kept but made again.
    """
    first = graph.outputs[0]
    ahead = set(needed(graph, [first]))
    again = {n for n in graph.nodes if not n.operands}
    behind = [n for n in needed(graph, graph.outputs[1:]) if n not in ahead or n in again]
    made = {v for n in ahead - again for v in n.results}
    read = {v for n in behind for v in n.operands} | set(graph.outputs[1:])
    kept = [v for n in graph.nodes for v in n.results if v in made and v in read]
    forward, forward_inputs = _program(graph, f"{graph.name}_forward", [n for n in graph.nodes if n in ahead],
                                       [], [first, *kept], {})
    aliases = {i - 1: j for i, j in graph.aliases.items()}
    backward, backward_inputs = _program(graph, f"{graph.name}_backward", behind, kept, graph.outputs[1:], aliases)
    return Halves(forward, backward, forward_inputs, backward_inputs, len(kept))


def _program(graph: Graph, name: str, nodes: Sequence[Node], first: Sequence[Value], outputs: Sequence[Value],
             aliases: dict[int, int]) -> tuple[Graph, tuple[int, ...]]:
    read = {v for n in nodes for v in n.operands} | set(outputs) | {graph.inputs[j] for j in aliases.values()}
    numbers = tuple(i for i, v in enumerate(graph.inputs) if v in read)
    with GraphBuilder(name) as builder:
        mapping: dict[Value, Value] = {v: builder.input(v.type, v.name, "data") for v in first}
        for i in numbers:
            mapping[graph.inputs[i]] = builder.input(graph.inputs[i].type, graph.inputs[i].name, graph.roles[i])
        replay(nodes, mapping, builder)
        given: set[Value] = set()
        for k, v in enumerate(outputs):
            local = mapping[v]
            if local in given or local in builder.graph.inputs:
                (local,) = builder.emit("identity", [local], {})
            given.add(local)
            builder.output(local, alias=mapping[graph.inputs[aliases[k]]] if k in aliases else None)
    return builder.graph, numbers
