"""Compiles small graphs through the whole of `schedules` and compares them with the interpreter."""

import itertools
import warnings

import numpy as np

from treadle.frontend.specialize import with_sizes
from treadle.ir import interp
from treadle.ir.builder import build as build_graph
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tvm deprecates its own names while it is imported
    from treadle.schedules.build import build
    from treadle.schedules.lower import lower

TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def graph_of(fn, *specs):
    """A graph of `fn`; specs are (shape, dtype) or shapes (then float32)."""
    types = [TensorType(*s) if s and isinstance(s[-1], str) else TensorType(s, "float32") for s in specs]
    return build_graph("main", fn, *types)


def data(graph, seed=0):
    """Random arrays for a graph's inputs."""
    rng = np.random.default_rng(seed)
    arrays = []
    for v in graph.inputs:
        dtype = as_dtype(v.dtype)
        if dtype.is_bool:
            arrays.append(np.asarray(rng.random(v.shape) < 0.5))
        elif dtype.is_float:
            arrays.append(np.asarray(rng.standard_normal(v.shape)).astype(dtype.np))
        else:
            arrays.append(rng.integers(0 if dtype.is_unsigned else -5, 6, v.shape).astype(dtype.np))
    return arrays


def combinations(**values):
    """Every combination of values of named sizes."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def check_sizes(graph, sizes, tol=None, arrays=data, expected=None):
    """Compiles a graph with symbolic sizes once and runs it at each of `sizes`, against the interpreter."""
    program = lower(graph, "cpu", expected)
    executable = build(program, "cpu")
    for values in sizes:
        static = with_sizes(graph, values)
        given = arrays(static)
        want = interp.run(static, [np.array(a) for a in given])
        got = executable.run([np.array(a) for a in given])
        for g, w, v in zip(got, want, graph.outputs, strict=True):
            assert g.shape == w.shape and g.dtype == w.dtype, values
            if v.dtype.is_float:
                limit = TOLERANCE[v.dtype] if tol is None else tol
                wide = np.asarray(w).astype(np.float64)
                np.testing.assert_allclose(np.asarray(g).astype(np.float64), wide, rtol=limit, atol=limit,
                                           err_msg=str(values))
            else:
                np.testing.assert_array_equal(g, w, err_msg=str(values))
    return [call.label for call in program.kernel_calls]


def kernels(graph):
    """Labels of the kernels of a graph."""
    return [call.label for call in lower(graph, "cpu").kernel_calls]


def check(graph, arrays=None, tol=None, count=None):
    """Runs the graph compiled and interpreted; compares all outputs, and the number of kernels."""
    arrays = data(graph) if arrays is None else arrays
    want = interp.run(graph, [np.array(a) for a in arrays])
    program = lower(graph, "cpu")
    got = build(program, "cpu").run([np.array(a) for a in arrays])
    for g, w, v in zip(got, want, graph.outputs, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        if v.dtype.is_float:
            limit = TOLERANCE[v.dtype] if tol is None else tol
            wide = np.asarray(w).astype(np.float64)
            np.testing.assert_allclose(np.asarray(g).astype(np.float64), wide, rtol=limit, atol=limit)
        else:
            np.testing.assert_array_equal(g, w)
    if count is not None:
        labels = [call.label for call in program.kernel_calls]
        assert len(labels) == count, labels
    return got
