"""Recomputation to a byte budget: the estimate, what is recomputed, and that answers stay the same."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as td
from treadle.autodiff.budget import budget_pass, kernels, recompute_to_fit, timeline
from treadle.autodiff.reverse import grad_graph
from treadle.ir.builder import build, emit
from treadle.ir.dims import Dim
from treadle.ir.errors import ConfigError
from treadle.ir.interp import run
from treadle.ir.passes import FINISH, TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

rng = np.random.default_rng(9)


def f32(*shape):
    return TensorType(shape, "float32")


def deep_net(depth):
    def loss(x, *weights):
        for w in weights:
            x = emit("tanh", emit("matmul", x, w)) + emit("sin", x)
        return [emit("reduce_mean", emit("square", x), axes=(0, 1))]
    forward = build("loss", loss, f32(64, 16), *[f32(16, 16)] * depth)
    return Pipeline(TIDY).run(grad_graph(forward, range(1, depth + 1)))


def test_elementwise_results_with_one_reader_are_in_its_kernel():
    def f(x, w):
        h = emit("exp", emit("neg", x))
        y = emit("matmul", h, w)
        return [emit("reduce_sum", emit("tanh", y) * y, axes=(0,)), y]
    groups = [[n.op.name for n in g] for g in kernels(build("f", f, f32(8, 8), f32(8, 8)))]
    assert groups == [["neg", "exp", "matmul"], ["tanh", "mul", "reduce_sum"]]


def test_the_estimate():
    graph = build("f", lambda x, w: [emit("matmul", emit("matmul", emit("matmul", x, w), w), w)], f32(4, 4), f32(4, 4))
    assert timeline(graph).memory == [64, 128, 128]


@pytest.mark.parametrize("share", [0.8, 0.65, 0.5])
def test_a_budget_is_kept(share):
    graph = deep_net(8)
    before = timeline(graph).peak
    result = recompute_to_fit(graph, int(share * before))
    verify(result.graph)
    assert result.changed and timeline(result.graph).peak == result.stats["peak_after"] <= share * before
    arrays = [rng.standard_normal(v.shape).astype(np.float32) / 4 for v in graph.inputs]
    for a, b in zip(run(graph, arrays), run(result.graph, arrays)):
        np.testing.assert_array_equal(a, b)


def test_cheap_values_first():
    """Values that cost no product are recomputed before those that do."""
    graph = deep_net(8)
    products = sum(n.op.name == "matmul" for n in graph.nodes)
    mild = recompute_to_fit(graph, int(0.85 * timeline(graph).peak))
    assert sum(n.op.name == "matmul" for n in mild.graph.nodes) == products
    tight = recompute_to_fit(graph, 1)
    assert sum(n.op.name == "matmul" for n in tight.graph.nodes) > products
    assert tight.stats["peak_after"] < mild.stats["peak_after"] and tight.stats["flops"] > mild.stats["flops"]


def test_enough_memory_changes_nothing():
    graph = deep_net(3)
    result = recompute_to_fit(graph, 1 << 30)
    assert not result.changed and result.graph is graph


def test_in_a_pipeline_before_erase():
    graph = deep_net(4)
    final = Pipeline([budget_pass(timeline(graph).peak // 2), *FINISH]).run(graph)
    assert len(final.nodes) > len(graph.nodes)


def test_symbolic_sizes_without_values_are_refused():
    with pytest.raises(ConfigError, match="sizes that are known"):
        recompute_to_fit(build("f", lambda x: [emit("softmax", emit("softmax", x, axis=0), axis=0)], f32(Dim("n"))), 10)


def test_with_symbolic_sizes_the_budget_is_kept_at_the_sizes_that_are_given():
    n = Dim("n")
    graph = build("f", lambda x: [emit("softmax", emit("softmax", x, axis=0), axis=0)], f32(n))
    assert timeline(graph, {"n": 10}).memory == [10 * m for m in timeline(graph, {"n": 1}).memory]
    assert recompute_to_fit(graph, 1 << 20, {"n": 10}).stats["peak_after"] == timeline(graph, {"n": 10}).peak


def test_a_training_step_with_open_sizes_keeps_its_budget_at_each_call():
    def steps(**options):
        td.random.seed(0)
        model = td.nn.Sequential(*[td.nn.Sequential(td.nn.Linear(64, 64), td.nn.GELU()) for _ in range(4)])
        step = td.train_step(model, lambda m, x: (m(x) ** 2).mean(), td.optim.SGD(model.parameters(), lr=0.1),
                             dynamic={"x": {0: "batch"}}, **options)
        used = []
        for size in (32, 256, 250, 31, 256):
            x = np.random.default_rng(size).standard_normal((size, 64), np.float32)
            arrays = [x, *(np.empty([m if isinstance(m, int) else size for m in info.shape])
                           for info in step.executable.signature.inputs[1:])] if used else None
            used.append((float(step(x).item()), step.executable, arrays))
        return step, used

    budget = 460_000
    free, without = steps()
    kept, within = steps(memory_budget=budget)
    np.testing.assert_allclose([loss for loss, *_ in without], [loss for loss, *_ in within], 1e-5)
    assert free.stats.compiles == 1 and kept.stats.compiles == 2, "one more for the larger batches, once"
    assert without[2][1].arena_bytes(without[2][2]) > budget
    assert all(executable.arena_bytes(arrays) <= budget for _, executable, arrays in within[1:])
    with pytest.raises(td.CompileError, match=r"\(at batch = 5000\); the budget is 460,000"):
        kept(np.ones((5000, 64), np.float32))
