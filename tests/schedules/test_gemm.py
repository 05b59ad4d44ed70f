"""Products of every form, type and awkward size against NumPy in float64."""

import itertools
import warnings
from dataclasses import replace

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import pytest

from treadle.ir.errors import DTypeError, ShapeError
from treadle.schedules.gemm import GemmConfig, GemmHooks, GemmProblem, candidates, gemm_primfunc, propose
from treadle.schedules.target import Target

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tvm = pytest.importorskip("tvm")
    from tvm import tirx
    from tvm.tirx.script import builder as T

HOST = Target.parse("cpu")
FORMS = list(itertools.product((False, True), repeat=2))
TOLERANCE = {"float64": 1e-14, "float32": 4e-6, "float16": 2e-3, "bfloat16": 1e-2}


def narrow(bits: int) -> Target:
    """This host, scheduled for vectors of `bits`."""
    if bits > HOST.vector_bits:
        pytest.skip(f"this host has no {bits}-bit vectors")
    return replace(HOST, vector_bits=bits)


def compiled(problem, config=None, target=HOST, hooks=None):
    return tvm.compile(gemm_primfunc(problem, config, target, "gemm", hooks), target.tvm_target)["gemm"]


def operands(problem, seed=0):
    rng = np.random.default_rng(seed)

    def draw(shape, dtype):
        x = rng.integers(-5, 6, shape) if "int" in dtype else rng.standard_normal(shape)
        return np.abs(x).astype(dtype) if dtype.startswith("u") else x.astype(dtype)

    return draw(problem.shape_a, problem.dtype_a), draw(problem.shape_b, problem.dtype_b)


def expected(problem, a, b):
    wide = np.float64 if problem.acc_dtype.startswith("float") else np.int64
    a, b = a.astype(wide), b.astype(wide)
    return (a.swapaxes(-1, -2) if problem.transpose_a else a) @ (b.swapaxes(-1, -2) if problem.transpose_b else b)


def check(problem, config=None, target=HOST):
    a, b = operands(problem)
    c = tvm.runtime.tensor(np.full(problem.shape_c, 77, problem.out_dtype))
    compiled(problem, config, target)(tvm.runtime.tensor(a), tvm.runtime.tensor(b), c)
    want = expected(problem, a, b)
    if problem.out_dtype in TOLERANCE:
        scale = TOLERANCE[problem.out_dtype] * max(1, problem.k) ** 0.5
        np.testing.assert_allclose(c.numpy().astype(np.float64), want, rtol=TOLERANCE[problem.out_dtype], atol=scale)
    else:
        np.testing.assert_array_equal(c.numpy(), want.astype(problem.out_dtype))


SIZES = [(33, 65, 40), (13, 100, 33), (5, 17, 7), (1, 70, 50), (4, 48, 129), (70, 1, 50), (50, 3, 20), (1, 1, 1),
         (1, 1, 100), (64, 64, 64), (29, 16, 18)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ta, tb", FORMS)
def test_forms_and_sizes(size, ta, tb):
    check(GemmProblem(*size, ta, tb))


@pytest.mark.parametrize("bits", [512, 256, 128])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("ta, tb", FORMS)
def test_dtypes_and_vector_widths(bits, dtype, ta, tb):
    out = dtype if ta else ("float32" if dtype in ("bfloat16", "float16") else dtype)
    check(GemmProblem(35, 67, 41, ta, tb, dtype_a=dtype, dtype_b=dtype, out_dtype=out), target=narrow(bits))


@pytest.mark.parametrize("dtype, out", [("int32", "int32"), ("int64", "int64"), ("int8", "int32"), ("uint8", "int32"),
                                        ("int8", "int64")])
@pytest.mark.parametrize("ta, tb", FORMS)
def test_integers_are_exact(dtype, out, ta, tb):
    check(GemmProblem(19, 37, 23, ta, tb, dtype_a=dtype, dtype_b=dtype, out_dtype=out))


@pytest.mark.parametrize("batch_a, batch_b", [((3,), (3,)), ((3,), ()), ((), (3,)), ((2, 1), (3,)), ((2, 3), (1, 3)),
                                              ((1,), (1,)), ((4, 2), (1,)), ((0,), ())])
@pytest.mark.parametrize("ta, tb", FORMS)
def test_batches_broadcast(batch_a, batch_b, ta, tb):
    check(GemmProblem(7, 33, 20, ta, tb, batch_a, batch_b))


@pytest.mark.parametrize("size", [(5, 20, 0), (0, 20, 5), (5, 0, 3), (0, 0, 0)])
def test_empty(size):
    check(GemmProblem(*size))


@pytest.mark.parametrize("change", [
    dict(k_block=32), dict(k_block=32, row_tiles=2, col_panels=2, order="panels"), dict(pack_a=True, col_panels=2),
    dict(pack_a=True, col_panels=3, k_block=64, row_tiles=3), dict(tile_rows=3, tile_cols=64),
    dict(parallel=False), dict(swap=True)])
@pytest.mark.parametrize("ta, tb", FORMS)
def test_every_option_of_a_config(change, ta, tb):
    base = GemmConfig(tile_rows=6, tile_cols=2 * HOST.vector_bits // 32)
    check(GemmProblem(40, 100, 135, ta, tb), replace(base, **change))


BF16 = GemmConfig(tile_rows=6, tile_cols=32, dot_bf16=True)


@pytest.mark.parametrize("change", [{}, dict(k_block=64, row_tiles=3), dict(pack_a=True, col_panels=2),
                                    dict(pack_a=True, pack_tiles=3, tile_rows=4), dict(pack_a=True, pack_tiles=99)])
@pytest.mark.parametrize("k", [1, 31, 32, 129])
@pytest.mark.parametrize("ta, tb", FORMS)
def test_pairs_of_bfloat16(change, k, ta, tb):
    if not HOST.has("avx512bf16"):
        pytest.skip("this host does not multiply bfloat16")
    problem = GemmProblem(20, 70, k, ta, tb, dtype_a="bfloat16", dtype_b="bfloat16")
    check(problem, replace(BF16, **change))


@pytest.mark.parametrize("m, n, k", [(1, 100, 65), (3, 64, 64), (4, 33, 17), (9, 40, 30)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_few_rows_are_streamed(m, n, k, dtype):
    """Without a copy of B: in place if it lies row by row, by dot products if it lies transposed."""
    for tb in (False, True):
        problem = GemmProblem(m, n, k, False, tb, dtype_a=dtype, dtype_b=dtype,
                              out_dtype="float64" if dtype == "float64" else "float32")
        config = propose(problem, HOST)
        assert config.kind == "dot" if tb else not config.pack_b
        check(problem, config)


def test_candidates_begin_with_the_proposal_and_are_right():
    problem = GemmProblem(60, 90, 600)
    configs = list(candidates(problem, HOST))
    assert configs[0] == propose(problem, HOST) and len(configs) == len(set(configs)) > 10
    for config in configs[1::12]:
        check(problem, config)


def test_threads_share_the_work():
    problem = GemmProblem(300, 200, 100)
    assert propose(problem, HOST).parallel
    check(problem)


def fused_hooks(problem, bias, residual, c, second):
    """c = residual = relu(A @ B + bias) + residual, in place; second = the sum before it."""
    def store(batch, i, j, value):
        total = value + bias[j]
        T.buffer_store(second, total, [*batch, i, j])
        T.buffer_store(c, T.max(total, T.float32(0)) + c[(*batch, i, j)], [*batch, i, j])
    a = tirx.decl_buffer(problem.shape_a, "float32", name="A")
    b = tirx.decl_buffer(problem.shape_b, "float32", name="B")
    return GemmHooks(params=(a, b, bias, c, second), a=a, b=b, store=store)


@pytest.mark.parametrize("size", [(33, 65, 40), (1, 50, 20), (40, 1, 9), (20, 7, 70)])
@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("tb", [False, True])
def test_epilogue_in_place_with_two_outputs(size, batch, tb):
    problem = GemmProblem(*size, False, tb, batch_a=batch)
    bias, c, second = (tirx.decl_buffer(shape, "float32", name=name) for name, shape in (
        ("bias", (problem.n,)), ("C", problem.shape_c), ("S", problem.shape_c)))
    run = compiled(problem, hooks=fused_hooks(problem, bias, None, c, second))
    a, b = operands(problem)
    rng = np.random.default_rng(1)
    beta, residual = rng.standard_normal(problem.n).astype("f"), rng.standard_normal(problem.shape_c).astype("f")
    tensors = [tvm.runtime.tensor(x) for x in (a, b, beta, residual, np.zeros_like(residual))]
    run(*tensors)
    total = expected(problem, a, b) + beta
    np.testing.assert_allclose(tensors[4].numpy(), total, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(tensors[3].numpy(), np.maximum(total, 0) + residual, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(33, 65, 40), (1, 50, 20), (40, 1, 30), (6, 4, 70), (5, 17, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ta, tb", FORMS)
def test_prologues_fuse_into_packing(size, dtype, ta, tb):
    """A arrives as int8 and is scaled, B is squared: both in `dtype` where they are multiplied."""
    problem = GemmProblem(*size, ta, tb, batch_a=(2,), dtype_a=dtype, dtype_b=dtype)
    x = tirx.decl_buffer(problem.shape_a, "int8", name="X")
    y = tirx.decl_buffer(problem.shape_b, "float32", name="Y")
    c = tirx.decl_buffer(problem.shape_c, "float32", name="C")

    def load_a(batch, i, k):
        return T.cast(T.cast(x[(*batch, *((k, i) if ta else (i, k)))], "float32") * T.float32(0.25), dtype)

    def load_b(batch, k, j):
        value = y[(*batch, *((j, k) if tb else (k, j)))]
        return T.cast(value * value, dtype)

    hooks = GemmHooks(params=(x, y, c), load_a=load_a, load_b=load_b,
                      store=lambda batch, i, j, value: T.buffer_store(c, value, [*batch, i, j]))
    run = compiled(problem, hooks=hooks)
    rng = np.random.default_rng(2)
    xs, ys = rng.integers(-8, 8, problem.shape_a).astype("int8"), rng.standard_normal(problem.shape_b).astype("f")
    out = tvm.runtime.tensor(np.zeros(problem.shape_c, "f"))
    run(tvm.runtime.tensor(xs), tvm.runtime.tensor(ys), out)
    want = expected(problem, (xs * np.float32(0.25)).astype(dtype), (ys * ys).astype(dtype))
    # TVM drops a rounding to bfloat16 and back between two float32 computations (excess precision).
    tolerance = 1e-3 if dtype == "float32" else 0.3
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-5, atol=tolerance)


def test_bad_problems_are_told():
    with pytest.raises(ShapeError, match="do not broadcast"):
        GemmProblem(1, 1, 1, batch_a=(2,), batch_b=(3,))
    with pytest.raises(DTypeError, match="bool"):
        GemmProblem(1, 1, 1, dtype_a="bool")
