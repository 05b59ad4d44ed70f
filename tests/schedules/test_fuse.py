"""Fusion: how many kernels a model takes, and that no group is impossible."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from lowered import check, data, graph_of, kernels

from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType

F32 = "float32"
I32 = as_dtype("int32")


def c(value):
    return emit("constant", value=np.asarray(value, F32))


def relu(x):
    return emit("maximum", x, c(0.0))


def gelu(x):
    return x * 0.5 * (emit("erf", x * 0.70710678) + 1.0)


def linear(x, w, b):
    return emit("matmul", x, w) + b


ONE_KERNEL = {
    "gelu": (gelu, [(40, 50)]),
    "softmax": (lambda x: emit("softmax", x, axis=1), [(40, 50)]),
    "log_softmax of columns": (lambda x: emit("log_softmax", x, axis=0), [(40, 50)]),
    "layer_norm": (lambda x, g, b: emit("layer_norm", x, g, b), [(40, 50), (50,), (50,)]),
    "rms_norm": (lambda x, g: emit("rms_norm", x, g), [(4, 10, 50), (50,)]),
    "group_norm": (lambda x, g, b: emit("group_norm", x, g, b, groups=4), [(3, 8, 5, 7), (8,), (8,)]),
    "batch_norm": (lambda x, g, b: emit("batch_norm", x, g, b), [(3, 8, 5, 7), (8,), (8,)]),
    "residual and layer_norm": (lambda x, y, g, b: (lambda s: [s, emit("layer_norm", s, g, b)])(x + y),
                                [(40, 50), (40, 50), (50,), (50,)]),
    "linear and relu": (lambda x, w, b: relu(linear(x, w, b)), [(33, 20), (20, 17), (17,)]),
    "linear, gelu, residual": (lambda x, w, b, r: gelu(linear(x, w, b)) + r, [(33, 20), (20, 17), (17,), (33, 17)]),
    "sum and sum of squares": (lambda x: [emit("reduce_sum", x, axes=(0,)), emit("reduce_sum", x * x, axes=(0,))],
                               [(80, 60)]),
    "variance of all": (lambda x: emit("reduce_mean", emit("square", x - emit("reduce_mean", x, axes=(0, 1),
                                                                              keepdims=True)), axes=(0, 1)), [(9, 8)]),
    "broadcast of a counter": (lambda x: emit("where", emit("le", emit("iota", shape=(9, 8), axis=1, dtype=I32),
                                                            emit("iota", shape=(9, 8), axis=0, dtype=I32)),
                                              x, c(-1e9)), [(9, 8)]),
}


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_one_kernel(name):
    fn, specs = ONE_KERNEL[name]
    check(graph_of(fn, *specs), count=1, tol=2e-4)


def test_two_layers_are_two_kernels():
    graph = graph_of(lambda x, w, b, v, d: linear(relu(linear(x, w, b)), v, d),
                     (33, 20), (20, 17), (17,), (17, 10), (10,))
    check(graph, count=2)


def test_cross_entropy_is_a_row_kernel_and_a_mean():
    def fn(x, y):
        return emit("reduce_mean", emit("cross_entropy", x, y, label_smoothing=0.1), axes=(0,))

    graph = graph_of(fn, (33, 20), ((33,), "int32"))
    check(graph, [data(graph)[0], np.arange(33, dtype=np.int32) % 20], count=2)


def test_few_long_rows_are_shared_among_threads():
    """A softmax over one row of many elements is split into passes that can run in parallel."""
    assert len(kernels(graph_of(lambda x: emit("softmax", x, axis=1), (1, 1 << 18)))) > 1
    assert len(kernels(graph_of(lambda x: emit("softmax", x, axis=1), (64, 1 << 12)))) == 1


def test_a_value_that_others_need_is_stored_by_the_kernel_that_makes_it():
    def fn(x, w):
        y = emit("exp", x)
        return [y * 2.0, emit("matmul", y, w)]

    check(graph_of(fn, (16, 16), (16, 16)), count=2)


def test_a_path_through_a_kernel_of_its_own_is_no_cycle():
    """y and y + sort(y) cannot be one kernel: sort stands between."""
    def fn(x):
        y = emit("tanh", x)
        values, _ = emit("sort", y, axis=1)
        return y + values

    check(graph_of(fn, (8, 9)), count=3)


def test_reading_row_values_across_rows_is_not_one_kernel():
    """The sums of the rows are used along the columns."""
    def fn(x):
        s = emit("reduce_sum", x, axes=(1,))
        return x - emit("reshape", s, shape=(1, 12))

    check(graph_of(fn, (12, 12)), count=2)


UNARY = ["tanh", "neg", "square", "sigmoid"]
BINARY = ["add", "mul", "maximum"]


@st.composite
def programs(draw):
    """Random graphs over values of a few shapes that broadcast, reduce, move and multiply."""
    steps = draw(st.lists(st.tuples(st.sampled_from(["unary", "binary", "sum", "mean_keep", "transpose", "reshape",
                                                     "matmul", "softmax", "slice"]),
                                    st.integers(0, 99), st.integers(0, 99)), min_size=3, max_size=14))
    return steps


def random_graph(steps):
    with GraphBuilder("random") as b:
        values = [b.input(TensorType(s, F32)) for s in ((6, 6), (6, 6), (6,), (1, 6))]
        for kind, i, j in steps:
            x, y = values[i % len(values)], values[j % len(values)]
            if kind == "unary":
                values.append(emit(UNARY[j % len(UNARY)], x))
            elif kind == "binary":
                values.append(emit(BINARY[(i + j) % len(BINARY)], x, y))
            elif kind in ("sum", "mean_keep") and x.rank:
                op = "reduce_sum" if kind == "sum" else "reduce_mean"
                values.append(emit(op, x, axes=(j % x.rank,), keepdims=kind == "mean_keep" or x.rank == 1) * 0.2)
            elif kind == "transpose" and x.rank == 2:
                values.append(emit("transpose", x, perm=(1, 0)))
            elif kind == "reshape" and x.type.size == 36:
                values.append(emit("reshape", emit("reshape", x, shape=(4, 9)), shape=(6, 6)))
            elif kind == "matmul" and x.shape == y.shape == (6, 6):
                values.append(emit("matmul", x, y, transpose_x=bool(i % 2)) * 0.2)
            elif kind == "softmax" and x.rank == 2:
                values.append(emit("softmax", x, axis=j % 2))
            elif kind == "slice" and x.shape == (6, 6):
                values.append(emit("slice", x, starts=(5, 0), limits=(-1, 6), strides=(-1, 1)))
            if any(s not in (1, 6) for s in values[-1].shape):
                values.pop()
        b.output(*values[4:][::2], values[-1])
    return b.graph


@given(programs())
@settings(max_examples=12)
def test_random_graphs_fuse_rightly(steps):
    graph = random_graph(steps)
    arrays = [np.clip(a, -1, 1) for a in data(graph)]
    check(graph, arrays, tol=2e-3)


def test_a_view_that_is_an_output_and_read_inside():
    def fn(x, i):
        y = emit("reshape", emit("log_softmax", emit("reshape", x, shape=(6, 1, 5)), axis=2), shape=(6, 5))
        return [-emit("take_along_axis", y, i, axis=1), y]

    graph = graph_of(fn, (6, 5), ((6, 1), "int64"))
    check(graph, [data(graph)[0], np.arange(6).reshape(6, 1) % 5])


@pytest.mark.parametrize(("shape", "perm"), [((2, 3, 4), (1, 0, 2)), ((5, 5), (1, 0)), ((3, 4, 5), (2, 1, 0)),
                                             ((6, 3, 32), (1, 0, 2))])
@pytest.mark.parametrize("axis", [-1, 0])
def test_rows_of_something_costly_that_was_transposed(shape, perm, axis):
    """What a row puts aside has to be of that row."""
    def fn(x):
        y = emit("transpose", emit("exp", x), perm=perm)
        return [emit("softmax", y, axis=axis % len(shape)), emit("tanh", y)]

    check(graph_of(fn, shape))


@pytest.mark.parametrize("shape", [(2, 4), (2, 3), (3, 8), (4, 5), (2, 3, 7)])
def test_repeated_elements_read_backwards(shape):
    """TVM takes (3 - v) % 4 for -(v % -4), unless it is written with a rising numerator."""
    def fn(x):
        y = emit("reshape", emit("broadcast_to", x, shape=shape), shape=(1, int(np.prod(shape))))
        whole = emit("reshape", y, shape=shape)
        return [emit("reverse", y, axes=(1,)), emit("reverse", whole, axes=(0, len(shape) - 1))]

    check(graph_of(fn, shape[-1:]))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 40, 7), (5, 16, 3), (33, 31, 20), (64, 64, 64), (130, 97, 30),
                                           (3, 200, 0), (1, 300, 256), (257, 1, 12)])
def test_heavy_epilogues_of_products_of_any_size(m, n, k):
    def fn(x, w, r, b):
        y = emit("matmul", x, w, transpose_y=True) + b
        return [gelu(y) * r, emit("tanh", y)]

    check(graph_of(fn, (m, k), (n, k), (m, n), (n,)), count=1, tol=2e-4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_heavy_epilogues_in_other_dtypes(dtype):
    shapes = [((3, 20, 30), dtype), ((30, 17), dtype), ((17,), dtype)]
    check(graph_of(lambda x, w, b: emit("sigmoid", emit("matmul", x, w) + b), *shapes), count=1)
