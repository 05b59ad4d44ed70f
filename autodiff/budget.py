"""Recomputation to a byte budget.

A training step holds most memory where forward and backward meet: values that were made long ago wait there for their
use in the backward pass. This pass estimates the memory at every node, and while the peak is above the budget it takes
a value that waits across the peak, drops it, and computes it again just before its next use; cheapest first, in
operations per byte saved.

A graph with symbolic sizes is estimated at the sizes that are given; the recomputation is right at all.

The estimate follows the node order and the fusion to come: a result of an elementwise op or a view with one reader is
taken to be part of that reader's kernel, and occupies nothing. Inputs and what takes over their storage do not count.

The pass comes last, before `erase`: a pass that merges equal nodes would undo it. The method is that of XLA's
HloRematerialization, with recomputation in chains: what is needed to compute a value again, and is gone by then, is
itself computed again if that is cheap.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.dims import Dim, evaluate
from ..ir.errors import ConfigError
from ..ir.graph import Graph, Node, Value
from ..ir.order import hoist_updates
from ..ir.pipeline import Pass, PassResult
from ..ir.rewrite import with_operands

CHAIN_NODES = 24  # of one recomputation
ROUNDS = 200
GATHER_FLOPS = 16  # operations that a processor does while a byte is gathered
WORTHWHILE = 0.99


Sizes = Mapping[str, int]
Kernel = list[Node]  # nodes that run as one: the last, and what is fused into it


def kernels(graph: Graph) -> list[Kernel]:
    """The nodes in groups: a result of an elementwise op or a view that one group reads is made in that group."""
    readers = graph.uses()
    outputs = set(graph.outputs)
    group: dict[Node, Node] = {}  # node -> the last node of its group
    for node in reversed(graph.nodes):
        group[node] = node
        if (node.op.has("elementwise") or node.op.has("view")) and outputs.isdisjoint(node.results):
            reading = {group[n] for v in node.results for n in readers.get(v, ())}
            if len(reading) == 1:
                (group[node],) = reading
    members: dict[Node, Kernel] = {}
    for node in graph.nodes:
        members.setdefault(group[node], []).append(node)
    return [members[node] for node in graph.nodes if node in members]


@dataclass
class Timeline:
    """When every value is made and read, counted in kernels, and the bytes in use at every kernel."""

    kernels: list[Kernel]
    made: dict[Value, int]
    reads: dict[Value, list[int]]  # kernels that read a value, in order; one past the end for an output
    nbytes: dict[Value, int]       # 0 if the value is never in memory, or not in memory of its own
    memory: list[int]
    sizes: Sizes  # what symbolic sizes are taken to be

    @property
    def peak(self) -> int:
        return max(self.memory, default=0)

    def height(self) -> tuple[int, int]:
        """The peak, and at how many kernels it is reached: what a recomputation must lower."""
        return self.peak, self.memory.count(self.peak)

    def last(self, value: Value) -> int:
        return self.reads[value][-1] if self.reads[value] else self.made[value]

    def waits(self, value: Value, kernel: float) -> bool:
        """Whether a value is kept during a kernel that neither makes nor reads it (or between two, at a fraction)."""
        return (self.nbytes.get(value, 0) > 0 and self.made[value] < kernel < self.last(value)
                and kernel not in self.reads[value])

    def present(self, value: Value, kernel: int) -> bool:
        """Whether a kernel could read a value at no cost: it is an input, or kept until then."""
        return value not in self.made or (self.nbytes[value] > 0 and self.made[value] < kernel <= self.last(value))


def timeline(graph: Graph, sizes: Sizes | None = None) -> Timeline:
    """The estimate for a graph, for these values of its symbolic sizes.

    Raises:
        ConfigError: a symbolic size has no value.
    """
    sizes = sizes or {}
    groups = kernels(graph)
    made = {v: i for i, group in enumerate(groups) for node in group for v in node.results}
    reads: dict[Value, list[int]] = {v: [] for v in made}
    for i, group in enumerate(groups):
        for v in {v for node in group for v in node.operands if made.get(v, i) != i}:
            reads[v].append(i)
    taken_over = {graph.outputs[i] for i in graph.aliases}
    for v in dict.fromkeys(graph.outputs):
        if v in made:
            reads[v].append(len(groups))
    nbytes = {v: 0 if not reads[v] or v in taken_over or _is_constant(v) else _bytes(v, sizes)
              for v in made}
    return Timeline(groups, made, reads, nbytes, _memory(len(groups), made, reads, nbytes), sizes)


def _is_constant(value: Value) -> bool:
    return value.producer is not None and value.producer.op.has("constant")


def _bytes(value: Value, sizes: Sizes) -> int:
    size = value.type.nbytes
    if isinstance(size, Dim) and not size.names <= sizes.keys():
        raise ConfigError(f"a memory budget is one for sizes that are known, but {value!r} has a symbolic one: compile "
                          "for the arguments of a call, or give sizes=")
    return evaluate(size, sizes)


def _memory(count: int, made: dict[Value, int], reads: dict[Value, list[int]], nbytes: dict[Value, int]) -> list[int]:
    change = [0] * (count + 2)
    for v, size in nbytes.items():
        if size:
            change[made[v]] += size
            change[min(reads[v][-1], count) + 1] -= size
    return list(itertools.accumulate(change[:count]))


@dataclass(frozen=True)
class Plan:
    """One recomputation: `value` is dropped after its last use before the peak, `chain` runs again before `use`."""

    value: Value
    use: int
    chain: tuple[Node, ...]
    saved: int
    flops: int
    kept: frozenset[Value]  # what the chain reads


def recompute_to_fit(graph: Graph, budget: int, sizes: Sizes | None = None, ahead: int = 0) -> PassResult:
    """Recomputes until the estimated peak of intermediate values is within `budget` bytes, or nothing more helps.

    `ahead`: the first so many outputs stay what they are, as they are given before what follows is computed.
    `stats`: peak_before, peak_after (bytes), recomputed (nodes), flops (extra operations).
    """
    result = _lower_peak(graph, budget, sizes, ahead)
    if result.changed and result.stats["peak_after"] > budget:
        # Out of reach: what was reached may be had for less by not asking for more.
        modest = _lower_peak(graph, result.stats["peak_after"], sizes, ahead)
        if modest.stats["peak_after"] <= result.stats["peak_after"] and modest.stats["flops"] < result.stats["flops"]:
            return modest
    return result


def _lower_peak(graph: Graph, budget: int, sizes: Sizes | None, ahead: int) -> PassResult:
    current, line = graph, timeline(graph, sizes)
    best, spent = graph, {"recomputed": 0, "flops": 0}
    stats = {"peak_before": line.peak, "peak_after": line.peak, **spent}
    for _ in range(ROUNDS):
        plans = _choose(line, line.memory.index(line.peak), line.peak - budget) if line.peak > budget else []
        if not plans:
            break
        after = _apply(current, line, plans, ahead)
        after_line = timeline(after, sizes)
        if after_line.height() >= line.height():
            break
        spent["recomputed"] += sum(len(p.chain) for p in plans)
        spent["flops"] += sum(p.flops for p in plans)
        # Several kernels may reach one peak: a round at one of them pays only once it is gone. And the last per cents
        # on the way to a budget that is out of reach cost more than they are worth.
        if after_line.peak <= max(budget, WORTHWHILE * stats["peak_after"]):
            best, stats = after, {**stats, "peak_after": after_line.peak, **spent}
        current, line = after, after_line
    return PassResult(best, best is not graph, stats)


def budget_pass(budget: int, sizes: Sizes | None = None) -> Pass:
    """The pass that recomputes to a budget (at these sizes), once updates no longer make every gradient wait for the
    end."""
    def run(graph: Graph) -> PassResult:
        result = recompute_to_fit(hoist_updates(graph).graph, budget, sizes)
        return PassResult(result.graph, result.graph is not graph, result.stats)
    return Pass("memory_budget", run)


def keep_less(graph: Graph, ahead: int, most: int) -> PassResult:
    """A graph whose first `ahead` outputs a program of their own gives, a forward pass: recomputes in the rest of the
    graph until what that reads of the first program is within `most` bytes, or nothing more helps.

    `stats`: kept_before, kept_after (bytes), recomputed (nodes), flops (extra operations).
    """
    early = _ancestors(graph, graph.outputs[:ahead])
    current = Graph(graph.name, graph.inputs, graph.roles,
                    [*(n for n in graph.nodes if n in early), *(n for n in graph.nodes if n not in early)],
                    graph.outputs, graph.aliases, graph.meta)
    best, spent = graph, {"recomputed": 0, "flops": 0}
    line, seam, kept = _seam(current, early, ahead)
    stats = {"kept_before": kept, "kept_after": kept, **spent}
    for _ in range(ROUNDS):
        plans = _choose(line, seam, kept - most) if kept > most else []
        if not plans:
            break
        current = _apply(current, line, plans, ahead)
        before, (line, seam, kept) = kept, _seam(current, _ancestors(current, current.outputs[:ahead]), ahead)
        if kept >= before:
            break
        spent["recomputed"] += sum(len(p.chain) for p in plans)
        spent["flops"] += sum(p.flops for p in plans)
        best, stats = current, {**stats, "kept_after": kept, **spent}
    return PassResult(best, best is not graph, stats)


def _ancestors(graph: Graph, outputs: Sequence[Value]) -> set[Node]:
    wanted, found = set(outputs), set()
    for node in reversed(graph.nodes):
        if not wanted.isdisjoint(node.results):
            found.add(node)
            wanted.update(node.operands)
    return found


def _seam(graph: Graph, early: set[Node], ahead: int) -> tuple[Timeline, float, int]:
    """The timeline of what the outputs behind the first `ahead` need; where it is handed on; how much that is."""
    rest = Graph(graph.name, graph.inputs, graph.roles, graph.nodes, graph.outputs[ahead:],
                 {i - ahead: j for i, j in graph.aliases.items() if i >= ahead})
    line = timeline(rest)
    seam = max((i for i, group in enumerate(line.kernels) if group[-1] in early), default=-1) + 0.5
    return line, seam, sum(line.nbytes[v] for v in line.made if line.waits(v, seam))


def _choose(line: Timeline, peak: float, excess: int) -> list[Plan]:
    """Recomputations that lower the memory at some kernel by so much, cheapest per byte first."""
    plans = [p for v in line.made if line.waits(v, peak) and (p := _plan(line, v, peak)) is not None]
    plans.sort(key=lambda p: (p.flops + 1) / p.saved)
    chosen: list[Plan] = []
    dropped: set[Value] = set()
    needed: set[Value] = set()
    for plan in plans:
        if excess <= 0:
            break
        if plan.value not in needed and not plan.kept & dropped:
            chosen.append(plan)
            dropped.add(plan.value)
            needed |= plan.kept
            excess -= plan.saved
    return chosen


def _plan(line: Timeline, value: Value, peak: float) -> Plan | None:
    """How to compute a value again for its first use after the peak; None if that saves nothing."""
    use = next(i for i in line.reads[value] if i > peak)
    if use >= len(line.kernels):
        return None  # an output
    chain: dict[Node, None] = {}
    kept: set[Value] = set()
    extended = 0
    wanted = [value]
    while wanted:
        v = wanted.pop()
        node = v.producer
        if node is None or (v is not value and (line.present(v, use) or line.waits(v, peak))):
            kept.add(v)  # there anyway: until its use, or at least at the peak
        elif node in chain:
            continue
        elif v is not value and node.op.has("contraction") and 4 * _bytes(v, line.sizes) <= line.nbytes[value]:
            kept.add(v)  # small: to keep it is cheaper than to multiply again
            extended += _bytes(v, line.sizes)
        elif node.regions or _once(node) or node.op.has("barrier") or len(chain) == CHAIN_NODES:
            return None
        else:
            chain[node] = None
            wanted.extend(node.operands)
    saved = line.nbytes[value] - extended
    if saved <= 0:
        return None
    order = {node: None for group in line.kernels[:use] for node in group if node in chain}
    return Plan(value, use, tuple(order), saved, sum(_flops(n, line.sizes) for n in order), frozenset(kept))


def _once(node: Node) -> bool:
    """Whether a node may run only once. Ranks that gather run one program, so they may gather again, together."""
    return node.op.has("effect") and node.op.name != "all_gather"


def _flops(node: Node, sizes: Sizes) -> int:
    if node.op.name == "all_gather":
        return GATHER_FLOPS * sum(_bytes(v, sizes) for v in node.results)
    return int(evaluate(node.flops, sizes))


def _apply(graph: Graph, line: Timeline, plans: Sequence[Plan], ahead: int = 0) -> Graph:
    """The graph in the order of its kernels, chains repeated; uses from there on read the repetition, and so do outputs
    but for the first `ahead`."""
    starting: dict[int, list[Plan]] = {}
    for plan in plans:
        starting.setdefault(plan.use, []).append(plan)
    nodes: list[Node] = []
    mapping: dict[Value, Value] = {}
    first: dict[Value, Value] = {}  # the same without the repetitions
    for i, group in enumerate(line.kernels):
        for plan in starting.get(i, ()):
            again: dict[Value, Value] = {}
            for node in plan.chain:
                copy = Node(node.op, [again.get(v, mapping.get(v, v)) for v in node.operands], node.attrs,
                            [v.type for v in node.results], node.regions, node.loc)
                again.update(zip(node.results, copy.results))
                nodes.append(copy)
            mapping[plan.value] = again[plan.value]
        for node in group:
            fresh = with_operands(node, [mapping.get(v, v) for v in node.operands])
            if fresh is not node:
                mapping.update(zip(node.results, fresh.results))
                first.update(zip(node.results, fresh.results))
            nodes.append(fresh)
    outputs = [(first if i < ahead else mapping).get(v, v) for i, v in enumerate(graph.outputs)]
    return Graph(graph.name, graph.inputs, graph.roles, nodes, outputs, graph.aliases, graph.meta)
