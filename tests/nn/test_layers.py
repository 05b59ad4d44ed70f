"""Every layer and loss against torch, eager and compiled: outputs, gradients, moved statistics."""

import numpy as np
import pytest

import treadle as td

from .recorded import cases, part

LAYERS = {name: (ours or torch, shapes) for name, torch, ours, shapes in cases().LAYERS}


def make(name):
    module = eval(LAYERS[name][0], vars(td.nn))
    module = module.to("float64")
    module.load_state_dict(part(name, "state"))
    return module


def flat(result):
    return [result] if isinstance(result, td.Tensor) else [t for r in result for t in flat(r)]


def weighted(results):
    """The loss that the recorder differentiated: outputs weighted by the cosine of their position."""
    return sum((td.sum(y * np.cos(np.arange(y.size)).reshape(y.shape)) for y in results), td.tensor(0.0, "float64"))


def check(kind, actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=kind)


@pytest.mark.parametrize("name", LAYERS)
def test_eager_equals_torch(name):
    module = make(name)
    args = [td.tensor(a, requires_grad=a.dtype == np.float64) for a in part(name, "input").values()]
    results = flat(module(*args))
    expected = part(name, "output")
    assert len(results) == len(expected)
    for y, want in zip(results, expected.values()):
        check("output", y.numpy(), want, 1e-9)
    weighted(results).backward()
    for i, want in part(name, "input_grad").items():
        check(f"gradient of input {i}", args[int(i)].grad.numpy(), want, 1e-8)
    named = dict(module.named_parameters())
    assert named.keys() == part(name, "grad").keys()
    for key, want in part(name, "grad").items():
        check(f"gradient of {key}", named[key].grad.numpy(), want, 1e-8)
    for key, want in part(name, "after").items():
        check(key, module.state_dict()[key].numpy(), want, 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_equals_torch(name):
    module = make(name)

    args = [td.tensor(a) for a in part(name, "input").values()]
    outputs = td.compile(lambda *xs: tuple(flat(module(*xs))))(*args)
    for y, want in zip(outputs, part(name, "output").values(), strict=True):
        check("output", y.numpy(), want, 1e-9)
    for key, want in part(name, "after").items():
        check(key, module.state_dict()[key].numpy(), want, 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_gradients_of_inputs_equal_torch(name):
    module = make(name)
    arrays = list(part(name, "input").values())
    wanted = part(name, "input_grad")
    if not wanted:
        pytest.skip("integer inputs only")
    argnums = tuple(int(i) for i in wanted)
    grads = td.compile(td.grad(lambda *args: weighted(flat(module(*args))), argnums=argnums))(*arrays)
    for i, got, want in zip(argnums, grads, wanted.values(), strict=True):
        check(f"gradient of input {i}", got.numpy(), want, 1e-8)


@pytest.mark.parametrize("dim", [0, -1])
def test_glu_gates_one_half_by_the_other(dim):
    x = np.random.default_rng(0).standard_normal((4, 6))
    first, second = np.split(x, 2, axis=dim)
    got = td.nn.functional.glu(td.asarray(x), dim)
    np.testing.assert_allclose(got.numpy(), first / (1 + np.exp(-second)), rtol=1e-12)
