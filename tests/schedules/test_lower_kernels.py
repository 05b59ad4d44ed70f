"""Ops that write a kernel of their own, without fusion around them: half-width vectors, one thread or several.

At full width every op is compiled by tests/ir/test_ops_compiled.py.
"""

import dataclasses

import numpy as np
import pytest
from optable.checks import compare, joint_graph
from optable.table import case_id, cases

from treadle.ir import interp
from treadle.ir.dtypes import as_dtype
from treadle.ir.opdef import op
from treadle.schedules import lower_fold, lower_pool, lower_scatter, lower_sort  # noqa: F401
from treadle.schedules.build import build
from treadle.schedules.program import Buffer, Copy, KernelCall, Program
from treadle.schedules.target import Target

OPS = {"cumsum", "cumprod", "argmax", "argmin", "sort", "top_k", "scatter_add", "scatter_add_along_axis",
       "scatter_add_nd", "scatter_nd", "dynamic_update_slice", "max_pool", "max_pool_grad", "avg_pool", "avg_pool_grad"}


def program_of(graph, target):
    """One kernel call per node; an operand that the result takes over is copied there first."""
    inputs = {v: Buffer(f"x{i}", v.shape, str(v.dtype), "input") for i, v in enumerate(graph.inputs)}
    outputs = {v: Buffer(f"y{i}", v.shape, str(v.dtype), "output") for i, v in enumerate(graph.outputs)}
    steps = []
    for node in graph.nodes:
        lowering = op(node.op.name).slots["lower"]
        args = [inputs[v] for v in node.operands]
        results = [outputs[v] for v in node.results]
        shared = dict(lowering.inplace)
        for operand, result in shared.items():
            steps.append(Copy(args[operand], results[result]))
            args[operand] = results[result]
        fresh = [b for i, b in enumerate(results) if i not in shared.values()]
        writes = [*shared, *range(len(args), len(args) + len(fresh))]
        steps.append(KernelCall(lowering.fn(node, target, "kernel"), [*args, *fresh], writes=writes))
    return Program(list(inputs.values()), list(outputs.values()), steps)


HALF = dataclasses.replace(Target.parse("cpu"), vector_bits=256)


@pytest.mark.parametrize(("row", "dtype"), [c for c in cases() if c[0].op in OPS and c[1] in ("float32", "int8")],
                         ids=case_id)
def test_half_width_vectors(row, dtype):
    graph, arrays = joint_graph(row.op, list(row.samples(as_dtype(dtype))))
    with np.errstate(all="ignore"):
        want = interp.run(graph, arrays)
    got = build(program_of(graph, HALF), "cpu").run(arrays)
    for g, w, value in zip(got, want, graph.outputs, strict=True):
        compare(np.asarray(g), w, value.type, 2.0 * row.tolerance(value.dtype), f"{row.op} {value!r}")


def test_results_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(0)
    from treadle.ir.builder import GraphBuilder, emit
    from treadle.ir.types import TensorType
    with GraphBuilder() as b:
        x = b.input(TensorType((50, 70), "float32"), "x")
        i = b.input(TensorType((900,), "int64"), "i")
        u = b.input(TensorType((900, 70), "float32"), "u")
        b.output(emit("scatter_add", x, i, u, axis=0), emit("cumsum", x, axis=1))
    arrays = [rng.standard_normal((50, 70)).astype("f"), rng.integers(-2, 52, 900),
              rng.standard_normal((900, 70)).astype("f")]
    host = Target.parse("cpu")
    results = [build(program_of(b.graph, t), t).run(arrays)
               for t in (host, dataclasses.replace(host, threads=1))]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
