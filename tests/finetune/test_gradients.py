"""Gradients of imported models: as torch recorded them, and as differences of the loss in f64 say."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import treadle as td
from treadle.frontend.transforms import gradients

ORACLE = Path(__file__).resolve().parent.parent / "oracle"
sys.path.insert(0, str(ORACLE))
import onnx_cases as cases  # noqa: E402

RECORDED = np.load(ORACLE / "onnx.npz")
TOLERANCE = 1e-4


def loaded(key):
    """The module at the weights of the record, and its inputs."""
    model = cases.read(key)
    if model is None:
        pytest.skip(f"needs the package {cases.MODELS[key][0]} (the extra `test`)")
    module = td.onnx.load(model)
    for name, parameter in module.named_parameters():
        parameter.assign(td.tensor(cases.moved(name, parameter.numpy())))
    return module, list(cases.MODELS[key][2]().values())


def loss_of(module, *inputs):
    outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((y * td.tensor(cases.cotangent(y.shape).astype(y.dtype.np))).sum() for y in outputs if y.dtype.is_float)


@pytest.mark.slow
@pytest.mark.parametrize("key", cases.MODELS)
def test_as_torch_recorded(key):
    module, inputs = loaded(key)
    named = dict(module.named_parameters())
    assert {f"{key}/{n}" for n in named} | {f"{key}/loss"} == {k for k in RECORDED if k.startswith(f"{key}/")}

    def run(*given):
        loss = loss_of(module, *given)
        return loss, [td.zeros((), "float32") if g is None else g for g in gradients(loss, list(named.values()))]

    loss, grads = td.compile(run)(*inputs)
    assert loss.item() == pytest.approx(float(RECORDED[f"{key}/loss"]), rel=1e-4, abs=1e-4)
    floor = 1e-6 * max(float(RECORDED[f"{key}/{n}"][-1]) for n in named)  # some are zero: a key's bias, say
    wrong = {}
    for (name, parameter), grad in zip(named.items(), grads):
        recorded = RECORDED[f"{key}/{name}"]
        dense = np.broadcast_to(grad.numpy(), parameter.shape)
        difference = cases.error(name, dense, recorded)
        if not difference <= TOLERANCE * recorded[-1] + floor:
            wrong[name] = difference / recorded[-1]
    assert not wrong, wrong
