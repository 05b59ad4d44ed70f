"""What passes know about loops.

`merge_scans`: two scans over the same operands become one that gives the results of both. The gradient of a scan
emits the forward scan once more, with more results (what the backward steps read); merged, it runs once.

`fixed_carries`, a simplification: a carry that every step returns unchanged is a constant of the loop, which need not
be copied from step to step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .builder import copy_into, emit, make_node
from .cse import Merger, is_pure
from .dce import sweep
from .graph import Graph, Node, Value
from .hashing import attr_key
from .pipeline import Pass, PassResult
from .rewrite import with_operands
from .simplify_match import Rule

# A joint body, and which of its outputs are the results of each scan.
Joint = tuple[Graph, dict[Node, list[int]]]


def merge_scans(graph: Graph) -> PassResult:
    """Merges scans of this graph whose operands, attributes and carries are equal. Run it after `cse`."""
    joints = {first: joint for first, *others in _similar_scans(graph) if len((joint := _join(first, others))[1]) > 1}
    if not joints:
        return PassResult(graph, False, {"merged": 0})
    leader = {node: first for first, (_, places) in joints.items() for node in places}
    merged: dict[Node, Node] = {}
    mapping: dict[Value, Value] = {}
    for node in graph.nodes:
        first = leader.get(node)
        if first is None:
            merged[node] = with_operands(node, [mapping.get(v, v) for v in node.operands])
            mapping.update(zip(node.results, merged[node].results))
            continue
        body, places = joints[first]
        if node is first:
            operands = [mapping.get(v, v) for v in node.operands]
            merged[node] = make_node(node.op, operands, node.attrs, [body], node.loc)
        mapping.update((old, merged[first].results[i]) for old, i in zip(node.results, places[node]))
    outputs = [mapping.get(v, v) for v in graph.outputs]
    after = Graph(graph.name, graph.inputs, graph.roles, list(merged.values()), outputs, graph.aliases, graph.meta)
    return PassResult(after, True, {"merged": len(leader) - len(joints)})


def _similar_scans(graph: Graph) -> list[list[Node]]:
    """Groups of two or more scans with the same operands and attributes."""
    groups: dict[Hashable, list[Node]] = {}
    for node in graph.nodes:
        if node.op.name == "scan" and is_pure(node):
            key = (node.operands, tuple((k, attr_key(v)) for k, v in node.attrs.items()))
            groups.setdefault(key, []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _join(first: Node, others: Sequence[Node]) -> Joint:
    """One body for the first scan and for those of the others whose carries turn out to be the same."""
    n_carry, body = first.attrs["n_carry"], first.regions[0]
    with Merger(body.name) as builder:
        inputs = [builder.input(v.type, v.name) for v in body.inputs]
        outputs = copy_into(body, inputs)
        places = {first: list(range(len(outputs)))}
        for other in others:
            found = copy_into(other.regions[0], inputs)
            if found[:n_carry] == outputs[:n_carry]:
                outputs += [v for v in dict.fromkeys(found[n_carry:]) if v not in outputs[n_carry:]]
                places[other] = [*range(n_carry), *(outputs.index(v, n_carry) for v in found[n_carry:])]
        builder.output(*outputs)
    return sweep(builder.graph).graph, places  # without what a scan that did not fit has left


MERGE_SCANS = Pass("merge_scans", merge_scans)

# --- simplification --------------------------------------------------------------------------------------


def fixed_carries(node: Node) -> Sequence[Value] | None:
    """Carries that the body returns as they came become constants; their final value is the initial one."""
    body, n_carry = node.regions[-1], node.attrs["n_carry"]
    fixed = [i for i in range(n_carry) if body.outputs[i] is body.inputs[i]]
    if not fixed:
        return None
    order = [i for i in range(len(node.operands)) if i not in fixed] + fixed
    regions = [_reordered(r, order, [i for i in range(len(r.outputs)) if r is not body or i not in fixed])
               for r in node.regions]
    results = emit(node.op.name, *(node.operands[i] for i in order), regions=tuple(regions),
                   **{**node.attrs, "n_carry": n_carry - len(fixed)})
    rest = iter((results,) if isinstance(results, Value) else results)
    return [node.operands[i] if i in fixed else next(rest) for i in range(len(node.results))]


def _reordered(region: Graph, inputs: Sequence[int], outputs: Sequence[int]) -> Graph:
    return Graph(region.name, [region.inputs[i] for i in inputs], [region.roles[i] for i in inputs], region.nodes,
                 [region.outputs[i] for i in outputs], meta=region.meta)


LOOP_RULES: dict[str, tuple[Rule, ...]] = {"scan": (fixed_carries,), "while_loop": (fixed_carries,)}
