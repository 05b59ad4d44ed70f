"""Accumulation over parts of a batch equals the large batch."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from treadle.autodiff.accumulate import accumulate
from treadle.autodiff.reverse import grad_graph
from treadle.ir.builder import GraphBuilder, build, emit
from treadle.ir.errors import ShapeError
from treadle.ir.interp import run
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

rng = np.random.default_rng(8)


def model(examples):
    """(x, w, counter, labels) -> loss, counter + examples (in place), logits; then the gradient of w."""
    with GraphBuilder("step") as b:
        x = b.input(TensorType((examples, 3), "float64"), "x")
        w = b.input(TensorType((3, 4), "float64"), "w", role="parameter")
        counter = b.input(TensorType((), "int64"), "counter", role="state")
        labels = b.input(TensorType((examples,), "int64"), "labels")
        logits = emit("matmul", x, w)
        b.output(emit("reduce_mean", emit("cross_entropy", logits, labels), axes=(0,)))
        b.output(counter + examples, alias=counter)
        b.output(logits)
    return grad_graph(b.graph, [1])


def test_equal_to_the_large_batch():
    small = accumulate(model(4), 3, split=[0, 3], stacked=[2])
    verify(small)
    assert small.input_types == model(12).input_types and small.output_types == model(12).output_types
    assert small.aliases == {1: 2} and small.roles == model(12).roles
    arrays = [rng.standard_normal((12, 3)), rng.standard_normal((3, 4)), np.array(5), rng.integers(0, 4, 12)]
    for a, b in zip(run(small, arrays), run(model(12), arrays)):
        np.testing.assert_allclose(a, b)


def test_narrow_results_are_summed_in_f32():
    graph = build("g", lambda x: [emit("reduce_sum", x, axes=(0, 1))], TensorType((1, 1), "bfloat16"))
    ones = np.ones((300, 1), ml_dtypes.bfloat16)
    assert run(accumulate(graph, 300, split=[0]), [ones])[0] == 1.0  # in bfloat16 the sum stops at 256


def test_bad_requests():
    graph = build("g", lambda x, y: [x * y], TensorType((2,), "float32"), TensorType((), "float32"))
    with pytest.raises(ShapeError, match="no axis of examples"):
        accumulate(graph, 2, split=[1])
    with pytest.raises(ShapeError, match="1 or more"):
        accumulate(graph, 0, split=[0])
