"""Gradients of every op of the table along one random direction, in f64, to the order of its row."""

import numpy as np
import pytest
from optable.checks import directional
from optable.table import TABLE, case_id

from treadle.autodiff import vjp_graph
from treadle.ir.dtypes import as_dtype
from treadle.ir.opdef import op

DIFFERENTIABLE = [row for row in TABLE if row.grad and "float64" in row.dtypes]


def test_rows_with_a_gradient_are_those_of_ops_that_have_one():
    checked = {row.op for row in DIFFERENTIABLE}
    wrong = sorted(name for name in checked if op(name).undifferentiable)
    missing = sorted({row.op for row in TABLE if not op(row.op).undifferentiable} - checked - {"stop_gradient"})
    assert not wrong and not missing, f"wrongly checked: {wrong}; differentiable but not checked: {missing}"


@pytest.mark.parametrize("row", DIFFERENTIABLE, ids=case_id)
def test_gradient(row):
    count = 0
    for sample in row.samples(as_dtype("float64")):
        wrt = [i for i, a in enumerate(sample.args) if a.dtype == np.float64]
        size = sum(sample.args[i].size for i in wrt)
        if sample.smooth and wrt and size <= 2500:
            directional(sample.graph(row.op), sample.args, wrt, vjp_graph, row.grad, 1e-6, np.random.default_rng(0))
            count += 1
    assert count >= 2, "too few samples"
