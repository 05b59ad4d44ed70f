"""A graph as a chain of layers, and a run of layers as a stage.

What matters of a loss's graph are the nodes that depend on data and parameters both: its spine. The others (masks from
the batch, a transposed weight, random numbers, which follow from a counter) are computed again wherever they are
wanted. Between two nodes of the spine the graph can be cut; what crosses there is handed on. The residual stream of a
transformer crosses alone between its layers; inside a residual block the skip crosses as well. So a layer ends where
few values cross: `cut_graph` looks for the narrowest crossings that give a good cut.

State that the loss moves (running statistics, the counter of a random generator) belongs to a stage: all that reads or
moves one tensor is in one stage, so a cut between them is not possible. Only state that follows from nothing but state,
as a counter does, is moved by every stage for itself: each has a copy, and they agree.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ..ir.builder import GraphBuilder, replay
from ..ir.errors import AttributeValueError
from ..ir.graph import Graph, Node, Value
from ..ir.opdef import op
from ..ir.rewrite import Rewriter, rewrite
from .chain import Cut, Layer, cut
from .cost import Cluster

Way = tuple[float, tuple[int, ...]]  # bytes handed on, ends of stages
BACKWARD_WORK = 2.0  # of the forward pass
GOOD = 1.1           # a cut is good enough if its slowest stage takes at most so much of the least possible
MOST_LAYERS = 600    # that a cut is searched among
NARROW = 1.5         # segments end where at most so many times the least bytes cross


@dataclass(frozen=True)
class Chain:
    """A graph's layers.

    Attributes:
        crossing: what each layer hands to the next; the last hands out the loss.
        results: numbers of the graph's other outputs that are made in each layer.
        alike: numbers of the outputs that every stage makes for itself.
        ends: the last step of each layer among those of the spine, whose ops are `ops`.
    """

    graph: Graph
    layers: tuple[Layer, ...]
    crossing: tuple[tuple[Value, ...], ...]
    results: tuple[tuple[int, ...], ...]
    alike: tuple[int, ...]
    ends: tuple[int, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A run of layers as a graph of its own.

    Attributes:
        graph: inputs: what it is handed, then inputs of the whole graph; outputs: what it hands on (the loss, if it is
            the last), then outputs of the whole graph, those that assign state with their alias.
        handed, out: the values of the whole graph that it is handed, and that it hands on.
        inputs, results: numbers in the whole graph of the inputs and outputs that follow.
    """

    graph: Graph
    handed: tuple[Value, ...]
    out: tuple[Value, ...]
    inputs: tuple[int, ...]
    results: tuple[int, ...]


# What depends on what ----------------------------------------------------------------------------------------------


def reached(graph: Graph, values: Iterable[Value]) -> set[Value]:
    """These values and all that is computed from them."""
    found = set(values)
    for node in graph.nodes:
        if any(v in found for v in node.operands):
            found.update(node.results)
    return found


def needed(graph: Graph, outputs: Iterable[Value], stop: Collection[Value] = ()) -> list[Node]:
    """The nodes that some values depend on, in order; not beyond the values `stop`."""
    known = frozenset(stop)
    wanted = [v for v in outputs if v not in known]
    found: set[Node] = set()
    while wanted:
        node = wanted.pop().producer
        if node is not None and node not in found:
            found.add(node)
            wanted.extend(v for v in node.operands if v not in known)
    return sorted(found, key=_places(graph, len(graph.nodes)).__getitem__)


@functools.lru_cache(maxsize=4)
def _places(graph: Graph, count: int) -> dict[Node, int]:
    """The place of each of its `count` nodes."""
    return {node: i for i, node in enumerate(graph.nodes)}


def moved_with_data(graph: Graph, data: Collection[int]) -> set[Value]:
    """The inputs that are assigned what depends on data or parameters: a running mean, but no counter."""
    start = {v for i, (v, role) in enumerate(zip(graph.inputs, graph.roles)) if i in data or role == "parameter"}
    moved: set[Value] = set()
    while True:
        found = reached(graph, start | moved)
        more = {graph.inputs[j] for i, j in graph.aliases.items() if graph.outputs[i] in found} - moved
        if not more:
            return moved
        moved |= more


class _Unwrap(Rewriter):
    """Takes out of recomputed regions what does not depend on their data: the counters that they move."""

    varying: set[Value] = set()  # of the graph that is rewritten

    def replace(self, node: Node) -> Sequence[Value] | None:
        varying = any(v in self.varying for v in node.operands)
        if node.op.name != "remat" or not varying:
            if varying:
                self.varying.update(node.results)
            return None
        (body,) = node.regions
        inner = reached(body, [v for v, given in zip(body.inputs, node.operands) if given in self.varying])
        apart = [v not in inner and v.producer is not None for v in body.outputs]
        if not any(apart):
            self.varying.update(node.results)
            return None
        mapping = dict(zip(body.inputs, node.operands))
        replay(needed(body, [v for v, alone in zip(body.outputs, apart) if alone]), mapping, self)
        kept = Graph(body.name, body.inputs, body.roles, body.nodes,
                     [v for v, alone in zip(body.outputs, apart) if not alone])
        rest = iter(self.emit("remat", node.operands, node.attrs, [kept]) if kept.outputs else ())
        return [mapping[v] if alone else next(rest) for v, alone in zip(body.outputs, apart)]


def unwrapped(graph: Graph, data: Collection[int]) -> Graph:
    """The graph in which counters that `checkpoint`ed code moves are moved outside of it."""
    rewriter = _Unwrap(graph.name)
    rewriter.varying = {v for i, (v, role) in enumerate(zip(graph.inputs, graph.roles))
                        if i in data or role == "parameter"}
    return rewrite(graph, rewriter)


# The chain ---------------------------------------------------------------------------------------------------------


class _Spine:
    """The nodes that matter, in order, and what crosses after each.

    Attributes:
        live: after each node, the values that later ones read; None where no cut is possible.
    """

    def __init__(self, graph: Graph, data: Collection[int]):
        self.graph = graph
        moved = moved_with_data(graph, data)
        assigned = {graph.inputs[j]: graph.outputs[i] for i, j in graph.aliases.items()}
        self.alike = tuple(i for i, j in sorted(graph.aliases.items()) if graph.inputs[j] not in moved)
        varying = reached(graph, [*(graph.inputs[i] for i in data), *moved])
        fixed = reached(graph, [v for i, v in enumerate(graph.inputs) if i not in data])
        makers = {assigned[v].producer for v in moved}
        self.nodes = [n for n in graph.nodes if n in makers or (n.results[0] in varying and n.results[0] in fixed)]
        self.live = self._live(moved, assigned)

    def _live(self, moved: set[Value], assigned: dict[Value, Value]) -> list[tuple[Value, ...] | None]:
        last = {v: i for i, n in enumerate(self.nodes) for v in n.operands}
        last[self.graph.outputs[0]] = len(self.nodes)
        first: dict[Value, int] = {}
        for i, n in enumerate(self.nodes):
            for v in n.operands:
                first.setdefault(v, i)
        place = {v: i for i, n in enumerate(self.nodes) for v in n.results}
        held = [0] * (len(self.nodes) + 1)
        for v in moved:
            ends = [x for x in (first.get(v), last.get(v), place.get(assigned[v])) if x is not None]
            held[min(ends)] += 1
            held[max(ends)] -= 1
        live: dict[Value, None] = {}
        found: list[tuple[Value, ...] | None] = []
        inside = 0
        for i, node in enumerate(self.nodes):
            live.update(dict.fromkeys(node.results))
            live = {v: None for v in live if last.get(v, -1) > i}
            inside += held[i]
            found.append(tuple(live) if live and not inside else None)
        if found:
            found[-1] = (self.graph.outputs[0],)
        return found

    def ends(self, widest: int) -> list[int]:
        """The nodes after which a layer ends if at most so many values may cross."""
        return [i for i, values in enumerate(self.live)
                if values is not None and (len(values) <= widest or i + 1 == len(self.live))]

    def widths(self) -> list[int]:
        """How many values cross anywhere, in increasing order."""
        return sorted({len(v) for v in self.live if v is not None})


def chain_of(graph: Graph, data: Collection[int], cluster: Cluster | None = None, widest: int = 1) -> Chain:
    """The layers of a graph whose first output is the loss. `data`: the inputs that are the batch.

    A layer ends where at most `widest` values cross. Its parameters count four times (gradient and two moments); its
    activations are what it computes.
    """
    spine = _Spine(graph, data)
    return _chain(spine, frozenset(data), cluster or Cluster(), spine.ends(widest))


def chain_at(graph: Graph, data: Collection[int], ends: Sequence[int], cluster: Cluster | None = None) -> Chain:
    """The layers of a graph that end where those of another one do, of the same steps on other shapes."""
    spine = _Spine(graph, data)
    fits = all(e < len(spine.live) and spine.live[e] is not None for e in ends)
    return _chain(spine, frozenset(data), cluster or Cluster(), ends if fits else spine.ends(1))


def regions(chain: Chain) -> tuple[int, ...]:
    """The ends of layers with one product at least: what hardly computes is with the layer before it, if there is one.

    That is where a cut changes something, and what recomputation computes again at a time.
    """
    found: list[int] = []
    heavy, start = [], 0
    for end in chain.ends:
        heavy.append(any(op(name).has("contraction") or name == "attention" for name in chain.ops[start:end + 1]))
        start = end + 1
    some = False
    for i, end in enumerate(chain.ends):
        some = some or heavy[i]
        if i + 1 == len(chain.ends) or heavy[i + 1] and (some or not found):
            found.append(end)
            some = False
    return tuple(found)


def _chain(spine: _Spine, data: frozenset[int], cluster: Cluster, ends: Sequence[int]) -> Chain:
    graph, start = spine.graph, 0
    layers, crossing, results = [], [], []
    seen: set[Value] = set()
    others = [i for i in range(1, len(graph.outputs)) if i not in spine.alike]
    for end in ends:
        nodes, values = spine.nodes[start:end + 1], spine.live[end]
        assert values is not None
        layers.append(_layer(graph, nodes, values, seen, data, cluster))
        crossing.append(values)
        made = {v for n in nodes for v in n.results}
        results.append(tuple(i for i in others if graph.outputs[i] in made))
        start = end + 1
    placed = {i for numbers in results for i in numbers}
    if results:  # what follows from data or parameters alone can be made anywhere
        results[-1] = (*results[-1], *(i for i in others if i not in placed))
    ops = tuple(n.op.name for n in spine.nodes)
    return Chain(graph, tuple(layers), tuple(crossing), tuple(results), spine.alike, tuple(ends), ops)


def _layer(graph: Graph, nodes: Sequence[Node], out: Sequence[Value], seen: set[Value], data: Collection[int],
           cluster: Cluster) -> Layer:
    read = {v for n in nodes for v in n.operands if v.producer is None} - seen
    seen |= read
    own = sum(float(v.type.nbytes) for i, v in enumerate(graph.inputs) if v in read and i not in data)
    seconds = sum(max(float(n.flops) / cluster.flops, cluster.touch(float(n.nbytes))) for n in nodes)
    kept = sum(float(v.type.nbytes) for n in nodes for v in n.results)
    handed = sum(float(v.type.nbytes) for v in out)
    return Layer(seconds, BACKWARD_WORK * seconds, 4 * own, kept, handed, nodes[0].op.name, len(out))


# Stages ------------------------------------------------------------------------------------------------------------


def cut_graph(graph: Graph, data: Collection[int], count: int, memory: float = float("inf"),
              kept: Sequence[int] | None = None, cluster: Cluster | None = None) -> tuple[Chain, Cut]:
    """A chain of the graph's layers and its best cut into stages: the narrowest crossings that give a good one.

    Raises:
        AttributeValueError: the graph cannot be cut into so many stages, or no cut fits in memory.
    """
    spine, cluster = _Spine(graph, data), cluster or Cluster()
    tried: list[tuple[float, Chain, Cut]] = []
    failure: AttributeValueError | None = None
    for widest in spine.widths() or [1]:
        ends = spine.ends(widest)
        if len(ends) < count or (tried and len(ends) > MOST_LAYERS):
            continue
        chain = _chain(spine, frozenset(data), cluster, ends)
        try:
            found = cut(chain.layers, count, memory, kept, cluster.along("pipe").bandwidth)
        except AttributeValueError as error:
            failure = error
            continue
        tried.append((found.seconds, chain, found))
        work = [x.forward + x.backward for x in chain.layers]
        if found.seconds <= GOOD * max(sum(work) / count, 0.0):
            break
    if not tried:
        most = len(spine.ends(max(spine.widths(), default=1)))
        raise failure or AttributeValueError(
            f"{graph.name} can be cut into {most} stages at most, not {count}: it is cut between steps of its "
            "computation that read both data and parameters, and not between those that read and move the same state. "
            "Use fewer stages (the mesh's pipeline axis times the plan's chunks)")
    least = min(seconds for seconds, _, _ in tried)
    return next((chain, found) for seconds, chain, found in tried if seconds <= GOOD * least)


def cut_at_home(graph: Graph, data: Collection[int], homes: Sequence[Collection[int]]) -> tuple[Chain, Cut] | None:
    """The chain of a graph and the cut for which each stage reads only inputs that are at home there; the one that
    hands on least, None if there is none.

    Args:
        homes: of each stage, the numbers of the inputs that it may read.
    """
    spine = _Spine(graph, data)
    reads = _reads(spine)
    best: list[Way | None] = [(0.0, ()), *(None for _ in homes[1:])]  # by the stage that comes next
    for i, read in enumerate(reads):
        live = spine.live[i - 1] if i else None
        found: list[Way | None] = []
        for s, home in enumerate(homes):
            on, before = best[s], best[s - 1] if s and live is not None else None
            if before is not None and live is not None:
                bytes_on = before[0] + sum(float(v.type.nbytes) for v in live)
                if on is None or bytes_on < on[0]:
                    on = bytes_on, (*before[1], i - 1)
            found.append(on if read <= set(home) else None)
        best = found
    last = best[-1]
    if not reads or last is None:
        return None
    ends = last[1]
    layers = sorted({*ends, *regions(_chain(spine, frozenset(data), Cluster(), spine.ends(1)))})
    chain = _chain(spine, frozenset(data), Cluster(), layers)
    return chain, Cut((0, *(layers.index(e) + 1 for e in ends)), 0.0, chain.layers)


def _reads(spine: _Spine) -> list[set[int]]:
    """The inputs of the graph that each node of the spine reads, itself or by what is computed again for it."""
    own = {v: {i} for i, v in enumerate(spine.graph.inputs)}
    place = {n: i for i, n in enumerate(spine.nodes)}
    found: list[set[int]] = [set() for _ in spine.nodes]
    for node in spine.graph.nodes:
        read = set().union(*(own.get(v, set()) for v in node.operands))
        if node in place:
            found[place[node]] = read
        else:
            own.update(dict.fromkeys(node.results, read))
    return found


def stages_of(chain: Chain, found: Cut, again: bool = False) -> list[Stage]:
    """The stages of a cut. `again`: they compute their layers again in the backward pass."""
    ends = [*found.bounds[1:], len(chain.layers)]
    return [stage_at(chain, first, end, number, again) for number, (first, end) in enumerate(zip(found.bounds, ends))]


def stage_at(chain: Chain, first: int, end: int, number: int = 0, again: bool = False) -> Stage:
    """Layers first to end - 1 as a stage."""
    results = sorted({i for numbers in chain.results[first:end] for i in numbers} | set(chain.alike))
    handed = chain.crossing[first - 1] if first else ()
    made = _stage(chain.graph, handed, chain.crossing[end - 1], results, number)
    return recomputed(chain, first, end, made) if again else made


def _stage(graph: Graph, handed: tuple[Value, ...], out: tuple[Value, ...], results: Sequence[int],
           number: int) -> Stage:
    outputs = [*out, *(graph.outputs[i] for i in results)]
    nodes = needed(graph, outputs, stop=handed)
    read = {v for n in nodes for v in n.operands} | set(outputs) - set(handed)
    read |= {graph.inputs[graph.aliases[i]] for i in results if i in graph.aliases}
    numbers = [i for i, v in enumerate(graph.inputs) if v in read]
    with GraphBuilder(f"{graph.name}_stage{number}") as builder:
        mapping: dict[Value, Value] = {v: builder.input(v.type, v.name or "handed") for v in handed}
        for i in numbers:
            mapping[graph.inputs[i]] = builder.input(graph.inputs[i].type, graph.inputs[i].name, graph.roles[i])
        replay(nodes, mapping, builder)
        builder.output(*(mapping[v] for v in out))
        for i in results:
            alias = graph.inputs[graph.aliases[i]] if i in graph.aliases else None
            builder.output(mapping[graph.outputs[i]], alias=None if alias is None else mapping[alias])
    return Stage(builder.graph, handed, out, tuple(numbers), tuple(results))


def recomputed(chain: Chain, first: int, end: int, stage: Stage) -> Stage:
    """A stage whose backward pass computes segments of it again from what they were handed, and keeps only that."""
    graph, whole = stage.graph, chain.graph
    with GraphBuilder(graph.name) as builder:
        inputs = [builder.input(v.type, v.name, role) for v, role in zip(graph.inputs, graph.roles)]
        mapping = dict(zip((*stage.handed, *(whole.inputs[i] for i in stage.inputs)), inputs))
        found: dict[int, Value] = {}
        for begin, stop in segments(chain, first, end):
            handed = chain.crossing[begin - 1] if begin else ()
            own = sorted(i for numbers in chain.results[begin:stop] for i in numbers)
            part = _stage(whole, handed, chain.crossing[stop - 1], own, begin)
            body = Graph(part.graph.name, part.graph.inputs, ["data"] * len(part.graph.inputs), part.graph.nodes,
                         part.graph.outputs)
            operands = [*(mapping[v] for v in handed), *(mapping[whole.inputs[i]] for i in part.inputs)]
            results = builder.emit("remat", operands, {}, [body])
            mapping.update(zip(part.out, results))
            found.update(zip(part.results, results[len(part.out):]))
        alike = [i for i in chain.alike if i in stage.results]
        replay(needed(whole, [whole.outputs[i] for i in alike]), mapping, builder)
        found.update((i, mapping[whole.outputs[i]]) for i in alike)
        builder.output(*(mapping[v] for v in stage.out))
        for i in stage.results:
            alias = mapping[whole.inputs[whole.aliases[i]]] if i in whole.aliases else None
            builder.output(found[i], alias=alias)
    return replace(stage, graph=builder.graph)


def segments(chain: Chain, first: int, end: int) -> list[tuple[int, int]]:
    """Runs of layers to compute again, which end where little crosses.

    Of k equal segments a backward pass has k inputs of x bytes in memory, and the activations of one, A / k: least for
    k = sqrt(A / x) (Chen et al. 2016, arXiv:1604.06174).
    """
    layers = chain.layers[first:end]
    every = sum(x.activations for x in layers)
    narrow = min((x.output for x in layers[:-1]), default=0.0)
    if not every or not narrow:
        return [(first, end)]
    target, found, begin, held = (every * narrow) ** 0.5, [], first, 0.0
    for i, layer in enumerate(layers, start=first + 1):
        held += layer.activations
        if i == end or (held >= target and layer.output <= NARROW * narrow):
            found.append((begin, i))
            begin, held = i, 0.0
    return found
