"""Dead code: nodes that no output and no effect depends on are removed, inputs of graphs kept.

Ops with regions are narrowed as well: a scan loses stacked results that nobody reads, carries that only feed
themselves, and operands that its body ignores; likewise while_loop, cond and remat. So a rule may return more than
is needed (a scan its residuals) and leave the choice to this pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .builder import make_node
from .graph import Graph, Node, Value
from .pipeline import Pass, PassResult
from .rewrite import with_operands

# A narrowed node, and which results of the old one its results are.
Narrowed = tuple[Node, list[int]]


def sweep(graph: Graph) -> PassResult:
    """Removes dead nodes; every output and input of the graph stays."""
    nodes, stats = _live_nodes(graph.nodes, graph.outputs)
    if stats["removed"] == stats["narrowed"] == 0:
        return PassResult(graph, False, stats)
    mapping: dict[Value, Value] = {}
    result: list[Node] = []
    for node, narrowed, kept in nodes:
        fresh = with_operands(narrowed, [mapping.get(v, v) for v in narrowed.operands])
        result.append(fresh)
        mapping.update((node.results[old], new) for old, new in zip(kept, fresh.results))
    outputs = [mapping.get(v, v) for v in graph.outputs]
    return PassResult(Graph(graph.name, graph.inputs, graph.roles, result, outputs, graph.aliases, graph.meta),
                      True, stats)


def _live_nodes(nodes: Sequence[Node], outputs: Iterable[Value]) -> tuple[list[tuple[Node, Node, list[int]]],
                                                                         dict[str, int]]:
    """The nodes to keep, in order, each with its narrowed form."""
    live = set(outputs)
    found: list[tuple[Node, Node, list[int]]] = []
    narrowed_count = 0
    for node in reversed(nodes):
        wanted = [r in live for r in node.results]
        effect = has_effect(node)
        if not any(wanted) and not effect:
            continue
        narrowed, kept = node, list(range(len(node.results)))
        if node.op.name in NARROW and not effect:
            narrowed, kept = NARROW[node.op.name](node, wanted)
        elif node.regions:
            narrowed = with_operands(node, node.operands, [sweep(r).graph for r in node.regions])
        narrowed_count += narrowed is not node
        live.update(narrowed.operands)
        found.append((node, narrowed, kept))
    return found[::-1], {"removed": len(nodes) - len(found), "narrowed": narrowed_count}


def has_effect(node: Node) -> bool:
    return node.op.has("effect") or any(has_effect(n) for r in node.regions for n in r.nodes)


def reached(graph: Graph, outputs: Iterable[Value]) -> set[Value]:
    """The values that some values of a graph depend on, these included."""
    live = set(outputs)
    for node in reversed(graph.nodes):
        if any(r in live for r in node.results) or has_effect(node):
            live.update(node.operands)
    return live


def _select(region: Graph, inputs: Sequence[int], outputs: Sequence[int]) -> Graph:
    """The region with some of its inputs and outputs, and only the nodes that these need."""
    chosen = Graph(region.name, [region.inputs[i] for i in inputs], [region.roles[i] for i in inputs], region.nodes,
                   [region.outputs[i] for i in outputs], meta=region.meta)
    swept = sweep(chosen).graph
    same = len(inputs) == len(region.inputs) and len(outputs) == len(region.outputs) and swept is chosen
    return region if same else swept


def _rebuilt(node: Node, operands: Sequence[Value], regions: Sequence[Graph], kept: list[int],
             **changed: int) -> Narrowed:
    if len(operands) == len(node.operands) and all(a is b for a, b in zip(regions, node.regions)):
        return node, kept
    fresh = make_node(node.op, operands, {**node.attrs, **changed}, regions, node.loc)
    for old, new in zip(kept, fresh.results):
        new.name = node.results[old].name
    return fresh, kept


def _live_carries(body: Graph, n_carry: int, live: set[int], others: Sequence[Value]) -> tuple[set[int], set[Value]]:
    """Carries that are read, or feed what is read, in any later step; and all the values that are then needed."""
    while True:
        needed = reached(body, [*(body.outputs[i] for i in live), *others])
        more = {i for i in range(n_carry) if body.inputs[i] in needed} - live
        if not more:
            return live, needed
        live = live | more


def _narrow_scan(node: Node, wanted: list[bool]) -> Narrowed:
    (body,), n_carry, n_xs = node.regions, node.attrs["n_carry"], node.attrs["n_xs"]
    ys = [i for i in range(n_carry, len(wanted)) if wanted[i]]
    carries, needed = _live_carries(body, n_carry, {i for i in range(n_carry) if wanted[i]},
                                    [body.outputs[i] for i in ys])
    kept = [*sorted(carries), *ys]
    inputs = [i for i, v in enumerate(body.inputs) if (i in carries if i < n_carry else v in needed)]
    return _rebuilt(node, [node.operands[i] for i in inputs], [_select(body, inputs, kept)], kept,
                    n_carry=len(carries), n_xs=sum(n_carry <= i < n_carry + n_xs for i in inputs))


def _narrow_while(node: Node, wanted: list[bool]) -> Narrowed:
    condition, body = node.regions
    n_carry = node.attrs["n_carry"]
    tested = reached(condition, condition.outputs)
    live = {i for i in range(n_carry) if wanted[i] or condition.inputs[i] in tested}
    carries, needed = _live_carries(body, n_carry, live, [])
    inputs = [i for i, (v, c) in enumerate(zip(body.inputs, condition.inputs))
              if (i in carries if i < n_carry else v in needed or c in tested)]
    kept = sorted(carries)
    return _rebuilt(node, [node.operands[i] for i in inputs],
                    [_select(condition, inputs, [0]), _select(body, inputs, kept)], kept, n_carry=len(carries))


def _narrow_call(skipped: int) -> Callable[[Node, list[bool]], Narrowed]:
    """For ops that call one of their regions with all their operands, the first `skipped` apart."""
    def narrow(node: Node, wanted: list[bool]) -> Narrowed:
        kept = [i for i, w in enumerate(wanted) if w]
        needed = [reached(r, [r.outputs[i] for i in kept]) for r in node.regions]
        inputs = [i for i in range(len(node.operands) - skipped)
                  if any(r.inputs[i] in n for r, n in zip(node.regions, needed))]
        operands = [*node.operands[:skipped], *(node.operands[i + skipped] for i in inputs)]
        return _rebuilt(node, operands, [_select(r, inputs, kept) for r in node.regions], kept)
    return narrow


def _narrow_pairs(node: Node, wanted: list[bool]) -> Narrowed:
    """For ops whose result i is operand i (barrier)."""
    kept = [i for i, w in enumerate(wanted) if w]
    return _rebuilt(node, [node.operands[i] for i in kept], (), kept)


NARROW: dict[str, Callable[[Node, list[bool]], Narrowed]] = {
    "scan": _narrow_scan,
    "while_loop": _narrow_while,
    "cond": _narrow_call(1),
    "remat": _narrow_call(0),
    "barrier": _narrow_pairs,
}

DCE = Pass("dce", sweep)
