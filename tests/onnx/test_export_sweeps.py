"""Sweeps over what can be exported: ops with symbolic sizes, gradients of every op, every layer, random graphs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra `test`)")

from export_tools import answers, runtime
from ir.graphs import arrays_for, graphs
from optable.checks import compare
from optable.table import TABLE, case_id

import treadle as td
from treadle import nn
from treadle.autodiff import vjp_graph
from treadle.frontend import tree
from treadle.frontend.onnx import to_model
from treadle.ir import interp
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dims import Dim
from treadle.ir.dtypes import as_dtype
from treadle.ir.errors import TreadleError
from treadle.ir.types import TensorType

SPEC = importlib.util.spec_from_file_location("nn_cases", Path(__file__).parent.parent / "oracle" / "nn_cases.py")
nn_cases = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(nn_cases)
RNG = np.random.default_rng(0)
# Attributes that hold sizes of operands: they become symbolic with them.
SIZES = {"reshape": ("shape",), "broadcast_to": ("shape",), "slice": ("starts", "limits"),
         **dict.fromkeys(("conv_input_grad", "avg_pool_grad", "max_pool_grad"), ("input_spatial",))}
FLOAT_ROWS = [row for row in TABLE if "float32" in row.dtypes and row.op not in ("bitcast", "cast", "constant", "iota")]


def named(n, names):
    return Dim(f"d{n}") if f"d{n}" in names else n


def symbolic(op, sample, all_axes):
    """The graph of a sample in which sizes of 2 and more are open (in the first axis, or in all); None if the op does
    not take such."""
    types = [TensorType(tuple(Dim(f"d{n}") if n >= 2 and (all_axes or i == 0) else n for i, n in enumerate(a.shape)),
                        as_dtype(a.dtype)) for a in sample.args]
    names = {str(d) for t in types for d in t.shape if isinstance(d, Dim)}
    attrs = dict(sample.attrs)
    for key in SIZES.get(op, ()):
        attrs[key] = tuple(named(n, names) if all_axes or i == 0 else n for i, n in enumerate(attrs[key]))
    try:
        with GraphBuilder(op) as builder:
            made = emit(op, *(builder.input(t) for t in types), **attrs)
            builder.output(*(made if isinstance(made, tuple) else (made,)))
        interp.bind_sizes(builder.graph, sample.args)
    except (TreadleError, TypeError):
        return None
    return builder.graph if names else None


@pytest.mark.slow
@pytest.mark.parametrize("row", FLOAT_ROWS, ids=case_id)
def test_ops_with_symbolic_sizes(row):
    for sample in row.samples(as_dtype("float32")):
        if sample.regions or sample.label == "extremes":
            continue
        for all_axes in (False, True):
            if row.op == "group_norm" and all_axes:
                continue  # whether the groups divide the channels cannot be told
            graph = symbolic(row.op, sample, all_axes)
            if graph is None:
                continue
            with np.errstate(all="ignore"):
                want = interp.run(graph, sample.args)
            got = answers(to_model(graph, clamp=True), sample.args)
            for g, w, value in zip(got, want, graph.outputs, strict=True):
                tol = 4 * row.tolerance(value.dtype)
                compare(g, w, TensorType(w.shape, value.dtype), tol, f"{row.op} {sample} {graph.input_types}")


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in FLOAT_ROWS if r.grad], ids=case_id)
def test_gradients_of_every_op(row):
    """To the order that the table checks."""
    for sample in row.few(as_dtype("float32")):
        wrt = [i for i, a in enumerate(sample.args) if a.dtype == np.float32]
        if not sample.smooth or not wrt or sum(sample.args[i].size for i in wrt) > 1000:
            continue
        graph, arrays = sample.graph(row.op), list(sample.args)
        for _ in range(row.grad):
            count = len(arrays)
            arrays += [RNG.standard_normal(v.shape).astype(v.dtype.np) for v in graph.outputs if v.dtype.is_float]
            graph = vjp_graph(graph, wrt)
            wrt = [*wrt, *range(count, len(arrays))]
            with np.errstate(all="ignore"):
                want = interp.run(graph, arrays)
            for g, w in zip(answers(to_model(graph), arrays), want, strict=True):
                scale = np.abs(w[np.isfinite(w)]).max(initial=1)
                np.testing.assert_allclose(g, w, rtol=3e-4, atol=3e-5 * scale, err_msg=f"{row.op} {sample}")


@pytest.mark.parametrize("case", nn_cases.LAYERS, ids=lambda case: case[0])
def test_every_layer(case):
    name, theirs, ours, shapes = case
    module = eval(f"nn.{ours or theirs}", {"nn": nn})
    arrays = [RNG.integers(0, int(s[1][1:]), s[0]) if isinstance(s[1:2], tuple) and isinstance(s[-1], str)
              else RNG.standard_normal(s).astype(np.float32) for s in shapes]
    batch = arrays[0].shape[0]
    for first in (batch,) if name in ("linear_vector", "kl") else (batch, "batch"):
        specs = [td.spec((first, *a.shape[1:]) if a.shape[:1] == (batch,) else a.shape, str(a.dtype)) for a in arrays]
        model = to_model(module, *specs)
        module.eval()
        want, _ = tree.flatten(module(*map(td.tensor, arrays)))
        for g, w in zip(runtime(model, arrays), want, strict=True):
            np.testing.assert_allclose(g, w.numpy(), rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(graphs())
def test_random_graphs(graph):
    arrays = arrays_for(graph)
    with np.errstate(all="ignore"):
        want = interp.run(graph, arrays)
    got = answers(to_model(graph), arrays)
    for g, w in zip(got, want, strict=True):
        scale = np.abs(w[np.isfinite(w)]).max(initial=1)
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * scale)
