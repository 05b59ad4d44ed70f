"""Parameters as constants: what the pass `freeze` folds, and what it leaves."""

import numpy as np
import pytest

from treadle.ir import ops as _ops  # noqa: F401
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.freeze import bind, freeze
from treadle.ir.interp import run
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

WINDOW = dict(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))


def constant(*shape, seed=0):
    return emit("constant", value=np.random.default_rng(seed).standard_normal(shape) + 0.5)


def frozen(graph, *arrays, tol=1e-12):
    """The frozen graph, once it has given the same numbers."""
    result = freeze(graph).graph
    verify(result)
    for got, want in zip(run(result, arrays), run(graph, arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol)
    return [n.op.name for n in result.nodes if n.op.name != "constant"]


def norm(y, channels, axes=(-1, 1, 1)):
    """A batch norm with statistics that are known, as exporters write it."""
    scale = constant(channels, seed=1) * emit("rsqrt", emit("square", constant(channels, seed=2)) + 1e-5)
    shift = constant(channels, seed=3) - constant(channels, seed=4) * scale
    return y * emit("reshape", scale, shape=(channels, *axes[1:])) + emit("reshape", shift, shape=(channels, *axes[1:]))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_is_folded_into_the_convolution_before_it(groups):
    with GraphBuilder() as b:
        x = b.input(TensorType((2, 4, 5, 6), "float64"), "x")
        y = emit("conv", x, constant(6, 4 // groups, 3, 3), **WINDOW, groups=groups) - constant(6, 1, 1, seed=5)
        b.output(emit("relu", norm(y, 6)))
    x = np.random.default_rng(9).standard_normal((2, 4, 5, 6))
    assert frozen(b.graph, x) == ["conv", "add", "relu"]


def test_and_into_a_transposed_one_and_a_product():
    with GraphBuilder() as b:
        x = b.input(TensorType((2, 4, 5, 6), "float64"), "x")
        w = constant(4, 3, 2, 2)
        y = emit("conv_input_grad", x, w, input_spatial=(10, 12), stride=(2, 2), padding=((0, 0), (0, 0)),
                 dilation=(1, 1))
        z = emit("matmul", emit("reshape", x, shape=(2, 4, 30)), constant(7, 30), transpose_y=True)
        b.output(norm(y, 3), (constant(7) - z) * constant(7, seed=6))
    x = np.random.default_rng(9).standard_normal((2, 4, 5, 6))
    assert sorted(frozen(b.graph, x)) == ["add", "add", "conv_input_grad", "matmul", "reshape"]


def test_what_others_read_stays():
    with GraphBuilder() as b:
        x = b.input(TensorType((1, 2, 4, 4), "float64"), "x")
        y = emit("conv", x, constant(3, 2, 3, 3), **WINDOW)
        b.output(y * constant(3, 1, 1), emit("exp", y))
    x = np.random.default_rng(9).standard_normal((1, 2, 4, 4))
    assert frozen(b.graph, x) == ["conv", "mul", "exp"]


def test_constants_that_would_grow_stay_small():
    with GraphBuilder() as b:
        x = b.input(TensorType((400, 500), "float64"), "x")
        b.output(x + constant(400, 1) * constant(1, 500, seed=1))
    assert frozen(b.graph, np.ones((400, 500))) == ["mul", "add"]


def test_divisions_by_constants():
    with GraphBuilder() as b:
        x = b.input(TensorType((3,), "float32"), "x")
        zero = emit("constant", value=np.array([1, 0, 2], np.float32))
        b.output(x / 6.0, x / zero)
    with np.errstate(divide="ignore"):
        assert sorted(frozen(b.graph, np.ones(3, np.float32), tol=1e-6)) == ["div", "mul"]


def test_bound_inputs_leave_the_signature():
    with GraphBuilder() as b:
        x = b.input(TensorType((3,), "float64"), "x")
        w = b.input(TensorType((3,), "float64"), "w", "parameter")
        s = b.input(TensorType((3,), "float64"), "s", "state")
        b.output(x * w)
        b.output(s + 1.0, alias=s)
    graph = bind(b.graph, {1: np.arange(3.0)})
    verify(graph)
    assert [v.name for v in graph.inputs] == ["x", "s"] and graph.aliases == {1: 1}
    np.testing.assert_array_equal(run(graph, [np.ones(3), np.zeros(3)])[0], np.arange(3.0))
