"""Mixed precision: what is cast, what is not, and that the numbers stay close."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import graph_of

from treadle.autodiff.amp import KEEP_ACCUMULATORS, mixed_precision
from treadle.autodiff.remat import remat
from treadle.autodiff.reverse import grad_graph
from treadle.ir.builder import GraphBuilder, build, copy_into, emit
from treadle.ir.dce import sweep
from treadle.ir.errors import DTypeError
from treadle.ir.interp import run
from treadle.ir.opdef import all_ops
from treadle.ir.parse import parse
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

rng = np.random.default_rng(7)


def f32(*shape):
    return TensorType(shape, "float32")


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def lines(text):
    return [line.strip() for line in str(text).strip().splitlines()]


FORWARD = """
graph main(%x: f32[8,4] data, %w: f32[4,6] parameter, %b: f32[6] parameter, %v: f32[6,3] parameter) -> (f32[8,3]) {
  %0 = matmul(%x, %w) : f32[8,6]
  %1 = add(%0, %b) : f32[8,6]
  %2 = tanh(%1) : f32[8,6]
  %3 = matmul(%2, %v) : f32[8,3]
  %4 = softmax(%3) {axis=1} : f32[8,3]
  return %4
}"""
CONVERTED = """
graph main(%x: f32[8,4] data, %w: f32[4,6] parameter, %b: f32[6] parameter, %v: f32[6,3] parameter) -> (f32[8,3]) {
  %0 = cast(%x) {dtype=dtype bf16} : bf16[8,4]
  %1 = cast(%w) {dtype=dtype bf16} : bf16[4,6]
  %2 = matmul(%0, %1) : bf16[8,6]
  %3 = cast(%b) {dtype=dtype bf16} : bf16[6]
  %4 = add(%2, %3) : bf16[8,6]
  %5 = tanh(%4) : bf16[8,6]
  %6 = cast(%v) {dtype=dtype bf16} : bf16[6,3]
  %7 = matmul(%5, %6) {out_dtype=dtype f32} : f32[8,3]
  %8 = softmax(%7) {axis=1} : f32[8,3]
  return %8
}"""


def test_golden():
    result = mixed_precision(parse(FORWARD))
    verify(result.graph)
    assert lines(result.graph) == lines(CONVERTED)
    assert [(d.op, str(d.dtype)) for d in result.stats["decisions"]] == [
        ("matmul", "bfloat16"), ("add", "bfloat16"), ("tanh", "bfloat16"), ("matmul", "bfloat16"),
        ("softmax", "float32")]
    assert "its data is narrow" in str(result.stats["decisions"][1])


def test_every_op_has_a_class():
    missing = [name for name, record in all_ops().items() if "amp" not in record.slots]
    assert not missing


def training_step():
    """SGD with momentum on a two-layer net, parameters and momenta updated in place."""
    def loss_of(x, w, v, labels):
        hidden = emit("tanh", emit("matmul", x, w))
        return [emit("reduce_mean", emit("cross_entropy", emit("matmul", hidden, v), labels), axes=(0,))]
    forward = build("loss", loss_of, f32(16, 8), f32(8, 12), f32(12, 4), TensorType((16,), "int64"))
    gradient = grad_graph(forward, [1, 2])
    with GraphBuilder("step") as b:
        x, labels = b.input(f32(16, 8), "x"), b.input(TensorType((16,), "int64"), "labels")
        params = [b.input(f32(8, 12), "w", role="parameter"), b.input(f32(12, 4), "v", role="parameter")]
        momenta = [b.input(p.type, f"m_{p.name}", role="state") for p in params]
        loss, *grads = copy_into(gradient, [x, *params, labels])
        b.output(loss)
        for p, m, g in zip(params, momenta, grads):
            updated = m * 0.9 + g
            b.output(p - updated * 0.1, alias=p)
            b.output(updated, alias=m)
    return b.graph


def test_a_whole_training_step_updates_masters_in_f32():
    graph = training_step()
    result = mixed_precision(graph)
    verify(result.graph)
    assert result.graph.aliases == graph.aliases and result.graph.output_types == graph.output_types
    contractions = [n for n in result.graph.nodes if n.op.name == "matmul"]
    assert all(n.operands[0].dtype == n.operands[1].dtype == "bfloat16" for n in contractions)
    decisions = result.stats["decisions"]
    assert all(d.dtype == "float32" for d in decisions if d.reason == "no contraction comes after")
    for i in (1, 3):  # the weight gradients come from the accumulators, unrounded
        producer = result.graph.outputs[i + 1].producer
        assert producer.operands[1].producer.op.name == "matmul" and producer.operands[1].dtype == "float32"
    arrays = [normal(16, 8), rng.integers(0, 4, 16), normal(8, 12) / 3, normal(12, 4) / 3, normal(8, 12), normal(12, 4)]
    for a, b in zip(run(graph, arrays), run(result.graph, arrays)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.01)


def test_before_differentiation_gradients_of_masters_are_f32():
    graph = mixed_precision(parse(FORWARD)).graph
    with GraphBuilder("loss") as b:
        inputs = [b.input(v.type, v.name) for v in graph.inputs]
        b.output(emit("reduce_sum", emit("square", copy_into(graph, inputs)[0]), axes=(0, 1)))
    gradient = grad_graph(b.graph, [1, 2, 3])
    verify(gradient)
    assert all(t.dtype == "float32" for t in gradient.output_types)
    narrow = [n for n in gradient.nodes if n.op.name == "matmul" and n.result.dtype == "bfloat16"]
    wider = KEEP_ACCUMULATORS.run(gradient).graph
    verify(wider)
    assert len(narrow) - len([n for n in wider.nodes if n.op.name == "matmul" and n.result.dtype == "bfloat16"]) == 2
    assert wider.outputs[1].producer.op.name == "matmul"


def test_residual_streams_and_accumulations_stay_wide():
    def block(x, w):
        return [emit("matmul", emit("layer_norm", x + emit("matmul", x, w), emit("reduce_sum", w, axes=(0,)),
                                    emit("reduce_sum", w, axes=(1,))), w)]
    result = mixed_precision(build("f", block, f32(4, 4), f32(4, 4)))
    chosen = {d.op: str(d.dtype) for d in result.stats["decisions"]}
    assert chosen == {"matmul": "bfloat16", "add": "float32", "layer_norm": "float32", "reduce_sum": "float32"}


def test_constants_and_integers_go_along():
    def f(x, w, i):
        y = emit("matmul", x, w) * 0.5
        y = emit("where", emit("gt", y, emit("constant", value=np.zeros((), np.float32))), y, y * 0.1)
        return [emit("matmul", emit("take", y, i, axis=0), w)]
    graph = build("f", f, f32(4, 4), f32(4, 4), TensorType((3,), "int64"))
    result = mixed_precision(graph)
    verify(result.graph)
    narrow = {d.op for d in result.stats["decisions"] if d.dtype == "bfloat16"}
    assert narrow == {"matmul", "mul", "gt", "where", "take"}


def test_inside_regions_and_across_their_borders():
    def body(h, x, w):
        out = emit("tanh", emit("matmul", h, w) + emit("matmul", x, w))
        return [out, out]
    rnn = build("rnn", body, f32(2, 4), f32(2, 4), f32(4, 4))

    def f(h, x, w):
        _, ys = emit("scan", h, x, w, regions=(rnn,), n_carry=1, n_xs=1, length=3)
        (again,) = remat(lambda y, w: emit("tanh", emit("matmul", y, w)), [ys, w])
        return [emit("matmul", again, w)]
    graph = build("f", f, f32(2, 4), f32(3, 2, 4), f32(4, 4))
    result = mixed_precision(graph)
    verify(result.graph)
    scan = next(n for n in result.graph.nodes if n.op.name == "scan")
    assert [str(v.dtype) for v in scan.operands] == ["float32", "bfloat16", "bfloat16"], "casts are outside the loop"
    checkpoint = next(n for n in result.graph.nodes if n.op.name == "remat")
    assert [str(v.dtype) for v in checkpoint.operands] == ["bfloat16", "bfloat16"]
    arrays = [normal(2, 4), normal(3, 2, 4), normal(4, 4) / 2]
    np.testing.assert_allclose(run(graph, arrays)[0], run(result.graph, arrays)[0], rtol=0.05, atol=0.05)


def test_other_dtypes_are_left_alone():
    for dtype in ("float64", "bfloat16"):
        t = TensorType((3, 3), dtype)
        assert not mixed_precision(build("f", lambda x: [emit("matmul", x, x)], t)).changed
    with pytest.raises(DTypeError, match="expected 'bfloat16' or 'float16'"):
        mixed_precision(parse(FORWARD), "float32")


def test_float16():
    result = mixed_precision(parse(FORWARD), "float16").graph
    verify(result)
    arrays = [normal(8, 4), normal(4, 6), normal(6), normal(6, 3)]
    np.testing.assert_allclose(run(result, arrays)[0], run(parse(FORWARD), arrays)[0], rtol=0.01, atol=0.01)


def test_dead_casts_are_swept():
    graph = mixed_precision(training_step()).graph
    assert len(sweep(graph).graph.nodes) >= len(graph.nodes) - 2
    assert graph_of(lambda x: [x], np.ones(3)).nodes == []
