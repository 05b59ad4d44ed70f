"""Every op of the table compiled with symbolic sizes, run at those of its samples, against the reference."""

import warnings

import numpy as np
import pytest
from optable.checks import as_tuple, compare
from optable.table import TABLE

from treadle.ir import interp
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dims import Dim
from treadle.ir.errors import TreadleError
from treadle.ir.types import TensorType

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tvm deprecates its own names while it is imported
    from treadle.schedules.build import build
    from treadle.schedules.lower import lower

SAMPLES = 2
LOOSER = 4.0
SIZED = ("shape", "input_spatial", "limits", "sizes")  # attributes that are sizes of operands


def symbolic(sample, op, every):
    """The sample's graph with a named size for each number of elements (`every`: of all axes, else of the first)."""
    known = set()

    def size(axis, n):
        if n < 2 or not (every or axis == 0):
            return n
        known.add(n)
        return Dim(f"s{n}")

    def renamed(attr):
        if isinstance(attr, tuple):
            return tuple(map(renamed, attr))
        return Dim(f"s{attr}") if type(attr) is int and attr in known else attr

    with GraphBuilder("main") as b:
        inputs = [b.input(TensorType(tuple(size(k, n) for k, n in enumerate(v.shape)), v.dtype))
                  for v in sample.graph(op).inputs]
        attrs = {k: renamed(v) if k in SIZED else v for k, v in sample.attrs.items()}
        b.output(*as_tuple(emit(op, *inputs, **attrs)))
    return b.graph if known else None


def traced(sample, op):
    """The graph with as many symbolic sizes as its attributes allow."""
    for every in (True, False) if op != "group_norm" else (False,):  # groups divide a number of channels
        try:
            return symbolic(sample, op, every)
        except TreadleError:  # an attribute says something of these sizes
            continue
    return None


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_compiled_with_symbolic_sizes(row):
    dtype = next((d for d in ("float32", "int64", "bool") if d in row.dtypes), row.dtypes[0])
    graphs = ((sample, traced(sample, row.op)) for sample in row.samples(dtype) if sample.regions is None)
    found = [(sample, graph) for sample, graph in graphs if graph is not None][:SAMPLES]
    if not found:
        pytest.skip("its attributes are sizes")
    for sample, graph in found:
        arrays = [np.array(a) for a in sample.args]
        static = sample.graph(row.op)
        with np.errstate(all="ignore"):
            want = interp.run(static, [np.array(a) for a in arrays])
        got = build(lower(graph, "cpu"), "cpu").run(arrays)
        for g, w, v in zip(got, want, static.outputs, strict=True):
            compare(np.asarray(g), w, v.type, LOOSER * row.tolerance(v.dtype), f"{row.op} {sample}")
