"""Selections that LLVM 22 gets wrong when it is left alone come out right, whatever the types and the mask."""

import numpy as np
import pytest
from lowered import graph_of

from treadle.ir import interp
from treadle.ir.builder import emit
from treadle.schedules import codegen
from treadle.schedules.build import build
from treadle.schedules.llvm_bugs import suspicious
from treadle.schedules.lower import lower
from treadle.schedules.target import Target

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


def constant(value, dtype):
    bits = np.dtype(dtype).itemsize * 8
    return emit("constant", value=np.asarray(value & (2**bits - 1), f"uint{bits}").astype(dtype))


def bit_selects(dtype):
    """Graph outputs: every order of a selection between an operand and a choice of its bits by a constant."""
    def fn(mask, x, y):
        results = []
        for bits in (0x7FFFFFFF7FFF7F7F, 0xF0F0F0F0F0F0F0F0, 1):
            kept, rest = constant(bits, dtype), constant(~bits, dtype)
            parts = emit("bitwise_and", x, kept), emit("bitwise_and", y, rest)
            for op in ("bitwise_or", "bitwise_xor", "add"):
                for merged in (emit(op, *parts), emit(op, *reversed(parts))):
                    for other in (x, y):
                        results += [emit("where", mask, other, merged), emit("where", mask, merged, other)]
        return results
    return fn


def masks(n):
    rng = np.random.default_rng(0)
    return [np.ones(n, bool), np.zeros(n, bool), np.arange(n) % 2 == 0, rng.random(n) < 0.5]


@pytest.mark.parametrize("size", [1, 3, 8, 16, 71])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_where_and_bit_selection(dtype, size):
    graph = graph_of(bit_selects(dtype), ((size,), "bool"), ((size,), dtype), ((size,), dtype))
    executable = build(lower(graph, "cpu"), "cpu")
    rng, info = np.random.default_rng(1), np.iinfo(dtype)
    x, y = (rng.integers(info.min, info.max, size, dtype, endpoint=True) for _ in range(2))
    for mask in masks(size):
        for got, want in zip(executable.run([mask, x, y]), interp.run(graph, [mask, x, y]), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_where_of_every_operation(dtype):
    """A selection merges with what computes its operands; none of them may change the answer."""
    ops = ("add", "sub", "mul", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor", "left_shift",
           "right_shift", "floor_divide", "remainder")

    def fn(mask, x, y):
        return [emit("where", mask, *pair) for op in ops
                for pair in ((x, emit(op, x, y)), (emit(op, x, y), y), (y, emit(op, y, x)))]
    graph = graph_of(fn, ((67,), "bool"), ((67,), dtype), ((67,), dtype))
    executable = build(lower(graph, "cpu"), "cpu")
    rng, info = np.random.default_rng(2), np.iinfo(dtype)
    x, y = (rng.integers(info.min, info.max, 67, dtype, endpoint=True) for _ in range(2))
    y[::3] %= 7
    for mask in masks(67):
        with np.errstate(all="ignore"):
            wanted = interp.run(graph, [mask, x, y])
        for got, want in zip(executable.run([mask, x, y]), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.fixture
def wrong_kernel():
    """A kernel that LLVM gets wrong by itself."""
    if not Target.parse("cpu").has("avx512vl"):
        pytest.skip("only masked instructions are affected")

    def fn(mask, x, y):
        kept, rest = constant(0x7FFFFFFF, "int32"), constant(~0x7FFFFFFF, "int32")
        return [emit("where", mask, x, emit("bitwise_or", emit("bitwise_and", x, kept), emit("bitwise_and", y, rest)))]
    graph = graph_of(fn, ((16,), "bool"), ((16,), "int32"), ((16,), "int32"))
    return lower(graph, "cpu").kernel_calls[0].kernel


def test_the_wrong_instruction_is_found_and_avoided(wrong_kernel, monkeypatch):
    tries = []
    compiled = codegen._llvm_object
    monkeypatch.setattr(codegen, "_llvm_object", lambda *args: tries.append(compiled(*args)) or tries[-1])
    code = codegen.compile_kernel(wrong_kernel, "k", Target.parse("cpu"))
    assert [suspicious(c) for c in tries] == [True, False] and code == tries[-1]


def test_without_a_fence_the_kernel_gets_no_masks_at_all(wrong_kernel, monkeypatch):
    monkeypatch.setattr(codegen, "selects_apart", lambda mod: mod)
    assert not suspicious(codegen.compile_kernel(wrong_kernel, "k", Target.parse("cpu")))
    monkeypatch.setattr(codegen, "suspicious", lambda code: True)
    codegen.compile_kernel(wrong_kernel, "k", Target.parse("cpu"))  # nothing in it asks for AVX-512
