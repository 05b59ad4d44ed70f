"""Indexing against NumPy: basic, advanced, masks, updates, on drawn shapes and indices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import treadle as td

from .tools import assert_close, both, traced

X = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
L = np.array

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4)


@given(st.data())
def test_basic_indices(data):
    shape = data.draw(SHAPES)
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    assert_close(td.asarray(x)[index], np.asarray(x[index]))


@given(st.data())
def test_updates_at_basic_indices(data):
    shape = data.draw(SHAPES)
    index = data.draw(hnp.basic_indices(shape))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    region = np.shape(x[index])
    values = -np.arange(1, np.prod(region, dtype=int) + 1, dtype=np.float32).reshape(region)
    replaced, added = x.copy(), x.copy()
    replaced[index] = values
    added[index] += values
    assert_close(td.asarray(x).at[index].set(values), replaced)
    assert_close(td.asarray(x).at[index].add(values), added)


ADVANCED = [
    L([0, 2]),
    ([0, -1],),
    (slice(None), L([[0, 1], [2, -1]])),
    (L([0, 2]), L([1, 3])),
    (L([[0], [2]]), L([1, 3])),
    (0, slice(None), L([4, 0])),
    (L([1, 1]), slice(1, 3), L([0, 4])),
    (slice(None), L([0, 1]), L([2, 3])),
    (Ellipsis, L([0])),
    (slice(0, 2), None, L([1, 2]), slice(None, None, -2)),
    (1, L([0, 3])),
    (L([0, 1]), 2),
    (None, L([0]), Ellipsis, None),
    (slice(None), 1, L([[0, 1]])),
    (L(2), L([0, 1])),
    (np.int64(1), slice(None), -1),
    (L([], dtype=int),),
    (L([0, 1], dtype=np.uint8), -1),
    (slice(None, None, 2), L([3, 0]), slice(None, None, -1)),
]


@pytest.mark.parametrize("case", range(len(ADVANCED)))
def test_advanced_indices(case):
    index = ADVANCED[case]
    index = tuple(L(i) if isinstance(i, list) else i for i in index) if isinstance(index, tuple) else index
    expected = X[index]
    assert_close(both(lambda x: x[index], X), np.asarray(expected))
    values = np.arange(expected.size, dtype=np.float32).reshape(expected.shape) + 100
    if len({tuple(p) for p in np.argwhere(np.ones(expected.shape))}) == len(
        set(np.arange(60).reshape(X.shape)[index].ravel())
    ):
        replaced = X.copy()
        replaced[index] = values
        assert_close(both(lambda x: x.at[index].set(values), X), replaced)
    added = X.copy()
    np.add.at(added, index, values)
    assert_close(both(lambda x: x.at[index].add(values), X), added)


def test_traced_indices():
    def pick(x, i):
        return x[i], x[:, i], x[i, :, i], x[-i - 1], td.take(x, i, 1), x.at[i].set(0.0), x.at[:, i].add(1.0)

    for i in (np.asarray(2), L([0, 2, 2]), L([-1, 0], np.int32)):
        x = td.asarray(X)
        assert_close(traced(pick, X, i), pick(x, td.asarray(i)))
        assert_close(pick(x, td.asarray(i))[0], np.asarray(X[i]))


def test_masks():
    mask = X[..., 0] % 2 == 0
    x = td.asarray(X)
    assert_close(x[td.asarray(mask)], X[mask])
    assert_close(x[X > 30], X[X > 30])
    assert_close(x[:, td.tensor([True, False, True, False])], X[:, [0, 2]])
    expected = X.copy()
    expected[mask] = 0
    assert_close(both(lambda x: x.at[x[..., 0] % 2 == 0].set(0.0), X), expected)
    assert_close(x.at[mask].set(X[mask] * 2).sum(), np.where(mask[..., None], X * 2, X).sum())
    assert_close(traced(lambda x: x[x > 30], X), X[X > 30])
    assert_close(traced(lambda x: td.nonzero(x > 57), X), tuple(np.nonzero(X > 57)))
    assert_close(td.nonzero(td.asarray(X > 57)), tuple(np.nonzero(X > 57)))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (3, "out of range for axis 0 of size 3"),
        ((0, -5), "out of range"),
        ((0, 0, 0, 0), "4 axes"),
        ((..., ...), "two ellipses"),
        (1.5, "is no index"),
        (L([0, 5]), "out of range"),
        (L([0.5]), "integer dtype"),
        (True, "bool"),
        ("a", "is no index"),
        (slice(None, None, 0), "step"),
    ],
)
def test_wrong_indices(index, words):
    with pytest.raises(td.TreadleError, match=words) as caught:
        td.asarray(X)[index]
    assert "test_indexing.py" in str(caught.value)


def test_traced_slice_bounds_are_refused():
    with pytest.raises(td.TreadleError, match="td.dynamic_slice"):
        td.trace(lambda x, i: x[i:], X, np.asarray(1))
    assert_close(both(lambda x, i: td.dynamic_slice(x, (i, 0, 1), (1, 4, 2)), X, np.asarray(1)), X[1:2, :, 1:3])
    updated = X.copy()
    updated[1:3, 2:4, 0:1] = -1
    assert_close(
        both(lambda x, i: td.dynamic_update_slice(x, -td.ones((2, 2, 1)), (i, 2, 0)), X, np.asarray(1)),
        updated,
    )


def test_by_name():
    i = L([[0, 2], [1, 1]])
    assert_close(both(lambda x: td.take(x, i), X), np.take(X, i))
    assert_close(both(lambda x: x.take(i, 1), X), np.take(X, i, 1))
    assert_close(both(lambda x: td.gather(x, i), X), X[i])
    along = np.argsort(-X, 1)
    assert_close(both(lambda x, i: td.take_along_axis(x, i, 1), X, along), np.take_along_axis(X, along, 1))
    assert_close(both(lambda x: td.take_along_axis(x, L([[[0]]]), -1), X), X[..., :1])
    expected = np.zeros((4, 5), np.float32)
    np.add.at(expected, i, X[:2, :2])
    assert_close(both(lambda u: td.scatter_add(td.zeros((4, 5)), i, u), X[:2, :2]), expected)
    assert_close(both(lambda x: td.gather_nd(x, i), X), X[i[:, 0], i[:, 1]])
    assert_close(
        td.scatter_add_nd(td.zeros((3, 4)), i, td.ones(2)),
        np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0] * 4], np.float32),
    )


def test_other_updates():
    x = td.asarray(X)
    assert (
        x.at[0].multiply(2.0)[0, 0, 1] == 2
        and x.at[0, 0].maximum(3).max() == 59
        and x.at[2].minimum(1).max() == 39
    )
    assert (x.at[1].get().numpy() == X[1]).all()
    assert_close(td.zeros(3).at[L([1, 1])].set(td.tensor([5.0, 7.0])), L([0, 7, 0], np.float32))
    with pytest.raises(td.TreadleError, match=r"f32\[7\] do not fit"):
        x.at[0].set(td.zeros(7))


def test_gradients_of_indexing():
    for fn in (
        lambda x: x[1, ::-2],
        lambda x: x[:, L([0, 0, 3])],
        lambda x: x.at[1].set(2.0) * x,
        lambda x: x.at[:, 1].add(x[:, 0]) ** 2,
        lambda x: x[L([0, 1]), L([1, 1])],
        lambda x: x.at[L([0, 2])].set(x[:2] * 3),
    ):
        x, d = X.astype(np.float64), np.random.default_rng(0).normal(size=X.shape)
        slope = (
            td.sum(td.sin(fn(td.asarray(x + 1e-6 * d)))) - td.sum(td.sin(fn(td.asarray(x - 1e-6 * d))))
        ).item() / 2e-6
        gradient = td.grad(lambda x: td.sum(td.sin(fn(x))))(x)  # noqa: B023
        np.testing.assert_allclose((gradient.numpy() * d).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("how", ["set", "add"])
@pytest.mark.parametrize("index, axes", [
    (lambda i, j: i, (0,)), (lambda i, j: (slice(None), i), (1,)), (lambda i, j: (1, slice(None), i), (2,)),
    (lambda i, j: (slice(None), i, j), (1, 2)), (lambda i, j: (i, slice(None), j), (0, 2)),
    (lambda i, j: (i, ..., slice(1, 3)), (0,)),
])
def test_compiled_updates_drop_what_is_out_of_range(how, index, axes):
    i, j = np.array([0, 7, -2, -9]), np.array([1, 2, 3, 9])
    expected = X.copy()
    for pair in zip(i, j):
        place = index(*pair)
        used = [k for k in (place if isinstance(place, tuple) else (place,)) if isinstance(k, np.integer)]
        assert len(used) == len(axes)
        if all(-X.shape[a] <= k < X.shape[a] for a, k in zip(axes, used)):
            expected[place] = 7 if how == "set" else expected[place] + 7
    found = td.compile(lambda x, i, j: getattr(x.at[index(i, j)], how)(7.0))(X, i, j)
    np.testing.assert_array_equal(found.numpy(), expected)
