"""Straight-line code, loops, whiles, branches and host calls, from hand-made kernels to numbers."""

import ml_dtypes
import numpy as np
import pytest
from program_kernels import (
    add,
    add_one,
    buffer,
    call,
    chain,
    double,
    elementwise,
    in_place_add_one,
    less_than,
    prim_func,
)

from treadle.ir.errors import RegistryError, VerifyError
from treadle.schedules.build import build
from treadle.schedules.host import register_host_function
from treadle.schedules.program import (
    Branch,
    Buffer,
    Copy,
    HostCall,
    KernelCall,
    Loop,
    LoopVar,
    Program,
    Term,
    View,
    While,
    element,
)

X = np.arange(8, dtype=np.float32)


def test_straight_line_reuses_one_kernel_and_two_places_of_the_arena():
    executable = build(chain(6))
    assert executable.stats.kernels == 1
    assert executable.plan.arena_bytes == 128  # six temps of 32 bytes, never more than two at once
    np.testing.assert_array_equal(executable.run([X])[0], X + 6)


def test_output_is_written_in_place_not_copied():
    program = chain(1)
    executable = build(program)
    assert executable.plan.arena_bytes == 0
    np.testing.assert_array_equal(executable.run([X])[0], X + 1)


def test_scan_with_stacked_inputs_and_outputs():
    """ys[i] = carry = carry + xs[i], as a scan lowers: a carry buffer updated in place of itself."""
    n = 5
    xs, init = buffer("xs", "input", (n, 8)), buffer("init", "input")
    ys, last = buffer("ys", "output", (n, 8)), buffer("last", "output")
    i = LoopVar("i")
    loop = Loop(i, n, [call(add(), element(xs, i), last, element(ys, i)), Copy(element(ys, i), last)])
    executable = build(Program([xs, init], [ys, last], [Copy(init, last), loop]))
    values = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    found, final = executable.run([values, X])
    expected = X + np.cumsum(values, axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(final, expected[-1], rtol=1e-5)


def test_reverse_scan_reads_from_the_end():
    n = 4
    xs, ys = buffer("xs", "input", (n, 8)), buffer("ys", "output", (n, 8))
    i = LoopVar("i")
    loop = Loop(i, n, [call(add_one(), element(xs, i, reverse_length=n), element(ys, i))])
    values = np.arange(n * 8, dtype=np.float32).reshape(n, 8)
    np.testing.assert_array_equal(build(Program([xs], [ys], [loop])).run([values])[0], values[::-1] + 1)


def test_double_buffered_carry():
    n = 5
    x, y, pair = buffer("x", "input"), buffer("y", "output"), buffer("pair", shape=(2, 8))
    i = LoopVar("i")
    half = lambda shift: View(pair, (8,), 0, (Term(i, 8, shift, modulo=2),))  # noqa: E731
    steps = [
        Copy(x, View(pair, (8,), 0)),
        Loop(i, n, [call(double(), half(0), half(1))]),
        Copy(View(pair, (8,), 8 * (n % 2)), y),
    ]
    np.testing.assert_array_equal(build(Program([x], [y], steps)).run([X])[0], X * 2**n)


def test_misaligned_views_are_fine():
    """Rows of 3 floats: 12-byte steps, far from any vector's alignment."""
    n = 6
    xs, ys = buffer("xs", "input", (n, 3)), buffer("ys", "output", (n, 3))
    i = LoopVar("i")
    program = Program([xs], [ys], [Loop(i, n, [call(add_one((3,)), element(xs, i), element(ys, i))])])
    values = np.arange(n * 3, dtype=np.float32).reshape(n, 3)
    np.testing.assert_array_equal(build(program).run([values])[0], values + 1)


def test_nested_loops_share_memory_between_iterations():
    n, m = 3, 4
    xs, ys = buffer("xs", "input", (n, m, 8)), buffer("ys", "output", (n, m, 8))
    i, j, t = LoopVar("i"), LoopVar("j"), buffer("t")

    def at(b):
        return View(b, (8,), 0, (Term(i, m * 8), Term(j, 8)))

    inner = Loop(j, m, [call(add_one(), at(xs), t), call(double(), t, at(ys))])
    executable = build(Program([xs], [ys], [Loop(i, n, [inner])]))
    values = np.random.default_rng(1).normal(size=(n, m, 8)).astype(np.float32)
    np.testing.assert_array_equal(executable.run([values])[0], (values + 1) * 2)
    assert executable.plan.arena_bytes == 64


def doubling_while(limit: float) -> Program:
    """while c[0] < limit: c = c * 2"""
    x, y = buffer("x", "input"), buffer("y", "output")
    flag, t = Buffer("flag", (), "bool"), buffer("t")
    loop = While(LoopVar("k"), [call(less_than(limit), y, flag)], flag, [call(double(), y, t), Copy(t, y)])
    return Program([x], [y], [Copy(x, y), loop])


@pytest.mark.parametrize("start, expected", [(1.0, 128.0), (100.0, 100.0), (99.0, 198.0)])
def test_while_runs_until_its_condition_fails(start, expected):
    executable = build(doubling_while(100.0))
    for _ in range(2):  # a second call starts afresh
        assert executable.run([np.full(8, start, np.float32)])[0][0] == expected


def test_while_counter_reaches_kernels():
    """The counter is an argument of a kernel and an offset of a view: ys[k] = k."""
    ys, x, flag = buffer("ys", "output", (6,)), buffer("x", "input"), Buffer("flag", (), "bool")
    k = LoopVar("k")
    store = prim_func('''
@T.prim_func(s_tir=True)
def store(OUT: T.Buffer((1,), "float32"), K: T.int64):
    T.func_attr({"global_symbol": "store", "tirx.noalias": True})
    OUT[0] = T.Cast("float32", K)
''')
    below = prim_func('''
@T.prim_func(s_tir=True)
def below(FLAG: T.Buffer((1,), "bool"), K: T.int64):
    T.func_attr({"global_symbol": "below", "tirx.noalias": True})
    FLAG[0] = K < T.int64(6)
''')
    body = [KernelCall(store, [View(ys, (1,), 0, (Term(k, 1),)), k], [0])]
    loop = While(k, [KernelCall(below, [flag, k], [0])], flag, body)
    np.testing.assert_array_equal(build(Program([x], [ys], [loop])).run([X])[0], np.arange(6))


def test_branch_takes_one_side():
    x, pred, y = buffer("x", "input"), Buffer("pred", (), "bool", "input"), buffer("y", "output")
    program = Program([pred, x], [y], [Branch(pred, [call(add_one(), x, y)], [call(double(), x, y)])])
    executable = build(program)
    np.testing.assert_array_equal(executable.run([np.array(True), X])[0], X + 1)
    np.testing.assert_array_equal(executable.run([False, X])[0], X * 2)


def test_branch_inside_a_loop_inside_a_branch():
    n = 4
    preds, x, outer = Buffer("preds", (n,), "bool", "input"), buffer("x", "input"), Buffer("outer", (), "bool", "input")
    y, flag, t, i = buffer("y", "output"), Buffer("flag", (), "bool"), buffer("t"), LoopVar("i")
    body = [
        Copy(element(preds, i), flag),
        Branch(flag, [call(add_one(), y, t)], [call(double(), y, t)]),
        Copy(t, y),
    ]
    program = Program([outer, preds, x], [y], [Copy(x, y), Branch(outer, [Loop(i, n, body)])])
    executable = build(program)
    choice = np.array([True, False, False, True])
    np.testing.assert_array_equal(executable.run([True, choice, X])[0], (X + 1) * 4 + 1)
    np.testing.assert_array_equal(executable.run([False, choice, X])[0], X)


def test_in_place_update_of_an_input():
    p = buffer("p", "input")
    out = buffer("out", "output", alias_of=p)
    update = KernelCall(in_place_add_one(), [out], [0], reads=[0])
    executable = build(Program([p], [out], [update], roles=["parameter"]))
    array = X.copy()
    for step in range(1, 4):
        (result,) = executable.run([array])
        assert result is array
        np.testing.assert_array_equal(array, X + step)


def test_reshape_alias_costs_nothing():
    x, y, t = buffer("x", "input"), buffer("y", "output", (4, 2)), buffer("t")
    reshaped = buffer("r", shape=(4, 2), alias_of=t)
    executable = build(Program([x], [y], [call(add_one(), x, t), call(double((4, 2)), reshaped, y)]))
    assert executable.plan.arena_bytes == 64
    np.testing.assert_array_equal(executable.run([X])[0], ((X + 1) * 2).reshape(4, 2))


def test_concat_by_views_of_the_result():
    a, b, y = buffer("a", "input"), buffer("b", "input"), buffer("y", "output", (16,))
    steps = [call(add_one(), a, View(y, (8,))), call(double(), b, View(y, (8,), 8))]
    np.testing.assert_array_equal(build(Program([a, b], [y], steps)).run([X, X])[0], np.r_[X + 1, X * 2])


def test_zero_size_buffers():
    x, y = buffer("x", "input", (0, 3)), buffer("y", "output", (0, 3))
    z, w = buffer("z", "input"), buffer("w", "output")
    t = buffer("t", shape=(0, 3))
    steps = [call(add_one(), x, t), Copy(t, y), call(add_one(), z, w)]
    empty, full = build(Program([x, z], [y, w], steps)).run([np.zeros((0, 3), np.float32), X])
    assert empty.shape == (0, 3)
    np.testing.assert_array_equal(full, X + 1)


def test_constants():
    x, y = buffer("x", "input"), buffer("y", "output")
    c = buffer("c", "constant", data=np.linspace(0, 1, 8, dtype=np.float32))
    np.testing.assert_array_equal(build(Program([x], [y], [call(add(), x, c, y)])).run([X])[0], X + c.data)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int64", "int8", "uint16", "bool"])
def test_dtypes(dtype):
    kind = getattr(ml_dtypes, dtype, dtype)
    copy = elementwise("copy", "<a>", (8,), dtype=dtype)
    x, y = buffer("x", "input", dtype=dtype), buffer("y", "output", dtype=dtype)
    values = np.arange(8).astype(kind)
    (found,) = build(Program([x], [y], [call(copy, x, y)])).run([values])
    assert found.dtype == np.dtype(kind)
    np.testing.assert_array_equal(found.view(np.uint8), values.view(np.uint8))


def test_kernels_may_allocate():
    """A small local array (on the stack) and a large one (from TVM's workspace), in serial and parallel loops."""
    kernel = prim_func('''
@T.prim_func(s_tir=True)
def scratch(A: T.Buffer((4, 4096), "float32"), B: T.Buffer((4, 4096), "float32")):
    T.func_attr({"global_symbol": "scratch", "tirx.noalias": True})
    for i in T.parallel(4):
        small = T.alloc_buffer((8,), "float32", scope="local")
        large = T.alloc_buffer((4096,), "float32")
        for j in T.serial(8):
            small[j] = T.float32(1)
        for j in T.serial(4096):
            large[j] = A[i, 4095 - j] + small[j % 8]
        for j in T.serial(4096):
            B[i, j] = large[4095 - j] * T.float32(2)
''')
    x, y = buffer("x", "input", (4, 4096)), buffer("y", "output", (4, 4096))
    values = np.random.default_rng(0).normal(size=(4, 4096)).astype(np.float32)
    np.testing.assert_array_equal(build(Program([x], [y], [call(kernel, x, y)])).run([values])[0], (values + 1) * 2)


def test_host_call_sees_tensors_and_its_error_reaches_the_caller():
    seen = []

    def negate(source, target):
        seen.append((source.shape, source.flags.writeable, target.flags.writeable))
        if source[0, 0] > 100:
            raise ValueError("too large")
        target[...] = -source

    register_host_function("test.negate", negate)
    x, y, t = buffer("x", "input", (4, 2)), buffer("y", "output", (4, 2)), buffer("t", shape=(4, 2))
    steps = [call(add_one((4, 2)), x, t), HostCall("test.negate", [t, y], [1])]
    executable = build(Program([x], [y], steps))
    values = X.reshape(4, 2)
    np.testing.assert_array_equal(executable.run([values])[0], -(values + 1))
    assert seen == [((4, 2), False, True)]
    with pytest.raises(ValueError, match="too large"):
        executable.run([values + 1000])
    np.testing.assert_array_equal(executable.run([values])[0], -(values + 1))  # still usable


def test_a_host_function_may_bind_its_arrays_once():
    bound = []

    def negate(k, source, target):
        bound.append(int(k))
        return lambda: np.negative(source, out=target)

    register_host_function("test.bound", negate, binds=True)
    x, y, t, i = buffer("x", "input"), buffer("y", "output"), buffer("t"), LoopVar("i")
    loop = Loop(i, 3, [HostCall("test.bound", [i, t, y], [2])])
    executable = build(Program([x], [y], [call(add_one(), x, t), loop]))
    for shift in range(4):
        result = executable.run([X + shift])[0]
        np.testing.assert_array_equal(result, -(X + shift + 1))
        del result  # so that the next one lies in the same memory
    assert bound == [0, 1, 2]  # the memory of every run, for each value of the counter


def test_a_program_keeps_the_host_functions_that_it_was_built_with():
    x, y = buffer("x", "input"), buffer("y", "output")
    programs = []
    for factor in (2, 3):
        register_host_function("test.times", lambda x, y, factor=factor: np.multiply(x, factor, out=y))
        programs.append(build(Program([x], [y], [HostCall("test.times", [x, y], [1])])))
    for executable, factor in zip(programs, (2, 3)):
        np.testing.assert_array_equal(executable.run([X])[0], factor * X)


def test_host_call_in_a_loop_gets_the_counter():
    steps_seen = []
    register_host_function("test.note", lambda k, t: steps_seen.append(int(k)))
    x, y, i = buffer("x", "input"), buffer("y", "output"), LoopVar("i")
    loop = Loop(i, 3, [HostCall("test.note", [i, y], [], reads=[1])])
    build(Program([x], [y], [Copy(x, y), loop])).run([X])
    assert steps_seen == [0, 1, 2]


def test_an_unregistered_host_function_is_named():
    x, y = buffer("x", "input"), buffer("y", "output")
    with pytest.raises(RegistryError, match="test.unknown"):
        build(Program([x], [y], [HostCall("test.unknown", [x, y], [1])]))


def broken_programs():
    x, y, t = buffer("x", "input"), buffer("y", "output"), buffer("t")
    i, flag = LoopVar("i"), buffer("flag")
    kernel, c = object(), buffer("c", "constant", data=X)
    taken = buffer("taken", alias_of=t)
    return {
        "is never written": Program([x], [y], []),
        "has kind 'input'": Program([x], [x], []),
        "outside its loop": Program([x], [y], [Copy(element(buffer("xs", "input", (2, 8)), i), y)]),
        "reaches outside": Program([x], [y], [Copy(View(x, (8,), 4), y)]),
        "byte counts differ": Program([x], [y], [Copy(View(x, (4,)), y)]),
        "not one bool": Program([x], [y], [Branch(flag, [Copy(x, y)])]),
        "has no data": Program([x], [y], [Copy(buffer("c", "constant"), y)]),
        "larger than the storage": Program([x], [y], [Copy(buffer("r", shape=(9,), alias_of=t), y)]),
        "share one storage": Program([x], [y, buffer("z", "output", alias_of=y)], [Copy(x, y)]),
        "cannot be written": Program([x], [y], [KernelCall(kernel, [c], [0]), Copy(x, y)]),
        "took over its storage": Program(
            [x], [y], [Copy(x, t), KernelCall(kernel, [taken], [0], [0]), KernelCall(kernel, [t, y], [1])]
        ),
    }


@pytest.mark.parametrize("message", broken_programs())
def test_a_broken_program_is_named(message):
    with pytest.raises(VerifyError, match=message):
        build(broken_programs()[message])
