"""The walk itself: what it refuses, what it skips; whole-graph gradients, forward mode, recomputation."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import check, graph_of

from treadle.autodiff.forward import jvp_graph
from treadle.autodiff.remat import remat
from treadle.autodiff.reverse import backward, grad_graph, vjp_graph
from treadle.ir.builder import GraphBuilder, build, emit
from treadle.ir.dce import sweep
from treadle.ir.dims import Dim
from treadle.ir.errors import GradientError, MissingRuleError
from treadle.ir.interp import run
from treadle.ir.opdef import OpDef, fill, register, unregister
from treadle.ir.passes import FINISH, TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

rng = np.random.default_rng(6)


def f64(*shape):
    return TensorType(shape, "float64")


def mlp(x, w, v, labels):
    hidden = emit("tanh", emit("matmul", x, w))
    loss = emit("cross_entropy", emit("matmul", hidden, v), labels)
    return [emit("reduce_mean", loss, axes=(0,))]


ARRAYS = (rng.standard_normal((4, 3)), rng.standard_normal((3, 5)), rng.standard_normal((5, 2)), np.array([0, 1, 1, 0]))


def test_a_whole_model():
    check(mlp, *ARRAYS)


def test_grad_graph_keeps_outputs_roles_and_aliases():
    with GraphBuilder("f") as b:
        x, w = b.input(f64(2), "x"), b.input(f64(2), "w", role="parameter")
        b.output(emit("reduce_sum", x * w, axes=(0,)))
        b.output(w + 1.0, alias=w)
    graph = grad_graph(b.graph, [1])
    verify(graph)
    assert graph.roles == ["data", "parameter"] and graph.aliases == {1: 1}
    loss, _, gradient = run(graph, [np.array([1.0, 2.0]), np.array([3.0, 4.0])])
    assert loss == 11.0 and gradient.tolist() == [1.0, 2.0]
    (only,) = run(grad_graph(b.graph, [1], keep_outputs=False), [np.array([1.0, 2.0]), np.array([3.0, 4.0])])
    assert only.tolist() == [1.0, 2.0]


def test_no_dependence_is_none_for_backward_and_zeros_for_graphs():
    def f(x, y):
        assert backward([x * 2.0], [x], [y]) == [None]
        return [x]
    build("f", f, f64(2), f64(2))
    graph = vjp_graph(build("f", lambda x, y: [x], f64(2), f64(3)), [1])
    (gradient,) = run(graph, [np.ones(2), np.ones(3), np.ones(2)])
    assert gradient.tolist() == [0.0, 0.0, 0.0]


def test_by_a_value_on_the_way_and_by_what_it_comes_from():
    def f(x):
        y = emit("sin", x)
        return [g for g in backward([y * y], [emit("exp", x)], [y, x]) if g is not None]
    x = np.array([0.3, 1.0])
    by_y, by_x = run(build("f", f, f64(2)), [x])
    np.testing.assert_allclose(by_y, 2 * np.sin(x) * np.exp(x))
    np.testing.assert_allclose(by_x, by_y * np.cos(x))


def test_stop_gradient_and_steps_are_not_walked():
    graph = vjp_graph(build("f", lambda x: [emit("stop_gradient", emit("exp", x)) * x + emit("floor", x)], f64(2)), [0])
    (gradient,) = run(graph, [np.array([1.0, 2.0]), np.ones(2)])
    np.testing.assert_allclose(gradient, np.exp([1.0, 2.0]))
    assert [n.op.name for n in graph.nodes].count("mul") == 2, "nothing is emitted for exp, floor and what is before"


def test_only_what_is_needed_is_computed():
    graph = vjp_graph(build("f", lambda x, w: [emit("matmul", x, w)], f64(2, 3), f64(3, 4)), [1])
    assert [n.op.name for n in graph.nodes] == ["matmul", "matmul"]


@pytest.mark.parametrize("request_, message", [
    (lambda x, i: backward([i], [i], [x]), "int64 is not a floating dtype"),
    (lambda x, i: backward([x], [x], [i]), "int64 is not a floating dtype"),
    (lambda x, i: backward([x], [emit("reduce_sum", x, axes=(0,))], [x]), "does not fit its output"),
    (lambda x, i: backward([x], [], [x]), "need as many cotangents"),
])
def test_nonsense_is_refused(request_, message):
    with pytest.raises(GradientError, match=message):
        build("f", lambda x, i: request_(x, i) and [x], f64(3), TensorType((3,), "int64"))


def test_a_gradient_of_a_tensor_is_refused():
    with pytest.raises(GradientError, match="(?s)only a scalar has one.*test_transforms"):
        grad_graph(build("f", lambda x: [x * 2.0], f64(3)), [0])


@pytest.fixture
def plugin():
    register(OpDef("odd_op", ("x",), lambda x: x, lambda x: x))
    yield
    unregister("odd_op")


def test_a_missing_rule_names_op_and_line(plugin):
    with pytest.raises(MissingRuleError, match="differentiate the op 'odd_op'") as error:
        vjp_graph(build("f", lambda x: [emit("odd_op", x)], f64(3)), [0])
    assert "test_transforms.py" in str(error.value)


@pytest.mark.parametrize("rule, message", [
    (lambda node, cts, needed: [], "gave 0 cotangents for 1 operands"),
    (lambda node, cts, needed: [emit("cast", cts[0], dtype=TensorType((), "float32").dtype)], "gave a cotangent f32"),
    (lambda node, cts, needed: [emit("reshape", emit("concat", cts[0], cts[0], axis=0), shape=(3, 2))], "does not fit"),
])
def test_a_wrong_rule_is_named(plugin, rule, message):
    fill("vjp", "odd_op", rule)
    with pytest.raises(GradientError, match=message):
        vjp_graph(build("f", lambda x: [emit("odd_op", x)], f64(3)), [0])


def test_symbolic_sizes():
    n = Dim("n")
    graph = build("f", lambda x, w: [emit("reduce_mean", emit("tanh", emit("matmul", x, w)), axes=(0, 1))],
                  f64(n, 3), f64(3, 2))
    gradient = grad_graph(graph, [0, 1])
    verify(gradient)
    x, w = rng.standard_normal((5, 3)), rng.standard_normal((3, 2))
    _, dx, dw = run(gradient, [x, w])
    slope = (1 - np.tanh(x @ w) ** 2) / 10
    np.testing.assert_allclose(dx, slope @ w.T)
    np.testing.assert_allclose(dw, x.T @ slope)


def test_forward_mode():
    graph = graph_of(lambda x, y: [emit("sin", x) * y, emit("cast", x, dtype=TensorType((), "int32").dtype), x - y],
                     np.ones(3), np.ones(3))
    pushed = jvp_graph(graph, [0, 1])
    verify(pushed)
    x, y, tx, ty = rng.standard_normal((4, 3))
    *_, first, second = run(pushed, [x, y, tx, ty])
    np.testing.assert_allclose(first, np.cos(x) * y * tx + np.sin(x) * ty)
    np.testing.assert_allclose(second, tx - ty)
    swept = sweep(pushed).graph
    assert len(swept.nodes) < len(pushed.nodes), "the pulled-back seed is dead"


def layer(x, w):
    return emit("tanh", emit("matmul", emit("sin", emit("exp", x)), w))


def test_recomputed_regions_have_the_same_gradient():
    x, w = rng.standard_normal((3, 4)), rng.standard_normal((4, 4))
    check(lambda x, w: remat(layer, [x, w])[0], x, w)
    plain = vjp_graph(graph_of(lambda x, w: layer(layer(x, w), w), x, w), [0, 1])
    again = vjp_graph(graph_of(lambda x, w: remat(layer, [remat(layer, [x, w])[0], w])[0], x, w), [0, 1])
    ct = rng.standard_normal((3, 4))
    for a, b in zip(run(plain, [x, w, ct]), run(again, [x, w, ct])):
        np.testing.assert_allclose(a, b)


def test_a_recomputation_is_not_merged_with_the_first_run():
    x, w = rng.standard_normal((3, 4)), rng.standard_normal((4, 4))
    graph = grad_graph(graph_of(lambda x, w: emit("reduce_sum", remat(layer, [x, w])[0], axes=(0, 1)), x, w), [0, 1])
    final = Pipeline([*TIDY, *TIDY, *FINISH]).run(graph)
    assert [n.op.name for n in final.nodes].count("exp") == 2
    assert "barrier" not in {n.op.name for n in final.nodes}
