"""The ops of ONNX Runtime's own domain, beside ONNX Runtime; those that it has on other devices only, by definition."""

import numpy as np
import one_node as n
import onnxruntime as ort
import pytest

import treadle as td

RNG = np.random.default_rng(0)
BATCH, STEPS, HEADS, WIDTH = 2, 5, 4, 64
SIZE = WIDTH // HEADS
f = n.floats


def u8(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def i8(*shape):
    return RNG.integers(-128, 128, shape).astype(np.int8)


def scale(value):
    return np.array(value, np.float32)


def zero(value, dtype=np.uint8):
    return np.array(value, dtype)


X = f(BATCH, STEPS, WIDTH)
SEEN = np.sort(RNG.random((BATCH, STEPS)) > 0.4, 1)[:, ::-1].astype(np.int32)
IDS, KINDS = RNG.integers(0, 10, (BATCH, STEPS)).astype(np.int32), RNG.integers(0, 2, (BATCH, STEPS)).astype(np.int32)
COS, SIN = np.cos(f(16, SIZE // 2)), np.sin(f(16, SIZE // 2))
PLACES = RNG.integers(0, 16, (BATCH, STEPS)).astype(np.int64)
PROJECTION = [f(WIDTH, 3 * WIDTH) * 0.2, f(3 * WIDTH)]
OTHERS = [f(BATCH, 7, WIDTH, seed=1), f(BATCH, 7, WIDTH, seed=2)]
PAST = [f(BATCH, HEADS, 3, SIZE), f(BATCH, HEADS, 3, SIZE, seed=4)]
A, B = (u8(3, 8), scale(0.02), zero(120)), (u8(3, 8), scale(0.03), zero(100))
LOW = (i8(3, 8), scale(0.02), zero(3, np.int8))

CASES = [
    ("Gelu", [X], 1, {}), ("BiasGelu", [X, f(WIDTH)], 1, {}), ("FastGelu", [X, f(WIDTH)], 1, {}),
    ("QuickGelu", [X], 1, {}),
    ("FusedMatMul", [f(2, 3, 4), f(2, 5, 4)], 1, {"transB": 1, "alpha": 0.5}),
    ("FusedMatMul", [f(4, 2, 3), f(2, 4, 5)], 1, {"transBatchA": 1, "transA": 1}),
    ("FusedGemm", [f(3, 4), f(4, 5), f(5)], 1, {"activation": "LeakyRelu", "activation_alpha": 0.2}),
    *(("FusedConv", [f(1, 3, 6, 6), f(4, 3, 3, 3), f(4)], 1, {"activation": a, **more}) for a, more in (
        ("Relu", {}), ("LeakyRelu", {"activation_params": [0.1]}), ("Clip", {"activation_params": [-0.5, 0.5]}),
        ("HardSigmoid", {"activation_params": [0.3, 0.4]}))),
    ("FusedConv", [f(1, 3, 6, 6), f(4, 3, 3, 3), f(4), f(1, 4, 4, 4)], 1, {"activation": "Relu"}),
    ("SkipLayerNormalization", [X, X * 2, f(WIDTH), f(WIDTH), f(WIDTH)], ["y", "", "", "s"], {}),
    ("SkipSimplifiedLayerNormalization", [X, X * 2, f(WIDTH)], ["y", "", "", "s"], {"epsilon": 1e-5}),
    ("SimplifiedLayerNormalization", [X, f(WIDTH)], 1, {"epsilon": 1e-6}),
    ("EmbedLayerNormalization", [IDS, KINDS, f(10, WIDTH), f(8, WIDTH), f(2, WIDTH), f(WIDTH), f(WIDTH), SEEN], 2, {}),
    ("EmbedLayerNormalization", [IDS, None, f(10, WIDTH), f(8, WIDTH), None, f(WIDTH), f(WIDTH)], 2, {}),
    *(("Attention", [X, *PROJECTION, mask], 1, {"num_heads": HEADS}) for mask in (
        None, np.array([3, 5], np.int32), SEEN, (RNG.random((BATCH, STEPS, STEPS)) > 0.2).astype(np.int32))),
    ("Attention", [X, *PROJECTION, None, np.stack(PAST)], 2, {"num_heads": HEADS, "unidirectional": 1}),
    ("Attention", [X, *PROJECTION, None, None, f(BATCH, HEADS, STEPS, STEPS)], 1, {"num_heads": HEADS}),
    ("MultiHeadAttention", [X, *OTHERS, f(3 * WIDTH), (RNG.random((BATCH, 7)) > 0.3).astype(np.int32)], 1,
     {"num_heads": HEADS}),
    ("MultiHeadAttention", [X, *OTHERS, None, None, f(BATCH, HEADS, STEPS, 7)], 1, {"num_heads": HEADS}),
    ("MultiHeadAttention", [X, X * 0.5, X, None, None, None, *PAST], 3, {"num_heads": HEADS, "unidirectional": 1}),
    ("RotaryEmbedding", [X, PLACES, COS, SIN], 1, {}),
    ("RotaryEmbedding", [f(BATCH, HEADS, STEPS, SIZE), PLACES, COS, SIN], 1, {"interleaved": 1}),
    ("RotaryEmbedding", [X, np.array([2], np.int64), COS, SIN], 1, {}),
    *((op, [*A, *B, scale(0.05), zero(128)], 1, {}) for op in ("QLinearAdd", "QLinearMul")),
    *((op, [*LOW, *LOW, scale(0.05), zero(2, np.int8)], 1, {}) for op in ("QLinearAdd", "QLinearMul")),
    *((op, [*A, scale(0.005), zero(0)], 1, {}) for op in ("QLinearSigmoid", "QLinearLeakyRelu")),
    ("QLinearGlobalAveragePool", [u8(1, 3, 4, 4), *A[1:], scale(0.01), zero(128)], 1, {}),
    ("QLinearAveragePool", [u8(1, 3, 4, 4), *A[1:], scale(0.02), zero(128)], 1, {"kernel_shape": [2, 2]}),
    ("QLinearConcat", [scale(0.02), zero(100), *A, *B], 1, {"axis": 1}),
    ("QGemm", [*A, u8(5, 8), scale(0.03), zero(100), np.arange(-2, 3).astype(np.int32) * 99, scale(0.9), zero(9)], 1,
     {"transB": 1, "alpha": 0.5}),
    ("QGemm", [*A, i8(8, 5), scale(0.03), zero(3, np.int8)], 1, {}),
    ("QLinearWhere", [RNG.random((3, 8)) > 0.5, *A, *B, scale(0.05), zero(128)], 1, {}),
    ("MatMulIntegerToFloat", [u8(3, 8), i8(8, 5), scale(0.02), f(5), zero(120), i8(5), f(5)], 1, {}),
    ("DynamicQuantizeMatMul", [f(3, 8), i8(8, 5), scale(0.03), zero(3, np.int8), f(5)], 1, {}),
    ("MatMulNBits", [f(3, 64), u8(8, 2, 16), np.abs(f(16))], 1, {"K": 64, "N": 8, "bits": 4, "block_size": 32}),
    ("MatMulNBits", [f(3, 64), u8(8, 2, 16), np.abs(f(16)), u8(8)], 1, {"K": 64, "N": 8, "bits": 4, "block_size": 32}),
    ("QuantizeLinear", [X, scale(0.02), zero(1000, np.uint16)], 1, {}),
    ("Trilu", [f(4, 4)], 1, {"upper": 0}),
]


def onnxruntime(proto, inputs):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None})


def assert_same(results, expected):
    results = results if isinstance(results, tuple) else (results,)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        got = result.numpy()
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        else:  # a number half-way between two integers may go either way
            assert np.abs(got.astype(np.int64) - wanted.astype(np.int64)).max() <= (wanted.dtype.itemsize == 1)


@pytest.mark.parametrize("op, inputs, outputs, attrs", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_against_onnxruntime(op, inputs, outputs, attrs):
    domain = "" if op == "SimplifiedLayerNormalization" else n.CONTRIB
    proto = n.model(op, inputs, outputs, opset=17, domain=domain, **attrs)
    module = td.onnx.load(proto.SerializeToString())
    given, expected = [x for x in inputs if x is not None], onnxruntime(proto, inputs)
    assert_same(module(*given), expected)
    assert_same(td.compile(module)(*given), expected)


@pytest.mark.parametrize("rotary", [0, 1])
def test_group_query_attention(rotary):
    """A prompt, then a step with a cache whose rows are filled to lengths of their own."""
    attrs = {"num_heads": HEADS, "kv_num_heads": 2, "do_rotary": rotary}
    tables = [COS, SIN] if rotary else []
    prompt = [f(1, STEPS, WIDTH), f(1, STEPS, 32), f(1, STEPS, 32), None, None, np.array([STEPS - 1], np.int32),
              np.array(STEPS, np.int32), *tables]
    step = [f(2, 1, WIDTH), f(2, 1, 32), f(2, 1, 32), f(2, 2, 6, SIZE), f(2, 2, 6, SIZE, seed=1),
            np.array([6, 4], np.int32), np.array(7, np.int32), *tables]
    for inputs in (prompt, step):
        proto = n.model("GroupQueryAttention", inputs, 3, opset=17, domain=n.CONTRIB, **attrs)
        y, key, _ = td.onnx.load(proto.SerializeToString())(*(x for x in inputs if x is not None))
        expected = onnxruntime(proto, inputs)
        np.testing.assert_allclose(y.numpy(), expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(key.numpy()[0], expected[1][0], rtol=1e-5, atol=1e-5)


def test_ops_of_other_devices():
    x, bias = f(2, 3, 8), f(8)
    value, gate = np.split(x + bias, 2, axis=-1)
    gelu = n.run("Gelu", [gate], domain=n.CONTRIB)
    np.testing.assert_allclose(n.run("BiasSplitGelu", [x, bias], domain=n.CONTRIB), value * gelu, rtol=1e-5)
    np.testing.assert_allclose(n.run("BiasAdd", [x, bias, x], domain=n.CONTRIB), x + bias + x, rtol=1e-6)
    image, w = f(1, 6, 6, 3), f(4, 3, 3, 3)
    planes = n.run("Conv", [np.moveaxis(image, 3, 1), w], opset=11)
    np.testing.assert_allclose(n.run("NhwcConv", [image, w], domain=n.CONTRIB), np.moveaxis(planes, 1, 3), rtol=1e-4,
                               atol=1e-5)
    y = n.run("GroupNorm", [f(1, 4, 4, 32), np.ones(32, np.float32), np.zeros(32, np.float32)], domain=n.CONTRIB,
              groups=4)
    groups = y.reshape(16, 4, 8)
    np.testing.assert_allclose(groups.mean((0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std((0, 2)), 1, atol=1e-3)
