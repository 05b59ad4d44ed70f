"""The tree of modules: registration, names, modes, state, hooks; initialisers' distributions."""

import math

import numpy as np
import pytest

import treadle as td
from treadle import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), td.tanh)])
        self.scale = nn.Parameter([1.0])
        self.register_buffer("scratch", td.tensor([0.0]), persistent=False)
        self.tied = self.first

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def test_names_and_modes():
    net = Net()
    assert [n for n, _ in net.named_parameters()] == [
        "scale", "first.weight", "first.bias", "blocks.0.weight", "blocks.0.bias", "blocks.1.0.weight",
        "blocks.1.0.bias"]
    assert {n for n, _ in net.named_buffers()} == {"scratch", "blocks.0.running_mean", "blocks.0.running_var"}
    assert "scratch" not in net.state_dict() and "tied.weight" not in net.state_dict()
    assert net.eval() is net and not any(m.training for m in net.modules())
    assert "Linear(3, 4, bias=True)" in repr(net)
    assert not any(p.requires_grad for p in net.requires_grad_(False).parameters())


def test_state_round_trip_and_its_errors():
    td.random.seed(1)
    a = Net()
    td.random.seed(2)
    b = Net()
    x = np.ones((2, 3), np.float32)
    assert not np.allclose(a.eval()(x).numpy(), b.eval()(x).numpy())
    b.load_state_dict(a.state_dict())
    np.testing.assert_array_equal(a(x).numpy(), b(x).numpy())
    state = {k: v.numpy() for k, v in a.state_dict().items()}
    state["first.weight"] = np.zeros((5, 3), np.float32)
    del state["scale"]
    state["more"] = np.zeros(1)
    with pytest.raises(td.CheckpointError) as error:
        b.load_state_dict(state)
    text = str(error.value)
    assert "first.weight: checkpoint has shape (5, 3), model (4, 3)" in text
    assert "scale: missing" in text and "more: not in the model" in text


def test_replacing_and_deleting_parts():
    net = Net()
    net.first = nn.Linear(3, 2)
    assert net.first.out_features == 2
    net.scratch = td.tensor([5.0])
    assert dict(net.named_buffers())["scratch"].item() == 5.0
    del net.scale
    with pytest.raises(AttributeError, match="no attribute 'scale'"):
        net.scale  # noqa: B018


def test_forgotten_super_init():
    class Bad(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(1, 1)

    with pytest.raises(td.ArgumentsError, match=r"super\(\).__init__\(\)"):
        Bad()


def test_hooks():
    layer, seen = nn.Linear(2, 2), []
    remove = layer.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    undo = layer.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    layer.register_forward_hook(lambda m, args, out: out + 1)
    y = layer(td.ones((3, 2)))
    np.testing.assert_allclose(y.numpy(), np.broadcast_to(layer.bias.numpy() + 1, (3, 2)), rtol=1e-6)
    remove()
    undo()
    layer(td.ones((3, 2)))
    assert seen == [(3, 2)]


def test_a_mode_change_retraces_and_an_edit_too():
    net = Net()
    f = td.compile(net)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    trained = f(x).numpy()
    net.eval()
    assert not np.allclose(trained, f(x).numpy())
    np.testing.assert_allclose(f(x).numpy(), net(x).numpy(), rtol=1e-5, atol=1e-6)
    net.scale = nn.Parameter([2.0])
    np.testing.assert_allclose(f(x).numpy(), net(x).numpy(), rtol=1e-5, atol=1e-6)


def test_dropout_scales_and_follows_the_mode():
    td.random.seed(0)
    layer, x = nn.Dropout(0.25), td.ones((200, 100))
    y = layer(x).numpy()
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert layer.eval()(x) is x
    with pytest.raises(td.AttributeValueError):
        nn.functional.dropout(x, 1.5)


@pytest.mark.parametrize("make, std", [
    (nn.init.xavier_uniform(), math.sqrt(2 / (300 + 200))), (nn.init.xavier_normal(), math.sqrt(2 / (300 + 200))),
    (nn.init.he_uniform(), math.sqrt(2 / 200)), (nn.init.he_normal(fan="out"), math.sqrt(2 / 300)),
    (nn.init.uniform(-1, 1), math.sqrt(1 / 3)), (nn.init.normal(0, 0.5), 0.5), (nn.init.constant(0), 0.0),
])
def test_initialisers(make, std):
    td.random.seed(3)
    w = make((300, 200))
    assert w.dtype == np.float32 and abs(w.mean()) < 0.02
    assert w.std() == pytest.approx(std, rel=0.02)
    assert make((2, 2), "bfloat16").dtype.name == "bfloat16"


def test_orthogonal_and_truncated():
    w = nn.init.orthogonal()((5, 4, 3))
    np.testing.assert_allclose(w.reshape(5, 12) @ w.reshape(5, 12).T, np.eye(5), atol=1e-6)
    t = nn.init.truncated_normal(0, 1, -1, 0.5)((1000,))
    assert t.min() >= -1 and t.max() <= 0.5
    with pytest.raises(td.ShapeError, match="rank >= 2"):
        nn.init.xavier_normal()((3,))


@pytest.mark.parametrize("call, error, message", [
    (lambda: nn.Linear(3, 4)(td.ones((2, 5))), td.ShapeError, "linear: the last dimension"),
    (lambda: nn.Conv2d(3, 4, 3)(td.ones((2, 4, 8, 8))), td.ShapeError, "Conv2d takes"),
    (lambda: nn.Conv2d(3, 4, 3, groups=2), td.ShapeError, "groups"),
    (lambda: nn.Conv2d(3, 4, (3, 3, 3)), td.AttributeValueError, "kernel_size needs 2 numbers"),
    (lambda: nn.LSTM(3, 4)(td.ones((2, 5))), td.ShapeError, "LSTM takes"),
    (lambda: nn.MultiHeadAttention(10, 3), td.ShapeError, "heads"),
    (lambda: nn.functional.cross_entropy(td.ones((3, 5)), td.tensor([0, 1])), td.ShapeError, "labels of shape"),
    (lambda: nn.functional.mse_loss(td.ones((3, 1)), td.ones(3)), td.ShapeError, "same shape"),
    (lambda: nn.functional.embedding(td.ones((3,)), td.ones((4, 2))), td.DTypeError, "integers"),
    (lambda: nn.functional.gelu(td.ones(3), "sigmoid"), td.AttributeValueError, "approximate"),
])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Scaled(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.factor = nn.Parameter(np.float32(start))

    def forward(self, weight):
        return weight * self.factor


def test_a_parameter_is_read_through_functions():
    layer = nn.Linear(3, 2)
    x = np.ones((4, 3), np.float32)
    compiled = td.compile(lambda x: layer(x))
    plain, stored = compiled(x).numpy(), layer.weight.numpy()
    layer.parametrize("weight", "scale", Scaled(2.0))
    layer.parametrize("weight", "half", Scaled(0.5))
    assert list(layer.state_dict()) == ["weight", "bias", "weight.scale.factor", "weight.half.factor"]
    assert [(n, k) for n, k, _ in layer.parametrized()] == [("weight", "scale"), ("weight", "half")]
    assert np.allclose(compiled(x).numpy(), plain) and compiled.stats.compiles == 2, "the old program is stale"
    layer._modules["weight.half"].factor.assign(td.tensor(3.0))
    assert np.allclose(layer.weight.numpy(), 6 * stored) and np.allclose(layer._parameters["weight"].numpy(), stored)
    (layer(x) ** 2).sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters()}
    assert all(g is not None for g in grads.values())
    assert np.isclose(grads["weight.scale.factor"].numpy() * 2, (grads["weight"].numpy() * stored).sum(), rtol=1e-4)
    with pytest.raises(td.ArgumentsError, match="first but through 'scale'"):
        layer.remove_parametrization("weight", "half")
    layer.remove_parametrization("weight", "scale")
    assert np.allclose(layer._parameters["weight"].numpy(), 2 * stored)
    layer.remove_parametrization("weight", "half", merge=False)
    assert np.allclose(layer.weight.numpy(), 2 * stored) and list(layer.state_dict()) == ["weight", "bias"]
    for wrong in (lambda: layer.parametrize("gain", "scale", Scaled(1)),
                  lambda: layer.remove_parametrization("bias", "scale")):
        with pytest.raises(td.ArgumentsError, match="gain|bias"):
            wrong()
