"""Checks of gradients in float64 along one random direction, first and second order.

The derivative of `sum(ct * f(x))` along `v` is compared with a central difference. Second order checks, in the same
way, the graph that computes the first gradient: cheap at any size, and each order tests the rules of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.autodiff.reverse import vjp_graph
from treadle.ir.builder import build
from treadle.ir.dtypes import as_dtype
from treadle.ir.graph import Graph
from treadle.ir.interp import run
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

STEP = 1e-5


def type_of(array: Any) -> TensorType:
    array = np.asarray(array)
    return TensorType(array.shape, as_dtype(array.dtype))


def graph_of(fn: Callable[..., Any], *arrays: Any) -> Graph:
    return build("f", fn, *(type_of(a) for a in arrays))


def check(fn: Callable[..., Any], *arrays: Any, order: int = 2, wrt: Sequence[int] | None = None,
          tol: float = 1e-6) -> None:
    """`fn(*values)` emits nodes; `arrays` are its inputs, differentiated by those that are f64 (or by `wrt`)."""
    arrays = tuple(np.asarray(a) for a in arrays)
    chosen = [i for i, a in enumerate(arrays) if a.dtype == np.float64] if wrt is None else list(wrt)
    check_graph(graph_of(fn, *arrays), arrays, chosen, order, tol, np.random.default_rng(0))


def check_graph(graph: Graph, arrays: Sequence[Any], wrt: list[int], order: int, tol: float, rng: Any) -> None:
    verify(graph)
    gradient = vjp_graph(graph, wrt)
    verify(gradient)
    floats = [i for i, v in enumerate(graph.outputs) if v.dtype.is_float]
    cts = [np.asarray(rng.standard_normal(graph.outputs[i].shape)) for i in floats]
    direction = [np.asarray(rng.standard_normal(arrays[i].shape)) for i in wrt]

    def value(step: float) -> float:
        moved = list(arrays)
        for i, v in zip(wrt, direction):
            moved[i] = arrays[i] + step * v
        outputs = run(graph, moved)
        return sum(float(np.sum(ct * outputs[i])) for i, ct in zip(floats, cts))

    numeric = (value(STEP) - value(-STEP)) / (2 * STEP)
    grads = run(gradient, [*arrays, *cts])
    analytic = sum(float(np.sum(g * v)) for g, v in zip(grads, direction))
    scale = max(1.0, abs(numeric), *(float(np.sum(np.abs(g * v))) for g, v in zip(grads, direction)))
    assert abs(analytic - numeric) <= tol * scale, (
        f"order {order}: analytic {analytic}, numeric {numeric}\n{graph}\n{gradient}")
    if order > 1:
        chosen = wrt + [len(arrays) + i for i in range(len(cts))]
        check_graph(gradient, [*arrays, *cts], chosen, order - 1, tol * 10, rng)
