"""Small models for tests: nodes, what they are fed with, what is stored."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NODE = helper.make_node
F32, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def value(name, kind=None, shape=None):
    return onnx.ValueInfoProto(name=name) if kind is None else helper.make_tensor_value_info(name, kind, shape)


def stored(arrays):
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def graph(nodes, inputs=(), outputs=("y",), arrays=None, name="g"):
    return helper.make_graph(nodes, name, [value(*i) for i in inputs],
                             [value(*([o] if isinstance(o, str) else o)) for o in outputs], stored(arrays or {}))


def model(nodes, inputs=(), outputs=("y",), arrays=None, opset=17, domains=None, functions=()):
    """A model; inputs are (name, element type, shape), outputs names or the same."""
    imports = [helper.make_opsetid("", opset)] + [helper.make_opsetid(d, v) for d, v in (domains or {}).items()]
    return helper.make_model(graph(nodes, inputs, outputs, arrays), opset_imports=imports, ir_version=9,
                             functions=list(functions))


def mlp(seed=0):
    """x[batch, 4] -> Gemm -> Relu -> Gemm -> Softmax, with the shape arithmetic that exporters write."""
    rng = np.random.default_rng(seed)
    nodes = [NODE("Gemm", ["x", "w1", "b1"], ["h"], transB=1, name="first"), NODE("Relu", ["h"], ["r"]),
             NODE("Shape", ["r"], ["s"]), NODE("Gather", ["s", "zero"], ["n"], axis=0),
             NODE("Unsqueeze", ["n", "axes"], ["n1"]), NODE("Concat", ["n1", "rest"], ["shape"], axis=0),
             NODE("Reshape", ["r", "shape"], ["q"]), NODE("ReduceMean", ["q"], ["m"], axes=[1], keepdims=0),
             NODE("MatMul", ["m", "w2"], ["z"], name="second"), NODE("Softmax", ["z"], ["y"], axis=-1)]
    arrays = {"w1": rng.standard_normal((6, 4)).astype("f"), "b1": rng.standard_normal(6).astype("f"),
              "w2": rng.standard_normal((3, 5)).astype("f"), "zero": np.int64(0), "axes": np.int64([0]),
              "rest": np.int64([2, 3])}
    return model(nodes, [("x", F32, ["batch", 4])], [("y", F32, ["batch", 5])], arrays)
