"""What a user adds from outside the package: an op, a layer, an optimizer, a loss."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as td
from treadle.frontend import plugins

from .tools import assert_close, both, traced

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


@pytest.fixture
def swish():
    yield plugins.register_op(
        "user_swish",
        "x",
        infer=lambda x, beta: x,
        reference=lambda x, beta: x / (1 + np.exp(-beta * x)),
        vjp=lambda ct, out, x, beta: ct * (beta * out + td.sigmoid(beta * x) * (1 - beta * out)),
        decompose=lambda x, beta: x * td.sigmoid(beta * x),
        attrs={"beta": 1.0},
        traits=["elementwise"],
        doc="x * sigmoid(beta * x).",
    )
    plugins.unregister_op("user_swish")


def test_an_op(swish):
    expected = X / (1 + np.exp(-2 * X))
    assert_close(both(lambda x: swish(x, beta=2.0), X), expected, 1e-5)
    reference = td.grad(lambda x: (x * td.sigmoid(2 * x) * x).sum())
    gradient = td.grad(lambda x: (swish(x, beta=2.0) * x).sum())
    assert_close(gradient(X), reference(X), 1e-5)
    assert_close(traced(gradient, X), reference(X), 1e-5)
    second = td.grad(lambda x: (gradient(x) ** 2).sum())
    assert_close(
        second(X.astype(np.float64)), td.grad(lambda x: (reference(x) ** 2).sum())(X.astype(np.float64)), 1e-9
    )
    assert_close(td.compile(lambda x: swish(x, beta=2.0) + 1)(X), expected + 1, 1e-5)
    assert_close(td.compile(gradient)(X), reference(X), 1e-5)
    graph = td.trace(swish, X)
    assert "user_swish(%x0)" in str(graph) or "user_swish" in str(graph)
    assert td.ir.parse(str(graph)) == graph and swish.__doc__ == "x * sigmoid(beta * x)."
    with pytest.raises(td.TreadleError, match="no attribute gamma"):
        swish(X, gamma=1.0)
    with pytest.raises(td.TreadleError, match="registered already"):
        plugins.register_op("user_swish", "x", infer=lambda x: x, reference=lambda x: x)


def test_an_op_with_several_operands_and_results():
    op = plugins.register_op(
        "user_sincos",
        "x y",
        infer=lambda x, y: (x, y),
        reference=lambda x, y: (np.sin(x) * y, np.cos(x) * y),
        vjp=[
            lambda ct, out, x, y: sum(
                c * o
                for c, o in ((ct[0], out[1]), (None if ct[1] is None else -ct[1], out[0]))
                if c is not None
            ),
            None,
        ],
    )
    try:
        assert_close(td.grad(lambda x: op(x, X)[0].sum())(X), np.cos(X) * X, 1e-5)
        assert_close(td.grad(lambda x: op(x, X)[1].sum() + op(x, X)[0].sum())(X), (np.cos(X) - np.sin(X)) * X, 1e-5)
        assert (td.grad(lambda y: op(X, y)[0].sum())(X).numpy() == 0).all()
        with pytest.raises(td.TreadleError, match="user_sincos"):
            td.compile(lambda x: op(x, x)[0])(X)
    finally:
        plugins.unregister_op("user_sincos")
    with pytest.raises(td.TreadleError, match="no op that was registered"):
        plugins.unregister_op("add")


def test_an_op_without_a_gradient_says_so():
    op = plugins.register_op("user_steps", "x", infer=lambda x: x, reference=np.floor)
    try:
        with pytest.raises(td.TreadleError, match="requires a gradient|registered without a vjp"):
            op(td.tensor(X, requires_grad=True)).sum().backward()
        with pytest.raises(td.TreadleError, match="registered without a vjp"):
            td.trace(td.grad(lambda x: op(x).sum()), X)
    finally:
        plugins.unregister_op("user_steps")


class Scale(td.nn.Module):
    """A user's layer."""

    def __init__(self, size):
        super().__init__()
        self.gain = td.nn.Parameter(np.ones(size, np.float32))
        self.register_buffer("calls", td.tensor(0.0))

    def forward(self, x):
        self.calls.assign(self.calls + 1)
        return x * self.gain


class SignDescent(td.optim.Optimizer):
    """A user's optimizer: the sign of a running mean of gradients."""

    def init_parameter(self, param, options):
        return {"mean": td.zeros_like(param)}

    def update_parameter(self, param, grad, state, scalars, options):
        mean = 0.9 * state["mean"] + 0.1 * grad
        return param - scalars["lr"] * td.sign(mean), {"mean": mean}


def test_a_layer_an_optimizer_and_a_loss():
    def log_cosh(model, x, y):
        return td.log(td.cosh(model(x) - y)).mean()

    runs = []
    for compiled in (True, False):
        td.random.seed(0)
        model = td.nn.Sequential(td.nn.Linear(3, 3), Scale(3))
        opt = SignDescent(model.parameters(), lr=0.01)
        step = td.train_step(model, log_cosh, opt)
        for _ in range(3):
            if compiled:
                step(X, X * 2)
            else:
                opt.zero_grad()
                log_cosh(model, td.asarray(X), td.asarray(X * 2)).backward()
                opt.step()
        runs.append(model)
    assert_close(runs[0].state_dict(), runs[1].state_dict(), 1e-5)
    assert runs[0][1].calls.item() == 3
