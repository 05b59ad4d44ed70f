"""Symbolic sizes pass through the rules: one trace serves inputs of several sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import treadle as td
from treadle.ir.interp import run as interpret

F32 = TensorProto.FLOAT
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model(nodes: Any, shape: Any, stored: Any = (), opset: int = 18) -> Any:
    """A model of x to y; sizes of x may be names."""
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", F32, shape)],
                              [helper.make_empty_tensor_value_info("y")],
                              [numpy_helper.from_array(np.asarray(a), name) for name, a in dict(stored).items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(op: str, *inputs: str, out: str = "y", **attrs: Any) -> Any:
    return helper.make_node(op, list(inputs), [out], **attrs)


I64 = np.int64
CASES = {
    "softmax of a flattened tensor": (("n", "s", 4), [node("Softmax", "x", axis=1)], {}, 11),
    "reshape": (("n", "s", 12), [node("Reshape", "x", "shape")], {"shape": np.array([0, -1, 3, 4], I64)}, 18),
    "flatten": (("n", "s", 4), [node("Flatten", "x", axis=1)], {}, 18),
    "positions": (("n", "s", 4), [
        node("Shape", "x", out="shape", start=1, end=2), node("Slice", "table", "zero", "shape", "one", out="rows"),
        node("Add", "x", "rows")], {"table": floats(1, 16, 4), "zero": np.array([0]), "one": np.array([1])}, 18),
    "slices": (("n", "s", 4), [node("Slice", "x", "a", "b", "axes")],
               {"a": np.array([0, 1]), "b": np.array([2**31 - 1, -1]), "axes": np.array([0, 1])}, 18),
    "backwards": (("n", "s", 4), [node("Slice", "x", "a", "b", "axes", "steps")],
                  {"a": np.array([-1]), "b": np.array([-2**63]), "axes": np.array([1]), "steps": np.array([-1])}, 18),
    "last token": (("n", "s", 4), [node("Gather", "x", "i", axis=1)], {"i": np.array(-1)}, 18),
    "pad": (("n", "s", 4), [node("Pad", "x", "pads", mode="reflect")], {"pads": np.array([0, 1, 0, 0, 1, 0])}, 18),
    "edge": (("n", "s", 4), [node("Pad", "x", "pads", mode="edge")], {"pads": np.array([0, 2, 0, 0, 1, 0])}, 18),
    "tile": (("n", "s", 4), [node("Tile", "x", "times")], {"times": np.array([1, 2, 1])}, 18),
    "conv": (("n", 3, "h", "w"), [node("Conv", "x", "k", pads=[1, 1, 1, 1], strides=[2, 2])],
             {"k": floats(4, 3, 3, 3)}, 18),
    "conv_transpose": (("n", 3, "h", "w"), [node("ConvTranspose", "x", "k", strides=[2, 2])],
                       {"k": floats(3, 2, 2, 2)}, 18),
    "max_pool": (("n", 3, "h", "w"), [node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)], {}, 18),
    "average_pool": (("n", 3, "h", "w"), [
        node("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)], {}, 18),
    "global_pool": (("n", 3, "h", "w"), [node("GlobalAveragePool", "x")], {}, 18),
    "upsample": (("n", 3, "h", "w"), [node("Resize", "x", "", "scales", mode="nearest", nearest_mode="floor",
                                           coordinate_transformation_mode="asymmetric")],
                 {"scales": np.array([1, 1, 2, 2], np.float32)}, 18),
    "resize": (("n", 3, "h", "w"), [node("Resize", "x", "", "scales", mode="linear")],
               {"scales": np.array([1, 1, 2, 2], np.float32)}, 18),
    "resize to a size": (("n", 3, "h", "w"), [
        node("Shape", "x", out="lead", end=2), node("Concat", "lead", "to", out="sizes", axis=0),
        node("Resize", "x", "", "", "sizes", mode="cubic")], {"to": np.array([7, 9])}, 18),
    "lstm": (("s", "n", 4), [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=3)],
             {"w": floats(1, 12, 4), "r": floats(1, 12, 3)}, 14),
    "layer_norm": (("n", "s", 4), [node("LayerNormalization", "x", "g", "b")], {"g": floats(4), "b": floats(4)}, 18),
    "expand": (("n", 1, 4), [node("Shape", "x", out="shape", end=1), node("Concat", "shape", "rest", out="to", axis=0),
                             node("Expand", "x", "to")], {"rest": np.array([3, 4])}, 18),
    "depth_to_space": (("n", 8, "h", "w"), [node("DepthToSpace", "x", blocksize=2)], {}, 18),
    "hardmax": (("n", "s", 4), [node("Hardmax", "x", axis=1)], {}, 18),
    "lrn": (("n", 5, "h", "w"), [node("LRN", "x", size=3)], {}, 18),
    "split": (("n", "s", 4), [helper.make_node("Split", ["x"], ["z", "y"], axis=2, num_outputs=2)], {}, 18),
    "cumsum": (("n", "s", 4), [node("CumSum", "x", "axis")], {"axis": np.array(1)}, 18),
    "trilu": (("n", "s", "s"), [node("Trilu", "x", upper=0)], {}, 18),
}
SIZES = [{"n": 2, "s": 5, "h": 6, "w": 7}, {"n": 1, "s": 3, "h": 9, "w": 4}]


@pytest.mark.parametrize("name", CASES)
def test_one_trace_for_all_sizes(name: str) -> None:
    shape, nodes, stored, opset = CASES[name]
    proto = model(nodes, shape, stored, opset)
    module = td.onnx.load(proto.SerializeToString())
    graph = td.trace(module, td.spec(tuple(td.Dim(s) if isinstance(s, str) else s for s in shape), "float32"))
    compiled = td.compile(module)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for sizes in SIZES:
        x = floats(*(sizes[s] if isinstance(s, str) else s for s in shape))
        (expected,) = session.run(None, {"x": x})
        captured = graph.meta["captures"]
        (result,) = interpret(graph, [captured[i].numpy() if i in captured else x for i in range(len(graph.inputs))])
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(compiled(x).numpy(), expected, rtol=1e-4, atol=1e-4)
