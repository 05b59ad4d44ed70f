"""What a program with open sizes takes for granted is asked at run time: nothing is read outside of an array."""

import numpy as np
import pytest

import treadle as td


def table(x):
    positions = td.asarray(np.arange(8, dtype=np.float32))
    return x + positions[:x.shape[1]]


def test_a_table_shorter_than_the_sequence(tmp_path):
    f = td.compile(table, dynamic={"x": ("batch", "seq")})
    for n in (1, 4, 8):
        x = np.ones((2, n), np.float32)
        np.testing.assert_array_equal(f(x).numpy(), x + np.arange(n))
    f.save(tmp_path / "f.treadle")
    for program in (f, td.load(tmp_path / "f.treadle")):
        for n in (9, 5000):
            with pytest.raises(td.ShapeError, match=rf"seq = {n} a slice from 0 to seq is outside its axis.*test_size"):
                program(np.ones((2, n), np.float32))
        assert program(np.ones((1, 3), np.float32)).shape == (1, 3)
    assert f.stats.compiles == 1


def test_what_is_certain_is_not_asked():
    f = td.compile(lambda x: (x[1:], x[:-1], x[::-1], x[:, 2:]), dynamic={"x": ("n", 4)})
    f(np.ones((3, 4), np.float32))
    assert f._last.executable.signature.checks == []


def test_bounds_that_data_decide():
    f = td.compile(lambda x, m: x[:td.nonzero(m)[0].shape[0]])
    x = np.arange(4, dtype=np.float32)
    assert f(x, np.ones(3, bool)).shape == (3,)
    g = td.compile(lambda x, m: x[:2 * td.nonzero(m)[0].shape[0]])
    assert g(x, np.array([True, True, False])).shape == (4,)
    with pytest.raises(td.ShapeError, match="outside its axis of 4"):
        g(x, np.ones(3, bool))
