"""Rules of the big ops, first and second order, and against the rules of their decompositions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from gradcheck import check, graph_of

from treadle.autodiff.reverse import vjp_graph
from treadle.ir import decompose_rules  # noqa: F401  (fills the slots)
from treadle.ir.context import emit
from treadle.ir.interp import run
from treadle.ir.opdef import op

rng = np.random.default_rng(4)


def normal(*shape):
    return rng.standard_normal(shape)


LABELS = np.array([[0, 4, -100], [2, 2, 1]])
MASK = np.array([[True, False, True, True], [False, False, False, False], [True, True, True, False]])

# name -> (arrays, attributes, which of the results are differentiated)
CASES = {
    "softmax": [((normal(3, 5),), {"axis": 1}), ((normal(2, 3, 4),), {"axis": 1})],
    "log_softmax": [((normal(3, 5),), {"axis": 1}), ((normal(2, 3, 4),), {"axis": 0})],
    "layer_norm": [((normal(3, 5), normal(5), normal(5)), {}),
                   ((normal(2, 3, 4), normal(3, 4), normal(3, 4)), {"axes": 2, "eps": 0.1})],
    "rms_norm": [((normal(2, 3, 5), normal(5)), {"eps": 0.01})],
    "group_norm": [((normal(2, 6, 3), normal(6), normal(6)), {"groups": 3}),
                   ((normal(2, 4, 2, 3), normal(4), normal(4)), {"groups": 1, "eps": 0.1})],
    "batch_norm": [((normal(6, 3), normal(3), normal(3)), {}),
                   ((normal(3, 2, 2, 3), normal(2), normal(2)), {"eps": 0.1})],
    "attention": [
        ((normal(3, 4), normal(5, 4), normal(5, 2)), {}),
        ((normal(2, 2, 4, 3), normal(2, 2, 4, 3), normal(2, 2, 4, 3)), {"causal": True, "scale": 0.7}),
        ((normal(2, 2, 3, 4), normal(1, 4, 4), normal(1, 4, 2), MASK), {}),
        ((normal(2, 3, 4), normal(2, 4, 4), normal(2, 4, 4), normal(3, 4)), {"causal": True}),
    ],
    "cross_entropy": [
        ((normal(2, 3, 5), np.clip(LABELS, 0, 4)), {}),
        ((normal(2, 3, 5), LABELS), {"ignore_index": -100, "label_smoothing": 0.1}),
        ((normal(2, 3, 5), LABELS.astype(np.int8)), {"ignore_index": 1000}),
    ],
}
PAIRS = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]


@pytest.mark.parametrize("name, number", PAIRS)
def test_against_differences(name, number):
    arrays, attrs = CASES[name][number]
    check(lambda *vs: emit(name, *vs, **attrs), *arrays)


@pytest.mark.parametrize("name, number", PAIRS)
def test_against_the_decomposition(name, number):
    arrays, attrs = CASES[name][number]
    full = op(name).complete_attrs(attrs)
    whole = graph_of(lambda *vs: emit(name, *vs, **attrs), *arrays)
    parts = graph_of(lambda *vs: op(name).slots["decompose"](*vs, **full), *arrays)
    wrt = [i for i, a in enumerate(arrays) if a.dtype == np.float64]
    cts = [normal(*v.shape) for v in whole.outputs]
    for a, b in zip(run(vjp_graph(whole, wrt), [*arrays, *cts]), run(vjp_graph(parts, wrt), [*arrays, *cts])):
        np.testing.assert_allclose(a, np.nan_to_num(b), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name, number", PAIRS)
def test_bfloat16_gradients_are_rounded_once(name, number):
    arrays, attrs = CASES[name][number]
    narrow = [a.astype(ml_dtypes.bfloat16) if a.dtype == np.float64 else a for a in arrays]
    widened = [a.astype(np.float64) if a.dtype == ml_dtypes.bfloat16 else a for a in narrow]
    wrt = [i for i, a in enumerate(arrays) if a.dtype == np.float64]

    def gradients(inputs):
        graph = graph_of(lambda *vs: emit(name, *vs, **attrs), *inputs)
        rng = np.random.default_rng(0)
        cts = [rng.standard_normal(v.shape).astype(ml_dtypes.bfloat16).astype(v.dtype.np) for v in graph.outputs]
        return run(vjp_graph(graph, wrt), [*inputs, *cts])

    for a, b in zip(gradients(narrow), gradients(widened)):
        assert a.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=0.03, atol=0.03 * max(1.0, np.abs(b).max()))
