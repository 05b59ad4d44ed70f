"""Channels-last convolution and pooling: the same numbers as channels first, and the same gradients."""

import numpy as np
import pytest

from treadle.autodiff.reverse import backward
from treadle.ir import ops as _ops  # noqa: F401
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.interp import run
from treadle.ir.types import TensorType

WINDOW = dict(stride=(2, 1), padding=((1, 0), (1, 1)), dilation=(1, 2))
POOL = dict(window=(3, 2), stride=(2, 1), padding=((1, 1), (0, 1)))
CASES = {
    "conv": (lambda x, **k: emit("conv", x, weight(), groups=2, **WINDOW, **k), (2, 4, 7, 6)),
    "conv_input_grad": (lambda x, **k: emit("conv_input_grad", x, weight(), input_spatial=(7, 6), groups=2, **WINDOW,
                                            **k), (2, 6, 3, 4)),
    "max_pool": (lambda x, **k: emit("max_pool", x, dilation=(1, 1), **POOL, **k)[0], (2, 3, 6, 5)),
    "avg_pool": (lambda x, **k: emit("avg_pool", x, count_include_pad=False, **POOL, **k), (2, 3, 6, 5)),
}


def weight():
    return emit("constant", value=np.random.default_rng(1).standard_normal((6, 2, 3, 3)))


def first(v):
    return emit("transpose", v, perm=(0, 3, 1, 2))


def last(v):
    return emit("transpose", v, perm=(0, 2, 3, 1))


def graph(function, shape, channels_last):
    """Value, gradient and second-order gradient of sum(y**2), in terms of a channels-first x."""
    with GraphBuilder() as b:
        x = b.input(TensorType(shape, "float64"), "x")
        y = first(function(last(x), channels_last=True)) if channels_last else function(x)
        loss = emit("reduce_sum", y * y * y, axes=(0, 1, 2, 3))
        one = emit("constant", value=np.ones(()))
        (g,) = backward([loss], [one], [x])
        (h,) = backward([emit("reduce_sum", g * g, axes=(0, 1, 2, 3))], [one], [x])
        b.output(y, g, h)
    return b.graph


@pytest.mark.parametrize("name", CASES)
def test_same_as_channels_first(name):
    function, shape = CASES[name]
    x = np.random.default_rng(0).standard_normal(shape)
    expected = run(graph(function, shape, False), [x])
    for got, want in zip(run(graph(function, shape, True), [x]), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
    assert np.abs(expected[2]).max() > 0
