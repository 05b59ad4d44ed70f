"""What a program takes for granted of symbolic sizes, to be asked when it is called with them.

Gathers clamp their indices, but a slice is read where it lies: of a table of 512 positions the first `seq` are there
only if `seq` is at most 512. What no proof settles becomes a check, which costs nothing but for sizes that are new
(`sized.Layouts`).
"""

from __future__ import annotations

from ..ir.dims import Size
from ..ir.graph import Graph, Node
from .signature import SizeCheck
from .sizes import at_least, is_dynamic


def size_checks(graph: Graph) -> list[SizeCheck]:
    """The checks of a graph, its regions included; each once."""
    found: dict[Size, SizeCheck] = {}
    for node in graph.walk():
        if node.op.name == "slice":
            for check in _of_slice(node):
                found.setdefault(check.rest, check)
    return list(found.values())


def _of_slice(node: Node) -> list[SizeCheck]:
    checks = []
    for size, start, limit, stride in zip(node.operands[0].shape, *(node.attrs[k] for k in ("starts", "limits",
                                                                                            "strides"))):
        if not is_dynamic(size, start, limit):
            continue
        low, high = (start, limit) if stride > 0 else (limit + 1, start + 1)
        where = f", at {node.loc}" if node.loc is not None else ""
        what = (f"a slice from {low} to {high} is outside its axis of {size} elements{where}: pass arrays of other "
                "sizes, or compile with specialize=True, which cuts a slice off at the end of its axis")
        checks += [SizeCheck(rest, what) for rest in (low, size - high) if not at_least(rest, 0)]
    return checks
