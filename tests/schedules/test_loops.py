"""Generated loop nests: index algebra, elementwise and row kernels at odd shapes, dtypes and layouts."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from lowered import check, data, graph_of

import treadle as td
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType
from treadle.schedules.loops import refine
from treadle.schedules.loops_index import Axis, Index, Merged, clamp, flatten, unflatten, within

F32 = "float32"
SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (1, 1), (2, 3, 5), (67, 129), (33, 1), (4100,)]
REDUCED = [((), ()), ((5,), (0,)), ((5, 37), (0,)), ((5, 37), (1,)), ((5, 37), ()), ((4, 5, 6), (0, 2)),
           ((4, 5, 6), (1,)), ((0, 3), (0,)), ((0, 3), (1,)), ((3, 0), (0, 1)), ((2, 1, 3), (1,)), ((300, 70), (0,)),
           ((40000,), (0,)), ((100003,), (0,)), ((30011, 3), (0,)), ((2, 50021), (1,)), ((6, 8, 33, 5), (0, 2, 3)),
           ((1, 70000, 2), (1,))]


# Index algebra ----------------------------------------------------------------------------------------------------

def numbered(axes, index):
    """The index's value at every point of the axes."""
    values = []
    for point in itertools.product(*(range(a.extent) for a in axes)):
        for axis, i in zip(axes, point):
            axis.bind(i)
        values.append(index.expr())
    return values


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_reshaped_indices_point_to_the_same_element(shape, choose):
    size = int(np.prod(shape))
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    rows = choose.draw(st.sampled_from(divisors))
    axes = [Axis(n) for n in shape]
    position = flatten([Index.of(a) for a in axes], shape)
    again = flatten(unflatten(position, (rows, size // rows)), (rows, size // rows))
    assert numbered(axes, again) == list(range(size))


@given(st.integers(-9, 9), st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 7))
def test_division_agrees_with_python(constant, c0, c1, divisor):
    axes = [Axis(3), Axis(4)]
    index = Index.of(axes[0]) * c0 + Index.of(axes[1]) * c1 + constant
    quotient, remainder = index.divided(divisor)
    for q, r, value in zip(numbered(axes, quotient), numbered(axes, remainder), numbered(axes, index)):
        assert (q, r) == divmod(value, divisor)


def test_a_split_and_merged_axis_folds_back():
    i, j = Axis(6), Axis(8)
    flat = flatten([Index.of(i), Index.of(j)], (6, 8))
    assert unflatten(flat, (6, 8)) == (Index.of(i), Index.of(j))
    assert unflatten(flat, (6, 2, 4))[0] == Index.of(i)
    merged = Merged([i, j])
    merged.bind(29)
    assert flat.expr() == 29


def test_bounds_decide_conditions():
    i = Index.of(Axis(5))
    assert within(i, 0, 4) is True and within(i, 5, 9) is False
    assert clamp(i, 0, 4) is i and clamp(i + 9, 0, 4) == Index({}, 4) or clamp(i + 9, 0, 4).hi == 4


def test_refine():
    assert refine([(6, 4), (24,), (2, 3, 4)]) == (2, 3, 4)
    assert refine([(4, 6), (6, 4)]) == (4, 6)


# Elementwise ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int64", "int32", "int8", "uint8"])
def test_arithmetic_at_every_shape(dtype):
    with GraphBuilder("shapes") as b:
        for shape in SHAPES:
            x, y = (b.input(TensorType(shape, dtype)) for _ in range(2))
            b.output(x * y + x, emit("maximum", x, y), emit("lt", x, y))
    check(b.graph)


def test_bools_and_casts():
    dtypes = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int8", "uint8", "bool")

    def fn(p, q, x):
        outs = [emit("logical_and", p, q), emit("logical_not", p), emit("logical_xor", p, q), emit("eq", p, q),
                emit("where", p, x, -x)]
        for d in dtypes:
            outs += [emit("cast", p, dtype=as_dtype(d)), emit("cast", x, dtype=as_dtype(d))]
        return outs

    graph = graph_of(fn, ((67,), "bool"), ((67,), "bool"), (67,))
    arrays = data(graph)
    arrays[2] = np.abs(arrays[2])
    check(graph, arrays)


@pytest.mark.parametrize(("a", "b"), [((5, 1), (1, 7)), ((4, 3, 33), (33,)), ((4, 3, 33), (3, 1)), ((), (9, 2)),
                                      ((2, 1, 5), (2, 6, 1)), ((3, 0), (1, 1)), ((1, 64), (64, 1))])
def test_broadcasting(a, b):
    check(graph_of(lambda x, y: [x - y, emit("tanh", x) * y], a, b))


@pytest.mark.parametrize("shape", [(16, 16), (33, 65), (5, 40, 37), (3, 20, 4, 32), (2, 3), (70, 1)])
@pytest.mark.parametrize("dtype", [F32, "bfloat16", "float16", "int64", "int8", "bool"])
def test_transpositions(shape, dtype):
    rank = len(shape)
    perms = {(*range(rank - 2), rank - 1, rank - 2), tuple(reversed(range(rank)))}
    check(graph_of(lambda x: [emit("transpose", x, perm=p) for p in sorted(perms)], (shape, dtype)))


def test_one_input_read_both_ways():
    check(graph_of(lambda x, y: emit("transpose", x, perm=(1, 0)) * y + emit("transpose", y, perm=(1, 0)),
                   (50, 50), (50, 50)))


def test_views_and_gathers_on_the_way():
    def fn(x, i):
        y = emit("tanh", x)
        a = emit("slice", y, starts=(1, 8), limits=(5, -1), strides=(2, -2))
        b = emit("pad", x, low=(1, -2), high=(0, 3), interior=(1, 0), value=2.5)
        c = emit("concat", x, emit("reverse", x, axes=(0,)), b, axis=0) if b.shape[1] == x.shape[1] else b
        d = emit("take", emit("reshape", x, shape=(9, 6)), i, axis=1)
        e = emit("one_hot", i, depth=5, dtype=as_dtype(F32))
        return [a, b, c, d, e, emit("iota", shape=(3, 4), axis=1, dtype=as_dtype("int32"))]

    graph = graph_of(fn, (6, 9), ((4,), "int32"))
    check(graph, [data(graph)[0], np.array([3, -1, 99, 0], np.int32)])


@pytest.mark.parametrize("parts", [(24, 24, 40), (1, 16, 3), (5, 0, 2), (64,) * 9])
def test_concatenations_along_the_innermost_axis(parts):
    with GraphBuilder() as b:
        xs = [b.input(TensorType((3, 7, n), F32), f"x{i}") for i, n in enumerate(parts)]
        y = b.input(TensorType((3, 7, sum(parts)), F32), "y")
        whole = emit("concat", *xs, axis=2)
        b.output(emit("concat", xs[0] * 2.0, *xs[1:], axis=2) + y, emit("reverse", whole, axes=(2,)) - y)
    check(b.graph)


def test_random_bits_are_those_of_philox():
    graph = graph_of(lambda s: [emit("random_bits", s, offset=5, shape=(3, 7)),
                                emit("random_bits", s, offset=0, shape=(1,))], ((2,), "uint64"))
    check(graph, [np.array([0x123456789ABCDEF0, 2**40 + 3], np.uint64)])


def test_integers_wrap():
    top = np.array([2**31 - 1, -2**31, 5], np.int32), np.array([2**63 - 1, -2**63, 5], np.int64)
    graph = graph_of(lambda x, y: [x + x, x * x, -x, y + y, y * y, -y, y - (y * y)], ((3,), "int32"), ((3,), "int64"))
    check(graph, list(top))


def test_floats_are_not_taken_for_reals():
    """What an algebraic simplifier would break: sums that lose digits, NaN, a number unequal to itself."""
    def fn(x):
        big = (x + 1e8) - 1e8
        return [big, x - x, emit("ne", x, x), emit("eq", x, x), x * 0.0, (x + x) - x]

    graph = graph_of(fn, (40,))
    x = np.linspace(-3, 3, 40).astype(np.float32)
    x[3], x[17] = np.nan, np.inf
    check(graph, [x])


# Rows and columns -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("op", ["sum", "mean", "max", "min", "prod"])
def test_reductions_of_f32(op):
    with GraphBuilder("reductions") as b:
        for shape, axes in REDUCED:
            x = b.input(TensorType(shape, F32))
            b.output(emit(f"reduce_{op}", x, axes=axes, keepdims=len(axes) == 1))
    arrays = [np.abs(a) / 50 if op in ("sum", "mean") else a * 0.1 + 1 for a in data(b.graph)]
    check(b.graph, arrays, tol=3e-4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "int64", "int32", "int8"])
def test_reductions_of_other_dtypes(dtype):
    ops = ("reduce_sum", "reduce_max", "reduce_min") + (("reduce_mean",) if "float" in dtype else ())
    graph = graph_of(lambda x: [emit(op, x, axes=a) for op in ops for a in ((0,), (1,), (0, 1))], ((23, 70), dtype))
    check(graph)


def test_reductions_of_bools():
    graph = graph_of(lambda x: [emit(op, x, axes=a) for op in ("reduce_any", "reduce_all") for a in ((0,), (1,))],
                     ((23, 70), "bool"))
    x = np.ones((23, 70), bool)
    x[3], x[:, 5] = False, False
    check(graph, [x])


def test_nan_and_infinities_in_reductions():
    graph = graph_of(lambda x: [emit(op, x, axes=(1,)) for op in ("reduce_max", "reduce_min", "reduce_sum")], (4, 40))
    x = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)
    x[0, 17], x[1, 3], x[2, 39], x[3, :] = np.nan, np.inf, -np.inf, -np.inf
    check(graph, [x])


@pytest.mark.parametrize("shape", [(64, 100), (3, 4, 5), (7, 1), (1, 5000), (5, 33)])
@pytest.mark.parametrize("axis", [0, -1])
def test_softmax_along_any_axis(shape, axis):
    ops = ("softmax", "log_softmax")
    check(graph_of(lambda x: [emit(op, x, axis=axis % len(shape)) for op in ops], shape))


def test_sums_do_not_depend_on_the_number_of_threads():
    from treadle.schedules.build import build
    from treadle.schedules.lower import lower
    from treadle.schedules.runtime import get_num_threads, set_num_threads

    graph = graph_of(lambda x: emit("reduce_sum", x, axes=(0,)), (1 << 18,))
    run = build(lower(graph, "cpu"), "cpu").run
    before = get_num_threads()
    arrays = data(graph)
    try:
        results = set()
        for threads in (1, 2):
            set_num_threads(threads)
            results.add(float(run(arrays)[0]))
    finally:
        set_num_threads(before)
    assert len(results) == 1


def test_kernels_of_more_than_two_to_the_31_elements_count_in_64_bits():
    from treadle.schedules.lower import lower

    huge = ((1 << 16, 1 << 16), "int8")
    graph = graph_of(lambda x: [emit("abs", x), emit("reduce_max", x, axes=(1,))], huge)
    for call in lower(graph, "cpu").kernel_calls:
        assert "T.int64" in call.kernel.script()
    small = lower(graph_of(lambda x: emit("abs", x), (8, 8)), "cpu").kernel_calls[0]
    assert "T.int64" not in small.kernel.script()


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_results_that_wrap_keep_their_sign(dtype):
    """64-bit sums are made of unsigned halves: TVM must not conclude that they are positive."""
    x = np.arange(-2, 4).astype(dtype)
    for fn in (lambda x: td.abs(x - 1), lambda x: td.maximum(x * 3, 0), lambda x: td.left_shift(x, 1) < 0,
               lambda x: td.astype(td.astype(x, "u" + dtype), dtype) < 0):
        np.testing.assert_array_equal(td.compile(fn)(x).numpy(), fn(td.tensor(x)).numpy())


def test_a_quotient_that_is_rounded_is_divided_exactly():
    """Elsewhere rows multiply with the reciprocal of what they divide by, and halves would round the wrong way."""
    x = (np.random.default_rng(0).integers(0, 511, (64, 255)) * 0.5).astype(np.float32)
    x[:, 0] = 255

    def quantized(x):
        scale = (td.max(x, axis=1, keepdims=True) - td.minimum(td.min(x, axis=1, keepdims=True), 0.0)) / 255.0 * 1.7
        return td.round(x * 1.7 / scale), td.clip(x * 1.7 / scale, 0, 200).astype("int32")

    for got, want in zip(td.compile(quantized, specialize=True)(x), quantized(td.tensor(x))):
        np.testing.assert_array_equal(got.numpy(), want.numpy())
