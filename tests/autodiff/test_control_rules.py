"""Gradients of cond and scan, first and second order; what the backward scan keeps."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import check, graph_of

from treadle.autodiff.reverse import grad_graph, vjp_graph
from treadle.ir.builder import build
from treadle.ir.context import emit
from treadle.ir.cse import merge
from treadle.ir.dce import sweep
from treadle.ir.errors import GradientError
from treadle.ir.interp import run
from treadle.ir.loops import merge_scans
from treadle.ir.simplify import simplify
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

rng = np.random.default_rng(5)


def normal(*shape):
    return rng.standard_normal(shape)


def f64(*shape):
    return TensorType(shape, "float64")


def test_cond():
    then = build("then", lambda x, y, n: [x * y, emit("sin", x)], f64(3), f64(3), TensorType((), "int32"))
    other = build("else", lambda x, y, n: [x + x, y * emit("cast", n, dtype=y.dtype)], f64(3), f64(3),
                  TensorType((), "int32"))
    for pred in (True, False):
        check(lambda p, x, y, n: emit("cond", p, x, y, n, regions=(then, other)),
              np.array(pred), normal(3), normal(3), np.array(4, np.int32))


def rnn_body():
    """(h, step; x; w, u) -> (tanh(h w + x u), step + 1; h_in, scaled)"""
    def body(h, step, x, w, u):
        out = emit("tanh", emit("matmul", h, w) + emit("matmul", x, u))
        scaled = out * emit("cast", step, dtype=out.dtype)
        return [out, step + 1, h, scaled]
    return build("rnn", body, f64(2, 3), TensorType((), "int32"), f64(2, 4), f64(3, 3), f64(4, 3))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [4, 1, 0])
def test_scan(reverse, length):
    check(lambda h, i, x, w, u: emit("scan", h, i, x, w, u, regions=(rnn_body(),), n_carry=2, n_xs=1, length=length,
                                     reverse=reverse),
          normal(2, 3), np.array(1, np.int32), normal(length, 2, 4), normal(3, 3), normal(4, 3))


def test_a_carry_that_never_changes_is_not_stacked():
    body = build("b", lambda h, w, x: [emit("sin", h * w) + x, w], f64(3), f64(3), f64(3))

    def loop(h, w, x):
        return emit("scan", h, w, x, regions=(body,), n_carry=2, n_xs=1, length=5)[0]

    arrays = normal(3), normal(3), normal(5, 3)
    check(loop, *arrays)
    scans = [n for n in vjp_graph(graph_of(loop, *arrays), [0, 1, 2]).nodes if n.op.name == "scan"]
    assert [t.shape for t in scans[1].regions[0].output_types] == [(3,), (3,), (3,), (3,)]  # h * w, h


def test_only_what_flows_has_a_cotangent():
    """A float carry that depends on no operand with a gradient stays out of the backward scan."""
    body = build("b", lambda h, t, x: [h * x * emit("cos", t), t + 0.1], f64(3), f64(), f64(3))

    def loop(h, x):
        return emit("scan", h, emit("constant", value=np.zeros(())), x, regions=(body,), n_carry=2, n_xs=1,
                    length=4)[0]

    check(loop, normal(3), normal(4, 3))
    gradient = vjp_graph(graph_of(loop, normal(3), normal(4, 3)), [0, 1])
    assert [n.attrs["n_carry"] for n in gradient.nodes if n.op.name == "scan"][-1] == 1


def test_scan_without_carries():
    body = build("b", lambda x, w: [emit("sin", x) * w], f64(3), f64(3))
    check(lambda x, w: emit("scan", x, w, regions=(body,), n_carry=0, n_xs=1, length=4), normal(4, 3), normal(3))


def test_scan_in_scan():
    inner = build("inner", lambda a, y: [a * y], f64(2), f64(2))

    def outer(h, x):
        return [emit("scan", h, x, regions=(inner,), n_carry=1, n_xs=1, length=3)]

    body = build("outer", outer, f64(2), f64(3, 2))
    check(lambda h, x: emit("scan", h, x, regions=(body,), n_carry=1, n_xs=1, length=2), normal(2), normal(2, 3, 2))


def test_while_loop_says_to_use_scan():
    cond = build("c", lambda x: emit("lt", emit("reduce_sum", x, axes=(0,)), _number(10.0)), f64(3))
    body = build("b", lambda x: [x * 2.0], f64(3))
    with pytest.raises(GradientError, match="while_loop has no gradient.*use scan") as error:
        vjp_graph(graph_of(lambda x: emit("while_loop", x, regions=(cond, body), n_carry=1), normal(3)), [0])
    assert "test_control_rules.py" in str(error.value)


def _number(x):
    return emit("constant", value=np.asarray(x))


def test_the_forward_scan_runs_once_in_a_compiled_gradient():
    """Merged and swept: one scan forward, one backward, and only what the backward steps read is stacked."""
    def body(h, x, w):
        out = emit("tanh", emit("matmul", h, w) + x)
        return [out, out]
    rnn = build("rnn", body, f64(2, 3), f64(2, 3), f64(3, 3))

    def loss(h, x, w):
        _, ys = emit("scan", h, x, w, regions=(rnn,), n_carry=1, n_xs=1, length=4)
        return [emit("reduce_sum", ys * ys, axes=(0, 1, 2))]
    arrays = normal(2, 3), normal(4, 2, 3), normal(3, 3)
    graph = grad_graph(graph_of(loss, *arrays), [0, 1, 2])
    result = graph
    for p in (merge, merge_scans, simplify, sweep):
        result = p(result).graph
        verify(result)
    forward, backward = (n for n in result.nodes if n.op.name == "scan")
    assert not forward.attrs["reverse"] and backward.attrs["reverse"]
    assert [n.op.name for n in forward.regions[0].nodes] == ["matmul", "add", "tanh"]
    assert len(forward.regions[0].outputs) == 3  # the carry, the output, the carry before the step
    for a, b in zip(run(graph, arrays), run(result, arrays)):
        np.testing.assert_allclose(a, b)
