"""What the tests do with a row: compare arrays, differentiate along a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.ir import interp
from treadle.ir.builder import GraphBuilder, copy_into
from treadle.ir.graph import Graph
from treadle.ir.types import TensorType

from .samples import Sample

STEP = 1e-5


def widened(x: np.ndarray) -> np.ndarray:
    """Floats as f64, 4-bit integers as i64, the rest as it is."""
    if x.dtype.kind in "iub" and x.dtype != np.bool_ or x.dtype == np.bool_:
        return x
    return x.astype(np.int64 if "int" in x.dtype.name else np.float64)


def compare(got: Any, want: Any, type: TensorType, tol: float, what: str) -> None:
    """`got` has exactly the type, and the values of `want` rounded to its dtype."""
    assert isinstance(got, np.ndarray), f"{what}: {got!r} is no array"
    assert (got.shape, got.dtype) == (type.shape, type.dtype.np), f"{what}: got {got.shape} {got.dtype} for {type}"
    with np.errstate(all="ignore"):
        want = np.asarray(want).astype(type.dtype.np)
    assert got.shape == want.shape, f"{what}: the oracle gives {want.shape} for {type}"
    left, right = widened(got), widened(want)
    if not type.dtype.is_float:
        np.testing.assert_array_equal(left, right, err_msg=what)
        return
    finite = np.abs(right[np.isfinite(right)])
    scale = float(finite.mean()) if finite.size else 0.0
    np.testing.assert_allclose(left, right, rtol=tol, atol=tol * min(scale, 1e4), err_msg=what, equal_nan=True)


def as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def directional(graph: Graph, arrays: Sequence[Any], wrt: list[int], gradient: Callable[[Graph, list[int]], Graph],
                order: int, tol: float, rng: Any) -> None:
    """The gradient that `gradient(graph, wrt)` computes, against a central difference along a random direction.

    The second order is the first order of the gradient's own graph.
    """
    made = gradient(graph, wrt)
    floats = [i for i, v in enumerate(graph.outputs) if v.dtype.is_float]
    cts = [np.asarray(rng.standard_normal(graph.outputs[i].shape)) for i in floats]
    direction = [np.asarray(rng.standard_normal(arrays[i].shape)) for i in wrt]

    def value(step: float) -> float:
        moved = list(arrays)
        for i, v in zip(wrt, direction):
            moved[i] = arrays[i] + step * v
        outputs = interp.run(graph, moved)
        return sum(float(np.sum(ct * outputs[i])) for i, ct in zip(floats, cts))

    numeric = (value(STEP) - value(-STEP)) / (2 * STEP)
    parts = [g * v for g, v in zip(interp.run(made, [*arrays, *cts]), direction)]
    analytic = sum(float(np.sum(p)) for p in parts)
    scale = max(1.0, abs(numeric), *(float(np.abs(p).sum()) for p in parts))
    assert abs(analytic - numeric) <= tol * scale, f"order {order}: {analytic} is not {numeric}\n{graph}\n{made}"
    if order > 1:
        chosen = [*wrt, *(len(arrays) + i for i in range(len(cts)))]
        directional(made, [*arrays, *cts], chosen, gradient, order - 1, tol * 10, rng)


def joint_graph(op: str, samples: Sequence[Sample]) -> tuple[Graph, list[np.ndarray]]:
    """All samples of an op side by side in one graph, which compiles in one go; and its arguments."""
    with GraphBuilder(op) as builder:
        for sample in samples:
            graph = sample.graph(op)
            builder.output(*copy_into(graph, [builder.input(t) for t in graph.input_types]))
    return builder.graph, [a for sample in samples for a in sample.args]
