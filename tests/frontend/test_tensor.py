"""Tensors: how they are made, what they are, how they promote, what they refuse."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

import treadle as td

from .tools import assert_close, both


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (1, "int64", ()),
        (1.5, "float32", ()),
        (True, "bool", ()),
        ([1, 2], "int64", (2,)),
        ([[1.0], [2]], "float32", (2, 1)),
        (np.zeros(3), "float64", (3,)),
        (np.float16(1), "float16", ()),
        (np.zeros((2, 0), ml_dtypes.bfloat16), "bfloat16", (2, 0)),
        ([], "float32", (0,)),
        (np.arange(3, dtype=">i4"), "int32", (3,)),
        ([np.int8(3), np.int8(4)], "int8", (2,)),
    ],
)
def test_data_decides_the_dtype(data, dtype, shape):
    t = td.tensor(data)
    assert (t.dtype, t.shape, t.ndim) == (dtype, shape, len(shape))
    assert t.numpy().dtype == np.asarray(t).dtype


def test_a_dtype_can_be_asked_for():
    assert td.tensor([1, 2], "bfloat16").numpy().dtype == ml_dtypes.bfloat16
    assert td.tensor([1.7], td.int32).item() == 1
    assert td.tensor(td.tensor([1.0, 2.0]), dtype=np.float64).dtype == "float64"
    assert np.zeros(2, td.bfloat16).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "data", [1j, "text", [object()], np.zeros(2, "datetime64[s]"), np.zeros(2, np.complex64)]
)
def test_what_is_no_number_is_refused(data):
    with pytest.raises(td.TreadleError, match="not a supported dtype"):
        td.tensor(data)


def test_ragged_lists_are_refused():
    with pytest.raises(td.TreadleError, match="rectangular"):
        td.tensor([[1, 2], [3]])


def test_tensor_copies_and_asarray_does_not():
    a = np.zeros(3, np.float32)
    copied, shared = td.tensor(a), td.asarray(a)
    a[0] = 1
    assert copied.numpy()[0] == 0 and shared.numpy()[0] == 1
    out = copied.numpy()
    out[0] = 5
    assert copied.numpy()[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        copied.numpy(copy=False)[0] = 1


def test_memory_is_aligned():
    for _ in range(5):
        assert td.tensor(np.zeros(3, np.int8))._value.array.ctypes.data % 64 == 0


def test_dlpack_and_pickle_and_copies():
    t = td.tensor([1.0, 2.0], requires_grad=True)
    assert np.shares_memory(np.from_dlpack(t), t._value.array)
    for other in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t)):
        assert other is not t and other.requires_grad and (other.numpy() == t.numpy()).all()
    assert td.tensor(td.tensor([3])).item() == 3


def test_python_numbers():
    assert float(td.tensor(2.5)) == 2.5 and int(td.tensor(2)) == 2 and bool(td.tensor(0)) is False
    assert (
        [10, 11, 12][td.tensor(1)] == 11
        and td.tensor([[3]]).item() == 3
        and td.tensor([1, 2]).tolist() == [1, 2]
    )
    assert td.tensor(1.5, "bfloat16").item() == 1.5 and len(td.zeros((4, 2))) == 4
    assert [r.tolist() for r in td.tensor([[1, 2], [3, 4]])] == [[1, 2], [3, 4]]
    for wrong in (
        lambda: bool(td.zeros(2)),
        lambda: td.zeros(2).item(),
        lambda: len(td.zeros(())),
        lambda: list(td.zeros(())),
        lambda: [1, 2][td.tensor(1.0)],
    ):
        with pytest.raises(td.TreadleError):
            wrong()


def test_repr_shows_elements_dtype_and_grad():
    assert (
        repr(td.tensor([1.0, 2.0], requires_grad=True))
        == "tensor([1., 2.], dtype=float32, requires_grad=True)"
    )
    assert "bfloat16" in repr(td.ones(2, "bfloat16"))
    assert td.trace(lambda x: [print(repr(x))] and x, td.spec((2,))).input_types


x32, x64, b16, h16 = td.ones(2), td.ones(2, "float64"), td.ones(2, "bfloat16"), td.ones(2, "float16")
i8, i64, u8, u64, flag = (td.ones(2, d) for d in ("int8", "int64", "uint8", "uint64", "bool"))


@pytest.mark.parametrize(
    ("result", "dtype"),
    [
        (x32 * 2.0, "float32"),
        (b16 * 2.0, "bfloat16"),
        (b16 + 1, "bfloat16"),
        (x32 + True, "float32"),
        (x32 + x64, "float64"),
        (b16 + h16, "float32"),
        (b16 + x32, "float32"),
        (i8 + i64, "int64"),
        (i8 + u8, "int16"),
        (i64 + u64, "float64"),
        (i8 + x32, "float32"),
        (i64 + b16, "bfloat16"),
        (flag + i8, "int8"),
        (i8 + 1, "int8"),
        (i8 + 1.0, "float32"),
        (flag + 1, "int64"),
        (flag + 1.0, "float32"),
        (i64 / i64, "float32"),
        (x32 * np.float64(2), "float32"),
        (x32 + np.ones(2), "float64"),
        (np.ones(2, np.float32) + x32, "float32"),
        (np.float32(1) + b16, "float32"),
        (2**x32, "float32"),
        (1 - i8, "int8"),
        (7 // i8, "int8"),
        (i8 < 3, "bool"),
        (td.exp(i8), "float32"),
        (td.sum(i8), "int64"),
        (td.sum(u8), "uint64"),
        (td.sum(flag), "int64"),
        (td.mean(i8), "float32"),
        (td.sum(b16), "bfloat16"),
        (td.where(flag, 1.0, i8), "float32"),
        (td.maximum(1.0, 2), "float32"),
        (td.argmax(x32), "int64"),
        (td.floor(i8), "int8"),
        (td.concatenate([i8, x32]), "float32"),
        (td.logical_and(x32, 1), "bool"),
    ],
)
def test_promotion(result, dtype):
    assert isinstance(result, td.Tensor) and result.dtype == dtype


def test_a_number_that_does_not_fit_is_refused():
    with pytest.raises(td.TreadleError, match="300 does not fit the dtype int8"):
        i8 + 300


def test_operators_match_numpy():
    x, y = np.array([[1.5, -2.0], [3.0, 4.0]], np.float32), np.array([2.0, -3.0], np.float32)
    for fn in (
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: a // b,
        lambda a, b: a % b,
        lambda a, b: a @ b,
        lambda a, b: -a,
        lambda a, b: abs(a),
        lambda a, b: a < b,
        lambda a, b: a == b,
        lambda a, b: a != b,
        lambda a, b: a**2,
        lambda a, b: a**3,
        lambda a, b: 2 - a,
        lambda a, b: a.T,
        lambda a, b: abs(a) ** 0.5,
        lambda a, b: abs(a) ** -1,
        lambda a, b: abs(a) ** b,
    ):
        assert_close(both(fn, x, y), fn(x, y))
    i, j = np.array([6, 5], np.int32), np.array([3, 1], np.int32)
    for fn in (
        lambda a, b: a & b,
        lambda a, b: a | b,
        lambda a, b: a ^ b,
        lambda a, b: a << b,
        lambda a, b: a >> b,
        lambda a, b: ~a,
        lambda a, b: a % -b,
        lambda a, b: -a // b,
        lambda a, b: a**b,
        lambda a, b: a**2,
    ):
        assert_close(both(fn, i, j), fn(i, j))


def test_operators_leave_strangers_alone():
    with pytest.raises(TypeError):
        td.ones(2) + "text"
    assert (td.ones(2) == None) is False  # noqa: E711
    assert td.ones(2) not in [None]


def test_assign_replaces_elements():
    p = td.nn.Parameter(np.zeros((2, 2), np.float32))
    place = p._value.array.ctypes.data
    view = p.reshape(4)
    assert p.assign([[1, 2], [3, 4]]) is p
    assert p._value.array.ctypes.data == place and p.tolist() == [[1, 2], [3, 4]]
    assert view.tolist() == [0, 0, 0, 0], "results of operations do not change"
    p.assign(7.0)
    assert p.tolist() == [[7, 7], [7, 7]]
    plain = td.zeros(3)
    kept = plain.numpy(copy=False)
    plain.assign(td.ones(3, "int64"))
    assert plain.tolist() == [1, 1, 1] and plain.dtype == "float32" and kept.tolist() == [0, 0, 0]
    with pytest.raises(td.TreadleError, match=r"f32\[3\] does not fit the tensor f32\[2,2\]"):
        p.assign(td.zeros(3))


def test_tensors_do_not_change():
    with pytest.raises(td.TreadleError, match=r"x.at\[i\].set"):
        td.zeros(2)[0] = 1.0
    with pytest.raises(td.TreadleError, match="role"):
        td.zeros(2).role = "nonsense"


def test_requires_grad_is_for_floating_leaves():
    with pytest.raises(td.TreadleError, match="int64 cannot require"):
        td.tensor([1], requires_grad=True)
    x = td.tensor([1.0], requires_grad=True)
    y = x * 2
    assert y.requires_grad and not y.is_leaf and not y.detach().requires_grad
    with pytest.raises(td.TreadleError, match="detach"):
        y.requires_grad = False
    with pytest.raises(td.TreadleError, match="detach"):
        y.assign(0.0)
    x.requires_grad = False
    assert not (x * 2).requires_grad
