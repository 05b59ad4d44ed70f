"""A rank that raises, dies, hangs or runs something else: the others end within seconds and say so."""

import re
import sys
import time

import pytest

from treadle.distributed.comm import mpi_available
from treadle.distributed.errors import LaunchError
from treadle.distributed.launch import command, environment, threads_per_rank

from .test_mpi import start

MISSING = mpi_available()
needs_mpi = pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")

WORDS = {
    "raise": r"DistributedError: rank 1 failed: ValueError in .* of step \d: out of data. Rank 0 was in \w+:data of "
             r"step 2",
    "kill": r"DistributedError: rank 1 \(process \d+\) is gone; it was last in .*\. Rank 0 was in \w+:data of step 2",
    "hang": r"DistributedError: rank 0 waited 3 s in \w+:data of step 2: rank 1 has not come, it was last in",
    "mismatch": r"the ranks do not agree on the program: ranks \[1\] differ from rank 0, first in line 1: rank 0 has "
                r"`graph train_step\(.*f32\[4,4\].*rank 1 has `graph train_step\(.*f32\[6,4\]",
}


@needs_mpi
@pytest.mark.parametrize("kind", WORDS)
def test_the_others_say_what_happened(kind):
    started = time.monotonic()
    done = start(2, "faults.py", kind, timeout=50, TREADLE_COMM_TIMEOUT="3")
    assert done.returncode != 0
    assert re.search(WORDS[kind], done.stderr), done.stderr[-3000:]
    assert "done" not in done.stdout
    assert time.monotonic() - started < 45


def test_threads_are_shared_out():
    assert [threads_per_rank(n, 8) for n in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
    assert environment(2, None, 8, {})["TREADLE_NUM_THREADS"] == "4"
    assert environment(2, 1, 8, {})["TREADLE_NUM_THREADS"] == "1"


def test_no_mpiexec(monkeypatch):
    monkeypatch.setattr(sys.modules["treadle.distributed.launch"], "find_mpiexec", lambda: None)
    with pytest.raises(LaunchError, match="mpiexec was not found; install it with"):
        command(2, ["x.py"])
