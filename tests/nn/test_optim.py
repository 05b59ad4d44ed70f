"""Optimizers against torch over 100 steps, Lion against its paper, schedules against torch, clipping, groups, state."""

import numpy as np
import pytest

import treadle as td
from treadle import optim

from .recorded import answers, cases, part

OPTIMIZERS = {name: ours or torch for name, torch, ours in cases().OPTIMIZERS}
SCHEDULES = {name: ours for name, _, ours in cases().SCHEDULES}


def parameters(name, dtype="float64"):
    return [td.nn.Parameter(a.astype(dtype)) for a in part(name, "start").values()]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
def test_equal_to_torch_over_100_steps(name, dtype, tolerance):
    params = parameters(name, dtype)
    opt = eval(OPTIMIZERS[name], {**vars(optim), "params": params})
    for step in range(100):
        for p in params:
            p.grad = td.tensor(cases().gradient(p.numpy(), step).astype(dtype))
        opt.step()
        for i, want in part(name, str(step + 1)).items():
            np.testing.assert_allclose(params[int(i)].numpy(), want, rtol=tolerance, atol=tolerance)


def test_lion_is_its_papers_algorithm():
    start = np.array([1.0, -2.0, 0.5])
    p, m = start.copy(), np.zeros(3)
    param = td.nn.Parameter(start)
    opt = optim.Lion([param], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(100):
        g = cases().gradient(p, step)
        param.grad = td.tensor(g)
        opt.step()
        c = 0.9 * m + 0.1 * g
        p = p - 0.01 * (np.sign(c) + 0.1 * p)
        m = 0.95 * m + 0.05 * g
    np.testing.assert_allclose(param.numpy(), p, rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_torch(name):
    schedule = eval(SCHEDULES[name], vars(optim))
    rates = [schedule(step) for step in range(cases().STEPS)]
    np.testing.assert_allclose(rates, answers()[f"schedule/{name}"], rtol=1e-9, atol=1e-15)


def test_schedules_compose():
    schedule = optim.LinearWarmup(1.0, 4).then(optim.Constant(1.0) * optim.Exponential(1.0, 0.5), at=4)
    assert [schedule(s) for s in range(8)] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.25, 0.125]
    opt = optim.SGD([td.nn.Parameter([0.0])], lr=lambda step: 0.5 / (step + 1), momentum=optim.Step(0.5, 1, 0.5))
    assert opt.hyperparameters(1)["0.lr"] == 0.25 and opt.hyperparameters(1)["0.momentum"] == 0.25


def test_groups_and_rate_changes():
    a, b = td.nn.Parameter([1.0]), td.nn.Parameter([1.0])
    opt = optim.SGD([{"params": [a], "lr": 1.0}, {"params": b}], lr=0.1)
    for p in (a, b):
        p.grad = td.tensor([0.5])
    opt.step()
    assert a.item() == pytest.approx(0.5) and b.item() == pytest.approx(0.95)
    opt.lr = 0.0
    opt.step()
    assert a.item() == pytest.approx(0.5) and opt.steps == 2
    a.grad = None
    opt.lr = 1.0
    opt.step()
    assert a.item() == pytest.approx(0.5) and b.item() == pytest.approx(0.45)


def test_state_round_trip_continues_the_same():
    def run(steps, opt, params):
        for step in steps:
            for p in params:
                p.grad = td.tensor(cases().gradient(p.numpy(), step))
            opt.step()

    whole = parameters("adamw")
    run(range(10), optim.AdamW(whole), whole)
    parts = parameters("adamw")
    first = optim.AdamW(parts)
    run(range(5), first, parts)
    second = optim.AdamW(parts)
    second.load_state_dict(first.state_dict())
    run(range(5, 10), second, parts)
    for p, q in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy())
    with pytest.raises(td.CheckpointError, match="missing"):
        optim.Adam(parts, amsgrad=True).load_state_dict(first.state_dict())


def test_clipping():
    grads = [td.tensor([3.0, 4.0]), None, td.tensor([[12.0]])]
    clipped, norm = optim.clip_by_global_norm(grads, 6.5)
    assert norm.item() == pytest.approx(13.0)
    np.testing.assert_allclose(clipped[0].numpy(), [1.5, 2.0], rtol=1e-6)
    assert clipped[1] is None
    same, _ = optim.clip_by_global_norm(grads, 100.0)
    np.testing.assert_allclose(same[2].numpy(), [[12.0]])
    np.testing.assert_allclose(optim.clip_by_value(grads, 3.5)[0].numpy(), [3.0, 3.5])


@pytest.mark.parametrize("make, error, message", [
    (lambda: optim.SGD([]), td.ArgumentsError, "no parameters"),
    (lambda: optim.SGD([td.tensor([1])]), td.ArgumentsError, "floating-point"),
    (lambda: optim.SGD([p := td.nn.Parameter([1.0]), p]), td.ArgumentsError, "twice"),
    (lambda: optim.SGD([td.nn.Parameter([1.0])], lr=-1.0), td.AttributeValueError, "lr must not be negative"),
    (lambda: optim.SGD([{"params": [td.nn.Parameter([1.0])], "rate": 1}]), td.AttributeValueError, "no option rate"),
    (lambda: optim.Adam([td.nn.Parameter([1.0])], betas=(1.0, 0.9)), td.AttributeValueError, "betas"),
    (lambda: optim.SGD([td.nn.Parameter([1.0])], nesterov=True), td.AttributeValueError, "Nesterov"),
    (lambda: optim.OneCycle(0.1, 1), td.AttributeValueError, "OneCycle"),
])
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
