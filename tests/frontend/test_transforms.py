"""Gradients: of functions, of records, nested, eager and traced."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as td

from .tools import assert_close, both, traced

X = np.linspace(-1.03, 1.61, 6).reshape(2, 3)


def slope(fn, x, direction, eps=1e-6):
    """The derivative of a scalar function along a direction, by central differences."""
    return (fn(td.asarray(x + eps * direction)) - fn(td.asarray(x - eps * direction))).item() / (2 * eps)


FUNCTIONS = [
    lambda x: (td.sin(x) * x**3).sum(),
    lambda x: td.logsumexp(x @ x.T),
    lambda x: td.softmax(x, 0)[1].prod(),
    lambda x: td.einsum("ij,kj,k->", x, x, x[:, 0]),
    lambda x: td.norm(x, 3) + td.std(x, correction=1),
    lambda x: td.median(x) ** 2,
    lambda x: td.where(x > 0, td.log(1 + abs(x)), td.tanh(x)).mean(),
    lambda x: (td.cumsum(x, 1) * td.sort(x, 0)).sum(),
    lambda x: td.max(x * td.roll(x, 1, 1)),
    lambda x: td.clip(x, -0.5, 0.9).sum() * x[0, 0],
    lambda x: td.pad(x, 1, "reflect").var(),
    lambda x: td.scan(lambda h, row: (td.tanh(h + row), h * row), td.zeros(3, "float64"), x)[1].sum(),
    lambda x: td.cond(x.sum() > 0, lambda y: td.exp(y).sum(), lambda y: (y * y).sum(), x),
]


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_first_and_second_order(fn):
    d = np.random.default_rng(0).normal(size=X.shape)
    gradient = both(td.grad(fn), X)
    np.testing.assert_allclose((gradient.numpy() * d).sum(), slope(fn, X, d), rtol=1e-6, atol=1e-8)

    def second(x):
        return (td.grad(fn)(x) * d).sum()

    hessian = both(td.grad(second), X)
    np.testing.assert_allclose((hessian.numpy() * d).sum(), slope(second, X, d), rtol=1e-5, atol=1e-6)


def test_third_order_and_mixed():
    x = td.tensor(0.7, "float64")
    third = td.grad(td.grad(td.grad(lambda x: td.sin(x) * x)))
    expected = -3 * np.sin(0.7) - 0.7 * np.cos(0.7)
    assert abs(third(x).item() - expected) < 1e-12
    assert abs(traced(third, np.asarray(0.7)).item() - expected) < 1e-12
    mixed = td.grad(lambda x: td.grad(lambda y: x * x * td.sin(y))(x * 1.0))  # d/dx [x^2 cos(x)]
    assert abs(mixed(x).item() - (2 * 0.7 * np.cos(0.7) - 0.49 * np.sin(0.7))) < 1e-12


def test_arguments_results_and_aux():
    params = {"w": td.asarray(X), "b": [td.zeros(3, "float64")]}

    def loss(params, x, scale=1.0):
        y = x @ params["w"] + params["b"][0]
        return (y * y).sum() * scale, {"y": y}

    (value, aux), grads = td.value_and_grad(loss, has_aux=True)(params, np.ones((4, 2)), scale=0.5)
    assert value.shape == () and aux["y"].shape == (4, 3) and not value.requires_grad
    assert_close(grads["b"][0], aux["y"].numpy().sum(0))
    assert_close(grads["w"], np.ones((2, 4)) @ aux["y"].numpy())
    only, aux = td.grad(loss, has_aux=True)(params, np.ones((4, 2)))
    assert set(only) == {"b", "w"}
    gx, gy = td.grad(lambda x, y: (x * y).sum(), argnums=(0, 1))(X, X + 1)
    assert_close((gx, gy), (X + 1, X))
    assert_close(td.grad(lambda x, y: (x * y).sum(), argnums=-1)(X, X + 1), X)
    assert td.grad(lambda x, y: y * 1.0)(2.0, td.tensor(1.0)).item() == 0, "an argument that does not matter"
    assert_close(traced(lambda x: td.value_and_grad(lambda x: (x * x).sum())(x), X), ((X * X).sum(), 2 * X))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: td.grad(lambda x: x)(X), r"shape \(2, 3\)"),
        (lambda: td.grad(lambda x: x.sum())(np.arange(3)), "floating"),
        (lambda: td.grad(lambda x: td.argmax(x))(X), "dtype int64"),
        (lambda: td.grad(lambda x: 1.0)(X), "scalar tensor"),
        (lambda: td.grad(lambda x: x.sum(), argnums=1)(X), "argnums"),
        (lambda: td.grad(lambda x: x.sum())("text"), "not a tensor"),
        (lambda: td.grad(lambda x: x.sum(), has_aux=True)(X), "pair"),
        (lambda: td.asarray(X).sum().backward(), "requires a gradient"),
        (lambda: td.tensor(X, requires_grad=True).backward(), "shape"),
        (lambda: td.jvp(td.sin, (X,), (X[0],)), "does not fit"),
        (lambda: td.jvp(td.sin, (X,), ()), "as many"),
        (lambda: td.vjp(td.sin, X)[1]((X, X)), "structure"),
        (lambda: td.tensor(X, requires_grad=True).sum().backward(td.ones(2)), "does not fit"),
        (
            lambda: td.trace(
                lambda x: td.grad(lambda y: td.while_loop(lambda s: s.sum() < 1, lambda s: s + 1, y).sum())(
                    x
                ),
                X,
            ),
            "use scan",
        ),
    ],
)
def test_what_has_no_gradient(call, words):
    with pytest.raises(td.TreadleError, match=words) as caught:
        call()
    assert "test_transforms.py" in str(caught.value)


def test_vjp_and_jvp():
    def fn(x, y):
        return td.sin(x) @ y, td.argmax(x), x.sum()

    y, ct, tx, ty = np.random.default_rng(1).normal(size=(4, 3, 2))
    tx, ct = tx.T, ct[:2]

    def pull(x, y):
        results, back = td.vjp(fn, x, y)
        return results, back((ct, np.zeros((), np.int64), np.float64(2)))

    (results, grads), expected = both(pull, X, y), (np.cos(X) * (ct @ y.T) + 2, np.sin(X).T @ ct)
    assert_close(grads, expected)
    assert_close(results[0], np.sin(X) @ y)
    (primal, tangent) = both(lambda x, y: td.jvp(fn, (x, y), (tx, ty)), X, y)
    assert_close(tangent, ((np.cos(X) * tx) @ y + np.sin(X) @ ty, np.zeros((), np.int64), np.asarray(tx.sum())))
    assert not tangent[0].requires_grad
    _, back = td.vjp(td.sin, X)
    assert_close(back(X)[0], back(X)[0])


def test_hessian_vector_product():
    def fn(x):
        return (td.exp(x) * x[:, ::-1]).sum()

    v = np.random.default_rng(2).normal(size=X.shape)
    forward = td.jvp(td.grad(fn), (X,), (v,))[1]
    reverse = td.grad(lambda x: (td.grad(fn)(x) * v).sum())(X)
    assert_close(forward, reverse, 1e-12)
    assert_close(traced(lambda x: td.jvp(td.grad(fn), (x,), (v,))[1], X), reverse, 1e-12)


def test_backward_accumulates_into_leaves():
    w, b = td.tensor(X, requires_grad=True), td.nn.Parameter(np.zeros(3))
    frozen = td.nn.Parameter(np.ones(3), requires_grad=False)
    for _ in range(2):
        loss = ((td.asarray(X.T) @ w + b) * frozen).sum()
        loss.backward()
    assert_close(w.grad, 2 * np.tile(X.sum(1, keepdims=True), (1, 3)))
    assert_close(b.grad, np.full(3, 6.0))
    assert frozen.grad is None and not w.grad.requires_grad
    (w * 2).backward(td.ones((2, 3), "float64"))
    assert_close(w.grad, 2 * np.tile(X.sum(1, keepdims=True), (1, 3)) + 2)
    with td.no_grad():
        assert not (w * 2).requires_grad and not td.is_grad_enabled()
        with td.enable_grad():
            assert (w * 2).requires_grad
    assert not td.no_grad()(lambda: w * 2)().requires_grad


def test_a_gradient_penalty_reaches_the_parameters():
    w = td.tensor(X.T.copy(), requires_grad=True)
    x = td.asarray(X)

    def penalty(w):
        return (td.grad(lambda x: td.tanh(x @ w).sum())(x) ** 2).sum()

    penalty(w).backward()
    d = np.random.default_rng(3).normal(size=w.shape)
    np.testing.assert_allclose((w.grad.numpy() * d).sum(), slope(penalty, X.T, d), rtol=1e-6)
    assert_close(traced(td.grad(penalty), X.T.copy()), w.grad, 1e-9)


def test_elements_replaced_between_forward_and_backward_are_noticed():
    w = td.nn.Parameter(X)
    loss = (w * w).sum()
    w.assign(0.0)
    with pytest.raises(td.TreadleError, match="replaced"):
        loss.backward()
    fresh = (w * w).sum()
    fresh.backward()
    assert w.grad is not None


def test_records_are_freed_with_their_tensors():
    import gc
    import weakref

    w = td.nn.Parameter(X)
    y = td.exp(w)
    node = weakref.ref(y._value.producer)
    del y
    gc.collect()
    assert node() is None


def test_checkpoint_recomputes_and_gives_the_same():
    w = td.nn.Parameter(X[:, :2].copy())
    count = td.tensor(0.0, role="state")

    def block(x, flag, scale=1.0):
        assert flag == "on"
        count.assign(count + 1)
        return {"y": td.tanh(td.sin(w @ x)) * td.random.uniform((), dtype="float64") * scale}

    def loss(x, block):
        return (block(x, "on", scale=2.0)["y"] ** 2).sum()

    td.random.seed(1)
    expected = traced(lambda x: td.grad(lambda x: loss(x, block))(x), X)
    td.random.seed(1)
    graph = td.trace(td.grad(lambda x: loss(x, td.checkpoint(block))), X)
    names = [n.op.name for n in graph.nodes]
    assert "remat" in names and "barrier" in names
    td.random.seed(1)
    assert_close(traced(td.grad(lambda x: loss(x, td.checkpoint(block))), X), expected, 1e-12)
    td.random.seed(1)
    assert_close(td.grad(lambda x: loss(x, td.checkpoint(block)))(X), expected, 1e-12)
    assert count.item() == 3
