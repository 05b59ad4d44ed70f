"""Constant weights in the layout of the kernels: what NumPy packs is what the kernels would have packed themselves."""

import numpy as np
import pytest

import treadle as td

CASES = {
    "plain": ((2, 5, 9, 11), (7, 5, 3, 3), dict(padding=1)),
    "pointwise": ((1, 40, 6, 6), (70, 40, 1, 1), {}),
    "strided": ((1, 16, 12, 12), (33, 16, 5, 5), dict(stride=2, padding=2)),
    "groups": ((1, 12, 8, 8), (18, 4, 3, 3), dict(groups=3)),
    "depthwise": ((2, 19, 8, 8), (19, 1, 3, 3), dict(padding=1, groups=19)),
    "one axis": ((2, 24, 50), (48, 24, 5), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_frozen_convolutions_equal_those_with_parameters(case):
    x_shape, w_shape, options = CASES[case]
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s, dtype=np.float32) for s in (x_shape, w_shape, w_shape[:1]))
    weight = td.tensor(w)
    bias = td.tensor(b.reshape((-1,) + (1,) * (len(w_shape) - 2)))

    def f(x):
        return td.maximum(td.conv(x, weight, **options) + bias, 0.0)

    plain, frozen = td.compile(f)(x).numpy(), td.compile(f, freeze=True)(x).numpy()
    np.testing.assert_allclose(frozen, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_frozen_transposed_convolution(groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 5, 6), dtype=np.float32)
    weight = td.tensor(rng.standard_normal((8, 20 // groups, 3, 3), dtype=np.float32))
    scale = td.tensor(rng.standard_normal((20, 1, 1), dtype=np.float32))

    def f(x):
        return td.conv_transpose(x, weight, stride=2, padding=1, groups=groups) * scale

    plain, frozen = td.compile(f)(x).numpy(), td.compile(f, freeze=True)(x).numpy()
    np.testing.assert_allclose(frozen, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [3, 17, 32, 100])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_products(rows, n, transposed):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, rows, 37), dtype=np.float32)
    w = rng.standard_normal((n, 37) if transposed else (37, n), dtype=np.float32)
    weight, bias = td.tensor(w), td.tensor(rng.standard_normal(n, dtype=np.float32))

    def f(x):
        return td.exp(td.matmul(x, weight.T if transposed else weight) * 0.1 + bias)

    plain, frozen = td.compile(f)(x).numpy(), td.compile(f, freeze=True)(x).numpy()
    np.testing.assert_allclose(frozen, plain, rtol=1e-4, atol=1e-5)


def test_a_frozen_program_keeps_the_values_it_was_made_with(tmp_path):
    weight = td.tensor(np.ones((4, 4), np.float32))
    x = np.ones((2, 4), np.float32)
    f = td.compile(lambda x: x @ weight, freeze=True)
    before = f(x).numpy().copy()
    weight.assign(np.zeros((4, 4), np.float32))
    np.testing.assert_array_equal(f(x).numpy(), before)
    f.save(tmp_path / "f.treadle")
    loaded = td.load(tmp_path / "f.treadle")
    assert not loaded.tensors
    np.testing.assert_array_equal(loaded(x).numpy(), before)
