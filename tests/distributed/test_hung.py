"""How long a rank is said to hang: of what it could run, and of the time in which somebody looked."""

import subprocess
import sys
import time

import pytest

from treadle.distributed import hung
from treadle.distributed.hung import Pace, Stay
from treadle.ir.errors import ConfigError


class Machine:
    """A clock and a process that are told what happens."""

    def __init__(self, monkeypatch):
        self.now, self.ran, self.busy = 100.0, 5.0, False
        monkeypatch.setattr(hung.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(hung, "activity", lambda pid: (self.busy, self.ran))
        self.stay = Stay(1)

    def passes(self, looks, seconds=0.5, ran=0.0, busy=True, where="op"):
        """So many looks, some seconds apart, in each of which the process ran for a while."""
        for _ in range(looks):
            self.now += seconds
            self.ran += ran
            self.busy = busy
            found = self.stay.look(where)
        return found


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_one_that_sleeps_or_is_stopped_hangs_for_as_long(machine):
    machine.passes(1)
    assert machine.passes(20, busy=False) == pytest.approx(10)
    assert machine.passes(1, where="the next op", busy=False) == 0


def test_one_that_spins_hangs_for_as_long_as_it_ran(machine):
    machine.passes(2, ran=0.5)
    assert machine.passes(20, ran=0.5) == pytest.approx(10)
    assert machine.passes(20, ran=2.0) == pytest.approx(20), "four threads make no more of it"


def test_one_that_waits_for_a_core_or_the_disk_does_not(machine):
    """Twenty processes share a core."""
    machine.passes(2)
    assert machine.passes(200, ran=0.5 / 20) == pytest.approx(5)
    assert machine.passes(200) == pytest.approx(5)


def test_what_nobody_saw_does_not_count(machine):
    machine.passes(1)
    assert machine.passes(1, seconds=3600, busy=False) <= hung.GAP


def test_a_step_is_bounded_by_those_before(machine, monkeypatch):
    monkeypatch.delenv("TREADLE_STEP_TIMEOUT", raising=False)
    limits = []

    def run(seconds):
        machine.now += seconds
        return seconds

    pace = Pace(run, limits.append)
    assert [pace(s) for s in (0.5, 0.25, 20.0, 1.0)] == [0.5, 0.25, 20.0, 1.0]
    assert limits == [0, 0, 10, 0, 10, 0, 200, 0], "the first may take as long as it likes"
    for text, limit in (("3.5", 3.5), ("0", 0)):
        monkeypatch.setenv("TREADLE_STEP_TIMEOUT", text)
        assert pace.limit() == limit
    monkeypatch.setenv("TREADLE_STEP_TIMEOUT", "-1")
    with pytest.raises(ConfigError, match="give a number of seconds >= 0"):
        pace.limit()


def test_a_step_that_raises_is_over():
    limits = []
    pace = Pace(lambda: 1 / 0, limits.append)
    pace.longest = 1.0
    with pytest.raises(ZeroDivisionError):
        pace()
    assert limits == [10, 0] and pace.longest == 1.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_what_a_process_does():
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while hung.activity(child.pid)[1] < 0.1:
            time.sleep(0.01)
        assert hung.activity(child.pid)[0]
    finally:
        child.kill()
        child.wait()
    assert hung.activity(child.pid) == (False, 0.0)
