"""`Gradient`: the derivative of one value of the graph by others, by our own reverse mode."""

from __future__ import annotations

from typing import Any

import onnx

from .. import functions as td
from ..transforms import vjp
from .node import OnnxNode
from .rules import TRAINING, onnx_rule
from .run import Frame
from .uses import names_used
from .values import tensor


@onnx_rule("Gradient", since=1, domain=TRAINING, fold=False)
def gradient(node: OnnxNode, *points: Any) -> Any:
    """The nodes between xs (and zs, which are held) and y are run again at the given points, and differentiated."""
    xs, zs, y = list(node.require("xs")), list(node.attr("zs", None) or []), node.require("y")
    if len(points) != len(xs) + len(zs):
        raise node.fail(f"xs and zs name {len(xs) + len(zs)} values, but it has {len(points)} operands")
    between = _between(node.frame.nodes, {*xs, *zs}, y)
    if not between:
        raise node.fail(f"{y!r} does not depend on {', '.join(xs)}")
    held = dict(zip(zs, points[len(xs):]))

    def value(*given: Any) -> Any:
        frame = Frame(node.frame.context, node.frame.opsets, node.frame)
        frame.env.update({**held, **dict(zip(xs, given))})
        frame.run(between)
        return tensor(frame.lookup(y))

    result, pull = vjp(value, *(tensor(x) for x in points[:len(xs)]))
    return tuple(pull(td.ones_like(result)))


def _between(nodes: list[onnx.NodeProto], sources: set[str], target: str) -> list[onnx.NodeProto]:
    """The nodes that lead from the sources to the target, in order."""
    reached, forward = set(sources), []
    for node in nodes:
        if not sources & set(node.output) and reached & names_used([node]):
            reached.update(node.output)
            forward.append(node)
    needed, kept = {target}, []
    for node in reversed(forward):
        if needed & set(node.output):
            needed |= names_used([node])
            kept.append(node)
    return kept[::-1]
