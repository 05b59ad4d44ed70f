"""Small ONNX models as exporters write them."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

import treadle as td

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def rng():
    return np.random.default_rng(1)


def built(nodes, weights, inputs, outputs, opset=17):
    """A checked ModelProto."""
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, FLOAT, s) for n, s in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    checker.check_model(model)
    return model


def encoder(width=8, layers=2, words=20):
    """A little transformer of the shape that torch's exporter gives: weights of products have lost their names."""
    r, node = rng(), helper.make_node
    draw = lambda *s: (0.3 * r.standard_normal(s)).astype(np.float32)  # noqa: E731
    weights = {"embeddings.word.weight": draw(words, width), "embeddings.LayerNorm.weight": np.ones(width, "f4"),
               "embeddings.LayerNorm.bias": np.zeros(width, "f4"), "root": np.float32(1 / np.sqrt(width))}
    nodes = [node("Gather", ["embeddings.word.weight", "ids"], ["e"], "/embeddings/word/Gather"),
             node("LayerNormalization", ["e", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"], ["x0"],
                  "/embeddings/LayerNorm/LayerNormalization", axis=-1)]

    def product(x, y, path, inner, outer, number):
        weights[f"onnx::MatMul_{number}"] = draw(inner, outer)
        weights[f"encoder.{path}.bias"] = draw(outer)
        nodes.extend([node("MatMul", [x, f"onnx::MatMul_{number}"], [y + "_m"], f"/encoder/{path}/MatMul"),
                      node("Add", [f"encoder.{path}.bias", y + "_m"], [y], f"/encoder/{path}/Add")])

    for i in range(layers):
        p, x = f"layer.{i}", f"x{i}"
        for k, part in enumerate(("query", "key", "value")):
            product(x, f"{p}{part}", f"{p}.{part}", width, width, 100 * i + k)
        nodes.extend([
            node("Transpose", [f"{p}key"], [f"{p}kt"], f"/encoder/{p}/Transpose", perm=[0, 2, 1]),
            node("MatMul", [f"{p}query", f"{p}kt"], [f"{p}s"], f"/encoder/{p}/scores/MatMul"),
            node("Mul", [f"{p}s", "root"], [f"{p}ss"], f"/encoder/{p}/scores/Mul"),
            node("Softmax", [f"{p}ss"], [f"{p}p"], f"/encoder/{p}/Softmax", axis=-1),
            node("MatMul", [f"{p}p", f"{p}value"], [f"{p}c"], f"/encoder/{p}/context/MatMul")])
        product(f"{p}c", f"{p}o", f"{p}.output", width, width, 100 * i + 9)
        weights[f"encoder.{p}.norm.weight"], weights[f"encoder.{p}.norm.bias"] = np.ones(width, "f4"), draw(width)
        nodes.extend([node("Add", [f"{p}o", x], [f"{p}r"], f"/encoder/{p}/Add_1"),
                      node("LayerNormalization", [f"{p}r", f"encoder.{p}.norm.weight", f"encoder.{p}.norm.bias"],
                           [f"x{i + 1}"], f"/encoder/{p}/norm/LayerNormalization", axis=-1)])
    return built(nodes, weights, [("ids", INT, ["batch", "seq"]), ("mask", INT, ["batch", "seq"])],
                 [(f"x{layers}", ["batch", "seq", width])])


def classifier(batch_norm="node", dropout=False, softmax=True, classes=3):
    """A little image classifier; `batch_norm`: as a node, "folded" into the bias, or "affine" (scale and shift)."""
    r, node = rng(), helper.make_node
    draw = lambda *s: (0.3 * r.standard_normal(s)).astype(np.float32)  # noqa: E731
    weights, nodes, x = {}, [], "image"
    for i, (inner, outer) in enumerate(((1, 4), (4, 6))):
        weights[f"conv{i}.weight"] = draw(outer, inner, 3, 3)
        names = [x, f"conv{i}.weight"]
        if batch_norm == "folded":
            weights[f"conv{i}.bias"] = draw(outer)
            names.append(f"conv{i}.bias")
        nodes.append(node("Conv", names, [f"c{i}"], f"/conv{i}/Conv", pads=[1, 1, 1, 1]))
        x = f"c{i}"
        if batch_norm == "node":
            weights |= {f"bn{i}.weight": 1 + draw(outer), f"bn{i}.bias": draw(outer), f"bn{i}.mean": draw(outer),
                        f"bn{i}.var": np.abs(draw(outer)) + 0.5}
            nodes.append(node("BatchNormalization", [x, *(f"bn{i}.{k}" for k in ("weight", "bias", "mean", "var"))],
                              [f"b{i}"], f"/bn{i}/BatchNormalization", momentum=0.8))
            x = f"b{i}"
        elif batch_norm == "affine":
            weights |= {f"scale{i}": 1 + draw(1, outer, 1, 1), f"shift{i}": draw(1, outer, 1, 1)}
            nodes += [node("Mul", [x, f"scale{i}"], [f"m{i}"], f"/bn{i}/Mul"),
                      node("Add", [f"m{i}", f"shift{i}"], [f"b{i}"], f"/bn{i}/Add")]
            x = f"b{i}"
        nodes.append(node("Relu", [x], [f"r{i}"], f"/act{i}/Relu"))
        x = f"r{i}"
    nodes += [node("GlobalAveragePool", [x], ["pooled"], "/pool"), node("Flatten", ["pooled"], ["flat"], "/flatten")]
    x = "flat"
    if dropout:
        weights["ratio"] = np.float32(0.25)
        nodes.append(node("Dropout", [x, "ratio"], ["dropped"], "/drop/Dropout"))
        x = "dropped"
    weights |= {"fc.weight": draw(classes, 6), "fc.bias": draw(classes)}
    nodes.append(node("Gemm", [x, "fc.weight", "fc.bias"], ["logits"], "/fc/Gemm", transB=1))
    if softmax:
        nodes.append(node("Softmax", ["logits"], ["probabilities"], "/softmax", axis=-1))
    return built(nodes, weights, [("image", FLOAT, ["batch", 1, "height", "width"])],
                 [("probabilities" if softmax else "logits", ["batch", classes])])


def load(model):
    """The model as a module, in evaluation mode."""
    return td.onnx.load(model)


IDS = np.random.default_rng(2).integers(0, 20, (4, 5))
MASK = np.ones((4, 5), np.int64)
IMAGES = np.random.default_rng(3).standard_normal((4, 1, 6, 6)).astype(np.float32)
