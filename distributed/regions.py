"""Loops and branches: their regions are partitioned like graphs, and every rank runs all of their steps.

A region's inputs lie as its node's operands do (what a scan takes row by row, one dimension less), and a carry goes out
of a step as it came in: this is found by spreading hints through the body until nothing changes. Collectives that the
body needs stand in the body. A carry that a step only adds to may be a partial sum all the way (the gradient of a
recurrent layer's weights, when the batch is split): then it is reduced once, behind the loop. The steps themselves are
not split, nor is what they are counted along.

Conditions are whole: all ranks branch, and stop, alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.graph import Graph, Node, Value
from .rules import Linear
from .sharding import PARTIAL, WHOLE, blocks_of, dim_of, split

if TYPE_CHECKING:
    from .propagate import RuleTable
    from .solve import AxisSolver

LOOPS = ("scan", "while_loop", "cond")
UNKNOWN_STEPS = 16  # of a while_loop, to compare what is inside with what is around it

Places = tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """How a node with regions runs along one mesh axis.

    Attributes:
        places: where what each operand becomes in the regions lies.
        ends: for each region, where its outputs lie.
    """

    places: Places
    ends: tuple[Places, ...]


def carries(node: Node) -> int:
    """How many operands come out of a step as they go into the next."""
    return int(node.attrs.get("n_carry", 0))


def steps(node: Node) -> int:
    """How often the regions run."""
    return int(node.attrs["length"]) if node.op.name == "scan" else UNKNOWN_STEPS if node.op.name == "while_loop" else 1


def first_operand(node: Node) -> int:
    """The operand that is the regions' first input: a cond's predicate is none."""
    return int(node.op.name == "cond")


def operand_shift(node: Node, i: int) -> int:
    """By how many dimensions an operand has more than what it becomes in the regions."""
    return int(node.op.name == "scan" and carries(node) <= i < carries(node) + node.attrs["n_xs"])


def result_shift(node: Node, i: int) -> int:
    """The same for results: a scan stacks its ys."""
    return int(node.op.name == "scan" and i >= carries(node))


def links(node: Node) -> Iterator[tuple[Value, Value, int]]:
    """(operand, input of a region, dimensions that the operand has more)."""
    for region in node.regions:
        for i, inner in enumerate(region.inputs, first_operand(node)):
            yield node.operands[i], inner, operand_shift(node, i)


def ends(node: Node) -> Iterator[tuple[Value, Value, int]]:
    """(result, output of a region, dimensions that the result has more)."""
    for region in node.regions[node.op.name == "while_loop":]:
        for i, inner in enumerate(region.outputs):
            yield node.results[i], inner, result_shift(node, i)


def circles(node: Node) -> Iterator[tuple[Value, Value]]:
    """(output, input) of the body for each carry."""
    yield from zip(node.regions[-1].outputs[:carries(node)], node.regions[-1].inputs)


def outwards(place: int, shift: int) -> int:
    """A placement within a region as one outside."""
    return place if place < 0 else split(dim_of(place) + shift, blocks_of(place))


def inwards(place: int, shift: int) -> int:
    """A placement outside as one within a region; WHOLE for the dimension that is counted along."""
    return place if place < 0 or not shift else split(dim_of(place) - 1, blocks_of(place)) if dim_of(place) else WHOLE


def accumulators(node: Node) -> list[int]:
    """Carries that a step does nothing with but add to them."""
    body, found = node.regions[-1], []
    readers = body.uses()
    for i, (out, into) in enumerate(circles(node)):
        adds = out.producer is not None and out.producer.op.name == "add" and into in out.producer.operands
        if adds and out.dtype.is_float and len(readers[into]) == 1 and out.producer in body.nodes:
            found.append(i)
    return found


def summed(node: Node, table: RuleTable, sums: Collection[int]) -> set[Value]:
    """The values that a step makes to add them to these carries, back to where they stop being sums of sums."""
    body = node.regions[-1]
    readers, found = body.uses(), set()
    waiting = [v for i in sums for v in (body.outputs[i], *_others(node, i))]
    while waiting:
        v = waiting.pop()
        found.add(v)
        if v.producer is not None and v.producer in table.factors and table.factors[v.producer].linear:
            waiting += [x for x in v.producer.operands if len(readers[x]) == 1 and x not in found]
    return found


def _others(node: Node, i: int) -> list[Value]:
    """What a step adds to a carry."""
    out, into = node.regions[-1].outputs[i], node.regions[-1].inputs[i]
    assert out.producer is not None
    return [v for v in out.producer.operands if v is not into]


def choose_loop(solver: AxisSolver, node: Node) -> Loop:
    """The cheapest way found: as hinted, with sums left partial, or with everything whole."""
    body, first = node.regions[-1], first_operand(node)
    hinted = [WHOLE] * first + [solver.hint(v) for v in body.inputs]
    tries = [tuple(hinted)]
    if solver.ranks > 1:
        if sums := accumulators(node):
            _try(solver, node, [PARTIAL if i in sums else p for i, p in enumerate(hinted)])
            sums = [i for i in sums if _is_sum(solver, node, i)]
            tries.insert(0, tuple(PARTIAL if i in sums else p for i, p in enumerate(hinted)))
        tries.append((WHOLE,) * len(hinted))
    costs = [_try(solver, node, places)[0] for places in tries]
    best = tries[costs.index(min(costs))]
    seconds, found = _try(solver, node, best)
    solver.total += seconds
    return Loop(best, found)


def _is_sum(solver: AxisSolver, node: Node, i: int) -> bool:
    """Whether what was last tried adds partial sums to a carry."""
    add = node.regions[-1].outputs[i].producer
    assert add is not None
    return isinstance(solver.plan.strategies[add][solver.axis], Linear) and all(
        solver.have[v][0] == PARTIAL for v in _others(node, i))


def _try(solver: AxisSolver, node: Node, places: Sequence[int]) -> tuple[float, tuple[Places, ...]]:
    """Solves the regions for given places of their inputs: (seconds, where their outputs lie)."""
    total, found, first = 0.0, [], first_operand(node)
    sums = [i for i in range(carries(node)) if places[i] == PARTIAL]
    free = summed(node, solver.table, sums) if sums else set()
    for number, region in enumerate(node.regions):
        wanted: list[int | None] = [None] * len(region.outputs)
        if node.op.name == "cond":
            wanted = [solver.hint(v) for v in node.results]
        elif node.op.name == "while_loop" and number == 0:
            wanted = [WHOLE]
        else:
            wanted[:carries(node)] = places[:carries(node)]
        kept = {v for i, v in enumerate(region.inputs, first) if solver.is_firm(node.operands[i]) and places[i] >= 0}
        inner = solver.inside(region, dict(zip(region.inputs, places[first:])), wanted, free, kept)
        total += inner.total
        found.append(tuple(inner.have[v][0] if w is None else w for v, w in zip(region.outputs, wanted)))
    total *= steps(node)
    for i, v in enumerate(node.operands):
        total += solver.move(v, outwards(places[i], operand_shift(node, i)))
    for i, v in enumerate(node.results):
        total += solver.owed(v, outwards(found[-1][i], result_shift(node, i)))
    return total, tuple(found)


def counted(graph: Graph, times: int = 1) -> Iterator[tuple[Node, int]]:
    """Every node, and how often it runs: those of a scan's body for each step, of a while_loop's (unknown) once."""
    for node in graph.nodes:
        yield node, times
        for region in node.regions:
            yield from counted(region, times * (steps(node) if node.op.name == "scan" else 1))
