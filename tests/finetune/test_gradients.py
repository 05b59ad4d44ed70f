"""Gradients of imported models: as torch recorded them, and as differences of the loss in f64 say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
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


def doubled(model):
    """The model in f64: weights, inputs, casts and constants."""
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE

    def wide(tensor):
        if tensor.data_type == single:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    for tensor in model.graph.initializer:
        wide(tensor)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == single:
            value.type.tensor_type.elem_type = double
    del model.graph.value_info[:]
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                wide(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == single:
                attribute.i = double
    return model


@pytest.mark.slow
@pytest.mark.parametrize("key", cases.MODELS)
def test_as_differences_of_the_loss_in_f64(key):
    model = cases.read(key)
    if model is None:
        pytest.skip(f"needs the package {cases.MODELS[key][0]} (the extra `test`)")
    module = td.onnx.load(doubled(model))
    inputs = [a.astype(np.float64) if a.dtype == np.float32 else a for a in cases.MODELS[key][2]().values()]
    inputs = [inputs[0][:1]] if key == "orientation" else inputs
    named = dict(module.named_parameters())
    assert all(p.dtype == "float64" for p in named.values()) and len(named) == sum(
        k.startswith(f"{key}/") for k in RECORDED) - 1

    def run(*given):
        loss = loss_of(module, *given)
        return loss, [td.zeros((), "float64") if g is None else g for g in gradients(loss, list(named.values()))]

    compiled = td.compile(run)
    loss, found = compiled(*inputs)
    grads = [np.broadcast_to(g.numpy(), p.shape) for g, p in zip(found, named.values())]
    floor = 1e-7 * max(float(np.linalg.norm(g)) for g in grads)
    wrong = {}
    for (name, parameter), grad in zip(named.items(), grads):
        start = parameter.numpy()
        direction = cases.rng_of(name, 2).standard_normal(start.shape)
        expected = float((grad * direction).sum())
        for relative in (1e-7, 1e-8, 1e-9):  # a step that crosses the corner of a ReLU is no derivative
            step = relative * max(float(start.std()), 1e-2)
            parameter.assign(td.tensor(start + step * direction))
            difference = (compiled(*inputs)[0].item() - loss.item()) / step
            if abs(difference - expected) <= TOLERANCE * np.linalg.norm(grad) + floor:
                break
        else:
            wrong[name] = (difference, expected)
        parameter.assign(td.tensor(start))
    assert not wrong and compiled.stats.compiles == 1, wrong
