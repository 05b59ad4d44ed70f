"""What shares a kernel with a contraction without coming from it, and what must not: no kernel may wait for itself."""

from lowered import check, graph_of

from treadle.ir.builder import emit


def test_what_stands_beside_a_contraction_joins_its_epilogue():
    def step(w, mean, keep, x, dy):
        gradient = emit("matmul", x, dy, transpose_x=True)
        mean = mean * keep + gradient * (1.0 - keep)
        return w * keep - mean, mean

    check(graph_of(step, (12, 20), (12, 20), (), (7, 12), (7, 20)), count=1)


def test_what_a_contraction_reads_does_not_though_its_epilogue_reads_it_too():
    def step(x, w):
        y = emit("tanh", x)
        return emit("matmul", y, w) + y

    check(graph_of(step, (9, 9), (9, 9)), count=2)


def test_what_it_reads_through_a_view_does_not_either():
    def step(x, w):
        y = emit("tanh", x)
        flat = emit("reshape", y, shape=(6, 6))
        return emit("matmul", flat, w) + flat

    check(graph_of(step, (4, 9), (6, 6)), count=2)


def test_nor_what_it_depends_on_by_another_kernel():
    def step(x, w):
        y = emit("tanh", x)
        total = emit("reduce_sum", y, axes=(1,), keepdims=True)
        return emit("matmul", x * total, w) + y

    check(graph_of(step, (8, 8), (8, 8)))


def test_nor_by_another_kernel_and_a_view():
    def step(x, w):
        y = emit("tanh", x)
        total = emit("cumsum", y, axis=1)
        return emit("matmul", emit("reshape", total, shape=(6, 6)), w) + emit("reshape", y, shape=(6, 6))

    check(graph_of(step, (4, 9), (6, 6)))


def test_an_epilogue_does_not_reach_around_a_kernel_that_reads_through_a_view():
    def step(x, w):
        y = emit("matmul", x, w)
        total = emit("cumsum", emit("reshape", y, shape=(4, 9)), axis=1)
        return y + emit("reshape", total, shape=(6, 6))

    check(graph_of(step, (6, 5), (5, 6)))
