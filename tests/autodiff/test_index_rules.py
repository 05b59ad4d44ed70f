"""Rules of gathers, scatters and order, with repeated indices and with indices outside."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import check

from treadle.ir.context import emit

rng = np.random.default_rng(3)


def normal(*shape):
    return rng.standard_normal(shape)


INDICES = [np.array([0, 2, 2, 1]), np.array([[1, 1], [-3, 9]]), np.array(2), np.zeros((0,), np.int64),
           np.array([0, 3, 3], np.int8)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("indices", INDICES, ids=lambda a: str(a.tolist()))
def test_take_and_scatter_add(indices, axis):
    x = normal(4, 5)
    check(lambda x, i: emit("take", x, i, axis=axis), x, indices)
    updates = normal(*x.shape[:axis], *indices.shape, *x.shape[axis + 1:])
    check(lambda x, i, u: emit("scatter_add", x, i, u, axis=axis), x, indices, updates)


def test_a_long_axis_with_narrow_indices():
    check(lambda x, i: emit("take", x, i, axis=0), normal(300, 2), np.array([0, 127, -5], np.int8))


@pytest.mark.parametrize("axis", [0, 1])
def test_along_axis(axis):
    x = normal(3, 4)
    indices = rng.integers(-2, 6, (3, 7) if axis else (5, 4))
    check(lambda x, i: emit("take_along_axis", x, i, axis=axis), x, indices)
    check(lambda x, i, u: emit("scatter_add_along_axis", x, i, u, axis=axis), x, indices, normal(*indices.shape))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_index_vectors(depth):
    x = normal(3, 2, 4)
    indices = rng.integers(-1, 4, (2, 3, depth))
    check(lambda x, i: emit("gather_nd", x, i), x, indices)
    updates = normal(2, 3, *x.shape[depth:])
    check(lambda x, i, u: emit("scatter_add_nd", x, i, u), x, indices, updates)
    check(lambda x, i, u: emit("scatter_nd", x, i, u), x, indices, updates)


def test_dynamic_slices():
    x, update = normal(4, 5), normal(2, 3)
    for row, column in ((1, 1), (3, -2)):
        starts = np.array(row), np.array(column)
        check(lambda x, i, j: emit("dynamic_slice", x, i, j, sizes=(2, 3)), x, *starts)
        check(lambda x, u, i, j: emit("dynamic_update_slice", x, u, i, j), x, update, *starts)


def test_order():
    x = normal(3, 6)
    check(lambda x: emit("sort", x, axis=1, descending=True)[0] ** 2.0, np.abs(x))
    check(lambda x: emit("sort", x, axis=0)[0] * 2.0, x)
    check(lambda x: emit("top_k", x, k=2, axis=1)[0] * emit("top_k", x, k=2, axis=1, largest=False)[0], x)
