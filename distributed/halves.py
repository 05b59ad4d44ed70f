"""A stage's forward and backward pass, differentiated as one graph, taken apart into two programs.

The forward program gives the stage's results and what the backward program reads of its inner values. What depends on
parameters alone (a cast, a gathered weight) is not kept but made again, in front of who reads it; nor are constants,
and a rank's place in the mesh. State that the forward program moves is kept as it was, if the backward pass reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..ir.builder import GraphBuilder, replay
from ..ir.graph import Graph, Node, Value
from .stages import needed, reached


@dataclass(frozen=True)
class Halves:
    """A stage's two programs.

    Attributes:
        forward: gives the stage's results, then what else the backward pass reads.
        backward: takes what was kept, then inputs of the joint graph; gives the other outputs.
        forward_inputs, backward_inputs: numbers of the inputs of the joint graph.
        kept: numbers of the forward program's outputs that the backward program takes first.
    """

    forward: Graph
    backward: Graph
    forward_inputs: tuple[int, ...]
    backward_inputs: tuple[int, ...]
    kept: tuple[int, ...]


def halves(graph: Graph, count: int = 1, varying: Collection[int] | None = None) -> Halves:
    """A joint graph of forward and backward pass, whose first `count` outputs are the forward pass's, taken apart.

    Args:
        varying: the inputs that differ from one micro-batch to the next; default: all.
    """
    results = graph.outputs[:count]
    ahead = needed(graph, results)
    inputs = graph.inputs if varying is None else [graph.inputs[i] for i in varying]
    different = reached(graph, inputs)
    again = {n for n in graph.nodes if n.results and n.results[0] not in different}
    forward_nodes = set(ahead)
    behind = [n for n in needed(graph, graph.outputs[count:]) if n in again or n not in forward_nodes]
    made = {v for n in ahead if n not in again for v in n.results}
    moved = {graph.inputs[j] for i, j in graph.aliases.items() if i < count}
    read = {v for n in behind for v in n.operands} | set(graph.outputs[count:])
    inner = [v for n in ahead for v in n.results]
    kept = [v for v in (*graph.inputs, *inner) if v in read and (v in made or v in moved)]
    extra = [v for v in kept if v not in results or v in moved]
    forward, forward_inputs = _program(
        graph, f"{graph.name}_forward", ahead, again, [], [*results, *extra],
        {i: j for i, j in graph.aliases.items() if i < count})
    backward, backward_inputs = _program(
        graph, f"{graph.name}_backward", behind, again, kept, graph.outputs[count:],
        {i - count: j for i, j in graph.aliases.items() if i >= count})
    place = {**{v: i for i, v in reversed(list(enumerate(results)))}, **{v: count + i for i, v in enumerate(extra)}}
    return Halves(forward, backward, forward_inputs, backward_inputs, tuple(place[v] for v in kept))


def overwriting(graph: Graph, sums: Collection[Value]) -> tuple[Graph, set[Value]]:
    """A backward program that writes these inputs, sums of gradients, where it would add to them: for the first
    micro-batch of a step. Gives it, and those that it could not be done for."""
    left = set(sums)
    with GraphBuilder(graph.name) as builder:
        mapping = {v: builder.input(v.type, v.name, role) for v, role in zip(graph.inputs, graph.roles)}
        outputs = list(graph.outputs)
        for i, j in graph.aliases.items():
            total, node = graph.inputs[j], graph.outputs[i].producer
            if total in left and node is not None and node.op.name == "add" and total in node.operands:
                (outputs[i],) = (v for v in node.operands if v is not total)
                left.discard(total)
        replay(needed(graph, outputs), mapping, builder)
        for i, v in enumerate(outputs):
            builder.own_output(mapping[v], builder.graph.inputs[graph.aliases[i]] if i in graph.aliases else None)
    return builder.graph, left


def _program(graph: Graph, name: str, nodes: Sequence[Node], lazy: Collection[Node], first: Sequence[Value],
             outputs: Sequence[Value], aliases: dict[int, int]) -> tuple[Graph, tuple[int, ...]]:
    """A program of some nodes; of these the `lazy` ones stand right before their first reader."""
    read = {v for n in nodes for v in n.operands} | set(outputs) | {graph.inputs[j] for j in aliases.values()}
    read -= set(first)
    numbers = tuple(i for i, v in enumerate(graph.inputs) if v in read)
    with GraphBuilder(name) as builder:
        mapping: dict[Value, Value] = {v: builder.input(v.type, v.name, "data") for v in first}
        for i in numbers:
            mapping[graph.inputs[i]] = builder.input(graph.inputs[i].type, graph.inputs[i].name, graph.roles[i])
        for node in nodes:
            if node not in lazy:
                _provide(node.operands, mapping, builder)
                replay([node], mapping, builder)
        _provide(outputs, mapping, builder)
        for k, v in enumerate(outputs):
            builder.own_output(mapping[v], mapping[graph.inputs[aliases[k]]] if k in aliases else None)
    return builder.graph, numbers


def _provide(values: Sequence[Value], mapping: dict[Value, Value], builder: GraphBuilder) -> None:
    """Emits what makes these values, as far as it was not yet."""
    stack = list(values)
    while stack:
        v = stack[-1]
        if v in mapping or v.producer is None:
            stack.pop()
            continue
        missing = [x for x in v.producer.operands if x not in mapping]
        if missing:
            stack += missing
        else:
            replay([v.producer], mapping, builder)
            stack.pop()
