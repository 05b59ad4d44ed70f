"""ONNX Runtime: a session with the same number of threads, all optimisations on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
started = time.perf_counter()
import onnxruntime  # noqa: E402

imported = time.perf_counter() - started

import contender  # noqa: E402
import models  # noqa: E402


def prepare(case, threads):
    if case == "call":  # nothing is loaded beyond the import
        return lambda: None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    inputs, session = models.inputs_of(case), None

    def step():
        nonlocal session
        if session is None:  # a session is made by the first step: starting counts
            session = onnxruntime.InferenceSession(str(models.CASES[case][0].file), options)
        return float(abs(session.run(None, inputs)[0]).mean())

    return step


if __name__ == "__main__":
    contender.main(prepare, imported)
