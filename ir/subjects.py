"""What the values of a training step are for: parameters, states, gradients or activations.

Nothing is marked while a graph is made, so this reads it off the roles of inputs and the flow of data, at any stage.
What follows from parameters alone (a gathered weight, a narrow copy) is "parameters", from optimizer state "states".
What depends on data and reaches storage that an output takes over without another contraction or reduction is
"gradients": a weight's gradient is only scaled, sent and added up on its way. All else is "activations".
"""

from __future__ import annotations

from .graph import Graph, Node, Value

SUBJECTS = ("parameters", "gradients", "states", "activations")
_SENT = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "start", "wait", "concat", "dynamic_slice", "pad")


def subjects(graph: Graph) -> dict[Value, str]:
    """The subject of every value of a graph; those of regions are not looked at."""
    found: dict[Value, str] = {}
    for v, role in zip(graph.inputs, graph.roles):
        found[v] = {"parameter": "parameters", "state": "states", "scalar": "", "constant": ""}.get(role, "activations")
    for node in graph.nodes:
        known = {found[v] for v in node.operands}
        subject = next((s for s in ("activations", "states", "parameters") if s in known), "")
        found.update(dict.fromkeys(node.results, subject))
    ends = {graph.outputs[i] for i in graph.aliases}
    for node in reversed(graph.nodes):
        if any(v in ends for v in node.results):
            for v in node.results:
                if found[v] == "activations":
                    found[v] = "gradients"
            if _passes(node):
                ends.update(v for v in node.operands if v.producer is not None)
    return {v: s or "activations" for v, s in found.items()}


def _passes(node: Node) -> bool:
    """Whether a node hands a gradient on as it is, or scaled."""
    return node.op.has("elementwise") or node.op.has("view") or node.op.name in _SENT
