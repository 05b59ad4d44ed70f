"""A network as ONNX Runtime's own tools quantize it, compiled: bit for bit what ONNX Runtime gives."""

import logging

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import treadle as td

ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra `test`)")
tools = pytest.importorskip("onnxruntime.quantization", reason="needs onnxruntime (the extra `test`)")


def floats(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32) * 0.3


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small residual network, in a file."""
    stored = {"w": floats(8, 3, 3, 3), "b": floats(8), "v": floats(8, 8, 3, 3), "fc": floats(8, 5), "fb": floats(5)}
    nodes = [("Conv", ["x", "w", "b"], "a", {"pads": [1] * 4, "strides": [2, 2]}), ("Relu", ["a"], "r", {}),
             ("Conv", ["r", "v"], "c", {"pads": [1] * 4}), ("Add", ["c", "r"], "d", {}), ("Sigmoid", ["d"], "s", {}),
             ("MaxPool", ["s"], "m", {"kernel_shape": [2, 2], "strides": [2, 2]}),
             ("GlobalAveragePool", ["m"], "g", {}), ("Flatten", ["g"], "f", {}), ("Gemm", ["f", "fc", "fb"], "y", {})]
    graph = helper.make_graph([helper.make_node(op, i, [o], **attrs) for op, i, o, attrs in nodes], "net",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, 16, 16))],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 5))],
                              [numpy_helper.from_array(v, k) for k, v in stored.items()])
    path = tmp_path_factory.mktemp("quantized") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


class Calibration(tools.CalibrationDataReader):
    """Four batches."""

    def __init__(self):
        self.batches = iter([{"x": floats(2, 3, 16, 16) * i} for i in range(1, 5)])

    def get_next(self):
        return next(self.batches, None)


@pytest.mark.parametrize("how", ["QDQ", "QDQ per channel", "QOperator", "QOperator per channel", "dynamic"])
def test_quantized_network(network, how):
    path = network.with_name("quantized.onnx")
    logging.disable(logging.WARNING)
    try:
        if how == "dynamic":
            tools.quantize_dynamic(network, path, weight_type=tools.QuantType.QInt8)
        else:
            tools.quantize_static(network, path, Calibration(), quant_format=tools.QuantFormat[how.split()[0]],
                                  per_channel="channel" in how, weight_type=tools.QuantType.QInt8,
                                  activation_type=tools.QuantType.QUInt8)
    finally:
        logging.disable(logging.NOTSET)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    module, x = td.onnx.load(path), floats(4, 3, 16, 16)
    (expected,) = session.run(None, {"x": x})
    tolerance = 1e-6 if how == "dynamic" else 0
    for run in (module, td.compile(module)):
        np.testing.assert_allclose(run(x).numpy(), expected, rtol=tolerance, atol=tolerance)
