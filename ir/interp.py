"""Runs a graph in NumPy, one reference kernel per node.

The oracle of the tests, the constant folder, and how a pass is checked when a pipeline is bisected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .dims import Dim, evaluate, solve
from .errors import ArgumentsError
from .graph import Graph, Node, Value

Array = np.ndarray


def run(graph: Graph, arrays: Sequence[Any]) -> list[Array]:
    """The outputs of a graph for given inputs (arrays of the declared dtypes and shapes).

    Symbolic sizes take their values from the shapes of the arrays.

    Raises:
        ArgumentsError: the number, a shape or a dtype of the arrays is not what the graph declares.
    """
    inputs = [np.asarray(a) for a in arrays]
    return _run(graph, inputs, bind_sizes(graph, inputs))


def bind_sizes(graph: Graph, arrays: Sequence[Array]) -> dict[str, int]:
    """The values of the symbolic sizes of a graph, from the arrays it is called with."""
    if len(arrays) != len(graph.inputs):
        raise ArgumentsError(f"graph {graph.name} takes {len(graph.inputs)} inputs, got {len(arrays)}")
    sizes: dict[str, int] = {}
    for _ in range(2):  # a second look checks expressions whose names were found after them
        for value, array in zip(graph.inputs, arrays, strict=True):
            fits = len(value.shape) == array.ndim and all(
                solve(declared, actual, sizes) for declared, actual in zip(value.shape, array.shape, strict=True))
            if not fits or array.dtype != value.dtype.np:
                known = f" with {sizes}" if sizes else ""
                raise ArgumentsError(f"input {value!r} of graph {graph.name}{known} got an array of shape "
                                     f"{array.shape} and dtype {array.dtype}")
    return sizes


def _run(graph: Graph, arrays: Sequence[Array], sizes: dict[str, int]) -> list[Array]:
    env: dict[Value, Array] = dict(zip(graph.inputs, arrays, strict=True))
    for node in graph.nodes:
        if node.op.name == "bind_size":
            sizes[str(node.attrs["size"])] = int(env[node.operands[0]])
        env.update(zip(node.results, run_node(node, [env[v] for v in node.operands], sizes), strict=True))
    return [env[v] for v in graph.outputs]


def run_node(node: Node, arrays: Sequence[Array], sizes: dict[str, int] | None = None) -> list[Array]:
    """The results of one node, each of exactly the inferred dtype."""
    sizes = {} if sizes is None else sizes
    attrs = {k: _static(v, sizes) for k, v in node.attrs.items()} if sizes else node.attrs
    extra = {"regions": tuple(_callable(r, sizes) for r in node.regions)} if node.op.has("regions") else {}
    results = node.op.reference(*arrays, **attrs, **extra)
    if not isinstance(results, tuple):
        results = (results,)
    return [np.asarray(r, dtype=v.dtype.np) for r, v in zip(results, node.results, strict=True)]


def _callable(region: Graph, sizes: dict[str, int]) -> Callable[..., tuple[Array, ...]]:
    return lambda *arrays: tuple(_run(region, [np.asarray(a) for a in arrays], sizes))


def _static(attr: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(attr, Dim):
        return evaluate(attr, sizes)
    if isinstance(attr, tuple):
        return tuple(_static(a, sizes) for a in attr)
    return attr
