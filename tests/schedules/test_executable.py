"""Calling a compiled program: who owns what, what is checked, threads, profile, without a linker."""

import os
import subprocess
import sys
import threading
import time

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
    many_kernels,
)

from treadle.ir.errors import (
    ArgumentsError,
    AttributeValueError,
    CompileError,
    DTypeError,
    ShapeError,
    TargetError,
)
from treadle.schedules import executable as module
from treadle.schedules import link, runtime
from treadle.schedules.build import build
from treadle.schedules.executable import empty_aligned
from treadle.schedules.host import register_host_function
from treadle.schedules.program import HostCall, KernelCall, Program
from treadle.schedules.runtime import available_cpus, get_num_threads, set_num_threads
from treadle.schedules.target import ISAS, Target

X = np.arange(8, dtype=np.float32)


def sum_program(roles=("data", "parameter")) -> Program:
    x, w, y = buffer("x", "input"), buffer("w", "input"), buffer("y", "output")
    return Program([x, w], [y], [call(add(), x, w, y)], roles=list(roles), name="total")


def update_program() -> Program:
    """p += 1 in place, and y = p + x of the old p."""
    x, p, y = buffer("x", "input"), buffer("p", "input"), buffer("y", "output")
    out = buffer("p_next", "output", alias_of=p)
    steps = [call(add(), x, p, y), KernelCall(in_place_add_one(), [out], [0], reads=[0])]
    return Program([x, p], [y, out], steps, roles=["data", "parameter"], name="update")


# -- ownership ------------------------------------------------------------------------------------------------


def test_outputs_are_fresh_and_belong_to_the_caller():
    executable = build(chain())
    first = executable.run([X])[0]
    second = executable.run([X * 2])[0]
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, X + 3)
    first[:] = -1
    np.testing.assert_array_equal(second, X * 2 + 3)
    assert first.ctypes.data % 64 == 0 and first.flags.writeable


def test_memory_of_a_dropped_output_is_used_again_but_a_view_keeps_it():
    executable = build(chain())
    address = executable.run([X])[0].ctypes.data  # dropped at once
    again = executable.run([X])[0]
    assert again.ctypes.data == address
    part = again[2:4]
    del again
    executable.run([X + 100])
    np.testing.assert_array_equal(part, [5, 6])


def test_outputs_outlive_the_executable():
    executable = build(chain())
    result = executable.run([X])[0]
    del executable
    np.testing.assert_array_equal(result, X + 3)


def test_release_and_run_again():
    executable = build(chain())
    kept = executable.run([X])[0]
    executable.release()
    np.testing.assert_array_equal(executable.run([X])[0], kept)
    assert executable.nbytes > executable.signature.arena_bytes


def test_in_place_updates_return_the_callers_array():
    executable, p = build(update_program()), X.copy()
    for step in range(3):
        y, out = executable.run([X, p])
        assert out is p
        np.testing.assert_array_equal(y, 2 * X + step)
        np.testing.assert_array_equal(p, X + step + 1)


def test_a_batch_is_let_go_and_a_parameter_stays_bound():
    executable, w = build(sum_program()), X.copy()
    executable.run([X.copy(), w])
    assert executable._bound[0] is None and executable._bound[1] is w
    w += 1  # bound by reference: the next call sees the change
    np.testing.assert_array_equal(executable.run([X, w])[0], 2 * X + 1)
    np.testing.assert_array_equal(executable.run([X, w + 1])[0], 2 * X + 2)


# -- what may be passed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4, 16, 20])
def test_any_alignment_of_an_element_will_do(offset):
    n = 4096
    program = chain(2, (n,))
    raw = np.zeros(n * 4 + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    x = raw[start : start + n * 4].view(np.float32)
    x[:] = np.arange(n)
    assert x.ctypes.data % 64 == offset
    np.testing.assert_array_equal(build(program).run([x])[0], np.arange(n) + 2)


def test_odd_layouts_are_copied():
    executable = build(chain(1, (4, 2)))
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(executable.run([values.T])[0], values.T + 1)
    unaligned = np.zeros(33, np.uint8)[1:].view(np.float32).reshape(4, 2)
    assert not unaligned.flags.aligned
    np.testing.assert_array_equal(executable.run([unaligned])[0], np.ones((4, 2)))
    np.testing.assert_array_equal(executable.run([values[::-1].reshape(4, 2)])[0], values[::-1].reshape(4, 2) + 1)


def test_read_only_arrays_numbers_and_other_libraries():
    x = X.copy()
    x.flags.writeable = False
    executable = build(sum_program())
    np.testing.assert_array_equal(executable.run([x, x])[0], 2 * X)
    tensor = runtime.load_runtime().from_dlpack(X.copy())
    np.testing.assert_array_equal(executable.run([tensor, tensor])[0], 2 * X)
    s, y = buffer("s", "input", ()), buffer("y", "output", ())
    scalar = build(Program([s], [y], [call(add_one(()), s, y)]))
    for value in (2, 2.0, np.float32(2), np.array(2, np.float32)):
        (found,) = scalar.run([value])
        assert found.shape == () and found == 3


def test_empty_aligned():
    for shape, dtype in (((3, 5), np.float32), ((), np.int8), ((0, 4), ml_dtypes.bfloat16)):
        array = empty_aligned(shape, dtype)
        assert array.shape == shape and array.dtype == dtype and array.ctypes.data % 64 == 0


def test_wrong_arguments_are_named():
    executable = build(sum_program())
    with pytest.raises(ArgumentsError, match=r"total takes 2 inputs \(x, w\), got 1"):
        executable.run([X])
    with pytest.raises(ShapeError, match=r"input 1 \('w'\) of total: expected float32\[8\], got float32\[9\]"):
        executable.run([X, np.zeros(9, np.float32)])
    with pytest.raises(DTypeError, match=r"input 0 \('x'\).*got float64\[8\]"):
        executable.run([X.astype(np.float64), X])
    with pytest.raises(DTypeError, match="expected float32"):
        executable.run([X.astype(">f4"), X])
    with pytest.raises(ArgumentsError, match="masked"):
        executable.run([np.ma.masked_less(X, 3), X])
    with pytest.raises(ArgumentsError, match="got list"):
        executable.run([[1, 2], X])
    np.testing.assert_array_equal(executable.run([X, X])[0], 2 * X)


def test_an_input_updated_in_place_must_be_fit_for_it():
    executable, p = build(update_program()), X.copy()
    frozen = X.copy()
    frozen.flags.writeable = False
    for bad in (np.zeros(16, np.float32)[::2], frozen):
        with pytest.raises(ArgumentsError, match="updated in place"):
            executable.run([X, bad])
    with pytest.raises(ArgumentsError, match="'x' and 'p' of update share memory"):
        executable.run([p, p])
    both = np.zeros(12, np.float32)
    with pytest.raises(ArgumentsError, match="share memory"):
        executable.run([both[4:], both[:8]])
    executable.run([X, p])


# -- control --------------------------------------------------------------------------------------------------


def test_threads_take_turns():
    executable = build(chain(4, (1 << 14,)))
    failures = []

    def worker(seed: int) -> None:
        x = np.full(1 << 14, seed, np.float32)
        for _ in range(50):
            if not (executable.run([x])[0] == seed + 4).all():
                failures.append(seed)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_the_gil_is_released_while_kernels_run():
    """Another Python thread goes on while a kernel of some tenths of a second runs."""
    n = 1 << 22
    slow = elementwise("slow", "T.exp(T.exp(T.exp(<a>)))", (n,))
    x, y = buffer("x", "input", (n,)), buffer("y", "output", (n,))
    executable, ticks, stop = build(Program([x], [y], [call(slow, x, y)])), [], threading.Event()

    def ticker() -> None:
        while not stop.is_set():
            time.sleep(0.001)
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=ticker)
    thread.start()
    begun = time.perf_counter()
    executable.run([np.full(n, -3, np.float32)])
    took = time.perf_counter() - begun
    stop.set()
    thread.join()
    assert sum(begun + 0.2 * took < tick < begun + 0.8 * took for tick in ticks) >= 3


def test_kernel_times():
    x, t, y = buffer("x", "input"), buffer("t"), buffer("y", "output")
    steps = [call(add_one(), x, t, label="first"), call(double(), t, y, label="second")]
    steps[1].flops = 8.0
    executable = build(Program([x], [y], steps))
    times = executable.kernel_times([X], repeat=3)
    assert [(k.label, k.calls, k.flops) for k in times] == [("first", 1, 0.0), ("second", 1, 8.0)]
    assert all(0 < k.seconds < 1 for k in times) and times[1].gflops > 0
    np.testing.assert_array_equal(executable.run([X])[0], (X + 1) * 2)


def test_an_error_in_the_middle_leaves_the_executable_usable():
    fail = [True]

    def maybe(_):
        if fail[0]:
            raise KeyError("in the middle")

    register_host_function("test.maybe", maybe)
    x, y = buffer("x", "input"), buffer("y", "output")
    executable = build(Program([x], [y], [call(add_one(), x, y), HostCall("test.maybe", [y], [], [0])]))
    with pytest.raises(KeyError, match="in the middle"):
        executable.run([X])
    fail[0] = False
    np.testing.assert_array_equal(executable.run([X])[0], X + 1)


def test_without_a_linker_objects_are_linked_in_memory(monkeypatch):
    monkeypatch.setattr(link, "linker", lambda: None)
    monkeypatch.setattr("treadle.schedules.build.linker", lambda: None)
    program = many_kernels(3)
    parallel = call(double((64,), parallel=True), program.steps[-1].args[0], program.outputs[0])
    program.steps[-1] = parallel
    executable = build(program)
    assert set(executable.library.files) and link.SHARED not in executable.library.files
    np.testing.assert_array_equal(executable.run([np.zeros(64, np.float32)])[0], np.full(64, 4))


def test_a_failing_linker_is_no_failure(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "ld"
    broken.write_text("#!/bin/sh\necho cannot link >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(link, "linker", lambda: str(broken))
    monkeypatch.setenv("TREADLE_CACHE_DIR", str(tmp_path / "cache"))
    np.testing.assert_array_equal(build(chain()).run([X])[0], X + 3)
    assert "cannot link" in caplog.text


def test_neither_linker_nor_jit_says_what_to_install(monkeypatch):
    monkeypatch.setattr(link, "linker", lambda: None)
    monkeypatch.setattr("treadle.schedules.build.linker", lambda: None)
    monkeypatch.setitem(__import__("sys").modules, "tvm_ffi_orcjit", None)
    link._session.cache_clear()
    with pytest.raises(CompileError, match="pip install apache-tvm-ffi-orcjit"):
        build(chain())


def test_code_for_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(module, "host_features", lambda: frozenset({"sse3"}))
    monkeypatch.setattr("treadle.schedules.target.host_features", lambda: frozenset({"sse3"}))
    executable = build(chain(), "cpu:avx2")
    with pytest.raises(TargetError, match="lacks .*avx2"):
        executable.run([X])


@pytest.mark.parametrize("isa", [isa for isa in ISAS if Target.parse(f"cpu:{isa}").runnable_here()])
def test_every_instruction_set_of_this_machine(isa):
    np.testing.assert_array_equal(build(chain(), f"cpu:{isa}").run([X])[0], X + 3)


# -- threads of kernels ---------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = runtime._requested, runtime._running
    yield
    runtime._requested, runtime._running = before


def pool_size() -> int:
    runtime.prepare_thread()
    return runtime.load_runtime().get_global_func("runtime.NumThreads")()


def test_thread_count_holds_in_every_python_thread_and_can_change(threads, monkeypatch):
    monkeypatch.setattr(runtime, "_requested", None)
    monkeypatch.delenv("TREADLE_NUM_THREADS", raising=False)
    assert get_num_threads() == available_cpus()
    monkeypatch.setenv("TREADLE_NUM_THREADS", "3")
    assert get_num_threads() == 3
    found = []
    for count in (1, available_cpus(), 1, available_cpus()):
        set_num_threads(count)
        worker = threading.Thread(target=lambda: found.append(pool_size()))
        worker.start()
        worker.join()
        assert pool_size() == count == found[-1]


def test_nothing_is_pinned_and_the_environment_is_left_alone(threads):
    affinity, environment = os.sched_getaffinity(0), dict(os.environ)
    executable = build(chain(2, (64,)))
    for count in (1, 2):
        set_num_threads(count)
        executable.run([np.zeros(64, np.float32)])
    assert os.sched_getaffinity(0) == affinity and dict(os.environ) == environment


@pytest.mark.skipif(available_cpus() < 2, reason="one core: nothing runs in parallel")
def test_kernels_run_in_parallel_where_no_variable_says_so():
    """In a process of its own: TVM takes variables of other libraries too, and the suite's may be set."""
    script = (
        "import os, threading, numpy as np, treadle as td\n"
        "x = np.ones(1 << 22, np.float32)\n"
        "f = td.compile(lambda x: td.tanh(td.exp(td.sin(x))))\n"
        "f(x)\n"
        "def ticks():\n"
        "    folder = '/proc/self/task'\n"
        "    def used(t): return sum(map(int, open(f'{folder}/{t}/stat').read().rsplit(')')[1].split()[11:13]))\n"
        "    return {t: used(t) for t in os.listdir(folder)}\n"
        "before = ticks()\n"
        "for _ in range(60): f(x)\n"
        "spent = [count - before.get(t, 0) for t, count in ticks().items()]\n"
        "print(sum(2 * s > max(spent) for s in spent))\n")  # an idle worker waits actively for a moment
    clean = {k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert int(done.stdout) == available_cpus()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_bad_thread_counts(bad):
    with pytest.raises(AttributeValueError, match="whole number"):
        set_num_threads(bad)


def test_a_parallel_kernel_gives_the_same_with_any_count(threads):
    n = 1 << 12
    x, y = buffer("x", "input", (n,)), buffer("y", "output", (n,))
    executable = build(Program([x], [y], [call(add_one((n,), parallel=True), x, y)]))
    values = np.arange(n, dtype=np.float32)
    for count in (1, 2, 1):
        set_num_threads(count)
        np.testing.assert_array_equal(executable.run([values])[0], values + 1)
