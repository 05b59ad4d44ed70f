"""What ops meant in older opsets, and operands and attributes that the backend suite does not reach."""

import numpy as np
import one_node as n
import onnxruntime as ort
import pytest

import treadle as td

X = n.floats(2, 3, 4)
IMAGE = n.floats(1, 2, 5, 7)
I64 = np.int64


def ints(*values):
    return np.array(values, I64)


def onnxruntime(op, inputs, *args, **more):
    """The results of ONNX Runtime, unoptimized."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = n.model(op, inputs, *args, **more)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    known = more.get("known", ())
    return session.run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None and i not in known})


def assert_same(op, inputs, *args, tolerance=1e-5, **more):
    got = n.run(op, inputs, *args, **more)
    for result, wanted in zip(got if isinstance(got, list) else [got], onnxruntime(op, inputs, *args, **more)):
        assert result.dtype == wanted.dtype
        np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op, inputs, attrs", [
    ("Softmax", [X], {"axis": 1}), ("Softmax", [X], {"axis": 2}), ("LogSoftmax", [X], {"axis": 0}),
    ("Hardmax", [X], {"axis": 1}), ("Clip", [X], {"min": -0.5, "max": 0.5}), ("Clip", [X], {"max": 0.25}),
    ("Squeeze", [n.floats(1, 3, 1)], {"axes": [0]}), ("Unsqueeze", [X], {"axes": [0, 4]}),
    ("ReduceSum", [X], {"axes": [1], "keepdims": 0}), ("ReduceMean", [X], {}), ("ReduceL2", [X], {"axes": [-1]}),
    ("Pad", [X], {"pads": [0, 1, 0, 1, 0, 2], "value": 2.5}),
    ("Pad", [X], {"pads": [0, 1, 0, 0, 1, 0], "mode": "reflect"}), ("Slice", [X], {"starts": [0], "ends": [1]}),
    ("Slice", [X], {"starts": [1, -3], "ends": [2**31 - 1, -1], "axes": [1, 2]}),
    ("Split", [X], {"axis": 2, "split": [1, 3]}), ("TopK", [X], {"k": 2, "axis": 1}), ("Dropout", [X], {}),
    ("Upsample", [IMAGE], {"scales": [1.0, 1.0, 2.0, 3.0], "mode": "nearest"}),
    ("Upsample", [IMAGE], {"scales": [1.0, 1.0, 1.5, 2.0], "mode": "linear"}),
    ("BatchNormalization", [IMAGE, n.floats(2), n.floats(2, seed=1), n.floats(2, seed=2), np.abs(n.floats(2))], {}),
])
def test_attributes_of_opset_8(op, inputs, attrs):
    outputs = 2 if op in ("Split", "TopK") else 1
    assert_same(op, inputs, outputs, opset=8, **attrs)


def test_broadcasting_before_opset_7():
    x, y = n.floats(2, 3, 4, 5), n.floats(3, 4)
    np.testing.assert_array_equal(n.run("Add", [x, y], opset=6, broadcast=1, axis=1), x + y[:, :, None])
    np.testing.assert_array_equal(n.run("Mul", [x, n.floats(5)], opset=6, broadcast=1), x * n.floats(5))


def test_prelu_before_opset_7():
    slope = n.floats(2)
    expected = np.where(IMAGE < 0, IMAGE * slope[:, None, None], IMAGE)
    np.testing.assert_array_equal(n.run("PRelu", [IMAGE, slope], opset=6), expected)


def test_dropout_masks():
    assert n.run("Dropout", [X], 2, opset=7)[1].dtype == np.float32
    assert n.run("Dropout", [X], 2, opset=10)[1].dtype == bool
    y = n.run("Dropout", [np.ones((64, 64), np.float32), np.array(0.25, np.float32), np.array(True)], known=[1, 2])
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)} and 0.2 < (y == 0).mean() < 0.3


def test_dropout_whose_mode_is_an_input():
    fn = td.compile(n.module("Dropout", [X, np.array(0.5, np.float32), np.array(True)]))
    still = fn(X, np.array(0.5, np.float32), np.array(False)).numpy()
    np.testing.assert_array_equal(still, X)


@pytest.mark.parametrize("opset", [9, 14])
def test_batch_norm_training(opset):
    scale, bias, mean, var = n.floats(2), n.floats(2, seed=1), n.floats(2, seed=2), np.abs(n.floats(2, seed=3))
    attrs, outputs = ({"training_mode": 1}, 3) if opset == 14 else ({}, 5)
    inputs = [IMAGE, scale, bias, mean, var]
    y, new_mean, new_var, *_ = n.run("BatchNormalization", inputs, outputs, opset=opset, **attrs)
    m, v = IMAGE.mean((0, 2, 3)), IMAGE.var((0, 2, 3))
    expected = (np.moveaxis(IMAGE, 1, 3) - m) / np.sqrt(v + 1e-5) * scale + bias
    np.testing.assert_allclose(y, np.moveaxis(expected, 3, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new_mean, mean * 0.9 + m * 0.1, rtol=1e-5)
    np.testing.assert_allclose(new_var, var * 0.9 + v * 0.1, rtol=1e-5)


@pytest.mark.parametrize("attrs", [
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"auto_pad": "SAME_LOWER", "strides": [2, 1]}, {"auto_pad": "VALID"},
    {"pads": [1, 0, 2, 1], "dilations": [1, 2]}, {"pads": [1, 1, 1, 1], "strides": [2, 2], "ceil_mode": 1},
])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_pools(op, attrs):
    if op == "LpPool" and "ceil_mode" in attrs:
        pytest.skip("ONNX Runtime has no ceil_mode there")
    outputs = 2 if op == "MaxPool" and "ceil_mode" not in attrs else 1
    assert_same(op, [IMAGE], outputs, opset=19, kernel_shape=[3, 2], **attrs)


def test_max_pool_indices_by_columns():
    assert_same("MaxPool", [IMAGE], 2, opset=12, kernel_shape=[2, 2], storage_order=1)


@pytest.mark.parametrize("attrs", [
    {}, {"strides": [2, 3], "output_padding": [1, 2]}, {"strides": [2, 2], "pads": [1, 0, 2, 1]}, {"dilations": [2, 2]},
    {"strides": [2, 2], "output_shape": [9, 13]}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [3, 2]}, {"group": 2},
])
def test_conv_transpose(attrs):
    w = n.floats(2, 3 if attrs.get("group", 1) == 1 else 2, 3, 2)
    assert_same("ConvTranspose", [IMAGE, w, n.floats(w.shape[1] * attrs.get("group", 1))], opset=11, tolerance=1e-4,
                **attrs)


@pytest.mark.parametrize("x, y", [
    (np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)), (ints(-9, 9), ints(4, -4)),
])
def test_integer_division_truncates(x, y):
    np.testing.assert_array_equal(n.run("Div", [x, y], opset=14), np.trunc(x / y).astype(x.dtype))
    assert_same("Mod", [x, y], opset=13)
    assert_same("Mod", [x, y], opset=13, fmod=1)


@pytest.mark.parametrize("x, y", [
    (n.floats(3) + 3, ints(1, 2, 3)), (np.array([1, 2, 3], np.int32), np.array([2.0, 0.5, 2.0], np.float32)),
    (ints(1, 2, 3), np.array([2, 1, 0], np.int32)),
])
def test_powers_of_two_dtypes(x, y):
    assert_same("Pow", [x, y], opset=15)


@pytest.mark.parametrize("attrs", [
    {"activations": ["Relu", "Tanh", "Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]},
    {"clip": 0.3}, {"input_forget": 1},
])
def test_lstm_options(attrs):
    x, w, r, b = n.floats(5, 2, 4), n.floats(1, 12, 4), n.floats(1, 12, 3), n.floats(1, 24)
    assert_same("LSTM", [x, w, r, b, np.array([5, 3], np.int32)], 3, opset=14, hidden_size=3, tolerance=1e-4, **attrs)


@pytest.mark.parametrize("late", [0, 1])
def test_gru_both_ways(late):
    x, w, r, b = n.floats(5, 2, 4), n.floats(2, 9, 4), n.floats(2, 9, 3), n.floats(2, 18)
    assert_same("GRU", [x, w, r, b, np.array([3, 5], np.int32)], 2, opset=14, hidden_size=3, direction="bidirectional",
                linear_before_reset=late, tolerance=1e-4)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("how", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("scales", [(1, 1, 2, 3), (1, 1, 0.6, 0.6), (1, 1, 1.7, 0.4)])
def test_resize_against_onnxruntime(mode, how, scales):
    if how == "align_corners" and scales != (1, 1, 2, 3):
        pytest.skip("ONNX Runtime rounds scale * size there; the standard does not")
    assert_same("Resize", [IMAGE, None, np.array(scales, np.float32)], opset=13, known=[2], mode=mode, tolerance=1e-4,
                coordinate_transformation_mode=how)


def test_resize_of_opset_10():
    assert_same("Resize", [IMAGE, np.array([1, 1, 2, 1.5], np.float32)], opset=10, known=[1], mode="linear")


def test_max_roi_pool():
    rois = np.array([[0, 0, 0, 4, 3], [0, 1, 1, 6, 4], [0, 2, 3, 3, 4]], np.float32)
    assert_same("MaxRoiPool", [IMAGE, rois], opset=11, pooled_shape=[2, 3], spatial_scale=1.0)


def test_roi_align_that_counts_its_samples():
    rois = np.array([[0, 0, 6, 4], [1, 1, 3, 2]], np.float32)
    assert_same("RoiAlign", [IMAGE, rois, ints(0, 0)], opset=16, output_height=2, output_width=2)


def test_long_fourier_transforms():
    x = n.floats(1, 2500, 1)
    y = n.run("DFT", [x, None, np.array(1, I64)], opset=20, known=[2])
    spectrum = np.fft.fft(x[..., 0])
    np.testing.assert_allclose(y[..., 0] + 1j * y[..., 1], spectrum, rtol=1e-3, atol=2e-2)


def test_integers_are_exact():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (17, 300)).astype(np.uint8), rng.integers(-128, 128, (300, 19)).astype(np.int8)
    zero = np.array(131, np.uint8)
    fn = td.compile(n.module("MatMulInteger", [a, b, zero, rng.integers(-5, 5, 19).astype(np.int8)], opset=21))
    columns = rng.integers(-5, 5, 19).astype(np.int8)
    expected = (a.astype(np.int64) - 131) @ (b.astype(np.int64) - columns)
    np.testing.assert_array_equal(fn(a, b, zero, columns).numpy(), expected.astype(np.int32))


@pytest.mark.parametrize("channels", [4, 300])
def test_integer_convolutions_are_exact(channels):
    rng = np.random.default_rng(channels)
    x, w = rng.integers(0, 256, (1, channels, 6, 5)).astype(np.uint8), rng.integers(0, 256, (3, channels, 3, 3))
    zeros = [np.array(0, np.uint8), np.array([255, 3, 0], np.uint8)]
    inputs = [x, w.astype(np.uint8), *zeros]
    fn = td.compile(n.module("ConvInteger", inputs, opset=21, pads=[1, 1, 0, 1]))
    padded = np.pad(x.astype(I64), ((0, 0), (0, 0), (1, 0), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    expected = np.einsum("nchwij,ocij->nohw", windows, w - zeros[1].astype(I64)[:, None, None, None])
    np.testing.assert_array_equal(fn(*inputs).numpy(), expected.astype(np.int32))


@pytest.mark.parametrize("left, right", [(np.uint8, np.int8), (np.int8, np.uint8), (np.int8, np.int8)])
def test_integer_products_against_onnxruntime(left, right):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(np.iinfo(t).min, np.iinfo(t).max + 1, s).astype(t) for t, s in
            ((left, (2, 5, 70)), (right, (70, 9))))
    if left == np.int8 and right == np.uint8:
        a_zero, b_zero = np.array(7, left), np.array(9, right)
        expected = (a.astype(I64) - 7) @ (b.astype(I64) - 9)
        np.testing.assert_array_equal(n.run("MatMulInteger", [a, b, a_zero, b_zero], opset=21), expected)
    else:
        assert_same("MatMulInteger", [a, b, np.array(7, left), rng.integers(-9, 9, 9).astype(right)], opset=17)


def test_random_numbers():
    y = n.run("RandomNormal", [], opset=22, shape=[100, 100], mean=2.0, scale=3.0)
    assert abs(y.mean() - 2) < 0.1 and abs(y.std() - 3) < 0.1
    y = n.run("RandomUniformLike", [X], opset=22, low=1.0, high=2.0)
    assert y.shape == X.shape and y.min() >= 1 and y.max() < 2
    y = n.run("Bernoulli", [np.full((100, 100), 0.25, np.float32)], opset=22, dtype=7)
    assert y.dtype == np.int64 and 0.2 < y.mean() < 0.3
    y = n.run("Multinomial", [np.log(np.array([[1, 2, 7]], np.float32))], opset=22, sample_size=5000)
    assert y.dtype == np.int32 and 0.65 < (y == 2).mean() < 0.75


def test_a_bad_attribute_names_the_node():
    with pytest.raises(td.ir.errors.OnnxError, match="Resize node.*mode"):
        n.run("Resize", [IMAGE, None, np.ones(4, np.float32)], known=[2], mode="bicubic")
