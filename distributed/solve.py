"""Completion: a strategy for every node, by what communication and computation cost.

One mesh axis after the other, the nodes are taken in order. Where an operand lies is known by then; candidates for a
node are the labels along which its operands or the hint of its result are split, passing partial sums through, and
running whole. Each is charged with bringing the operands where it needs them, with the work a rank then does, and with
what its results will still owe: the reduction of a partial sum, the way to an output's place.

A partial sum that several nodes read is brought where they want it at once; with one reader it waits, so that sums of
partial sums (the gradients of query, key and value) are reduced once. That places exactly one all-reduce where
Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053) has one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..ir.dce import sweep
from ..ir.decompose import INLINE, decompose, decomposing, has_decomposition
from ..ir.errors import ShapeError
from ..ir.graph import Graph, Node, Value
from .cost import Cluster
from .mesh import Mesh, MeshError
from .propagate import Hints, Propagation, RuleTable, is_view, to_unfold
from .regions import LOOPS, Loop, choose_loop, outwards, result_shift
from .reshard import filled_with, transition
from .rules import Linear, Strategy, base
from .sharding import PARTIAL, WHOLE, Sharding, blocks_of, dim_of, divides, split

INFINITE = float("inf")
# An op of a user's own that says nothing of how it is split, but what simpler ops it is.
UNRULED = decomposing(lambda node: "shard" not in node.op.slots and has_decomposition(node), "unruled")
STAYS = 1e6  # factor on the cost of moving an input that is annotated as split: weights stay where they were put


@dataclass
class Plan:
    """How a graph runs on a mesh. Pure data.

    Attributes:
        graph: the graph of one process, big ops decomposed where that was needed.
        inputs, outputs: where each lies between steps.
        strategies: node -> mesh axis -> strategy (`rules.py`).
        loops: node with regions -> mesh axis -> how it runs.
        settled: partial sums that are brought somewhere as soon as they are there.
        seconds: what a step takes by the cost model, along each mesh axis: messages, and work as the axis splits it.
    """

    graph: Graph
    mesh: Mesh
    cluster: Cluster
    inputs: list[Sharding] = field(default_factory=list)
    outputs: list[Sharding] = field(default_factory=list)
    table: RuleTable | None = None
    strategies: dict[Node, dict[str, Strategy]] = field(default_factory=dict)
    loops: dict[Node, dict[str, Loop]] = field(default_factory=dict)
    settled: dict[Value, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def solve(graph: Graph, mesh: Mesh, inputs: Mapping[int, Sharding], outputs: Mapping[int, Sharding] | None = None,
          cluster: Cluster | None = None) -> Plan:
    """A plan for a graph, some of whose inputs (and outputs) are annotated, by number.

    Inputs that are not annotated lie as their readers want them; outputs as the input whose storage they take over, or
    whole.

    Raises:
        MeshError, ShapeError: an annotation does not fit its value, or the graph has symbolic sizes.
        MissingRuleError: an op says nothing of how it is split.
    """
    outputs = dict(outputs or {})
    _check(graph, mesh, inputs, outputs)
    graph = sweep(UNRULED.run(INLINE.run(graph).graph).graph).graph
    fixed = _fixed(graph, mesh, inputs, outputs)
    while True:
        table = RuleTable(graph)
        hints = _all_hints(graph, mesh, table, fixed)
        unfold = {n for axis in mesh.names for n in to_unfold(table, hints[axis], mesh[axis])}
        if not unfold:
            break
        graph = decompose(graph, unfold.__contains__).graph
        fixed = _fixed(graph, mesh, inputs, outputs)
    plan = Plan(graph, mesh, cluster or Cluster(), table=table)
    solvers: list[AxisSolver] = []
    for axis in mesh.names:
        solvers.append(AxisSolver(plan, axis, hints[axis], fixed, solvers))
        solvers[-1].run()
    plan.inputs = [Sharding.of(v.rank, {s.axis: s.stored[v] for s in solvers}) for v in graph.inputs]
    plan.outputs = [outputs.get(i) or (plan.inputs[graph.aliases[i]] if i in graph.aliases else Sharding.whole(v.rank))
                    for i, v in enumerate(graph.outputs)]
    return plan


def _check(graph: Graph, mesh: Mesh, inputs: Mapping[int, Sharding], outputs: Mapping[int, Sharding]) -> None:
    if graph.dims:
        raise ShapeError(f"graph {graph.name} has symbolic sizes ({', '.join(sorted(graph.dims))}); partitioning needs "
                         "numbers: trace it for arguments of a fixed shape")
    for i, sharding in inputs.items():
        sharding.check(graph.inputs[i].type, mesh, graph.inputs[i].name, padded=True)
    for i, sharding in outputs.items():
        sharding.check(graph.outputs[i].type, mesh, padded=True)


def _fixed(graph: Graph, mesh: Mesh, inputs: Mapping[int, Sharding],
           outputs: Mapping[int, Sharding]) -> dict[str, Hints]:
    """axis -> annotated values -> placement."""
    fixed: dict[str, Hints] = {}
    for axis in mesh.names:
        found: Hints = {graph.inputs[i]: s.placement(axis) for i, s in inputs.items()}
        for i, s in outputs.items():
            found.setdefault(graph.outputs[i], s.placement(axis))
        for node in graph.walk():
            if node.op.name == "annotate":
                wish = _wish(node, mesh)
                if axis in (*wish.split_axes, *node.attrs["whole"]):
                    found[node.result] = wish.placement(axis)
        fixed[axis] = found
    return fixed


def _wish(node: Node, mesh: Mesh) -> Sharding:
    """What `constrain` says of a value."""
    wish = Sharding(node.attrs["dims"])
    try:
        wish.check(node.result.type, mesh, "a value that `constrain` names", padded=True)
    except (MeshError, ShapeError) as error:
        raise type(error)(error.message, node.loc) from None
    return wish


def _all_hints(graph: Graph, mesh: Mesh, table: RuleTable, fixed: Mapping[str, Hints]) -> dict[str, Hints]:
    links = [(graph.inputs[j], graph.outputs[i]) for i, j in graph.aliases.items()]
    hints: dict[str, Hints] = {}
    for axis in mesh.names:
        if mesh[axis] == 1:
            hints[axis] = {}
            continue
        def refused(value: Value, dim: int, axis: str = axis) -> bool:
            others = {other: place for other in mesh.names if other != axis
                      for place in (fixed[other].get(value, hints.get(other, {}).get(value, WHOLE)),)}
            return not shares(value, split(dim), axis, others, mesh)
        hints[axis] = Propagation(graph, table, mesh[axis], fixed[axis], links, refused).run()
    return hints


def shares(value: Value, place: int, axis: str, others: Mapping[str, int], mesh: Mesh) -> bool:
    """Whether a dimension can be split over an axis, besides what other axes make of it."""
    same = {a: p for a, p in others.items() if p >= 0 and dim_of(p) == dim_of(place)}
    size = value.shape[dim_of(place)]
    if not same or not isinstance(size, int):
        return not same
    same[axis] = place
    return divides(size, [(blocks_of(same[a]), mesh[a]) for a in reversed(mesh.names) if a in same])


class AxisSolver:
    """Chooses strategies along one axis, given those along the axes before it."""

    def __init__(self, plan: Plan, axis: str, hints: Hints, annotated: Mapping[str, Hints],
                 before: Sequence[AxisSolver]):
        assert plan.table is not None
        self.plan, self.axis, self.hints, self.before = plan, axis, hints, list(before)
        self.annotated, self.fixed = annotated, annotated[axis]
        self.table, self.cluster, self.ranks = plan.table, plan.cluster, plan.mesh[axis]
        self.have: dict[Value, list[int]] = {}  # of the values of regions as well
        self.stored: dict[Value, int] = {}
        self.firm = {v for v in plan.graph.inputs if self.fixed.get(v, WHOLE) >= 0}
        self.read(plan.graph)

    def read(self, graph: Graph) -> None:
        """Turns to a graph: the plan's, or a region."""
        self.graph, self.total = graph, 0.0
        self.wanted: dict[Value, int] = {}
        readers = graph.uses()
        ends = {v: sum(o is v for o in graph.outputs) for v in graph.outputs}
        self.readers = {v: len(dict.fromkeys(readers.get(v, ()))) + ends.get(v, 0)
                        for v in (*graph.inputs, *(r for n in graph.nodes for r in n.results))}
        self.sole = {v: nodes[0] for v, nodes in readers.items() if self.readers[v] == 1}

    def run(self) -> None:
        """Fills in the strategies of every node."""
        for v in self.graph.inputs:
            self.stored[v] = self.fixed[v] if v in self.fixed else self.hint(v)
            self.have[v] = [self.stored[v]]
        for i, v in enumerate(self.graph.outputs):
            source = self.graph.aliases.get(i)
            self.wanted[v] = self.stored[self.graph.inputs[source]] if source is not None else self.fixed.get(v, WHOLE)
        for node in self.graph.nodes:
            self.choose(node)
        self.plan.seconds[self.axis] = self.total

    def inside(self, region: Graph, places: Mapping[Value, int], ends: Sequence[int | None],
               free: Collection[Value] = (), kept: Collection[Value] = ()) -> AxisSolver:
        """The solver of a region whose inputs lie as told, and its outputs (None: as they come); after it ran.

        `free`: values whose hints do not count. `kept`: inputs that stay where they are.
        """
        inner = copy.copy(self)
        inner.firm = set(kept)
        inner.hints = {v: place for v, place in self.hints.items() if v not in free} if free else self.hints
        inner.read(region)
        for v in region.inputs:
            inner.have[v] = [places[v]]
        inner.wanted = {v: place for v, place in zip(region.outputs, ends) if place is not None}
        for node in region.nodes:
            inner.choose(node)
        return inner

    def hint(self, v: Value) -> int:
        """Where a value would like to lie."""
        place = self.hints.get(v, WHOLE)
        earlier = {s.axis: s.have.get(v, [WHOLE])[0] for s in self.before}
        return place if place < 0 or shares(v, place, self.axis, earlier, self.plan.mesh) else WHOLE

    def whole_bytes(self, v: Value) -> float:
        """Bytes of the value that the ranks along this axis hold together."""
        size = float(v.type.nbytes)
        for solver in self.before:
            if solver.have[v][0] >= 0:
                size /= solver.ranks
        return size

    def move(self, v: Value, target: int) -> float:
        """Seconds to bring a value where it is needed, from the cheapest place where it lies."""
        if (number := filled_with(v)) is not None and not (target == PARTIAL and number):
            return 0.0
        least = min(transition(self.cluster, self.axis, self.ranks, self.whole_bytes(v), source, target)
                    for source in self.have[v])
        return least * STAYS if v in self.firm else least

    def is_firm(self, v: Value) -> bool:
        """Whether a value is an input that was annotated as split, and so stays."""
        return v in self.firm

    def candidates(self, node: Node) -> list[Strategy]:
        """Adding up partial sums first, whole last: of equal cost the first is taken."""
        factors = self.table.factors[node]
        if self.ranks == 1:
            return [None]
        found: dict[Strategy, bool] = {}
        for i, v in enumerate(node.operands):
            for place in self.have[v]:
                found.update(dict.fromkeys(factors.strategies(0, i, place) if place >= 0 else (), True))
        for i, v in enumerate(node.results):
            place = self.hints.get(v, WHOLE)
            found.update(dict.fromkeys(factors.strategies(1, i, place) if place >= 0 else (), True))
        kept = [x for x in found if self.table.fits(node, x, self.ranks) and self.allowed(node, x)]
        for number, operands in enumerate(factors.linear):
            if any(PARTIAL in self.have[node.operands[i]] for i in operands):
                kept.insert(0 if self.adds(node, Linear(number)) else len(kept), Linear(number))
        return [*kept, None]

    def adds(self, node: Node, strategy: Strategy) -> bool:
        """Whether a strategy adds up partial sums: reduced later, they are reduced as one."""
        return isinstance(strategy, Linear) and all(
            PARTIAL in self.have[node.operands[i]] for i in self.table.factors[node].linear[strategy.set])

    def allowed(self, node: Node, strategy: Strategy) -> bool:
        """Whether the axes before leave a strategy: where they split the same dimension, they split the same label."""
        factors, label = self.table.factors[node], base(strategy)
        earlier = {s.axis: s.plan.strategies[node][s.axis] for s in self.before}
        same = [s.ranks for s in self.before if base(earlier[s.axis]) == label]
        if same and self.table.limits[node][label] % math.prod([self.ranks, *same]):
            return False
        for placement, values in ((factors.operand_placement, node.operands), (factors.result_placement, node.results)):
            for i, v in enumerate(values):
                place, others = placement(strategy, i), {a: placement(x, i) for a, x in earlier.items()}
                if place >= 0 and not (shares(v, place, self.axis, others, self.plan.mesh) and all(
                        dim_of(p) != dim_of(place) or base(earlier[a]) == label for a, p in others.items() if p >= 0)):
                    return False
        for i, v in enumerate(node.results):  # where they bring it, and where it is annotated to lie, has to be room
            place, others = factors.result_placement(strategy, i), {a: factors.result_placement(x, i)
                                                                    for a, x in earlier.items()}
            others |= {a: found[v] for a, found in self.annotated.items() if a != self.axis and v in found}
            if place >= 0 and not shares(v, place, self.axis, others | self.plan.settled.get(v, {}), self.plan.mesh):
                return False
        return True

    def cost(self, node: Node, strategy: Strategy) -> float:
        """Seconds of a strategy: moves, work, and what the results will owe.

        The work of adding up partial sums counts as if it were split: it is no reason to reduce each of them.
        """
        factors = self.table.factors[node]
        work = max(float(node.flops) / self.cluster.flops, self.cluster.touch(float(node.nbytes)))
        split = strategy is not None and not isinstance(strategy, Linear)
        seconds = work / self.ranks if split or self.adds(node, strategy) else work
        for i, v in enumerate(node.operands):
            if v not in node.operands[:i] or factors.operand_placement(strategy, i) != factors.operand_placement(
                    strategy, node.operands.index(v)):
                seconds += self.move(v, factors.operand_placement(strategy, i))
        for i, v in enumerate(node.results):
            place = factors.result_placement(strategy, i)
            if split and base(strategy) in factors.combined:
                seconds += self.cluster.all_reduce(self.axis, self.ranks, self.whole_bytes(v))
            seconds += self.owed(v, place)
        return seconds

    def owed(self, v: Value, place: int) -> float:
        """Seconds that a result takes to get where it has to be; none if it is added to what owes that already."""
        if place == PARTIAL and v in self.sole and self.joins(v, self.sole[v]):
            return 0.0
        return transition(self.cluster, self.axis, self.ranks, self.whole_bytes(v), place, self.goal(v, place))

    def joins(self, v: Value, reader: Node) -> bool:
        """Whether a node adds a value to partial sums."""
        sets = (tuple(reader.operands[i] for i in numbers) for numbers in self.table.factors[reader].linear)
        return any(v in own and len(own) > 1 and all(self.have.get(x, [WHOLE])[0] == PARTIAL for x in own if x is not v)
                   for own in sets)

    def goal(self, v: Value, place: int) -> int:
        """Where a result will have to be: as annotated, as the output lies, as hinted, or just not a partial sum."""
        if v in self.fixed:
            return self.fixed[v]
        if self.readers[v] == 1 and v in self.wanted:
            return self.wanted[v]
        hint = self.hint(v)
        if hint >= 0:
            return hint
        return WHOLE if place == PARTIAL else place

    def choose(self, node: Node) -> None:
        """Takes the cheapest strategy and notes where things lie then."""
        factors = self.table.factors[node]
        for v in node.results:  # the axes before may ask
            self.have.setdefault(v, [WHOLE])
        if node.op.name in LOOPS:
            loop = choose_loop(self, node)
            self.plan.loops.setdefault(node, {})[self.axis] = loop
            for i, v in enumerate(node.results):
                self.note(v, outwards(loop.ends[-1][i], result_shift(node, i)))
            return
        best, least = None, INFINITE
        for strategy in self.candidates(node):
            seconds = self.cost(node, strategy)
            if seconds < least * (1 - 1e-9):
                best, least = strategy, seconds
        self.total += least
        self.plan.strategies.setdefault(node, {})[self.axis] = best
        for i, v in enumerate(node.operands):
            place = factors.operand_placement(best, i)
            if place not in self.have[v]:
                self.have[v].append(place)
        for i, v in enumerate(node.results):
            self.note(v, factors.result_placement(best, i))
        if is_view(node) and node.result not in self.fixed:
            self.note_ways(node)

    def note_ways(self, node: Node) -> None:
        """A value that lies in several ways is seen in as many."""
        if self.have[node.result][0] == PARTIAL:
            return
        for place in self.have[node.operands[0]]:
            found = self.table.view(node, place, self.ranks) if place != PARTIAL else None
            if found is not None and (found[0] is None or self.allowed(node, found[0])):
                seen = self.table.factors[node].result_placement(found[0], 0)
                self.have[node.result] += [seen] if seen not in self.have[node.result] else []

    def note(self, v: Value, place: int) -> None:
        """Where a result lies, or is brought at once."""
        self.plan.settled.get(v, {}).pop(self.axis, None)
        if place == PARTIAL and self.readers[v] != 1 or v in self.fixed:
            place = self.goal(v, place)
            self.plan.settled.setdefault(v, {})[self.axis] = place
        self.have[v] = [place]
