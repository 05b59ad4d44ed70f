"""The rounds that programs make by themselves, with another rank that is only memory: no MPI.

tests/distributed/test_exchanges.py runs them between processes.
"""

import numpy as np
import pytest

from treadle.ir import parse
from treadle.ir import rounds as R
from treadle.schedules import artifact
from treadle.schedules.build import build
from treadle.schedules.codegen import compile_kernel
from treadle.schedules.host import register_host_function
from treadle.schedules.lower import lower
from treadle.schedules.target import Target

NAME = "all_reduce;axis=data;size=2;reduce=sum"
FAR_AHEAD = 1 << 40
SUM = """graph main(%x: f32[5] data) -> (f32[5]) {
  %0 = all_reduce(%x) {axis="data", reduce="sum", size=2} : f32[5]
  return %0
}"""
SIZED = """graph main(%x: f32[n] data) -> (f32[], f32[n]) {
  %0 = reduce_sum(%x) {axes=(0), keepdims=false} : f32[]
  %1 = all_reduce(%0) {axis="data", reduce="sum", size=2} : f32[]
  %2 = neg(%x) : f32[n]
  return %1, %2
}"""
X = np.arange(5, dtype=np.float32)


class Ranks:
    """Rank 0's record, and the memory of both."""

    def __init__(self, other):
        slot = R.READ // 2
        self.memory = np.zeros((2, R.HEADER + 2 * slot), np.uint8)
        self.counters = [m[:8].view(np.int64) for m in self.memory]
        self.counters[1][0] = other
        self.slots = [[m[R.HEADER + k * slot:][:slot].view(np.float32) for k in range(2)] for m in self.memory]
        self.group = np.array([slot, 3, 0, *(m.ctypes.data for m in self.memory)], np.int64)
        self.watch = np.zeros(R.AT + R.LABEL // 8, np.int64)
        self.record = np.zeros(R.RECORD, np.int64)
        self.record[[R.GROUP, R.WATCH]] = self.group.ctypes.data, self.watch.ctypes.data
        self.record[R.TEXT:].view(np.uint8)[:3] = list(b"sum")
        self.called = []

    def function(self, x, out):
        self.called.append(int(self.record[R.STAGE]))
        out[...] = -x
        self.record[R.STAGE] = R.DONE

    def register(self, record=True):
        register_host_function(NAME, self.function, record=self.record if record else None)
        return self


def test_a_round_that_the_other_rank_has_come_to_needs_no_python():
    ranks = Ranks(FAR_AHEAD).register()
    executable = build(lower(parse(SUM)))
    for turn in range(1, 4):  # both slots
        ranks.slots[1][turn % 2][:5] = 10 * turn
        np.testing.assert_array_equal(executable.run([X + turn])[0], X + turn + 10 * turn)
        assert ranks.counters[0][0] == turn
        np.testing.assert_array_equal(ranks.slots[0][turn % 2][:5], X + turn)
    assert ranks.called == [] and ranks.record[R.CALLS] == ranks.watch[R.CALL] == 3
    assert ranks.record[R.NANOSECONDS] > 0 and ranks.watch[R.STATE] == R.COMPUTING
    assert bytes(ranks.watch[R.AT:].view(np.uint8)[:4]) == b"sum\0"


@pytest.mark.parametrize(("other", "closed", "stage", "rounds"), [(0, 0, R.BEGUN, 1), (FAR_AHEAD, 1, R.ASIDE, 0)],
                         ids=["late", "closed"])
def test_python_goes_on_where_the_program_stops(other, closed, stage, rounds):
    ranks = Ranks(other).register()
    ranks.watch[R.CLOSED] = closed
    np.testing.assert_array_equal(build(lower(parse(SUM))).run([X])[0], -X)
    assert ranks.called == [stage] and ranks.counters[0][0] == ranks.watch[R.CALL] == rounds
    assert ranks.watch[R.STATE] == (R.WAITING if rounds else R.COMPUTING)
    np.testing.assert_array_equal(ranks.slots[0][1][:5], X * rounds)  # what the others wait for


def test_without_a_record_python_does_all_of_it():
    ranks = Ranks(FAR_AHEAD).register(record=False)
    np.testing.assert_array_equal(build(lower(parse(SUM))).run([X])[0], -X)
    assert ranks.called == [R.DONE] and ranks.counters[0][0] == 0


def test_a_program_of_any_size_that_was_saved_finds_its_record(tmp_path):
    Ranks(FAR_AHEAD).register(record=False)
    artifact.save(build(lower(parse(SIZED))), tmp_path / "sum.treadle")
    ranks = Ranks(FAR_AHEAD).register()
    executable = artifact.load(tmp_path / "sum.treadle")
    for n in (3, 700):
        ranks.slots[1][0][0] = ranks.slots[1][1][0] = n
        total, negated = executable.run([np.ones(n, np.float32)])
        assert total == 2 * n and (negated == -1).all()
    assert ranks.called == [] and ranks.counters[0][0] == 2


def test_on_arm_memory_is_ordered_by_the_instructions_themselves():
    call = lower(parse(SUM), "cpu:neon").compiled_calls[0]
    code = compile_kernel(call.kernel, "kernel", Target.parse("cpu:neon"))
    words = np.frombuffer(code[:len(code) // 4 * 4], "<u4") & 0xFFFFFC00
    loads, stores = (words == 0xC8DFFC00).sum(), (words == 0xC89FFC00).sum()  # LDAR and STLR of 64 bits
    assert loads >= 2 and stores == 1


def test_long_exchanges_are_left_to_python():
    for ranks in (2, 5):
        most = R.READ // ranks // R.LINE * R.LINE
        for count, short in ((most // 4, True), (most // 4 + 1, False)):
            program = lower(parse(SUM.replace("f32[5]", f"f32[{count}]").replace("size=2", f"size={ranks}")))
            assert bool(program.recorded) == short and R.places([4 * count], ranks) == ([0] if short else None)
    assert R.places([1] * (R.READ // 2 // R.LINE + 1), 2) is None  # a line each
    assert not lower(parse(SUM.replace("size=2", f"size={R.MOST_RANKS + 1}"))).recorded
