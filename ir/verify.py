"""Checks that a graph keeps the invariants of the IR.

Run after every pass in tests and under TREADLE_VERIFY=1. What it finds is a bug in the pass, so the
message names the node as well as the user's line it came from.
"""

from __future__ import annotations

from .builder import make_node
from .errors import TreadleError, VerifyError
from .graph import ROLES, Graph, Node, Value
from .opdef import op
from .text import node_text


def verify(graph: Graph) -> None:
    """Re-infers every type and re-checks the structure, regions included.

    Raises:
        VerifyError: a value is used before it is defined or defined twice, a type is not what the op
            infers, an op is not the registered one, or an alias is not valid.
    """
    if len(graph.roles) != len(graph.inputs) or set(graph.roles) - set(ROLES):
        raise VerifyError(f"graph {graph.name}: the roles {graph.roles} do not fit its {len(graph.inputs)} inputs")
    defined: set[Value] = set()
    for value in graph.inputs:
        if value in defined or value.producer is not None:
            raise VerifyError(f"graph {graph.name}: input {value!r} stands twice or has a producer")
        defined.add(value)
    for node in graph.nodes:
        _verify_node(graph, node, defined)
        defined.update(node.results)
    for value in graph.outputs:
        if value not in defined:
            raise VerifyError(f"graph {graph.name}: output {value!r} is not defined in it")
    _verify_aliases(graph)


def _verify_node(graph: Graph, node: Node, defined: set[Value]) -> None:
    where = f"graph {graph.name}: {node_text(node)}"
    for operand in node.operands:
        if operand not in defined:
            raise VerifyError(f"{where}: the operand {operand!r} is used before its definition, or belongs to "
                              f"another graph", node.loc)
    if any(v in defined or v.producer is not node for v in node.results):
        raise VerifyError(f"{where}: a result is defined twice or has another producer", node.loc)
    if op(node.op.name) is not node.op:
        raise VerifyError(f"{where}: its op is not the registered one", node.loc)
    for region in node.regions:
        verify(region)
    try:
        fresh = make_node(node.op, node.operands, node.attrs, node.regions, node.loc)
    except TreadleError as error:
        raise VerifyError(f"{where}: does not type: {error.message}", node.loc) from error
    if tuple(v.type for v in fresh.results) != tuple(v.type for v in node.results):
        inferred = ", ".join(str(v.type) for v in fresh.results)
        raise VerifyError(f"{where}: the op infers {inferred}", node.loc)
    if fresh.attrs.keys() != node.attrs.keys():
        raise VerifyError(f"{where}: attributes are missing: {fresh.attrs.keys() - node.attrs.keys()}", node.loc)


def _verify_aliases(graph: Graph) -> None:
    taken: set[int] = set()
    for out, source in graph.aliases.items():
        if out >= len(graph.outputs) or source >= len(graph.inputs) or source in taken:
            raise VerifyError(f"graph {graph.name}: the alias of output {out} to input {source} is out of range "
                              f"or takes an input that is taken already")
        taken.add(source)
        if graph.outputs[out].type != graph.inputs[source].type:
            raise VerifyError(f"graph {graph.name}: output {graph.outputs[out]!r} cannot take over the storage of "
                              f"{graph.inputs[source]!r}: the types differ")
