"""Whole graphs: outputs and their storage, constants, control flow."""

import numpy as np
import pytest
from lowered import check, graph_of

from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.builder import build as build_graph
from treadle.ir.errors import MissingRuleError
from treadle.ir.opdef import OpDef, register, unregister
from treadle.ir.types import TensorType
from treadle.schedules.lower import lower
from treadle.schedules.program import Copy, walk

F32 = "float32"


def c(value, dtype=F32):
    return emit("constant", value=np.asarray(value, dtype))


def test_outputs_that_no_kernel_computes():
    table = np.arange(12, dtype=np.float32).reshape(3, 4)

    def fn(x):
        y = x * 2.0
        return [x, c(3.0), c(table), y, y, emit("reshape", y, shape=(6, 2)), emit("reshape", x, shape=(12,))]

    check(graph_of(fn, (3, 4)))


def test_a_large_constant_is_a_buffer_and_a_scalar_an_immediate():
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    graph = graph_of(lambda x: x * c(table) + c(0.5), (3, 4))
    program = lower(graph)
    assert [b.shape for b in program.constants] == [(3, 4)]
    check(graph, count=1)


def updated(build_outputs, *names, shape=(5, 7)):
    with GraphBuilder("step") as b:
        inputs = [b.input(TensorType(shape, F32), n, "state") for n in names]
        for value, alias in build_outputs(*inputs):
            b.output(value, alias=alias)
    return b.graph


def copies(graph):
    return [s for s in walk(lower(graph).steps) if isinstance(s, Copy)]


def test_adamw_updates_in_place_in_one_kernel():
    def step(p, g, m, v):
        m2, v2 = m * 0.9 + g * 0.1, v * 0.999 + g * g * 0.001
        return [(p * 0.99 - m2 * 0.1 / (emit("sqrt", emit("abs", v2)) + 1e-8), p), (m2, m), (v2, v)]

    graph = updated(step, "p", "g", "m", "v")
    assert not copies(graph)
    check(graph, count=1)


def test_an_output_that_takes_over_an_input_read_transposed_is_computed_beside():
    graph = updated(lambda x: [(emit("transpose", x, perm=(1, 0)) + x, x)], "x", shape=(6, 6))
    assert len(copies(graph)) == 1
    check(graph)


def test_readers_of_an_input_run_before_it_is_taken_over():
    def step(w, x):
        return [(w - x, w), (emit("matmul", w, x), None), (emit("reduce_sum", w, axes=(0,)), None)]

    check(updated(step, "w", "x", shape=(6, 6)))


def test_inputs_that_change_places():
    check(updated(lambda a, b: [(b, a), (a, b)], "a", "b"))


def test_an_input_is_passed_on_although_another_output_takes_its_place():
    check(updated(lambda a: [(a * 2.0, a), (a, None)], "a"))


def test_a_weight_is_updated_in_the_epilogue_of_its_gradient():
    def step(w, x):
        return [(w - emit("matmul", x, x, transpose_x=True) * 0.1, w)]

    graph = updated(step, "w", "x", shape=(8, 8))
    assert not copies(graph)
    check(graph, count=1)


def region(fn, *types):
    return build_graph("region", fn, *types)


def test_cond():
    t = TensorType((5,), F32)
    regions = (region(lambda x, y: [x + y, x], t, t), region(lambda x, y: [x * y, y], t, t))
    graph = graph_of(lambda p, x, y: list(emit("cond", p, x, y, regions=regions)), ((), "bool"), (5,), (5,))
    x = [np.arange(5, dtype=F32), np.full(5, 3, F32)]
    for pred in (True, False):
        check(graph, [np.array(pred), *x])


def test_while_loop_with_carries_that_change_places():
    t, n = TensorType((3,), F32), TensorType((), "int32")
    cond = region(lambda i, x, y, k: emit("lt", i, k), n, t, t, n)
    body = region(lambda i, x, y, k: [i + 1, y, x + y], n, t, t, n)

    def fn(k, x, y):
        return list(emit("while_loop", c(0, "int32"), x, y, k, n_carry=3, regions=(cond, body)))

    graph = graph_of(fn, ((), "int32"), (3,), (3,))
    for steps in (0, 1, 7):
        check(graph, [np.array(steps, np.int32), np.ones(3, F32), np.arange(3, dtype=F32)])


@pytest.mark.parametrize("length", [0, 1, 2, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(length, reverse):
    t = TensorType((4,), F32)
    body = region(lambda h, g, x, w: [emit("tanh", h * w + x), h, h + x, x], t, t, t, t)

    def fn(h, g, xs, w):
        return list(emit("scan", h, g, xs, w, n_carry=2, n_xs=1, length=length, reverse=reverse, regions=(body,)))

    check(graph_of(fn, (4,), (4,), (length, 4), (4,)))


def test_nested_scans():
    t = TensorType((2,), F32)
    inner = region(lambda a, x: [a * 0.5 + x, a], t, t)

    def outer_fn(a, xs):
        last, seen = emit("scan", a, xs, n_carry=1, n_xs=1, length=3, reverse=False, regions=(inner,))
        return [last + 1.0, emit("reduce_sum", seen, axes=(0,))]

    outer = region(outer_fn, t, TensorType((3, 2), F32))
    graph = graph_of(lambda a, xs: list(emit("scan", a, xs, n_carry=1, n_xs=1, length=4, reverse=True,
                                             regions=(outer,))), (2,), (4, 3, 2))
    check(graph)


def test_an_op_without_lowering_or_decomposition_is_named():
    register(OpDef("mystery", ("x",), lambda x: x, lambda x: x))
    try:
        with pytest.raises(MissingRuleError, match="mystery"):
            lower(graph_of(lambda x: emit("mystery", x), (3,)))
    finally:
        unregister("mystery")


def test_a_weight_read_under_another_name_is_not_overwritten_by_its_reader():
    def step(w, x):
        square = emit("reshape", w, shape=(6, 6))
        return [(emit("reshape", emit("matmul", square, x), shape=(36,)), w)]

    with GraphBuilder("step") as b:
        w, x = b.input(TensorType((36,), F32), "w", "state"), b.input(TensorType((6, 6), F32), "x")
        for value, alias in step(w, x):
            b.output(value, alias=alias)
    check(b.graph)


def test_rows_of_a_stack_are_not_copied():
    def fn(x, w):
        h = emit("tanh", x)
        parts = [emit("reshape", emit("slice", h, starts=(i, 0, 0), limits=(i + 1, 5, 6), strides=(1, 1, 1)),
                      shape=(5, 6)) for i in range(3)]
        return [emit("matmul", p, w) for p in parts]

    check(graph_of(fn, (3, 5, 6), (6, 4)), count=4)


def test_a_scatter_works_in_the_memory_of_a_dying_operand():
    def fn(i, u):
        zeros = emit("broadcast_to", c(0.0), shape=(10, 4))
        return emit("scatter_add", zeros, i, u, axis=0) * 2.0

    graph = graph_of(fn, ((3,), "int32"), (3, 4))
    assert not copies(graph)
    check(graph, [np.array([1, 9, 1], np.int32), np.ones((3, 4), np.float32)])


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("exponent", [2, 3])
def test_integer_powers_wrap_and_are_not_reasoned_about(dtype, exponent):
    """x**2 % x is 0 only where x**2 does not overflow."""
    def fn(x):
        power = emit("pow", x, emit("constant", value=np.asarray(exponent, dtype)))
        return [power, emit("remainder", power, x), emit("floor_divide", power, x), emit("lt", power, x)]
    graph = graph_of(fn, ((23,), dtype))
    info = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(info.min, info.max, 23, dtype, endpoint=True)
    with np.errstate(over="ignore"):
        got = check(graph, [x])[0]
        np.testing.assert_array_equal(got, x**exponent)


def test_a_result_of_an_early_pass_does_not_overwrite_what_a_later_one_reads():
    def fn(x, scale):
        y = x * scale
        mean = emit("reduce_mean", y, axes=(1,), keepdims=True)
        wide = emit("exp", y - mean)
        total = emit("reduce_sum", wide, axes=(1,), keepdims=True)
        return scale - x * 0.5, wide / total * scale

    with GraphBuilder("main") as b:
        x, scale = b.input(TensorType((1, 33), F32), "x"), b.input(TensorType((1, 33), F32), "scale", "parameter")
        b.output(*fn(x, scale))
    graph = b.graph
    graph.aliases[0] = 1
    check(graph)
