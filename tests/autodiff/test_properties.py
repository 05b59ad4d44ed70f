"""Gradients, mixed precision and recomputation of random graphs."""

from __future__ import annotations

import numpy as np
from gradcheck import check_graph
from hypothesis import assume, given, settings
from ir.graphs import arrays_for, graphs

from treadle.autodiff.amp import mixed_precision
from treadle.autodiff.budget import recompute_to_fit, timeline
from treadle.autodiff.forward import jvp_graph
from treadle.autodiff.reverse import vjp_graph
from treadle.autodiff.save_less import save_less
from treadle.ir.dce import sweep
from treadle.ir.interp import run
from treadle.ir.order import hoist_updates
from treadle.ir.passes import FINISH, TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.verify import verify

KINKS = {"floor", "abs", "maximum", "minimum", "reduce_max", "reduce_min"}


def all_inputs(graph):
    return list(range(len(graph.inputs)))


@given(graphs(max_nodes=10, dtypes=("float64",)))
@settings(max_examples=60)
def test_gradients(graph):
    assume(not KINKS & {n.op.name for n in graph.nodes})
    arrays = [0.3 * a for a in arrays_for(graph)]
    assume(all(np.isfinite(r).all() and np.abs(r).max(initial=0) < 1e4 for r in run(graph, arrays)))
    check_graph(graph, arrays, all_inputs(graph), order=2, tol=1e-5, rng=np.random.default_rng(1))


@given(graphs(max_nodes=10, dtypes=("float64",)))
@settings(max_examples=40)
def test_forward_and_reverse_agree(graph):
    """<ct, J v> = <Jᵀ ct, v>, kinks included."""
    arrays, wrt = [0.3 * a for a in arrays_for(graph)], all_inputs(graph)
    vs, cts = arrays_for(graph, seed=1), [np.random.default_rng(2).standard_normal(v.shape) for v in graph.outputs]
    pushed = run(jvp_graph(graph, wrt), [*arrays, *vs])[len(graph.outputs):]
    pulled = run(vjp_graph(graph, wrt), [*arrays, *cts])
    left = sum(np.sum(a * b) for a, b in zip(cts, pushed))
    right = sum(np.sum(a * b) for a, b in zip(pulled, vs))
    assume(np.isfinite(left))
    np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-7 * (1 + sum(np.abs(p).sum() for p in pushed)))


@given(graphs(max_nodes=15, dtypes=("float32",)))
@settings(max_examples=40)
def test_passes_keep_gradients(graph):
    gradient = vjp_graph(graph, all_inputs(graph))
    result = Pipeline([*TIDY, *FINISH]).run(gradient)
    arrays = [np.float32(0.3) * a for a in arrays_for(gradient)]
    for a, b in zip(run(gradient, arrays), run(result, arrays)):
        assume(np.isfinite(a).all())
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * (1 + np.abs(a).max(initial=0)))


@given(graphs(max_nodes=15, dtypes=("float32",)))
@settings(max_examples=40)
def test_recomputation_and_order_change_no_bit(graph):
    gradient = Pipeline(TIDY).run(vjp_graph(graph, all_inputs(graph)))
    fitted = recompute_to_fit(gradient, 1).graph
    assert timeline(fitted).peak <= timeline(gradient).peak
    for result in (fitted, hoist_updates(gradient).graph, sweep(save_less(gradient).graph).graph):
        verify(result)
        for a, b in zip(run(gradient, arrays_for(gradient)), run(result, arrays_for(gradient))):
            np.testing.assert_array_equal(a, b)


@given(graphs(max_nodes=15, dtypes=("float32",)))
@settings(max_examples=40)
def test_mixed_precision_keeps_types(graph):
    for source in (graph, vjp_graph(graph, all_inputs(graph))):
        result = mixed_precision(source).graph
        verify(result)
        assert result.input_types == source.input_types and result.output_types == source.output_types
