"""The channels-last pass: same numbers, and transpositions only where they must stay."""

import numpy as np

from treadle.ir import ops as _ops  # noqa: F401
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dce import sweep
from treadle.ir.interp import run
from treadle.ir.types import TensorType
from treadle.ir.verify import verify
from treadle.schedules.layout import channels_last

WINDOW = dict(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))


def net():
    """conv, batch-norm-like statistics, per-channel scale, relu, pool, residual, concat, pad, flatten."""
    rng = np.random.default_rng(0)
    with GraphBuilder("net") as b:
        x = b.input(TensorType((2, 3, 8, 6), "float64"), "x")
        w = emit("constant", value=rng.standard_normal((4, 3, 3, 3)))
        v = emit("constant", value=rng.standard_normal((4, 4, 3, 3)))
        scale = emit("constant", value=rng.standard_normal((4, 1, 1)))
        y = emit("conv", x, w, **WINDOW)
        mean = emit("reduce_mean", y, axes=(0, 2, 3), keepdims=True)
        y = emit("maximum", (y - mean) * scale + 0.5, emit("constant", value=np.zeros(())))
        z = emit("conv", y, v, **WINDOW) + y
        z = emit("concat", z, emit("reverse", z, axes=(3,)), axis=1)
        z = emit("pad", z, low=(0, 0, 1, 0), high=(0, 0, 0, 1), interior=(0, 0, 0, 0), value=1.0)
        z = emit("slice", z, starts=(0, 1, 0, 1), limits=(2, 8, 9, 7), strides=(1, 2, 1, 1))
        p, _ = emit("max_pool", z, window=(2, 2), stride=(2, 2), padding=((0, 0), (0, 0)), dilation=(1, 1))
        b.output(emit("reshape", p, shape=(2, 4 * 4 * 3)), emit("reduce_sum", p, axes=(0, 2, 3), keepdims=False),
                 emit("reduce_sum", p, axes=(0,), keepdims=False))
    return b.graph


def test_same_numbers_and_few_transpositions():
    graph = net()
    result = channels_last(graph)
    verify(result.graph)
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 6))
    for got, want in zip(run(result.graph, [x]), run(graph, [x]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    ops = [n.op.name for n in result.graph.nodes]
    assert ops.count("transpose") == 2, str(result.graph)  # the input, and the pooled maps that are flattened
    assert all(n.attrs["channels_last"] for n in result.graph.nodes if n.op.name in ("conv", "max_pool"))


def test_a_graph_without_images_stays_the_same_object():
    with GraphBuilder() as b:
        x = b.input(TensorType((2, 3, 8), "float32"), "x")
        b.output(x + 1.0)
    assert not channels_last(b.graph).changed and channels_last(b.graph).graph is b.graph


def test_channels_stay_last_through_a_reshape_of_the_spatial_axes():
    with GraphBuilder() as b:
        x = b.input(TensorType((1, 6, 4), "float32"), "x")
        w = emit("constant", value=np.ones((5, 4, 3, 1), np.float32))
        image = emit("transpose", emit("reshape", x, shape=(1, 6, 4, 1)), perm=(0, 2, 1, 3))
        y = emit("conv", image, w, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
        b.output(emit("reduce_max", emit("reshape", y, shape=(1, 5, 4)) + 1.0, axes=(2,), keepdims=False))
    result = channels_last(b.graph)
    verify(result.graph)
    x = np.random.default_rng(1).standard_normal((1, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(run(result.graph, [x])[0], run(b.graph, [x])[0], rtol=1e-5)
    assert not any(n.op.name == "transpose" for n in sweep(result.graph).graph.nodes), str(result.graph)
