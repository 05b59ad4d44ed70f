"""The thread that calls MPI while a process computes."""

import threading

import pytest

from treadle.distributed.comm import mpi_available
from treadle.distributed.progress import Progress

MISSING = mpi_available()


class Control:
    """A communicator that counts. `broken`: it raises."""

    def __init__(self, broken=False):
        self.calls, self.called, self.broken = 0, threading.Event(), broken

    def Iprobe(self):
        self.calls += 1
        self.called.set()
        if self.broken:
            raise RuntimeError("a connection broke")


def test_it_calls_only_while_something_is_under_way():
    control, messages, waits = Control(), [], [False]
    progress = Progress(control, lambda: waits[0])
    begin = progress.of(lambda: bool(messages))
    for _ in range(3):
        messages.append("x")
        begin()
        assert control.called.wait(20)
        messages.clear()
        while progress._begun.is_set():  # it goes to sleep
            pass
        calls = control.calls
        control.called.clear()
        assert not control.called.wait(0.02) and control.calls == calls
    waits[0] = True  # who waits calls MPI itself
    messages.append("x")
    begin()
    assert not control.called.wait(0.02)
    progress.end()
    assert not progress._thread.is_alive()


def test_it_is_told_the_end_while_it_looks():
    progress = Progress(Control(), lambda: False)

    def under_way():
        if progress._thread is threading.current_thread():
            progress._ended.set()  # as `end` does it
            progress._begun.set()
        return False

    progress.of(under_way)()
    progress._thread.join(20)
    assert not progress._thread.is_alive()


def test_it_leaves_errors_to_whoever_waits():
    progress = Progress(Control(broken=True), lambda: False)
    progress.of(lambda: True)()
    progress._thread.join(20)
    assert progress.calls == 1
    progress.end()
    Progress(Control(), lambda: False).end()  # never begun


@pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")
def test_messages_move_while_both_sides_compute(place, tmp_path):
    """On one host without memory that the ranks share, as if there were two."""
    done = place.start(2, "moving.py", tmp_path / "arrived", timeout=100, TREADLE_SHARED_MEMORY="0")
    assert done.returncode == 0 and done.stdout == "sent\n", done.stderr[-3000:]
