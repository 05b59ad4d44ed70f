"""What the backward pass computes again for free: elementwise chains, not products."""

from __future__ import annotations

import numpy as np

from treadle.autodiff.budget import kernels
from treadle.autodiff.reverse import grad_graph
from treadle.autodiff.save_less import save_less
from treadle.ir.builder import build, emit
from treadle.ir.dims import Dim
from treadle.ir.interp import run
from treadle.ir.passes import FINISH, TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.types import TensorType
from treadle.ir.verify import verify


def f32(*shape):
    return TensorType(shape, "float32")


def gelu(h):
    return h * 0.5 * (1.0 + emit("tanh", (h + 0.044715 * h ** 3.0) * 0.79788456))


def loss(x, w, b, v):
    hidden = gelu(emit("matmul", x, w) + b)
    return [emit("reduce_sum", emit("square", emit("matmul", hidden, v)), axes=(0, 1))]


def test_gelu_keeps_its_input_only():
    graph = Pipeline(TIDY).run(grad_graph(build("f", loss, f32(32, 8), f32(8, 64), f32(64), f32(64, 4)), [1, 2, 3]))
    result = save_less(graph)
    verify(result.graph)
    assert result.changed and result.stats["dropped"] >= 4
    final = Pipeline(FINISH).run(result.graph)
    arithmetic = [g for g in kernels(final) if g[-1].op.has("elementwise") and g[-1].results[0].shape == (32, 64)]
    assert len(arithmetic) <= 3, "the sum with the bias, GELU, and its gradient"
    assert [n.op.name for n in final.nodes].count("matmul") == 5
    arrays = [np.random.default_rng(1).standard_normal(v.shape).astype(np.float32) for v in graph.inputs]
    for a, b in zip(run(graph, arrays), run(final, arrays)):
        np.testing.assert_array_equal(a, b)
    assert not save_less(final).changed


def test_neighbours_and_products_are_left_to_the_scheduler():
    graph = build("f", lambda x, w: [emit("matmul", emit("exp", x), w), emit("matmul", emit("sin", x), w)],
                  f32(4, 4), f32(4, 4))
    assert not save_less(graph).changed


def test_symbolic_sizes_are_left_alone():
    graph = build("f", lambda x: [emit("softmax", emit("exp", x), axis=0) + emit("exp", x)], f32(Dim("n")))
    assert not save_less(graph).changed
