"""Fused attention against the reference: one kernel, and no matrix of scores in memory."""

import dataclasses

import numpy as np
import pytest

from treadle.ir import interp
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType
from treadle.schedules import attention
from treadle.schedules.build import build
from treadle.schedules.lower import expand, lower
from treadle.schedules.plan import plan_memory
from treadle.schedules.target import Target

TOLERANCE = {"float64": 1e-13, "float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}


def problem(lead, lead_k, queries, keys, features, values, dtype="float32", mask=None, causal=False, scale=None,
            after=None):
    """(graph, arrays); `mask` is a kind and a shape, `after(y)` what follows in the graph."""
    rng = np.random.default_rng(0)
    shapes = [(*lead, queries, features), (*lead_k, keys, features), (*lead_k, keys, values)]
    arrays = [rng.standard_normal(s).astype(as_dtype(dtype).np) for s in shapes]
    if mask:
        kind, shape = mask
        seen = rng.random(shape) < 0.6
        if shape[-2:] == (queries, keys):
            seen[..., 2, :] = False  # a query that sees nothing
        arrays.append(seen if kind == "bool" else rng.standard_normal(shape).astype(as_dtype(dtype).np))
    builder = GraphBuilder()
    with builder as b:
        inputs = [b.input(TensorType(x.shape, x.dtype.name), f"x{i}") for i, x in enumerate(arrays)]
        y = emit("attention", *inputs, causal=causal, scale=scale)
        b.output(after(y) if after else y)
    return builder.graph, arrays


def check(graph, arrays, target="cpu", kernels=1):
    with np.errstate(all="ignore"):
        (want,) = interp.run(graph, arrays)
    program = lower(graph, target)
    assert len(program.steps) == kernels
    (got,) = build(program, target).run(arrays)
    tol = TOLERANCE[str(graph.outputs[0].dtype)]
    assert got.dtype == want.dtype
    np.testing.assert_allclose(np.asarray(got, "f8"), want.astype("f8"), rtol=tol, atol=tol)
    return np.asarray(got), program


SHAPES = [  # lead, lead of k and v, queries, keys, features, values, mask, causal, scale
    ((2,), (2,), 33, 47, 17, 5, None, False, None),
    ((2, 3), (2, 3), 47, 33, 16, 17, None, True, None),
    ((2,), (2,), 19, 70, 40, 33, None, True, -0.3),
    ((2, 2), (2, 1), 61, 61, 64, 64, ("bool", (2, 1, 61, 61)), False, None),
    ((2,), (), 13, 29, 1, 1, ("add", (29,)), False, 0.5),
    ((3,), (1,), 26, 5, 9, 70, ("bool", (26, 1)), True, None),
    ((2, 2), (2, 2), 35, 44, 15, 20, ("add", (2, 1, 1, 44)), True, None),
]


CASES = [(case, dtype) for dtype in ("float32", "bfloat16") for case in SHAPES] \
    + [(SHAPES[i], dtype) for dtype in ("float64", "float16") for i in (1, 3, 6)]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda c: c if isinstance(c, str) else f"{c[2]}x{c[3]}")
def test_against_reference(case, dtype):
    *sizes, mask, causal, scale = case
    check(*problem(*sizes, dtype=dtype, mask=mask, causal=causal, scale=scale))


@pytest.mark.parametrize(("queries", "keys", "causal", "mask"), [
    (333, 290, True, None), (101, 217, True, ("bool", (101, 217))), (60, 300, True, None)])
def test_several_blocks_of_keys(queries, keys, causal, mask):
    """A cache of 64 KB holds a part of the keys: the softmax is carried from block to block."""
    target = dataclasses.replace(Target.parse("cpu"), l2_bytes=1 << 16)
    graph, arrays = problem((2,), (2,), queries, keys, 33, 35, mask=mask, causal=causal)
    config = attention.propose(attention.AttentionProblem.of(graph.nodes[-1]), target)
    assert config.key_panels * config.score_vectors * target.vector_bits // 32 < keys
    check(graph, arrays, target)


def test_extreme_scores_do_not_overflow():
    graph, arrays = problem((2,), (2,), 24, 40, 8, 8, causal=True)
    arrays[0] *= 1e4
    check(graph, arrays)


def test_scores_are_never_in_memory():
    graph, arrays = problem((2, 4), (2, 4), 512, 512, 16, 16, causal=True)
    _, program = check(graph, arrays)
    operands = sum(x.nbytes for x in arrays) + graph.outputs[0].type.nbytes
    assert plan_memory(program).peak_bytes == operands < 2 * 4 * 512 * 512 * 4


def test_what_follows_is_part_of_the_kernel():
    def after(y):
        return emit("cast", emit("reshape", emit("exp", y * 0.5), shape=(6, 37, 20)), dtype=as_dtype("float16"))
    check(*problem((2, 3), (2, 3), 37, 37, 16, 20, after=after))


def test_one_value_as_every_operand():
    x = np.random.default_rng(1).standard_normal((2, 21, 21)).astype("f4")
    builder = GraphBuilder()
    with builder as b:
        v = b.input(TensorType(x.shape, "float32"), "x")
        b.output(emit("attention", v, v, v, v, causal=False))
    check(builder.graph, [x])


def test_rows_do_not_depend_on_threads_and_vectors():
    graph, arrays = problem((), (), 600, 100, 20, 20, causal=True)
    cpu = Target.parse("cpu")
    one, _ = check(graph, arrays, dataclasses.replace(cpu, threads=1))
    many, _ = check(graph, arrays, dataclasses.replace(cpu, threads=7))
    np.testing.assert_array_equal(one, many)
    check(graph, arrays, dataclasses.replace(cpu, vector_bits=128))


@pytest.mark.parametrize(("lead", "queries", "keys"), [((4,), 1, 50), ((), 100, 300), ((6,), 5, 2000), ((0,), 6, 6)])
def test_few_queries_and_nothing_at_all_are_decomposed(lead, queries, keys):
    graph, arrays = problem(lead, lead, queries, keys, 8, 8)
    assert all(n.op.name != "attention" for n in expand(graph).nodes)
    (want,), (got,) = interp.run(graph, arrays), build(lower(graph)).run(arrays)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
