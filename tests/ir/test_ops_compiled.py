"""Every op of the table compiled for this machine, against the reference."""

import warnings

import numpy as np
import pytest
from optable.checks import compare, joint_graph
from optable.table import case_id, cases

from treadle.ir import interp
from treadle.ir.dtypes import as_dtype

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tvm deprecates its own names while it is imported
    from treadle.schedules.build import build
    from treadle.schedules.lower import lower

# What an element costs in accuracy beyond the reference: sums in another order, polynomials for libm.
LOOSER = 2.0


@pytest.mark.parametrize(("row", "dtype"), cases(), ids=case_id)
def test_compiled_against_reference(row, dtype):
    samples = row.few(as_dtype(dtype))
    graph, arrays = joint_graph(row.op, samples)
    with np.errstate(all="ignore"):
        want = interp.run(graph, arrays)
    got = build(lower(graph, "cpu"), "cpu").run(arrays)
    names = [str(sample) for sample in samples for _ in sample.graph(row.op).outputs]
    assert len(got) == len(names)
    for g, w, value, name in zip(got, want, graph.outputs, names, strict=True):
        compare(np.asarray(g), w, value.type, LOOSER * row.tolerance(value.dtype), f"{row.op} {name}")
