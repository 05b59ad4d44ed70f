"""Scratch buffers: on the stack while they fit, from the thread's pool beyond."""

from pathlib import Path

import numpy as np
import pytest
from lowered import check, graph_of

from treadle.ir.builder import emit
from treadle.schedules import codegen, scratch
from treadle.schedules.build import build
from treadle.schedules.lower import lower
from treadle.schedules.target import Target


def product(n):
    return graph_of(lambda x, y: [emit("matmul", x, y)], (n, n), (n, n))


def takes_from_pool(graph):
    kernel = lower(graph, "cpu").kernel_calls[0].kernel
    return b"TVMBackendAllocWorkspace" in codegen.compile_kernel(kernel, "k", Target.parse("cpu"))


def test_a_small_kernel_calls_no_allocator():
    assert not takes_from_pool(product(64))


def test_what_the_stack_does_not_hold_comes_from_the_pool(monkeypatch):
    monkeypatch.setattr(scratch, "STACK_BYTES", 4096)  # register tiles fit, panels do not
    assert takes_from_pool(product(64))


@pytest.mark.parametrize("limit", [0, 4096, 1 << 20])
def test_numbers_do_not_depend_on_where_scratch_is(limit, monkeypatch, tmp_path):
    monkeypatch.setattr(scratch, "STACK_BYTES", limit)
    monkeypatch.setattr(codegen, "CODEGEN_VERSION", f"scratch-{limit}")
    graph = graph_of(lambda x, y: [emit("softmax", emit("matmul", x, y), axis=0)], (33, 70), (70, 129))
    rng = np.random.default_rng(0)
    check(graph, [rng.standard_normal(s).astype("f") for s in ((33, 70), (70, 129))])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_scratch_from_the_pool_goes_back_to_it(monkeypatch):
    monkeypatch.setattr(scratch, "STACK_BYTES", 0)
    monkeypatch.setattr(codegen, "CODEGEN_VERSION", "scratch-pool")
    graph = product(64)
    executable = build(lower(graph, "cpu"), "cpu")
    arrays = [np.ones((64, 64), np.float32)] * 2

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(20):
        executable.run(arrays)
    before = resident()
    for _ in range(1000):  # each takes 16 KB of panels at least
        executable.run(arrays)
    assert resident() - before < 4 << 20
