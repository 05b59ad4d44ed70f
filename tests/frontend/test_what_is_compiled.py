"""What a model is compiled to: the kernels by name, what is updated in place, how much memory waits between kernels.

The lists are what fusion gives today. A change that makes one longer has to say why; a shorter one is welcome.
"""

from __future__ import annotations

import numpy as np
import pytest

import treadle as td
from treadle import nn
from treadle.frontend.building import _lowered
from treadle.schedules.program import Copy, View, walk

F = nn.functional


def classified(model, x, y):
    return td.mean(F.cross_entropy(model(x), y))


def squared(model, x):
    y = model(x)
    return td.mean(td.square(y[0] if isinstance(y, tuple) else y))


def mlp():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10)), classified, \
        (np.ones((8, 20), np.float32), np.zeros(8, np.int64))


def cnn():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.Linear(128, 10))
    return model, classified, (np.ones((4, 3, 8, 8), np.float32), np.zeros(4, np.int64))


def encoder():
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0), squared, (np.ones((2, 6, 32), np.float32),)


def lstm():
    return nn.LSTM(8, 16), squared, (np.ones((5, 2, 8), np.float32),)


def labels(executable) -> list[str]:
    return [kernel.label for kernel in executable.signature.kernels]


def step_of(make):
    td.random.seed(0)
    model, loss, batch = make()
    step = td.train_step(model, loss, td.optim.AdamW(model.parameters(), lr=1e-3))
    step(*batch)
    return model, step, batch


def test_an_mlp_is_a_kernel_a_layer():
    model, loss, batch = mlp()
    f = td.compile(lambda x: model(x))
    with td.no_grad():
        f(batch[0])
    assert labels(f._last.executable) == ["matmul+add+relu", "matmul+add"]


def test_the_step_of_an_mlp():
    _, step, _ = step_of(mlp)
    assert labels(step.executable) == [
        "matmul+add+relu", "matmul+add",
        "reduce_max+sub+exp+reduce_sum+log+sub...", "ne+reduce_sum+cast+reduce_sum+div+div...",  # the loss
        "reduce_max+sub+exp+reduce_sum+div+clip...",                                            # its gradient
        "reduce_sum+mul+mul+mul+add+mul...", "matmul", "matmul+mul+mul+mul+add+mul...",  # with AdamW
        "gt+where+reduce_sum+mul+mul+mul...", "matmul+mul+mul+mul+add+mul..."]


@pytest.mark.parametrize("make, kernels, calls", [(mlp, 10, 10), (cnn, 17, 17), (encoder, 30, 36), (lstm, 17, 17)])
def test_kernels_of_a_step(make, kernels, calls):
    _, step, _ = step_of(make)
    assert step.stats.kernels <= kernels and len(labels(step.executable)) <= calls


@pytest.mark.parametrize("make", [mlp, cnn, encoder, lstm])
def test_a_step_updates_everything_in_place_and_copies_nothing(make):
    model, step, batch = step_of(make)
    outputs = step.executable.signature.outputs
    state = 3 * len(list(model.parameters())) + sum(1 for _ in model.named_buffers())
    assert [o.alias is None for o in outputs].count(True) == 1, "the loss is the only new array"
    assert len(outputs) - 1 >= state
    program = _lowered(step.trace(*batch), "cpu", None)
    copies = [step for step in walk(program.steps) if isinstance(step, Copy)]
    places = [copy.dst.buffer if isinstance(copy.dst, View) else copy.dst for copy in copies]
    assert all(p.kind == "temp" for p in places), "loops copy into what they carry and stack, nothing into the model"
    assert not copies or make is lstm


def test_a_call_with_known_types_compiles_and_looks_up_nothing(monkeypatch):
    _, step, batch = step_of(mlp)
    monkeypatch.setattr(type(step._compiled), "_make", lambda *a: pytest.fail("compiled again"))
    for _ in range(3):
        step(*batch)
    assert (step.stats.calls, step.stats.hits, step.stats.compiles) == (4, 3, 1)
