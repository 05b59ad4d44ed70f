"""Programs whose sizes are known only when they run: compiled once, right at every size."""

import numpy as np
import pytest
from lowered import check_sizes, combinations, graph_of

from treadle.ir.context import emit
from treadle.ir.dims import Dim
from treadle.ir.dtypes import as_dtype
from treadle.schedules import sizes

B, N = Dim("b"), Dim("n")
SIZES = combinations(b=(0, 1, 2, 17), n=(0, 1, 3, 16, 33, 100))
H = Dim("h")


def test_what_holds_for_all_sizes():
    assert sizes.at_least(N, 1) and sizes.at_least(N * B, N) and sizes.at_least((N - 1) // 2, 0)
    assert not sizes.at_least(N, 2) and not sizes.at_least(N - B, 0) and not sizes.at_least(N - 2, 0)
    assert sizes.at_least(N, (N // 2) * 2)
    assert sizes.exact(N * B * 4, N) == B * 4 and sizes.exact(N + 1, 2) is None and sizes.exact(12, 5) is None


ELEMENTWISE = {
    "broadcast": (lambda x, y: emit("exp", x + y), (B, N), (N,)),
    "static columns": (lambda x, y: x * y, (B, 8), (B, 8)),
    "odd columns": (lambda x, y: x * y, (B, 7), (7,)),
    "column": (lambda x, y: x - y, (B, N), (B, 1)),
    "transposed": (lambda x: emit("transpose", emit("exp", x), perm=(1, 0)), (B, N)),
    "beside its transpose": (lambda x, y: x + emit("transpose", y, perm=(1, 0)), (B, N), (N, B)),
    "joined axes": (lambda x: emit("reshape", emit("exp", x), shape=(B * N, 4)), (B, N, 4)),
    "turned and joined": (lambda x: emit("reshape", emit("transpose", x, perm=(1, 0, 2)), shape=(N, B * 8)), (B, N, 8)),
    "split axes": (lambda x: emit("reshape", emit("exp", x), shape=(B * 4, 2)), (B, 8)),
    "concat": (lambda x: emit("concat", x, emit("exp", x), x * 2.0, axis=1), (B, N)),
    "concat rows": (lambda x, y: emit("concat", x, emit("exp", y), axis=0), (B, 5), (N, 5)),
    "pad": (lambda x: emit("pad", x, low=(1, 0), high=(0, 2), interior=(0, 1), value=3.0), (B, N + 1)),
    "slice": (lambda x: emit("slice", x, starts=(0, 1), limits=(B, N + 1), strides=(1, 1)), (B, N + 2)),
    "reverse": (lambda x: emit("reverse", x, axes=(0, 1)), (B, N)),
    "take": (lambda x, i: emit("take", x, i, axis=0), (50, N), ((B, 3), "int64")),
    "take of rows": (lambda x, i: emit("take", x, i, axis=0), (N + 1, 8), ((B,), "int32")),
    "iota": (lambda x: x + emit("iota", shape=(B, N), axis=1, dtype=as_dtype("float32")), (B, N)),
    "one hot": (lambda i: emit("one_hot", i, depth=10, dtype=as_dtype("float32")), ((B, N), "int64")),
    "int64": (lambda x, y: x * y + x, ((B, N), "int64"), ((N,), "int64")),
    "bfloat16": (lambda x: emit("tanh", x), ((B, N), "bfloat16")),
    "several outputs": (lambda x: (emit("exp", x), emit("reshape", x * 2.0, shape=(B * N,))), (B, N)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_loops(name):
    check_sizes(graph_of(*ELEMENTWISE[name]), SIZES)


def reduce(op, *axes, keepdims=False):
    return lambda x: emit(op, x, axes=axes, keepdims=keepdims)


def layer_norm(x, scale, bias):
    return emit("layer_norm", x, scale, bias, axes=1, eps=1e-5)


ROWS = {
    "softmax": (lambda x: emit("softmax", x, axis=1), (B, N)),
    "softmax of columns": (lambda x: emit("softmax", x, axis=0), (B, N)),
    "softmax of 64": (lambda x: emit("softmax", x * 2.0, axis=1), (B, 64)),
    "softmax of a middle axis": (lambda x: emit("softmax", x, axis=1), (B, N, 5)),
    "log softmax": (lambda x: emit("log_softmax", x, axis=1), (B, N)),
    "sum": (reduce("reduce_sum", 1), (B, N)),
    "sum of columns": (reduce("reduce_sum", 0), (B, N)),
    "sum of static columns": (reduce("reduce_sum", 0), (B, 40)),
    "sum of all": (reduce("reduce_sum", 0, 1), (B, N)),
    "mean": (reduce("reduce_mean", 1, keepdims=True), (B, N + 1)),
    "max": (reduce("reduce_max", 1), (B, N + 1)),
    "any": (reduce("reduce_any", 1), ((B, N), "bool")),
    "variance": (lambda x: emit("reduce_mean", (x - emit("reduce_mean", x, axes=(0,), keepdims=True)) ** 2.0,
                                axes=(0,), keepdims=False), (B + 1, N)),
    "layer norm": (layer_norm, (B, 48), (48,), (48,)),
    "layer norm of a dynamic axis": (layer_norm, (B, N + 1), (N + 1,), (N + 1,)),
    "integers": (reduce("reduce_sum", 1), ((B, N), "int64")),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    check_sizes(graph_of(*ROWS[name]), SIZES, tol=1e-4)


def indices(graph):
    rng = np.random.default_rng(1)
    return [rng.integers(0, max(graph.inputs[0].shape[-1], 1), v.shape) if v.dtype == "int64"
            else rng.standard_normal(v.shape, np.float32) for v in graph.inputs]


OWN = {
    "cumsum": (lambda x: emit("cumsum", x, axis=1, exclusive=False, reverse=False), (B, N)),
    "cumsum of columns": (lambda x: emit("cumsum", x, axis=0, exclusive=True, reverse=True), (B, N)),
    "argmax": (lambda x: emit("argmax", x, axis=1, keepdims=False), (B, N + 1)),
    "argmin of columns": (lambda x: emit("argmin", x, axis=0, keepdims=True), (B + 1, N)),
    "sort": (lambda x: emit("sort", x, axis=1, descending=True), (B, N)),
    "sort of columns": (lambda x: emit("sort", x, axis=0, descending=False), (B, N)),
    "top k": (lambda x: emit("top_k", x, k=3, axis=1, largest=True), (B, N + 3)),
    "scatter": (lambda x, i, u: emit("scatter_add", x, i, u, axis=0), (N, 9), ((B,), "int64"), (B, 9)),
    "scatter columns": (lambda x, i, u: emit("scatter_add", x, i, u, axis=0), (7, N), ((B,), "int64"), (B, N)),
    "update": (lambda x, u, i: emit("dynamic_update_slice", x, u, i, emit("constant", value=np.array(1))),
               (N + 2, 10), (2, 4), ((), "int64")),
}


@pytest.mark.parametrize("name", OWN)
def test_kernels_of_their_own(name):
    check_sizes(graph_of(*OWN[name]), SIZES, arrays=indices, tol=1e-4)


POOLS = {
    "max": lambda x: emit("max_pool", x, window=(3, 2), stride=(2, 2), padding=((1, 1), (0, 1)), dilation=(1, 1),
                          channels_last=False),
    "average": lambda x: emit("avg_pool", x, window=(2, 2), stride=(1, 2), padding=((1, 0), (0, 1)),
                              count_include_pad=False, channels_last=False),
    "max, last": lambda x: emit("max_pool", emit("transpose", x, perm=(0, 2, 3, 1)), window=(3, 2), stride=(2, 2),
                                padding=((1, 1), (0, 1)), dilation=(1, 1), channels_last=True),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools(name):
    check_sizes(graph_of(POOLS[name], (B, 5, H + 2, N + 2)), combinations(b=(0, 1, 3), h=(1, 6), n=(1, 2, 19)))
