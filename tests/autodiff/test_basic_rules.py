"""Every rule of the elementwise, reduction, matmul and shape tables against central differences."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import check

from treadle.ir.context import emit
from treadle.ir.dtypes import float64

rng = np.random.default_rng(1)


def normal(*shape):
    return rng.standard_normal(shape)


def positive(*shape):
    return rng.uniform(0.3, 2.0, shape)


UNARY = {
    "neg": normal, "abs": normal, "exp": normal, "exp2": normal, "expm1": normal, "square": normal, "sin": normal,
    "cos": normal, "sinh": normal, "cosh": normal, "tanh": normal, "asinh": normal, "atan": normal, "erf": normal,
    "erfc": normal, "sigmoid": normal, "softplus": normal, "identity": normal, "log": positive, "log2": positive,
    "log10": positive, "log1p": positive, "sqrt": positive, "rsqrt": positive, "cbrt": positive,
    "reciprocal": positive, "sign": normal, "floor": normal, "ceil": normal, "round": normal, "trunc": normal,
    "tan": lambda *s: rng.uniform(-1, 1, s), "asin": lambda *s: rng.uniform(-0.9, 0.9, s),
    "acos": lambda *s: rng.uniform(-0.9, 0.9, s), "atanh": lambda *s: rng.uniform(-0.9, 0.9, s),
    "acosh": lambda *s: rng.uniform(1.2, 3, s),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    check(lambda x: emit(name, x), UNARY[name](3, 4))


BINARY = {"add": normal, "sub": normal, "mul": normal, "div": positive, "pow": positive, "maximum": normal,
          "minimum": normal, "hypot": normal, "atan2": normal, "remainder": positive, "fmod": positive,
          "floor_divide": positive}
BROADCASTS = [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((), (2, 3)), ((2, 1, 3), (4, 1)), ((0, 3), (1, 3))]


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
def test_binary(name, shapes):
    check(lambda x, y: emit(name, x, y), *(BINARY[name](*s) for s in shapes))


def test_the_same_operand_twice():
    check(lambda x: x * x + x, normal(3))


def test_selection():
    c = np.array([True, False, True])
    check(lambda c, x, y: emit("where", c, x, y), c, normal(2, 3), normal(3))
    check(lambda x: emit("clip", x, lo=-0.5, hi=None) + emit("clip", x, lo=None, hi=0.5) * x, normal(5, 5))


def test_cast_between_floats():
    check(lambda x: emit("cast", emit("sin", emit("cast", x, dtype=float64)), dtype=float64), normal(3))


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2), ()], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("name", ["reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod", "logsumexp"])
def test_reductions(name, axes, keepdims):
    check(lambda x: emit(name, x, axes=axes, keepdims=keepdims), normal(3, 2, 4))


def test_product_over_zeros():
    x = normal(3, 4)
    x[0, 1] = x[2, 0] = x[2, 3] = 0.0
    check(lambda x: emit("reduce_prod", x, axes=(1,)), x)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["cumsum", "cumprod"])
def test_cumulative(name, exclusive, reverse):
    x = normal(2, 5, 3)
    x[0, 1] = 0.0
    x[1, 3, 2] = x[1, 4, 2] = 0.0
    check(lambda x: emit(name, x, axis=1, exclusive=exclusive, reverse=reverse), x)


@pytest.mark.parametrize("tx", [False, True])
@pytest.mark.parametrize("ty", [False, True])
@pytest.mark.parametrize("batch", [((), ()), ((2,), ()), ((), (2,)), ((2,), (2,)), ((2, 1), (3,)), ((1,), (2,))],
                         ids=str)
def test_matmul(tx, ty, batch):
    x = normal(*batch[0], *((4, 3) if tx else (3, 4)))
    y = normal(*batch[1], *((5, 4) if ty else (4, 5)))
    check(lambda x, y: emit("matmul", x, y, transpose_x=tx, transpose_y=ty), x, y)


def test_shape_ops():
    check(lambda x: emit("reshape", x, shape=(4, 3)) * 2.0, normal(2, 6))
    check(lambda x: emit("transpose", x, perm=(2, 0, 1)), normal(2, 3, 4))
    check(lambda x: emit("broadcast_to", x, shape=(2, 3, 4)), normal(3, 1))
    check(lambda x: emit("reverse", x, axes=(0, 2)), normal(2, 3, 4))
    check(lambda x, y, z: emit("concat", x, y, x, z, axis=1), normal(2, 3), normal(2, 1), normal(2, 0))


@pytest.mark.parametrize("bounds", [((1, 0), (5, 4), (2, 1)), ((5, 3), (0, -1), (-2, -1)), ((6, 0), (-1, 4), (-4, 3)),
                                    ((2, 2), (2, 4), (1, 1)), ((4, 0), (6, 4), (3, 2))], ids=str)
def test_slice(bounds):
    starts, limits, strides = bounds
    check(lambda x: emit("slice", x, starts=starts, limits=limits, strides=strides), normal(7, 4))


@pytest.mark.parametrize("padding", [((1, 0), (2, 1), (0, 0)), ((0, 1), (0, 0), (2, 1)), ((-1, 2), (0, -2), (0, 0)),
                                     ((-2, -1), (1, -1), (1, 2)), ((-4, 0), (1, 0), (0, 0))], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (0, 3)], ids=str)
def test_pad(padding, shape):
    low, high, interior = padding
    if shape[0] == 0 and low[0] + high[0] < 0:
        pytest.skip("no such result")
    check(lambda x: emit("pad", x, low=low, high=high, interior=interior, value=1.5), normal(*shape))
