"""What TVM raises while something is compiled reaches the user as an error that names what is theirs."""

import numpy as np
import pytest
import tvm

import treadle as td
from treadle.schedules import codegen, rules

X = np.ones((3, 4), np.float32)


def failing(*_):
    raise tvm.error.InternalError("Check failed: (a == b) is false: arith\nStack trace: ...")


def of_a_user(x):
    return td.tanh(x) + 1


LINE = of_a_user.__code__.co_firstlineno + 1


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TREADLE_CACHE_DIR", str(tmp_path))


def message(fn, *args, **options) -> str:
    with pytest.raises(td.CompileError) as caught:
        td.compile(fn, **options)(*args)
    assert isinstance(caught.value.__cause__, (tvm.error.InternalError, td.CompileError))
    return str(caught.value)


def test_a_schedule_that_fails(monkeypatch):
    monkeypatch.setattr(rules, "RULES", (failing,))
    said = message(of_a_user, X, specialize=True)
    assert "the kernel tanh+add (ops: " in said and "tanh" in said and "Check failed: (a == b)" in said
    assert f"test_faults.py:{LINE}" in said and "TREADLE_DUMP" in said and "cpu:avx2" in said
    assert "Stack trace" not in said


def test_with_open_sizes_the_remedy_is_to_fix_them(monkeypatch):
    monkeypatch.setattr(rules, "RULES", (failing,))
    assert "specialize=True" in message(of_a_user, X, dynamic={"x": ("batch", 4)})


def test_code_generation_that_fails(monkeypatch):
    monkeypatch.setattr(codegen, "_right_object", failing)
    said = message(of_a_user, X, specialize=True)
    assert "the kernel tanh+add" in said and "Check failed" in said and f"test_faults.py:{LINE}" in said


def test_a_host_function_that_fails(monkeypatch):
    monkeypatch.setattr(codegen, "compile_host", failing)
    assert "the host function of a program cannot be compiled: InternalError" in message(of_a_user, X, specialize=True)


def test_errors_of_ours_and_lack_of_memory_stay_what_they_are(monkeypatch):
    def refuse(*_):
        raise td.ShapeError("too small")

    def exhausted(*_):
        raise MemoryError

    for rule, kind in ((refuse, td.ShapeError), (exhausted, MemoryError)):
        monkeypatch.setattr(rules, "RULES", (rule,))
        with pytest.raises(kind):
            td.compile(of_a_user, specialize=True)(X)
