"""Gradients at kinks and ties: torch's conventions, as numbers that hold always and as a live comparison."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import graph_of

from treadle.autodiff.reverse import vjp_graph
from treadle.ir.context import emit
from treadle.ir.interp import run


def constant(x):
    return emit("constant", value=np.asarray(x, np.float64))


# name -> (function of values, the same in torch, inputs, gradients for a cotangent of ones)
CONVENTIONS = {
    "maximum": (lambda x, y: emit("maximum", x, y), lambda t, x, y: t.maximum(x, y),
                ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), ([0, 0.5, 1], [1, 0.5, 0])),
    "minimum": (lambda x, y: emit("minimum", x, y), lambda t, x, y: t.minimum(x, y),
                ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), ([1, 0.5, 0], [0, 0.5, 1])),
    "abs": (lambda x: emit("abs", x), lambda t, x: x.abs(), ([-1.0, 0.0, 2.0],), ([-1, 0, 1],)),
    "sign": (lambda x: emit("sign", x) + x * 0.0, lambda t, x: x.sign() + x * 0, ([-1.0, 0.0],), ([0, 0],)),
    "clip": (lambda x: emit("clip", x, lo=-1.0, hi=1.0), lambda t, x: x.clamp(-1, 1),
             ([-2.0, -1.0, 0.0, 1.0, 3.0],), ([0, 1, 1, 1, 0],)),
    "relu": (lambda x: emit("where", emit("le", x, constant(0)), constant(0), x), lambda t, x: x.relu(),
             ([-1.0, 0.0, 2.0],), ([0, 0, 1],)),
    "reduce_max": (lambda x: emit("reduce_max", x, axes=(0,)), lambda t, x: x.amax(0),
                   ([1.0, 3.0, 3.0, 2.0],), ([0, 0.5, 0.5, 0],)),
    "reduce_min": (lambda x: emit("reduce_min", x, axes=(0,)), lambda t, x: x.amin(0),
                   ([1.0, 3.0, 1.0, 2.0],), ([0.5, 0, 0.5, 0],)),
    "pow": (lambda x, y: emit("pow", x, y), lambda t, x, y: x ** y,
            ([0.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 1.0]), ([0, 0, 0, 1], [0, 0, np.log(2), 0])),
    "sqrt": (lambda x: emit("sqrt", x), lambda t, x: x.sqrt(), ([0.0, 4.0],), ([np.inf, 0.25],)),
    "remainder": (lambda x, y: emit("remainder", x, y), lambda t, x, y: t.remainder(x, y),
                  ([5.0, -5.0], [3.0, 3.0]), ([1, 1], [-1, 2])),
    "fmod": (lambda x, y: emit("fmod", x, y), lambda t, x, y: t.fmod(x, y),
             ([5.0, -5.0], [3.0, 3.0]), ([1, 1], [-1, 1])),
    "floor": (lambda x: emit("floor", x) + x * 0.0, lambda t, x: x.floor() + x * 0, ([0.5, 1.0],), ([0, 0],)),
    "reduce_prod": (lambda x: emit("reduce_prod", x, axes=(0,)), lambda t, x: x.prod(0),
                    ([2.0, 0.0, 3.0],), ([0, 6, 0],)),
    "logsumexp": (lambda x: emit("logsumexp", x, axes=(1,)), lambda t, x: x.logsumexp(1),
                  ([[-np.inf, 0.0], [0.0, 0.0]],), ([[0, 1], [0.5, 0.5]],)),
    "cumprod": (lambda x: emit("cumprod", x, axis=0), lambda t, x: x.cumprod(0),
                ([2.0, 0.0, 3.0, 0.0],), ([1, 8, 0, 0],)),
    "max_pool": (lambda x: emit("max_pool", x, window=(2,), stride=(2,), padding=((0, 0),), dilation=(1,))[0],
                 lambda t, x: t.nn.functional.max_pool1d(x, 2), ([[[1.0, 1.0, 2.0, 3.0]]],), ([[[1, 0, 0, 1]]],)),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_recorded(name):
    fn, _, inputs, expected = CONVENTIONS[name]
    arrays = [np.asarray(a, np.float64) for a in inputs]
    graph = graph_of(fn, *arrays)
    found = run(vjp_graph(graph, range(len(arrays))), [*arrays, np.ones(graph.outputs[0].shape)])
    for f, e in zip(found, expected):
        np.testing.assert_allclose(f, e, rtol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONVENTIONS)
def test_torch_does_the_same(name):
    torch = pytest.importorskip("torch")
    _, fn, inputs, expected = CONVENTIONS[name]
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in inputs]
    fn(torch, *tensors).sum().backward()
    for t, e in zip(tensors, expected):
        np.testing.assert_allclose(t.grad.numpy(), e, rtol=1e-12)
