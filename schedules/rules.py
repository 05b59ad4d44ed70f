"""The ordered list of schedules: the first that accepts a group writes its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ir.errors import CompileError
from ..ir.graph import Node
from .group import Group
from .loops import Signature, elementwise_kernel
from .lower_anchors import Epilogue
from .lower_slots import Kernel
from .rows import row_kernel
from .sizes import with_sizes

Rule = Callable[[Group, Signature, Any, str], Any]


def contraction(group: Group, signature: Signature, target: Any, name: str) -> Any:
    """Matrix products and convolutions, with their epilogue."""
    anchor = group.anchor
    if anchor is None:
        return None
    epilogue = Epilogue(anchor, group.nodes, signature)
    function = anchor.op.slots["lower"].fn(anchor, epilogue, target, name)
    group.packed = epilogue.packed
    return function


def reduction(group: Group, signature: Signature, target: Any, name: str) -> Any:
    """Groups with reductions: rows and columns."""
    if not group.has_reduction:
        return None
    return row_kernel(name, signature, group.nodes, target)


def own_kernel(group: Group, signature: Signature, target: Any, name: str) -> Any:
    """Ops that write their kernel themselves."""
    node: Node = group.nodes[-1]
    lowering = node.op.slots.get("lower")
    return lowering.fn(node, target, name) if isinstance(lowering, Kernel) else None


def elementwise(group: Group, signature: Signature, target: Any, name: str) -> Any:
    """What is left: one loop nest over the outputs."""
    return elementwise_kernel(name, signature, group.nodes, target)


RULES: tuple[Rule, ...] = (contraction, own_kernel, reduction, elementwise)


def kernel_of(group: Group, signature: Signature, target: Any, name: str) -> Any:
    """The PrimFunc of a group.

    Raises:
        CompileError: no schedule accepts it.
    """
    for rule in RULES:
        function = rule(group, signature, target, name)
        if function is not None:
            return with_sizes(function)
    raise CompileError(f"no schedule accepts the group {group.label}", group.nodes[-1].loc)
