"""Running a function three ways: eagerly, as a traced graph in the interpreter, and as NumPy says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import treadle as td
from treadle.frontend import tree
from treadle.ir import interp
from treadle.ir.verify import verify


def run_graph(graph: Any, *args: Any) -> Any:
    """The result of a traced graph, from the interpreter; what it assigns is assigned."""
    verify(graph)
    assert td.ir.parse(str(graph)) == graph
    data = iter(
        [np.asarray(leaf) for leaf in tree.flatten((args, {}))[0] if not isinstance(leaf, (int, float, str))]
    )
    captures = graph.meta["captures"]
    arrays = [captures[i].numpy() if i in captures else next(data) for i in range(len(graph.inputs))]
    outputs = interp.run(graph, arrays)
    for i, tensor in graph.meta["assigns"].items():
        tensor.assign(outputs[i])
    return tree.unflatten(graph.meta["out_structure"], outputs[: len(outputs) - len(graph.meta["assigns"])])


def traced(fn: Callable[..., Any], *args: Any) -> Any:
    """The result of `fn`, traced and interpreted, as arrays."""
    return run_graph(td.trace(fn, *args), *args)


def both(fn: Callable[..., Any], *args: Any) -> Any:
    """The eager result, after a check that the traced one is the same."""
    eager = fn(*[td.asarray(a) if isinstance(a, np.ndarray) else a for a in args])
    assert_close(traced(fn, *args), eager)
    return eager


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Equal trees: structure, shapes, dtypes, values to a relative tolerance."""
    found, structure = tree.flatten(actual)
    wanted, other = tree.flatten(expected)
    assert structure == other
    for a, e in zip(found, wanted):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape, (a.shape, e.shape)
        assert a.dtype == e.dtype, (a.dtype, e.dtype)
        np.testing.assert_allclose(a.astype(np.float64), e.astype(np.float64), tolerance, tolerance)
