"""Gradients of rules, where the derivative is not simply that of one op: against differences, in f64."""

import numpy as np
import one_node as n
import pytest

import treadle as td

F64 = np.float64


def wide(*shape, seed=0):
    return n.floats(*shape, seed=seed, dtype=F64)


SIZES = np.array([1, 2, 7, 9], np.int64)
COORDINATES = {"half_pixel": {}, "align_corners": {}, "asymmetric": {}, "pytorch_half_pixel": {"exclude_outside": 1}}
RESIZE = [{"mode": mode, "coordinate_transformation_mode": how, **more} for mode in ("linear", "cubic")
          for how, more in COORDINATES.items()]
SAMPLES = [{"mode": m, "padding_mode": p, "align_corners": a} for m in ("linear", "cubic") for p, a in (
    ("zeros", 0), ("border", 1), ("reflection", 0))]
H = 3
RECURRENT = {"RNN": 1, "LSTM": 4, "GRU": 3}


def check(fn, *arrays, tolerance=1e-6):
    got, want = n.directional(fn, arrays)
    assert got == pytest.approx(want, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("attrs", [*RESIZE, {"mode": "nearest"}, {"mode": "linear", "antialias": 1}])
@pytest.mark.parametrize("sizes", [SIZES, np.array([1, 2, 3, 2], np.int64)], ids=["up", "down"])
def test_resize(attrs, sizes):
    x = wide(1, 2, 4, 5)
    fn = n.module("Resize", [x, None, None, sizes], known=[3], **attrs)
    check(fn, x)


@pytest.mark.parametrize("attrs", SAMPLES)
def test_grid_sample(attrs):
    x, grid = wide(2, 3, 4, 5), np.tanh(wide(2, 3, 3, 2, seed=1)) * 1.2
    check(n.module("GridSample", [x, grid], **attrs), x, grid)


def test_roi_align():
    x, rois = wide(2, 3, 8, 8), np.array([[0.3, 0.6, 5.2, 6.1], [1.1, 0.2, 7.3, 3.9]])
    batch = np.array([0, 1], np.int64)
    fn = n.module("RoiAlign", [x, rois, batch], output_height=3, output_width=2, sampling_ratio=2)
    check(lambda x, rois: fn(x, rois, batch), x, rois)


def test_deform_conv():
    x, w, offset, b, mask = wide(1, 4, 5, 5), wide(2, 2, 3, 3), wide(1, 36, 3, 3) * 0.3, wide(2), wide(1, 18, 3, 3)
    fn = n.module("DeformConv", [x, w, offset, b, mask], group=2, offset_group=2)
    check(fn, x, w, offset, b, mask)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", RECURRENT)
def test_recurrent(op, direction):
    gates, both = RECURRENT[op], 2 if direction == "bidirectional" else 1
    x, w, r = wide(4, 2, 5), wide(both, gates * H, 5) * 0.5, wide(both, gates * H, H, seed=1) * 0.5
    b, h = wide(both, 2 * gates * H) * 0.3, wide(both, 2, H)
    lengths = np.array([4, 2], np.int32)
    fn = n.module(op, [x, w, r, b, lengths, h], outputs=2, direction=direction, hidden_size=H)
    check(lambda x, w, r, b, h: fn(x, w, r, b, lengths, h), x, w, r, b, h)


def test_lstm_with_peepholes():
    x, w, r, b, p = wide(3, 2, 4), wide(1, 12, 4), wide(1, 12, H), wide(1, 24), wide(1, 9)
    h, c = wide(1, 2, H), wide(1, 2, H, seed=3)
    fn = n.module("LSTM", [x, w, r, b, None, h, c, p], outputs=3, hidden_size=H)
    check(fn, x, w, r, b, h, c, p)


def test_gru_linear_before_reset():
    x, w, r, b = wide(3, 2, 4), wide(1, 9, 4), wide(1, 9, H), wide(1, 18)
    check(n.module("GRU", [x, w, r, b], outputs=2, hidden_size=H, linear_before_reset=1), x, w, r, b)


@pytest.mark.parametrize("attrs", [{}, {"is_causal": 1}, {"softcap": 2.0}])
def test_attention(attrs):
    q, k, v, mask = wide(2, 4, 3, 8), wide(2, 2, 5, 8), wide(2, 2, 5, 6), wide(2, 4, 3, 5)
    check(n.module("Attention", [q, k, v, mask], opset=23, **attrs), q, k, v, mask)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min", "none"])
def test_scatter(reduction):
    x, updates = wide(5, 3), wide(4, 3, seed=2)
    indices = np.array([[0], [2], [0], [4]], np.int64) if reduction != "none" else np.array([[0], [2], [1], [4]])
    fn = n.module("ScatterND", [x, indices, updates], reduction=reduction)
    check(lambda x, u: fn(x, indices, u), x, updates)


@pytest.mark.parametrize("op, shape, attrs", [
    ("LRN", (1, 6, 3, 3), {"size": 3}), ("LpNormalization", (3, 4), {}), ("Hardmax", (3, 4), {}),
    ("LpPool", (1, 2, 5, 5), {"kernel_shape": [2, 2]}), ("Celu", (3, 4), {}), ("Mish", (4,), {}),
    ("MeanVarianceNormalization", (2, 3, 4, 4), {}), ("Det", (2, 4, 4), {}),
    ("AveragePool", (1, 2, 6, 6), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "dilations": [1, 2]}),
    ("DepthToSpace", (1, 8, 2, 3), {"blocksize": 2}), ("GlobalLpPool", (1, 2, 4, 4), {"p": 3}),
    ("ReduceLogSumExp", (3, 4), {}), ("CumSum", (3, 4), {}), ("Gelu", (3, 4), {"approximate": "tanh"}),
])
def test_of_one_operand(op, shape, attrs):
    x = wide(*shape)
    more = [np.array(1, np.int64)] if op == "CumSum" else []
    fn = n.module(op, [x, *more], opset=23, known=[1] if more else [], **attrs)
    check(fn, x)


def test_power_of_negative_numbers():
    x = -np.abs(wide(3, 4)) - 0.1
    check(n.module("Pow", [x, np.array(2.0)], known=[1]), x)


def test_dft():
    x = wide(2, 6, 2)
    check(n.module("DFT", [x, None, np.array(1, np.int64)], known=[2], onesided=0), x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    x, w, labels = wide(4, 5, 2), np.abs(wide(5)) + 0.1, np.array([[0, 1], [4, 2], [-1, 3], [2, 2]], np.int64)
    fn = n.module("SoftmaxCrossEntropyLoss", [x, labels, w], outputs=2, reduction=reduction, ignore_index=-1)
    check(lambda x, w: fn(x, labels, w), x, w)


def test_compiled_gradient_of_a_sampler():
    x, grid = n.floats(1, 2, 6, 6), np.tanh(n.floats(1, 4, 4, 2, seed=1))
    fn = n.module("GridSample", [x, grid], mode="cubic")

    def loss(x, grid):
        return td.sum(td.square(fn(x, grid)))

    eager = td.grad(loss, argnums=(0, 1))(td.tensor(x), td.tensor(grid))
    compiled = td.compile(td.grad(loss, argnums=(0, 1)))(x, grid)
    for a, b in zip(eager, compiled):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-4)
